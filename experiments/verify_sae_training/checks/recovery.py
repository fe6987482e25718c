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

from checks.ground_truth import Concept, Truth
from checks.units import Scores, best_dimensions, best_latents, best_tokens, token_tables
from concepts.codes import Codes
from lib.batches import read_rows
from lib.sae import SAE
from lib.store import Run

WORD_F1 = 0.8  # a concept that the token table reaches this F1 for, on training rows, is a word concept
MIN_TOKENS, MIN_SENSE = 20, 5  # held-out tokens a concept needs; a sense needs as many of its word without it
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
    for word in (None, *truth.words):
        rows = every if word is None else truth.words[word]
        columns = [i for i, concept in enumerate(truth.concepts) if concept.word == word]
        labels, is_val = truth.labels[rows][:, columns], run.is_val[rows]
        n_val = labels[is_val].sum(0)
        enough = (n_val >= MIN_TOKENS if word is None
                  else (n_val >= MIN_SENSE) & (int(is_val.sum()) - n_val >= MIN_SENSE))
        if not enough.any() or not labels[~is_val].any():
            continue
        x = x_all if word is None else x_senses[rows[with_senses]]
        chosen = [truth.concepts[column] for column, is_enough in zip(columns, enough) if is_enough]
        yield Searched(rows, x, is_val, chosen, labels=labels[:, enough], n_val=n_val[enough].tolist())


def recovery(
    saes: dict[str, SAE], x: Tensor, labels: Tensor, is_val: Tensor, *, principal: Tensor, ids: Tensor, before: Tensor
) -> list[dict[str, Scores]]:
    """For each concept, a column of labels (bool [N, C]): kind -> scores of its best unit, and of the tables.

    x: rows [N, D]. is_val: bool [N]. principal: directions [D, P]. ids, before: token ids of the rows, and of the token
    before each (-1: none).
    """
    kinds: dict[str, list[Scores]] = {}
    for kind, sae in saes.items():
        codes = sae.encode(x.to(sae.mean.device))
        kinds[kind] = best_latents(codes, sae.n_latents, labels, is_val)
        if kind == "latent":
            kinds["firing"] = best_latents(codes, sae.n_latents, labels, is_val, shares=(0.0,))
    kinds["neuron"] = best_dimensions(x, labels, is_val)
    kinds["pca"] = best_dimensions((x - x.mean(0)) @ principal, labels, is_val)
    kinds["token"] = best_tokens(ids, labels, is_val)
    kinds["table"], kinds["pairs"] = token_tables(ids, before, labels, is_val)
    return [{kind: column[c] for kind, column in kinds.items()} for c in range(labels.shape[1])]


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
