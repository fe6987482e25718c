"""What step 1 says before it saves: what a sample of the texts shows, what the run will cost, what has changed."""
import json
import math
from collections.abc import Sequence
from typing import Any

from list_layers import every_block
from torch import nn

from lib.activations import SAMPLE_TEXTS, STORE_DTYPES, SaveSettings, preflight
from lib.environment import InputError, log
from lib.hooks import HookPoint
from lib.outputs import differences
from lib.store import open_run

PARTS = {"model": "model", "tokenizer": "tokenizer", "dataset": "data set"}


def preview(
    model: nn.Module, tokenizer, points: list[HookPoint], texts: Sequence[str], *, settings: SaveSettings,
    all_blocks: bool
) -> float:
    """Log what a sample shows at the hook points, or at all blocks too, then size and time; returns the bytes."""
    others = [point for point in every_block(model) if point not in points] if all_blocks else []
    chosen = preflight(model, tokenizer, points, texts, settings=settings)
    table = chosen + (preflight(model, tokenizer, others, texts, settings=settings) if others else [])
    log.info("%-64s %6s %8s %6s %9s %8s", "hook point (* to be saved)", "width", "|x| med", "gamma", "outliers",
             "eff.dim")
    for row in table:
        name = row["signature"] + (" *" if row in chosen else "")
        log.info("%-64s %6d %8.2f %6.2f %8.2f%% %8.1f", name, row["width"], row["median_norm"], row["gamma"],
                 100 * row["outlier_frac"], row["participation"])
    n_rows = chosen[0]["rows_per_text"] * len(texts)
    n_bytes = n_rows * sum(row["width"] for row in chosen) * STORE_DTYPES[settings.store_dtype].itemsize
    seconds = chosen[0]["seconds"] * len(texts) / min(len(texts), SAMPLE_TEXTS)
    log.info("about %s tokens, %.2f GB on disk, %s", f"{n_rows:,.0f}", n_bytes / 1e9,
             f"{math.ceil(seconds)} s" if seconds < 120 else f"{seconds / 60:.0f} min")
    return n_bytes


def contents_of(meta: dict[str, Any]) -> list[dict[str, Any]]:
    """What a run is made from, wherever it lies: model, tokenizer, data set."""
    return [{key: value for key, value in meta[part].items() if key != "path"} for part in PARTS]


def say_what_changed(meta: dict[str, Any], run_id: str) -> None:
    """Warn if the last run had the same constants, but another model, tokenizer or data set behind the same names."""
    try:
        last = open_run("verify_sae_training").meta
    except InputError:
        return  # there is none, or it is damaged: nothing to compare with
    if last["constants"] != json.loads(json.dumps(meta["constants"])) or not isinstance(last["tokenizer"], dict):
        return
    pairs = zip(PARTS.values(), contents_of(last), contents_of(meta))
    if changed := [name for name, then, now in pairs if differences(then, now)]:
        log.warning("the %s changed since the last run was saved, so this is a new run: %s", " and the ".join(changed),
                    run_id)
