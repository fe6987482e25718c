"""Step 1: save the activations of a language model on a data set.

    python 01_save_activations.py                                        # the embedded model and stories
    python 01_save_activations.py PRESET=bielik                          # the setting of the original experiment
    python 01_save_activations.py MODEL=gpt2 DATASET=my.jsonl LAYER_SIGNATURE=resid_post:6
    python 01_save_activations.py LAYER_SIGNATURE='?'                    # list the layers and stop
    torchrun --nproc-per-node 4 01_save_activations.py                   # four processes share the texts; see at_scale

Only real tokens are stored, each with its text and place in it, so that no later step needs the model for that.
Started again after an interruption, it continues; a finished run with the same constants is not made twice.

Writes store/verify_sae_training/runs/<run_id>/ and, when it is complete, run_id.txt
"""
import json
import math
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

PRESET = "standard"                       # standard: the values below; quick, full and large: fewer or all texts;
                                          # bielik: the original experiment, needs the hub and a GPU
MODEL: Location = "store/embedded/model"  # hub name or directory of a transformers model
DATASET: Location = "store/embedded/stories/train.jsonl"  # hub name, or a .jsonl .json .csv .tsv .txt .parquet file
DATA_SPLIT: Name = "train"                # split of a hub data set; a file has none
TEXT_FIELD: Name = "text"                 # the column that holds the text
DATA_LIMIT: Annotated[int, at_least(2), at_most(10**12)] | None = 5000  # texts, drawn at random; None: all
STREAM = False                            # copy texts to the store block by block: for data larger than memory or disk
MAX_LENGTH: Size = 128                    # tokens of a text, special tokens included; the rest is cut
LAYER_SIGNATURE: Name = "resid_post:0"    # one or several, separated by commas: resid_pre|mid|post:N, attn_out:N,
                                          # mlp_out:N (-1: the last, *: all), blocks.N.hook_resid_post, a dotted
                                          # module path, or class_path_with_underscores; ?: list them
HOOK_POINT: Literal["input", "output"] = "output"  # input or output of the module, where the signature does not say
BATCH_SIZE_SAVE: Size = 16                # texts of MAX_LENGTH in one forward pass; shorter texts: more of them
STORE_DTYPE: Literal["float32", "bfloat16", "float16"] = "float32"  # half the disk in bfloat16 (3 digits) or
                                          # float16 (range 65504)
SHARD_ROWS: Count = 65536                 # tokens in one file
SKIP_SPECIAL = True                       # keep BOS, EOS and other control tokens out
SKIP_FIRST: NotNegative = 0               # tokens to drop at the start of each text; 1 where there is no BOS
MAX_NORM_MULTIPLE: Positive | None = None  # drop tokens with a norm over this multiple of the median; None: none
VAL_FRAC: Share = 0.1                     # share of the texts that training never sees
PREFLIGHT = True                          # report norm, gamma, outliers and cost of every block before saving
MODEL_DTYPE: Precision = "auto"           # precision of the model: auto, float32, bfloat16, float16
LOAD_BITS: Literal[4, 8] | None = None    # 8 or 4: linear layers quantised (needs bitsandbytes and CUDA)
DEVICE_MAP: Literal["auto", "disk"] | None = None  # auto: model spread over GPUs, memory, disk; disk: each block read
                                          # when it runs
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

from list_layers import every_block, list_layers
from streaming import fingerprint_texts, stream_texts

from lib.activations import STORE_DTYPES, SaveSettings, preflight, save_activations
from lib.distributed import rank
from lib.environment import InputError, choose_device, log, log_to, run, say_next
from lib.files import fingerprint, write_text
from lib.hooks import resolve_all
from lib.models import choose_dtype, load_model, load_tokenizer, local_path, model_identity, tokenizer_identity
from lib.outputs import differences, in_use, require_room
from lib.store import experiment_dir, open_run, provenance
from lib.texts import load_documents, split_texts

FOLDER = experiment_dir("verify_sae_training")


def load_texts() -> Sequence[str]:
    """The texts of the data set: a list, or with STREAM a file that is read when they are needed."""
    if not STREAM:
        return [document[TEXT_FIELD] for document in load_documents(DATASET, DATA_SPLIT, TEXT_FIELD, DATA_LIMIT)]
    path = local_path(DATASET)
    version = [path.stat().st_size, path.stat().st_mtime] if path else None
    key = fingerprint([DATASET, version, DATA_SPLIT, TEXT_FIELD, DATA_LIMIT])
    with in_use(FOLDER / "texts"):
        return stream_texts(DATASET, FOLDER / "texts" / f"{key}.jsonl", split=DATA_SPLIT, text_field=TEXT_FIELD,
                            limit=DATA_LIMIT)


