"""Step 0, to choose a layer: what a sample of the texts shows at every block, in one pass.

    python 00_probe_layers.py                                             # the embedded model and stories
    python 00_probe_layers.py MODEL=gpt2 DATASET=my.jsonl LABEL_FIELD=topic
    python 00_probe_layers.py POINTS=resid_post,mlp_out

Prints a table, a recommendation and its reason. With labels, a linear probe tells how well each layer reveals them; the
embedded stories label every word with its concept.

Writes store/verify_sae_training/layers.json and figures/layers.png
"""
from typing import Annotated

import checkout  # noqa: F401  (first: finds lib)
from lib.constants import override
from lib.ranges import Device, Location, Name, NotNegative, Precision, Size, at_least, at_most, like

Points = Annotated[
    str,
    like(r"(resid_pre|resid_mid|resid_post|attn_out|mlp_out)"
         r"(\s*,\s*(resid_pre|resid_mid|resid_post|attn_out|mlp_out))*",
         "resid_pre, resid_mid, resid_post, attn_out, mlp_out, or several of them separated by commas"),
]
MODEL: Location = "store/embedded/model"  # hub name or directory of a transformers model
DATASET: Location = "store/embedded/stories/train.jsonl"  # hub name, or a .jsonl .json .csv .tsv .txt .parquet file
DATA_SPLIT: Name = "train"                # split of a hub data set; a file has none
TEXT_FIELD: Name = "text"                 # the column that holds the text
LABEL_FIELD: Name | None = None           # a class for each text, or a list with one for each word; None: "concepts"
                                          # or "label", if the data have it
N_TEXTS: Annotated[int, at_least(10), at_most(10**6)] = 500  # in the sample; all their activations are in memory
MAX_LENGTH: Size = 128                    # tokens of a text, special tokens included; the rest is cut
POINTS: Points = "resid_post"             # at every block, several separated by commas: resid_pre, resid_mid,
                                          # resid_post, attn_out, mlp_out
BATCH_SIZE_SAVE: Size = 16                # texts of MAX_LENGTH in one forward pass
SKIP_FIRST: NotNegative = 0               # tokens to drop at the start of each text; 1 where there is no BOS
MODEL_DTYPE: Precision = "auto"           # precision of the model: auto, float32, bfloat16, float16
DEVICE: Device = "auto"                   # auto, cpu, cuda, mps
TRUST_REMOTE_CODE = False                 # run code that comes with a hub model; only for authors you trust
CONSTANTS = override(globals())

import pandas
from next_step import kept_for

from checks import figures
from checks.layers import probe_layers, recommend_layer
from lib.activations import SaveSettings
from lib.environment import InputError, choose_device, run, say_next
from lib.files import write_json
from lib.hooks import resolve_all
from lib.models import choose_dtype, load_model, load_tokenizer
from lib.plots import style
from lib.store import experiment_dir
from lib.texts import load_documents

SAME_NEXT = ("DATA_SPLIT", "TEXT_FIELD", "MAX_LENGTH", "BATCH_SIZE_SAVE", "SKIP_FIRST", "MODEL_DTYPE", "DEVICE",
             "TRUST_REMOTE_CODE")  # mean the same in step 1
COLUMNS = {  # of the table of checks.layers.probe_layers: heading and format
    "width": ("width", "{:d}"), "median_norm": ("|x| med", "{:.2f}"), "gamma": ("gamma", "{:.2f}"),
    "outlier_frac": ("outl.row", "{:.2%}"), "outlier_dims": ("outl.dim", "{:d}"),
    "participation": ("eff.dim", "{:.1f}"), "probe_accuracy": ("probe", "{:.3f}"),
    "gb_per_million": ("GB/1M", "{:.2f}"), "seconds_per_million": ("s/1M", "{:.0f}"),
}


def read_texts():
    """Texts, the field of their labels and the labels; without labels both are None."""
    documents = load_documents(DATASET, DATA_SPLIT, TEXT_FIELD, N_TEXTS)
    field = LABEL_FIELD or next((name for name in ("concepts", "label") if name in documents[0]), None)
    if field is not None and field not in documents[0]:
        raise InputError(f"DATASET={DATASET} has no field {field!r}; it has {', '.join(map(str, documents[0]))}: set "
                         "LABEL_FIELD")
    labels = None if field is None else [document[field] for document in documents]
    return [document[TEXT_FIELD] for document in documents], field, labels


def print_layers(table):
    """One line per hook point."""
    frame = pandas.DataFrame(table).set_index("signature").rename_axis(None)
    shown = [name for name in COLUMNS if name in frame]
    print(frame[shown].to_string(header=[COLUMNS[name][0] for name in shown],
                                 formatters={name: COLUMNS[name][1].format for name in shown}))


def main():
    folder, device = experiment_dir("verify_sae_training"), choose_device(DEVICE)
    texts, field, labels = read_texts()
    model = load_model(MODEL, device, choose_dtype(MODEL_DTYPE, device), trust_remote_code=TRUST_REMOTE_CODE)
    tokenizer = load_tokenizer(MODEL, TRUST_REMOTE_CODE)
    points = resolve_all(model, ",".join(f"{kind.strip()}:*" for kind in POINTS.split(",")))
    points.sort(key=lambda point: int(point.names[0].rpartition(":")[2]))  # by depth
    settings = SaveSettings(MAX_LENGTH, BATCH_SIZE_SAVE * MAX_LENGTH, skip_first=SKIP_FIRST)
    table = probe_layers(model, tokenizer, points, texts, settings=settings, labels=labels)
    signature, reason = recommend_layer(table)
    print_layers(table)
    print(f"recommended: LAYER_SIGNATURE={signature}\n  {reason}")
    write_json(folder / "layers.json",
               {"constants": CONSTANTS, "labels": field, "layers": table, "recommended": signature, "reason": reason})
    style()
    (folder / "figures").mkdir(exist_ok=True)
    figures.layers(table, signature).savefig(folder / "figures" / "layers.png")
    print(folder / "layers.json", "and", folder / "figures" / "layers.png")
    say_next("01_save_activations.py", MODEL=MODEL, DATASET=DATASET, LAYER_SIGNATURE=signature,
             **kept_for("01_save_activations.py", CONSTANTS, SAME_NEXT))


if __name__ == "__main__":
    run(main)
