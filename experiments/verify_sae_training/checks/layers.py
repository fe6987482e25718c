"""Help in choosing a layer and k, before the long training.

    table = probe_layers(model, tokenizer, points, texts, settings, labels)    # one pass of a sample through the model
    signature, reason = recommend_layer(table)
    table = sweep_k(rows, settings, (2, 4, 8), recovered)                      # two short trainings for each k
    k, reason = recommend_k(table)
"""
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lib.activations import SaveSettings, block_rows, check_finite
from lib.batches import Rows, sample_rows
from lib.checking import Schema, Text
from lib.environment import InputError
from lib.hooks import HookPoint
from lib.metrics.layers import layer_statistics, linear_probe
from lib.sae import SAE
from lib.texts import filler_id, tokenise
from lib.training import TrainSettings, score, train_sae

LAYERS = Schema({
    "constants": {"MODEL": str}, "layers": [{"signature": str, Text("[a-z_]+"): float}], "recommended": str,
    "reason": str,
}, remedy="delete it and run 00_probe_layers.py again")
VAL_EVERY = 5  # every fifth text is held out from the linear probe
NEAR = 0.01  # accuracy, or cosine, within which a choice is as good as the best
GAMMA, OUTLIERS = 3.0, 0.01  # above these a layer's SAE needs care: dead latents, lost to a few rows
ENOUGH = 0.9  # share of the language-model loss that an SAE should recover
Table = list[dict[str, Any]]


def probe_layers(
    model: nn.Module, tokenizer, points: list[HookPoint], texts: Sequence[str], settings: SaveSettings,
    labels: list[Any] | None = None
) -> Table:
    """What a sample of texts says of each hook point, all in one pass; one dict a point, in the order of the points.

    labels: for each text its class (a str or int), or a list with the class of each of its words (None or 0: no
    label), or None. Adds to layer_statistics(): signature; probe_accuracy and majority on held-out texts, of single
    tokens for words' labels, else of the mean over the text's tokens; gb_per_million, of float32 on disk;
    seconds_per_million, of the forward pass up to the point, by depth from the time to the deepest.

    The sample's activations at all points are held in memory at once.
    """
    tokens = tokenise(tokenizer, list(texts), 0, settings.max_length, settings.skip_special, settings.skip_first)
    block_rows(model, points, tokens[:4], filler_id(tokenizer), settings)  # the first pass pays for set-up
    start = time.perf_counter()
    rows, states = block_rows(model, points, tokens, filler_id(tokenizer), settings)
    seconds = time.perf_counter() - start
    check_finite(model, rows, states, points, torch.float32)
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
    """How to gather the labelled examples from a layer's rows [R, D], their classes int64 [N], held out or not [N]."""
    text_id = rows[:, 0].long()
    if isinstance(labels[0], list | tuple):
        found = _word_labels(rows, texts, labels)
        chosen = torch.tensor([row for row, _ in found])
        y, of_text = [label for _, label in found], text_id[chosen]
        gather = lambda x: x[chosen]  # noqa: E731
    else:
        of_text, place = text_id.unique(return_inverse=True)
        counts = place.bincount()[:, None]
        y = [labels[i] for i in of_text.tolist()]
        gather = lambda x: torch.zeros(len(of_text), x.shape[1]).index_add_(0, place, x) / counts  # noqa: E731
    names = {name: number for number, name in enumerate(sorted(set(y), key=str))}
    is_val = of_text % VAL_EVERY == VAL_EVERY - 1
    if len(names) < 2 or not is_val.any() or is_val.all():
        raise InputError("a linear probe needs at least two classes and five texts; raise N_TEXTS or set another "
                         "LABEL_FIELD")
    return gather, torch.tensor([names[label] for label in y]), is_val


