"""Adversarial accuracy under a fixed budget: FGSM and PGD, L-infinity in input space or L2 per token.

`logits_of(x)` maps inputs x [B, ...] to logits [B, C]: pixels [B, P] for "linf", token embeddings [B, T, E] for "l2".
All models that are compared get the same budget.
"""
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

PGD_STEPS = 20
Logits = Callable[[Tensor], Tensor]


def fgsm(
    logits_of: Logits, x: Tensor, y: Tensor, eps: float, *, norm: str = "linf", mask: Tensor | None = None,
    bounds: tuple[float, float] | None = None,
) -> Tensor:
    """x moved by one step of length eps up the loss.

    norm "linf": sign of the gradient; "l2": gradient direction of each last-dimension vector. mask [B, T]:
    the positions that may move (None: all). bounds: the valid range of inputs.
    Range: within eps of x. Source: Goodfellow et al. (2015).
    """
    _, uphill = _loss_and_direction(logits_of, x, y, norm)
    return _project(x + eps * uphill, x, eps, norm=norm, mask=mask, bounds=bounds)


def pgd(
    logits_of: Logits, x: Tensor, y: Tensor, eps: float, *, generator: torch.Generator, norm: str = "linf",
    mask: Tensor | None = None, bounds: tuple[float, float] | None = None,
) -> Tensor:
    """20 steps of 2.5 eps / 20 from a random start, projected after each.

    Each example keeps the iterate with its largest loss. generator draws the start; other arguments as in fgsm.
    Range: within eps of x. Source: Madry et al. (2018).
    """
    noise = torch.rand(x.shape, generator=generator).to(x) * 2 - 1
    if norm == "l2":
        noise = noise / noise.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    moved = _project(x + eps * noise, x, eps, norm=norm, mask=mask, bounds=bounds)
    best, best_loss = moved, torch.full((len(x),), -torch.inf).to(x)
    for step in range(PGD_STEPS + 1):
        loss, uphill = _loss_and_direction(logits_of, moved, y, norm)
        better = loss > best_loss
        best = torch.where(better.view(-1, *[1] * (x.dim() - 1)), moved, best)
        best_loss = torch.where(better, loss, best_loss)
        if step < PGD_STEPS:
            further = moved + 2.5 * eps / PGD_STEPS * uphill
            moved = _project(further, x, eps, norm=norm, mask=mask, bounds=bounds)
    return best


def _loss_and_direction(logits_of: Logits, x: Tensor, y: Tensor, norm: str) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each example [B], and the direction of its steepest ascent: unit length in the norm, like x."""
    x = x.detach().requires_grad_(True)
    losses = cross_entropy(logits_of(x), y, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), x)
    if norm == "linf":
        return losses.detach(), gradient.sign()
    return losses.detach(), gradient / gradient.norm(dim=-1, keepdim=True).clamp(min=1e-12)


def _project(
    moved: Tensor, x: Tensor, eps: float, *, norm: str, mask: Tensor | None, bounds: tuple[float, float] | None
) -> Tensor:
    """The point nearest to `moved` within the budget about x, the mask and the bounds."""
    change = moved.detach() - x
    if norm == "linf":
        change = change.clamp(-eps, eps)
    else:
        change = change * (eps / change.norm(dim=-1, keepdim=True).clamp(min=1e-12)).clamp(max=1)
    if mask is not None:
        change = change * mask.unsqueeze(-1).to(change)
    return x + change if bounds is None else (x + change).clamp(*bounds)


def active_jaccard(a: Tensor, b: Tensor) -> Tensor:
    """Overlap |A and B| / |A or B| of the active latents of paired codes a, b [N, F]: float64 [N]; 1 if none fires.

    Range: 0 to 1. Source: Jaccard (1901).
    """
    a, b = a > 0, b > 0
    union = (a | b).sum(1).double()
    return torch.where(union > 0, (a & b).sum(1) / union.clamp(min=1), torch.ones_like(union))
