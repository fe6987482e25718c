"""Which layer? One pass of a sample of texts through the model.

    table = probe_layers(model, tokenizer, points, texts, settings=settings, labels=labels)
    signature, reason = recommend_layer(table)
"""
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lib.activations import SaveSettings, block_rows
from lib.environment import InputError
from lib.hooks import HookPoint
from lib.metrics.layers import layer_statistics, linear_probe
from lib.schemas import Schema, Text
from lib.texts import filler_id

LAYERS = Schema({
    "constants": {"MODEL": str}, "layers": [{"signature": str, Text("[a-z_]+"): float}], "recommended": str,
    "reason": str,
}, remedy="delete it and run 00_probe_layers.py again")
VAL_EVERY = 5  # every fifth text is held out from the linear probe
NEAR = 0.01  # accuracy within which one layer is as good as another
GAMMA, OUTLIERS = 3.0, 0.01  # above these, latents tend to die, or a few rows take the whole loss
Table = list[dict[str, Any]]


def probe_layers(
    model: nn.Module, tokenizer, points: list[HookPoint], texts: Sequence[str], *, settings: SaveSettings,
    labels: list[Any] | None = None
) -> Table:
    """What a sample of texts shows at each hook point; one dict a point, in the order of the points.

    labels: for each text its class (a str or int), or a list with the class of each of its words (None or 0: no
    label), or None. Columns beside those of layer_statistics():

        signature
        probe_accuracy, majority   of a linear probe and of the most frequent class on held-out texts; the probe reads
                                   single tokens where words have labels, else the mean over a text's tokens
        gb_per_million             tokens, as float32 on disk
        seconds_per_million        tokens, forward pass up to the point: its share, by depth, of the time to the deepest

    The sample's activations at all points are in memory at once.
    """
    tokens = settings.tokens(tokenizer, list(texts))
    pad_id = filler_id(tokenizer)
    block_rows(model, points, tokens[:4], pad_id=pad_id, settings=settings)  # the first pass pays for set-up
    start = time.perf_counter()
    rows, states = block_rows(model, points, tokens, pad_id=pad_id, settings=settings)
    seconds = time.perf_counter() - start
    if not len(rows):
        raise InputError("no text yields a token (all are empty or special tokens); check TEXT_FIELD and SKIP_FIRST")
    labelled = None if labels is None else _labelled_rows(rows, texts, labels)
    table = []
    for depth, (point, x) in enumerate(zip(points, tqdm(states, desc="probing", unit="layer")), 1):
        row = {"signature": point.signature, **layer_statistics(x)}
        if labelled is not None:
            gather, y, is_val = labelled
            row |= linear_probe(gather(x.float()), y, is_val)
        row["gb_per_million"] = 1e6 * x.shape[1] * 4 / 1e9
        row["seconds_per_million"] = seconds * depth / len(points) * 1e6 / len(rows)
        table.append(row)
    return table


def _labelled_rows(
    rows: Tensor, texts: Sequence[str], labels: list[Any]
) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor]:
    """A function from a layer's rows [R, D] to the labelled examples [N, D]; their classes, int64 [N]; which are held
    out, bool [N].
    """
    text_id = rows[:, 0].long()
    if isinstance(labels[0], list | tuple):
        found = _word_labels(rows, texts, labels)
        chosen = torch.tensor([row for row, _ in found])
        y, of_text = [label for _, label in found], text_id[chosen]

        def gather(x: Tensor) -> Tensor:
            return x[chosen]
    else:
        of_text, place = text_id.unique(return_inverse=True)
        counts = place.bincount()[:, None]
        y = [labels[i] for i in of_text.tolist()]

        def gather(x: Tensor) -> Tensor:
            return torch.zeros(len(of_text), x.shape[1]).index_add_(0, place, x) / counts

    names = {name: number for number, name in enumerate(sorted(set(y), key=str))}
    is_val = of_text % VAL_EVERY == VAL_EVERY - 1
    if len(names) < 2 or not is_val.any() or is_val.all():
        raise InputError("a linear probe needs at least two classes and five texts; raise N_TEXTS or set another "
                         "LABEL_FIELD")
    return gather, torch.tensor([names[label] for label in y]), is_val


def _word_labels(rows: Tensor, texts: Sequence[str], labels: list[Any]) -> list[tuple[int, Any]]:
    """(row, label) of every token that ends a labelled word; the words are the runs of letters.

    Raises InputError for a text that has not as many words as labels.
    """
    ends: dict[tuple[int, int], Any] = {}
    for number, (text, classes) in enumerate(zip(texts, labels)):
        words = list(re.finditer(r"[^\W\d_]+", text))
        if len(words) != len(classes):
            raise InputError(f"a text has {len(words)} words, its runs of letters, and {len(classes)} labels; give "
                             f"each word one (None: not labelled), or the text one: {text[:60]!r}")
        ends |= {(number, word.end()): label for word, label in zip(words, classes) if label}
    places = zip(rows[:, 0].tolist(), rows[:, 4].tolist())
    return [(row, ends[place]) for row, place in enumerate(places) if place in ends]


def recommend_layer(table: Table) -> tuple[str, str]:
    """A hook point of probe_layers' table, and why. A start, not a verdict: labels ask for little."""
    calm = [row for row in table if row["gamma"] <= GAMMA and row["outlier_frac"] <= OUTLIERS]
    left_out = (f"{len(table) - len(calm)} of {len(table)} left out for gamma over {GAMMA:g} or outlier rows; "
                if len(calm) < len(table) else "")
    if not calm:
        calm = table
        left_out = "every layer has a large gamma or outlier rows: set SKIP_FIRST=1 or MAX_NORM_MULTIPLE=10; "
    if "probe_accuracy" in table[0]:
        best = max(row["probe_accuracy"] for row in calm)
        row = next(row for row in calm if row["probe_accuracy"] >= best - NEAR)
        found = row["probe_accuracy"]
        reason = f"the first whose probe accuracy, {found:.3f}, is within {NEAR:g} of the best, {best:.3f}"
        return row["signature"], f"{left_out}{reason} (the most frequent class alone: {row['majority']:.3f})"
    row = max(calm, key=lambda row: row["participation"])
    reason = f"the most effective dimensions, {row['participation']:.1f}; with labels the advice is better"
    return row["signature"], left_out + reason

