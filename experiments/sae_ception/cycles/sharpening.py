"""Sharpening: which codes an example keeps, and the random draws that controls are made with.

Codes are sparse: values and indices [N, k], where a zero value is a slot that did not fire. Sharpening only zeroes or
rescales values, so decoding stays sparse. Labels y are int64 [N]. Ties go to the lower latent.
"""
import torch
from torch import Tensor

from lib.environment import InputError


def n_kept(n_latents: int, pct: float) -> int:
    """max(1, floor(n_latents * pct / 100)); pct is a percentage, 0-100."""
    return max(1, int(n_latents * pct // 100))


def class_means(values: Tensor, indices: Tensor, y: Tensor, *, n_classes: int, n_latents: int) -> Tensor:
    """Mean code of every latent in every class, float64 [C, F]; a class without examples is 0."""
    sums = torch.zeros(n_classes * n_latents, dtype=torch.float64)
    sums.index_add_(0, (y[:, None] * n_latents + indices.long()).flatten(), values.double().flatten())
    sizes = torch.bincount(y, minlength=n_classes).clamp(min=1)
    return sums.view(n_classes, n_latents) / sizes[:, None]


def class_masks(scores: Tensor, n_keep: int) -> Tensor:
    """bool [C, F]: the n_keep latents with the largest score in each row of scores [C, F]."""
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :n_keep]
    return torch.zeros(scores.shape, dtype=torch.bool).scatter_(1, order, True)


def contrast(means: Tensor) -> Tensor:
    """Class mean minus the mean of the other classes' means, [C, F]."""
    return means - (means.sum(0) - means) / max(1, len(means) - 1)


def per_class(values: Tensor, indices: Tensor, y: Tensor, masks: Tensor) -> Tensor:
    """values where the latent is in the mask (bool [C, F]) of the example's class, else 0."""
    return torch.where(masks[y[:, None], indices.long()], values, torch.zeros_like(values))


def per_example(values: Tensor, indices: Tensor, n_keep: int) -> Tensor:
    """The n_keep largest values of each row, else 0. Labels play no part.

    Raises InputError if no row has more codes that fire than that, which would leave all codes as they are.
    """
    most = int((values > 0).sum(1).max()) if len(values) else n_keep + 1
    if n_keep >= most:
        raise InputError(f"per_example would keep {n_keep} of at most {most} codes that fire, which sharpens nothing; "
                         "lower KEEP_PER_EXAMPLE")
    by_latent = indices.argsort(dim=1, stable=True)
    order = by_latent.gather(1, values.gather(1, by_latent).argsort(dim=1, descending=True, stable=True))
    keep = torch.zeros(values.shape, dtype=torch.bool).scatter_(1, order[:, :n_keep], True)
    return torch.where(keep, values, torch.zeros_like(values))


def random_latents(values: Tensor, n_active: Tensor, generator: torch.Generator) -> Tensor:
    """n_active [N] of each row's firing codes, drawn at random; n_active is at most the number that fire."""
    lottery = torch.rand(values.shape, generator=generator, dtype=torch.float64).masked_fill(values == 0, -1.0)
    rank = lottery.argsort(dim=1, descending=True).argsort(dim=1)
    return torch.where(rank < n_active[:, None], values, torch.zeros_like(values))


def rescaled(values: Tensor, norms: Tensor) -> Tensor:
    """values [N, k] with each row scaled to the norm in norms [N]; rows of zeros stay zero."""
    return values * (norms / values.norm(dim=1).clamp(min=1e-12))[:, None]


def random_unit(example_ids: Tensor, width: int, seed: int) -> Tensor:
    """A fixed random unit vector for each example id, [N, width]."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(int(example_ids.max()) + 1, width, generator=generator)
    return torch.nn.functional.normalize(table)[example_ids]


def about(centre: Tensor | None, directions: Tensor, h: Tensor) -> Tensor:
    """Targets [N, D] in the given directions (unit rows) as seen from the centre [D]; None: the origin.

    A cosine about the centre sees unit vectors about a distant origin all in one direction, the origin's. So the
    directions start at the centre, with the usual length of an activation (root mean square), which keeps the digits of
    the sum.
    """
    if centre is None:
        return directions
    return centre + directions * (h - centre).square().sum(1).mean().sqrt()


def derangement(n: int, generator: torch.Generator) -> Tensor:
    """A random permutation of 0..n-1 without a fixed point (one cycle, Sattolo); n = 1 has none and stays."""
    order = torch.randperm(n, generator=generator)
    permutation = torch.empty(n, dtype=torch.long)
    permutation[order] = order.roll(-1)
    return permutation


def derangement_in_class(y: Tensor, generator: torch.Generator) -> Tensor:
    """A derangement that maps every example to another one of its class."""
    permutation = torch.arange(len(y))
    for c in y.unique():
        members = (y == c).nonzero()[:, 0]
        permutation[members] = members[derangement(len(members), generator)]
    return permutation
