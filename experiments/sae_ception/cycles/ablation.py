"""Concept ablation while fine-tuning (CAFT, arXiv 2507.16795): a subspace is taken out of the activations.

    h <- h - share * (h Q) Q^T        Q [D, n], orthonormal: the span of n directions; only while the network trains

The network then can't learn to use what lies there; at inference nothing is taken out. Source: the paper, whose public
code projects every token's output of a layer in this way, about the origin. There people or a model say which latents
are unwanted. Here the concept is the attribute that the task has beside its label, and its latents are those which
tell most of it beyond the label.
"""
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from cycles.auxiliary import Auxiliary
from cycles.modules import OwnModule
from lib.environment import InputError
from lib.hooks import edit
from lib.metrics.interpretability import uncertainty_given


def telling_latents(codes: Tensor, attribute: Tensor, n_keep: int, *, y: Tensor) -> Tensor:
    """The n_keep latents whose firing tells most of an attribute beyond the label, int64 [at most n_keep]; ties: lower.

    codes: dense [N, F]; attribute and label y: int64 [N]. Told is the information I(b; attribute | y) in nats, so that
    latents which hardly ever fire are not chosen for the purity of a few firings. Those that tell nothing are left out;
    raises InputError if that leaves none.
    """
    fired = codes > 0
    share = uncertainty_given(fired, attribute, int(attribute.max()) + 1, y=y, n_classes=int(y.max()) + 1)["u"]
    p = fired.double().mean(0)
    entropy = -torch.special.xlogy(p, p) - torch.special.xlogy(1 - p, 1 - p)
    told = share * entropy
    if not bool((told > 0).any()):
        raise InputError("no latent tells anything of the attribute beyond the label, so caft has nothing to take out; "
                         "name another ATTRIBUTE_FIELD")
    order = told.argsort(descending=True, stable=True)[:n_keep]
    return order[told[order] > 0]


class Ablation(Auxiliary):
    """Takes a share of the activations' part in a subspace out while the network trains."""

    def __init__(self, directions: Tensor, share: float):
        """directions [n, D], in whose span the ablated concept lies; share: lambda, 0-1; the paper has 1.

        Raises InputError for another share, and where the directions span every dimension.
        """
        if not 0 <= share <= 1:
            raise InputError(f"AUX_WEIGHT={share:g} is the share of the activations that caft takes out: set it from "
                             "0 to 1")
        width = directions.shape[1]
        if (rank := int(torch.linalg.matrix_rank(directions.double()))) >= width:
            raise InputError(f"{len(directions)} latents span all {width} dimensions, so caft would leave nothing; "
                             "lower KEEP_PCT")
        left = torch.linalg.svd(directions.double().T, full_matrices=False)[0]
        self.basis, self.share = left[:, :rank].float(), share

    def part(self, h: Tensor) -> Tensor:
        """The part of h [..., D] in the subspace."""
        basis = self.basis.to(h)
        return h @ basis @ basis.T

    def loss(self, h: Tensor, ids: Tensor) -> Tensor:
        """The share of each row's squared norm that lies in the subspace, [B]; a measure without gradient."""
        with torch.no_grad():
            return self.part(h).square().sum(1) / h.square().sum(1).clamp(min=1e-12)

    def while_training(self, model: Any) -> AbstractContextManager:
        if isinstance(model, OwnModule):  # whose layer may give more than one row of numbers for an example
            return edit(model.module, model.target, lambda h: h - self.share * self.part(h.flatten(1)).view_as(h))
        return edit(getattr(model, "lm", model), model.target, lambda h: h - self.share * self.part(h))
