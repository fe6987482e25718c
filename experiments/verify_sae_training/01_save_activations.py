"""Step 1: save the activations of a language model on a data set.

    python 01_save_activations.py                                        # the embedded model and stories
    python 01_save_activations.py PRESET=bielik                          # the original experiment: hub and GPU needed
    python 01_save_activations.py MODEL=gpt2 DATASET=my.jsonl LAYER_SIGNATURE=resid_post:6
    python 01_save_activations.py LAYER_SIGNATURE='?'                    # list the layers and stop
    python 01_save_activations.py SAE=<name> DATASET=other.jsonl         # other texts for an SAE that is there already
    torchrun --nproc-per-node 4 01_save_activations.py                   # four processes share the texts; see at_scale

Only real tokens are stored, each with its text and its place in it, so later steps need no model to show them.
After an interruption, rerun the same command to resume. A finished run with the same constants is not made again.

With SAE, model, layer and masks are that SAE's. With a DATASET, notebooks 03, 04 and 05 then show the SAE on these
texts (their RUN_ID); without one, the activations that it was trained on are made again.

Writes store/verify_sae_training/runs/<run_id>/ and, when it is complete and no SAE was given, run_id.txt
"""
import sys
from collections.abc import Sequence
from typing import Annotated, Literal

import checkout  # noqa: F401  (first: finds lib)
from lib.constants import Presets, override
from lib.ranges import (
    Count,
    Device,
    Location,
    Name,
    NotNegative,
    Positive,
    Precision,
    Seed,
    Share,
    Size,
    at_least,
    at_most,
)

PRESET = "standard"                       # standard: the values below; quick, full, large: fewer or all texts; bielik
SAE: Location | None = None               # name or folder of an SAE whose model, layer, MAX_LENGTH, SKIP_... to use
MODEL: Location = "store/embedded/model"  # hub name or directory of a transformers model
DATASET: Location = "store/embedded/stories/train.jsonl"  # hub name, or a .jsonl .json .csv .tsv .txt .parquet file
DATA_SPLIT: Name = "train"                # split of a hub data set; a file has none
TEXT_FIELD: Name = "text"                 # the column that holds the text
DATA_LIMIT: Annotated[int, at_least(2), at_most(10**12)] | None = 5000  # texts, drawn at random; None: all
STREAM = False                            # copy texts to the store piece by piece: for data beyond memory or disk
MAX_LENGTH: Size = 128                    # tokens of a text, special tokens included; the rest is cut
LAYER_SIGNATURE: Name = "resid_post:0"    # one or several, separated by commas: resid_pre|mid|post:N, attn_out:N,
                                          # mlp_out:N (-1: the last, *: all), blocks.N.hook_resid_post, a dotted
                                          # module path, or class_path_with_underscores; ?: list them
HOOK_POINT: Literal["input", "output"] = "output"  # side of the module, where the signature does not say
BATCH_SIZE_SAVE: Size = 16                # texts of MAX_LENGTH in one forward pass; shorter texts: more of them
STORE_DTYPE: Literal["float32", "bfloat16", "float16"] = "float32"  # 16 bits: half the disk; float16 ends at 65504
SHARD_ROWS: Count = 65536                 # tokens in one file
SKIP_SPECIAL = True                       # keep BOS, EOS and other control tokens out
SKIP_FIRST: NotNegative = 0               # tokens to drop at the start of each text; 1 where there is no BOS
MAX_NORM_MULTIPLE: Positive | None = None  # drop tokens with a norm over this multiple of the median; None: none
VAL_FRAC: Share = 0.1                     # share of the texts that training never sees
PREFLIGHT = True                          # report norm, gamma, outliers and cost of every block before saving
MODEL_DTYPE: Precision = "auto"           # precision of the model: auto, float32, bfloat16, float16
LOAD_BITS: Literal[4, 8] | None = None    # 8 or 4: linear layers quantised (needs bitsandbytes and CUDA)
DEVICE_MAP: Literal["auto", "disk"] | None = None  # auto: over GPUs, memory, disk; disk: read each block as it runs
DEVICE: Device = "auto"                   # auto, cpu, cuda, mps
TRUST_REMOTE_CODE = False                 # run code that comes with a hub model; only for authors you trust
SEED: Seed = 0                            # draws the validation texts

PRESETS: Presets = {
    "quick": {"DATA_LIMIT": 1000},
    "standard": {},
    "full": {"DATA_LIMIT": None},
    "large": {"DATA_LIMIT": None, "STORE_DTYPE": "bfloat16"},
    "bielik": {
        "MODEL": "speakleash/Bielik-1.5B-v3.0-Instruct", "DATASET": "roneneldan/TinyStories", "DATA_LIMIT": 1000,
        "LAYER_SIGNATURE": "llamaforcausallm_model_layers_16_post_attention_layernorm", "HOOK_POINT": "input",
        "STORE_DTYPE": "bfloat16",
    },
}
CONSTANTS = override(globals(), PRESETS)

