"""Which concepts did the SAE find, and what finds them without it? For each concept the best unit of every kind.

    rows = recover_concepts(saes, run, hook, truth, principal)      # one dict a concept

Beside the units stand two tables fitted to the labels, which show what the token alone, or with the one before it,
gives away. Concepts that the token table finds are *word* concepts, the others *context* concepts.
"""
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from concepts.codes import Codes
from lib.batches import read_rows
from lib.ground_truth import WORD_F1, Concept, Truth, searched
from lib.metrics.units import recovery
from lib.sae import SAE
from lib.store import Run

KINDS = {
    "latent": "latent of the SAE", "firing": "the same, firing at all",
    "frozen_decoder": "latent, decoder frozen at random", "frozen_encoder": "latent, encoder frozen at random",
    "untrained": "latent of the untrained SAE",
    "neuron": "neuron", "pca": "principal direction", "token": "single token", "table": "token table (fitted)",
    "pairs": "token-pair table (fitted)",
}
BASELINES = ("frozen_decoder", "frozen_encoder", "untrained", "neuron", "pca", "token")  # units, as latents are


def recover_concepts(
    saes: dict[str, SAE], run: Run, hook: str, truth: Truth, principal: Tensor, n_rows: int = 120_000
) -> list[dict[str, Any]]:
    """For every concept with enough held-out tokens: {"concept", "part", "context", "n_val", kind: scores, ...}.

    saes: kind -> SAE; "latent" is the trained one, which is also scored by firing at all. principal: directions [D, P].
    n_rows: about how many rows, evenly thinned, to search for the concepts that any token may carry.
    """
    ids = run.rows["token_id"].long()
    before = torch.where(run.rows["text_id"].diff(prepend=torch.tensor([-1])) == 0, ids.roll(1), -1)
    found = []
    for part in searched_parts(run, hook, truth, n_rows):
        scores = recovery(saes, part.x, part.labels, part.is_val, principal=principal, ids=ids[part.rows],
                          before=before[part.rows])
        for concept, n, row in zip(part.concepts, part.n_val, scores):
            context = row["table"]["f1_train"] < WORD_F1
            found.append({"concept": concept.name, "part": concept.part, "context": context, "n_val": n, **row})
    return found


class Searched(NamedTuple):
    """Rows in which concepts are sought: those of every text for most of them, those of its word for a sense."""

    rows: Tensor
    """bool [n_rows], which of the run's."""
    x: Tensor
    """[N, D], their activations."""
    is_val: Tensor
    """bool [N]."""
    concepts: list[Concept]
    labels: Tensor
    """bool [N, C]."""
    n_val: list[int]
    """Held-out tokens of each concept."""


def searched_parts(run: Run, hook: str, truth: Truth, n_rows: int = 120_000) -> Iterator[Searched]:
    """The concepts with enough held-out tokens, with the rows in which they are sought; see recover_concepts."""
    every = torch.arange(run.n_rows) % max(1, run.n_rows // n_rows) == 0
    with_senses = torch.stack([torch.zeros_like(every), *truth.words.values()]).any(0)
    x_all, x_senses = (read_rows(run.shards(hook), wanted) for wanted in (every, with_senses))
    for rows, columns in searched(truth, run.is_val, every):
        x = x_all if rows is every else x_senses[rows[with_senses]]
        labels, is_val = truth.labels[rows][:, columns], run.is_val[rows]
        chosen = [truth.concepts[column] for column in columns]
        yield Searched(rows, x, is_val, chosen, labels=labels, n_val=labels[is_val].sum(0).tolist())


def gains(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The checks of checks.verification that recover_concepts' rows can answer: name -> value."""
    found = {}
    for name, context in (("concept_gain", False), ("context_gain", True)):
        part = [row for row in rows if row["context"] == context]
        mean = {kind: float(np.mean([row[kind]["f1"] for row in part])) for kind in KINDS if part and kind in part[0]}
        if mean:
            found[name] = mean["latent"] - max(mean[kind] for kind in BASELINES if kind in mean)
        if mean and context:
            found["context_table"] = mean["latent"] - mean["table"]
    return found


def compositions(codes: Codes, truth: Truth | None, latents: list[int], share: float = 0.8) -> dict[str, list[int]]:
    """The latents sorted by what at least `share` of their firings are on: one token, one leaf concept, or neither."""
    ids = codes.rows["token_id"].long()
    fired = []
    for start, values, indices in codes:
        row, slot = (values > 0).nonzero(as_tuple=True)
        fired.append((start + row, indices[row, slot].long()))
    row, latent = (torch.cat(column) for column in zip(*fired))
    found: dict[str, list[int]] = {"one token": [], "one leaf concept": [], "neither": []}
    leaves = [i for i, concept in enumerate(truth.concepts) if concept.part == "leaf"] if truth else []
    order = latent.argsort(stable=True)
    row, counts = row[order], torch.bincount(latent, minlength=codes.n_latents)
    ends = counts.cumsum(0)
    for i in latents:
        rows = row[ends[i] - counts[i] : ends[i]]
        if torch.bincount(ids[rows]).max() >= share * len(rows):
            found["one token"].append(i)
        elif truth and truth.labels[rows][:, leaves].sum(0).max() >= share * len(rows):
            found["one leaf concept"].append(i)
        else:
            found["neither"].append(i)
    return found