def report(model, tokenizer, points, texts, settings):
    """Log the sample's figures for the chosen points and, with PREFLIGHT, for every block; then size and time. Returns
    the size.
    """
    others = every_block(model) if PREFLIGHT else []
    chosen = preflight(model, tokenizer, points, texts, settings=settings)
    others = [point for point in others if point not in points]
    table = chosen + (preflight(model, tokenizer, others, texts, settings=settings) if others else [])
    log.info("%-64s %6s %8s %6s %9s %8s", "hook point (* to be saved)", "width", "|x| med", "gamma", "outliers",
             "eff.dim")
    for row in table:
        name = row["signature"] + (" *" if row in chosen else "")
        log.info("%-64s %6d %8.2f %6.2f %8.2f%% %8.1f", name, row["width"], row["median_norm"], row["gamma"],
                 100 * row["outlier_frac"], row["participation"])
    rows = chosen[0]["rows_per_text"] * len(texts)
    size = rows * sum(row["width"] for row in chosen) * STORE_DTYPES[STORE_DTYPE].itemsize
    seconds = chosen[0]["seconds"] * len(texts) / min(len(texts), 64)
    log.info("about %s tokens, %.2f GB on disk, %s", f"{rows:,.0f}", size / 1e9,
             f"{math.ceil(seconds)} s" if seconds < 120 else f"{seconds / 60:.0f} min")
    return size


def contents_of(meta):
    """What a run was made from, wherever it lay: model, tokenizer, data."""
    return [{key: value for key, value in meta[part].items() if key != "path"}
            for part in ("model", "tokenizer", "dataset")]


def say_what_changed(meta, run_id):
    """One line if the last run had these constants, but another model, tokenizer or data behind the same names."""
    try:
        last = open_run("verify_sae_training").meta
    except InputError:
        return
    if last["constants"] != json.loads(json.dumps(meta["constants"])) or not isinstance(last["tokenizer"], dict):
        return
    changed = [part for part, then, now in zip(("model", "tokenizer", "data set"), contents_of(last),
                                               contents_of(meta)) if differences(then, now)]
    if changed:
        log.warning("the %s changed since the last run was saved, so this is a new run: %s", " and the ".join(changed),
                    run_id)


def main():
    log_to(FOLDER / "01_save_activations.log")
    device = choose_device(DEVICE)
    model = load_model(MODEL, device, choose_dtype(MODEL_DTYPE, device), trust_remote_code=TRUST_REMOTE_CODE,
                       bits=LOAD_BITS, device_map=DEVICE_MAP)
    if LAYER_SIGNATURE == "?":
        return list_layers(model) if rank() == 0 else None
    points = resolve_all(model, LAYER_SIGNATURE, HOOK_POINT)
    tokenizer = load_tokenizer(MODEL, TRUST_REMOTE_CODE)
    texts, path = load_texts(), local_path(DATASET)
    meta = {
        "model": model_identity(model, MODEL),
        "tokenizer": tokenizer_identity(tokenizer),
        "dataset": {
            "name": DATASET, "path": path and str(path), "split": DATA_SPLIT, "field": TEXT_FIELD, "limit": DATA_LIMIT,
            "fingerprint": fingerprint_texts(texts),
        },
        "constants": {key: value for key, value in CONSTANTS.items() if key != "STREAM"},  # the run is the same
        "provenance": provenance(),
    }
    what = {key: value for key, value in CONSTANTS.items() if key not in ("PREFLIGHT", "PRESET", "STREAM")}
    run_id = f"{points[0].path.replace('.', '_')}-{fingerprint([what, *contents_of(meta)])[:8]}"
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
        size = report(model, tokenizer, points, texts, settings) if rank() == 0 else 0
        with in_use(folder):
            saved_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            require_room(folder, size - saved_bytes)
            saved = save_activations(folder, model, tokenizer, points, texts=texts, settings=settings, meta=meta,
                                     splits=split_texts(len(texts), VAL_FRAC, SEED))
    if rank() == 0:
        write_text(FOLDER / "run_id.txt", run_id + "\n")
    log.info("run %s: %s tokens of %s texts at %s", run_id, f"{saved.n_rows:,}", f"{len(texts):,}",
             ", ".join(saved.hooks))
    say_next("02_train_sae.py")


if __name__ == "__main__":
    run(main, parallel=True)