from corpora import constants_for
from list_layers import list_layers
from streaming import copy_of, fingerprint_texts

from checks.before_saving import contents_of, preview, say_what_changed
from lib.activations import SaveSettings, save_activations
from lib.distributed import rank
from lib.environment import choose_device, log, log_to, run, say_next
from lib.files import fingerprint, write_text
from lib.hooks import resolve_all
from lib.models import choose_dtype, load_model, load_tokenizer, local_path, model_identity, tokenizer_identity
from lib.outputs import in_use, require_room
from lib.sae import load_sae
from lib.saes import MODEL_FILE, find_sae
from lib.store import experiment_dir, open_run, provenance
from lib.texts import load_documents, split_by_text

FOLDER = experiment_dir("verify_sae_training")


def load_texts() -> Sequence[str]:
    """The texts of the data set: a list, or with STREAM a file that is read when they are needed."""
    if not STREAM:
        return [document[TEXT_FIELD] for document in load_documents(DATASET, DATA_SPLIT, TEXT_FIELD, DATA_LIMIT)]
    return copy_of(DATASET, DATA_SPLIT, TEXT_FIELD, DATA_LIMIT)


def take_constants_of_sae():
    """Put those of the SAE in the place of the constants that the command line does not give."""
    given = {argument.partition("=")[0] for argument in sys.argv[1:]}
    CONSTANTS.update(constants_for(load_sae(find_sae(SAE) / MODEL_FILE), CONSTANTS, given))
    globals().update(CONSTANTS)


def describe(model, tokenizer, texts):
    """What is written beside the activations: where they come from."""
    path = local_path(DATASET)
    dataset = {"name": DATASET, "path": path and str(path), "split": DATA_SPLIT, "field": TEXT_FIELD,
               "limit": DATA_LIMIT, "fingerprint": fingerprint_texts(texts)}
    return {
        "model": model_identity(model, MODEL), "tokenizer": tokenizer_identity(tokenizer), "dataset": dataset,
        "constants": {key: value for key, value in CONSTANTS.items()
                      if key not in ("STREAM", "SAE")},  # the run is the same
        "provenance": provenance(),
    }


def main():
    log_to(FOLDER / "01_save_activations.log")
    if SAE:
        take_constants_of_sae()
    device = choose_device(DEVICE)
    model = load_model(MODEL, device, choose_dtype(MODEL_DTYPE, device), trust_remote_code=TRUST_REMOTE_CODE,
                       bits=LOAD_BITS, device_map=DEVICE_MAP)
    if LAYER_SIGNATURE == "?":
        return list_layers(model) if rank() == 0 else None
    points = resolve_all(model, LAYER_SIGNATURE, HOOK_POINT)
    tokenizer = load_tokenizer(MODEL, TRUST_REMOTE_CODE)
    texts = load_texts()
    meta = describe(model, tokenizer, texts)
    decisive = {key: value for key, value in CONSTANTS.items() if key not in ("PREFLIGHT", "PRESET", "SAE", "STREAM")}
    run_id = f"{points[0].path.replace('.', '_')}-{fingerprint([decisive, *contents_of(meta)])[:8]}"
    folder = FOLDER / "runs" / run_id
    settings = SaveSettings(
        max_length=MAX_LENGTH, batch_tokens=BATCH_SIZE_SAVE * MAX_LENGTH, store_dtype=STORE_DTYPE,
        shard_rows=SHARD_ROWS, skip_special=SKIP_SPECIAL, skip_first=SKIP_FIRST, max_norm_multiple=MAX_NORM_MULTIPLE,
    )
    if (folder / "manifest.json").exists():
        saved = open_run("verify_sae_training", run_id)
        log.info("this run is already complete")
    else:
        say_what_changed(meta, run_id)
        n_bytes = 0.0
        if rank() == 0:
            n_bytes = preview(model, tokenizer, points, texts, settings=settings, all_blocks=PREFLIGHT)
        with in_use(folder):
            saved_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            require_room(folder, n_bytes - saved_bytes)
            saved = save_activations(folder, model, tokenizer, points, texts=texts, settings=settings, meta=meta,
                                     splits=split_by_text(texts, VAL_FRAC, SEED))
    if rank() == 0 and not SAE:
        write_text(FOLDER / "run_id.txt", run_id + "\n")
    log.info("run %s: %s tokens of %s texts at %s", run_id, f"{saved.n_rows:,}", f"{len(texts):,}",
             ", ".join(saved.hooks))
    if SAE:
        return say_next("03_analyze_training.ipynb", "04_name_sae_concepts.ipynb", "05_show_concepts.ipynb", SAE=SAE,
                        RUN_ID=run_id)
    say_next("02_train_sae.py")


if __name__ == "__main__":
    run(main, parallel=True)
