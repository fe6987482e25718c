"""Auxiliary losses without targets: what the activations of a batch are charged for.

    loss = penalty("monoloss", Frozen(...))(h, ids)        # a number for the batch; h [B, D] live, ids int64 [B]

A function for each row of cycles/arms.py that acts by a penalty. Several ranks each charge their own part of a batch.
"""
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize, relu

from cycles.arms import unlabelled
from lib.environment import InputError

TEMPERATURE = 0.2  # of the contrastive loss, as in the public code of arXiv 2410.21331 for CIFAR
EPS = 1e-8

OfBatch = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Frozen:
    """What does not change while the network trains."""

    y: Tensor
    """Class of every example by its id, int64 [N]."""
    embedding: Callable[[Tensor], Tensor]
    """ids [B] -> their activations in the model before, about the arm's centre, [B, D]."""


def mean_absolute(h: Tensor) -> Tensor:
    """The mean of |h| over examples and units, so that lambda means the same at any width."""
    return h.abs().mean()


def mono_scores(h: Tensor, embedding: Tensor) -> Tensor:
    """MonoScore of each column of h [B, D] given unit-free embeddings [B, E] of the same examples: [D], at most 1.

    m = sum over i < j of a_i a_j cos(e_i, e_j) / sum over i < j of a_i a_j, with a the column scaled to 0-1 by its
    least and largest value in the batch; 0 where fewer than two examples count. It takes B x D instead of B x B x D:
    twice the sums are |sum a_i e_i|^2 - sum a_i^2 and (sum a_i)^2 - sum a_i^2 for unit e. Source: arXiv 2602.12403,
    checked against its authors' public code.
    """
    a = (h - h.amin(0)) / (h.amax(0) - h.amin(0) + EPS)
    e = normalize(embedding, dim=1)
    own = a.square().sum(0)
    alike, pairs = (e.T @ a).square().sum(0) - (e.square().sum(1)[:, None] * a.square()).sum(0), a.sum(0).square() - own
    counts = pairs > EPS
    return torch.where(counts, alike / torch.where(counts, pairs, torch.ones_like(pairs)), torch.zeros_like(pairs))


def contrastive_loss(h: Tensor, y: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Supervised contrastive loss of z = ReLU(h) / |ReLU(h)| for rows h [B, D] of classes y [B]: a number.

    Mean over the rows i that share their class with another one of -log(sum of exp(z_i z_j / temperature) over the
    j != i of the same class / that over all j != i); 0 where no row does. Source: arXiv 2410.21331 (features made
    non-negative by ReLU) in its authors' public supervised form, which sums inside the logarithm. There two augmented
    views of an image go through a projection head; here there is one view and no head, because the target layer itself
    is what is to be monosemantic.
    """
    z = normalize(relu(h), dim=1)
    scores = z @ z.T / temperature
    others = ~torch.eye(len(h), dtype=torch.bool, device=h.device)
    same = others & (y[:, None] == y[None])
    rows = same.any(1)
    if not bool(rows.any()):
        return 0.0 * h.sum()
    lowest = torch.finfo(scores.dtype).min
    positive, everyone = (scores[rows].masked_fill(~mask[rows], lowest).logsumexp(1) for mask in (same, others))
    return (everyone - positive).mean()


def penalty(arm: str, frozen: Frozen) -> OfBatch:
    """The loss of an arm as a function of (h [B, D], ids [B]). Raises InputError for an arm without one."""
    losses: dict[str, OfBatch] = {
        "l1_activation": lambda h, ids: mean_absolute(h),
        "monoloss": lambda h, ids: 1 - mono_scores(h, frozen.embedding(ids).to(h)).mean(),
        "nonneg_contrastive": lambda h, ids: contrastive_loss(h, frozen.y[ids.cpu()].to(h.device)),
    }
    if (name := unlabelled(arm)) not in losses:
        raise InputError(f"{name!r} has no penalty; use one of {', '.join(losses)}")
    return losses[name]
