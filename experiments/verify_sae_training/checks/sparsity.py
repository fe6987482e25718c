"""Which k? Two short trainings for each of a few values.

    table = sweep_k(rows, settings, (2, 4, 8), recovered_by)
    k, reason = recommend_k(table)
"""
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lib.batches import Rows, sample_rows
from lib.sae import SAE
from lib.training.loop import TrainSettings, score
from lib.training.many import Job, train_saes

NEAR = 0.01  # cosine within which one k is as good as another
ENOUGH = 0.9  # share of the language-model loss, or of the variance, that an SAE should recover


def sweep_k(
    rows: Rows, settings: TrainSettings, ks: Sequence[int], recovered_by: Callable[[SAE], float] | None = None,
    device: torch.device | str = "cpu"
) -> list[dict[str, Any]]:
    """Two short trainings for each k that differ in the seed alone, from one read (lib/training/many.py); one dict a k.

    settings: of the trainings, whose top_k and seed are replaced. recovered_by: from an SAE to the share of the
    language-model loss that it recovers. Columns:

        k
        ev, l0_mean, dead_pct   of the first SAE, held out
        loss_recovered          where recovered_by is given and not nan
        neighbours              mean |cosine| of two directions of one dictionary; arXiv 2508.16560 takes its lowest
                                point for the right k, but on the embedded stories it only falls
        seeds                   mean over latents of the largest cosine to a direction of the other seed's dictionary
    """
    seeds = (settings.seed, settings.seed + 1)
    jobs = [Job(rows, replace(settings, top_k=k, seed=seed)) for k in ks for seed in seeds]
    saes = {number: sae for number, sae, _ in train_saes(jobs, device)}
    table = []
    for i, k in enumerate(ks):
        first, second = saes[2 * i], saes[2 * i + 1]
        numbers = score(first, sample_rows(rows, validation=True))
        row = {"k": k, **{name: numbers[name] for name in ("ev", "l0_mean", "dead_pct")}}
        if recovered_by is not None and not math.isnan(recovered := recovered_by(first)):
            row["loss_recovered"] = recovered
        table.append(row | {"neighbours": mean_cosine(first.W_dec), "seeds": agreement(first.W_dec, second.W_dec)})
    return table


def mean_cosine(W: Tensor, chunk: int = 1024) -> float:
    """Mean |cosine| over all pairs of different rows of W [F, D], unit rows; never holds F x F."""
    total = sum(float((part @ W.T).abs().sum(1).cpu().double().sum()) for part in W.split(chunk))
    return (total - float(W.square().sum())) / (len(W) * (len(W) - 1))


def agreement(A: Tensor, B: Tensor, chunk: int = 1024) -> float:
    """Mean over the rows of A [F, D] of the largest cosine to a row of B [G, D], unit rows; 1: the same directions."""
    return float(torch.cat([(part @ B.T).max(1).values for part in A.split(chunk)]).cpu().double().mean())


def recommend_k(table: list[dict[str, Any]]) -> tuple[int, str]:
    """A k of sweep_k's table, and why: of those that rebuild enough, the one on whose directions two seeds agree most.

    Directions that come back from another start are more likely to be the data's than the seed's. Of the k that agree
    within NEAR, the largest rebuilds most.
    """
    name, measure = ("loss_recovered", "loss recovered") if "loss_recovered" in table[0] else ("ev", "EV")
    enough = [row for row in table if row[name] >= ENOUGH]
    if not enough:
        row = max(table, key=lambda row: row[name])
        reason = f"no k reaches a {measure} of {ENOUGH:g}; this one comes closest: try more latents, tokens or epochs"
        return row["k"], reason
    best = max(row["seeds"] for row in enough)
    row = max((row for row in enough if row["seeds"] >= best - NEAR), key=lambda row: row["k"])
    agreed = f"two seeds agree on its directions to {row['seeds']:.3f}, within {NEAR:g} of the best, {best:.3f}"
    return row["k"], f"of the k with a {measure} of at least {ENOUGH:g}, the largest for which {agreed}"