def _word_labels(rows: Tensor, texts: Sequence[str], labels: list[Any]) -> list[tuple[int, Any]]:
    """(row, label) of every token that ends a labelled word; the words are the runs of letters."""
    ends: dict[tuple[int, int], Any] = {}
    for number, (text, classes) in enumerate(zip(texts, labels)):
        words = re.finditer("[A-Za-z]+", text)
        ends |= {(number, word.end()): label for word, label in zip(words, classes) if label}
    places = zip(rows[:, 0].tolist(), rows[:, 4].tolist())
    return [(row, ends[place]) for row, place in enumerate(places) if place in ends]


def recommend_layer(table: Table) -> tuple[str, str]:
    """A hook point of probe_layers' table, and why. A start, not a verdict: what the labels do not ask for may live
    elsewhere.
    """
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
    return row[
        "signature"
    ], f"{left_out}the most effective dimensions, {row['participation']:.1f}; with labels the advice is better"


def sweep_k(
    rows: Rows, settings: TrainSettings, ks: Sequence[int], recovered: Callable[[SAE], float] | None = None,
    device: torch.device | str = "cpu"
) -> Table:
    """Two short trainings for each k, alike but for the seed; one dict a k.

    settings: those of the trainings, whose top_k and seed are replaced. recovered: an SAE -> share of the
    language-model loss recovered. Columns: k; ev, l0_mean, dead_pct, held out, of the first SAE; loss_recovered, if
    asked for; neighbours, the mean |cosine| between two directions of one dictionary (arXiv 2508.16560 takes its lowest
    point for the right k; on the embedded stories it only falls); seeds, the mean over latents of the largest cosine to
    a direction of the other seed's dictionary.
    """
    table = []
    for k in tqdm(ks, desc="sweeping k", unit="k"):
        pair = [train_sae(rows, replace(settings, top_k=k, seed=seed), None, device, progress=False)[0]
                for seed in (settings.seed, settings.seed + 1)]
        numbers = score(pair[0], sample_rows(rows, validation=True))
        row = {"k": k, **{name: numbers[name] for name in ("ev", "l0_mean", "dead_pct")}}
        if recovered is not None:
            row["loss_recovered"] = recovered(pair[0])
        table.append(row | {"neighbours": mean_cosine(pair[0].W_dec), "seeds": agreement(pair[0].W_dec, pair[1].W_dec)})
    return table


def mean_cosine(W: Tensor, chunk: int = 1024) -> float:
    """Mean |cosine| over all pairs of different rows of W [F, D], unit rows; never holds F x F."""
    total = sum(float((part @ W.T).abs().sum(1).cpu().double().sum()) for part in W.split(chunk))
    return (total - float(W.square().sum())) / (len(W) * (len(W) - 1))


def agreement(A: Tensor, B: Tensor, chunk: int = 1024) -> float:
    """Mean over the rows of A [F, D] of the largest cosine to a row of B [G, D], unit rows; 1: the same directions."""
    return float(torch.cat([(part @ B.T).max(1).values for part in A.split(chunk)]).cpu().double().mean())


def recommend_k(table: Table) -> tuple[int, str]:
    """A k of sweep_k's table, and why: of those that rebuild enough, the one whose directions two seeds agree on most.

    Directions that come back from another start are more likely to be the data's than the seed's. Among k that agree
    within NEAR the largest is taken, because it rebuilds most.
    """
    name, measure = ("loss_recovered", "loss recovered") if "loss_recovered" in table[0] else ("ev", "EV")
    enough = [row for row in table if row[name] >= ENOUGH]
    if not enough:
        row = max(table, key=lambda row: row[name])
        return row[
            "k"
        ], f"no k reaches a {measure} of {ENOUGH:g}; this one comes closest: more latents, tokens or epochs"
    best = max(row["seeds"] for row in enough)
    row = max((row for row in enough if row["seeds"] >= best - NEAR), key=lambda row: row["k"])
    agreed = f"two seeds agree on its directions to {row['seeds']:.3f}, within {NEAR:g} of the best, {best:.3f}"
    return row["k"], f"of the k with a {measure} of at least {ENOUGH:g} the largest for which {agreed}"
