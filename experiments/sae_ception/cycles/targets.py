"""Sharpening: which of an example's codes a target keeps, and the control arms' targets.

Codes are sparse: values and indices [N, k], a zero value being a slot that did not fire. Sharpening only zeroes
or rescales values, so decoding stays sparse. Labels y are int64 [N]. Ties go to the lower latent.
"""
from collections.abc import Callable

import torch
from torch import Tensor

from lib.environment import InputError

ARMS = (
    "lambda0", "new_seed", "per_class", "per_example", "full_recon", "random_unit", "permuted", "permuted_in_class",
    "random_latents", "shuffled_labels", "global_mask", "class_mean", "constant", "to_zero", "complement", "contrast",
)
NO_TARGET = ("lambda0", "new_seed")


def method(arm: str) -> str:
    """What an arm does: its name up to "@", so that "per_class@weak" is per_class with constants of its own."""
    return arm.partition("@")[0]


def n_kept(n_latents: int, pct: float) -> int:
    """max(1, floor(n_latents * pct / 100)); pct is a percentage, 0-100."""
    return max(1, int(n_latents * pct // 100))


def class_means(values: Tensor, indices: Tensor, y: Tensor, n_classes: int, n_latents: int) -> Tensor:
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

    Raises InputError if n_keep reaches the number of codes, which would leave the codes as they are.
    """
    if n_keep >= values.shape[1]:
        k = values.shape[1]
        raise InputError(f"per_example would keep {n_keep} of {k} codes, which sharpens nothing; lower "
                         "KEEP_PER_EXAMPLE")
    by_latent = indices.argsort(dim=1, stable=True)
    order = by_latent.gather(1, values.gather(1, by_latent).argsort(dim=1, descending=True, stable=True))
    keep = torch.zeros(values.shape, dtype=torch.bool).scatter_(1, order[:, :n_keep], True)
    return torch.where(keep, values, torch.zeros_like(values))


def random_latents(values: Tensor, n_active: Tensor, generator: torch.Generator) -> Tensor:
    """n_active [N] random ones of each row's firing codes, rescaled to the row's norm; n_active is at most what
    fires.
    """
    lottery = torch.rand(values.shape, generator=generator, dtype=torch.float64).masked_fill(values == 0, -1.0)
    rank = lottery.argsort(dim=1, descending=True).argsort(dim=1)
    return torch.where(rank < n_active[:, None], values, torch.zeros_like(values))


def rescaled(values: Tensor, norms: Tensor) -> Tensor:
    """values [N, k] with each row scaled to the norm in norms [N]; rows of zeros stay zero."""
    return values * (norms / values.norm(dim=1).clamp(min=1e-12))[:, None]


def random_unit(example_ids: Tensor, width: int, seed: int) -> Tensor:
    """A fixed random unit vector per example id, [N, width]: the reference's third strategy, no SAE in it."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(int(example_ids.max()) + 1, width, generator=generator)
    return torch.nn.functional.normalize(table)[example_ids]


def about(centre: Tensor | None, directions: Tensor, h: Tensor) -> Tensor:
    """Targets [N, D] in the given directions (unit rows) as the cosine will see them: about the centre [D], None: the
    origin.

    A unit vector about the origin, seen from a centre far away, is the direction to the origin, whatever it was. The
    step from the centre is as long as an activation's usually is (root mean square), so that the sum keeps its digits.
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
    """A derangement that maps every example to another one of its own class."""
    permutation = torch.arange(len(y))
    for c in y.unique():
        members = (y == c).nonzero()[:, 0]
        permutation[members] = members[derangement(len(members), generator)]
    return permutation


def sharpened_codes(arm: str, values: Tensor, indices: Tensor, y: Tensor, n_classes: int, n_latents: int,
                    keep: int, keep_per_example: int, generator: torch.Generator) -> Tensor:
    """The values [N, k] that the arm's targets decode. keep: latents per class; keep_per_example: per row.

    Raises InputError where sharpening would be a no-op: every firing code kept by an arm that should drop some.
    """
    if arm == "full_recon":
        return values
    if arm == "constant":
        return torch.zeros_like(values)
    if arm == "per_example":
        return per_example(values, indices, keep_per_example)
    means = class_means(values, indices, y, n_classes, n_latents)
    masks = class_masks(contrast(means) if arm == "contrast" else means, keep)
    if arm == "complement":
        masks = ~masks
    labels = y
    if arm == "shuffled_labels":  # true masks, each example with the mask of another example's label
        labels = y[torch.randperm(len(y), generator=generator)]
    if arm == "global_mask":  # masks recomputed from shuffled labels, nearly the global top latents for every class
        labels = y[torch.randperm(len(y), generator=generator)]
        masks = class_masks(class_means(values, indices, labels, n_classes, n_latents), keep)
    kept = per_class(values, indices, labels, masks)
    if bool((kept == values).all()):
        raise InputError(f"keeping {keep} latents per class keeps every code that fires; lower KEEP_PCT")
    if arm == "random_latents":
        chosen = random_latents(values, (kept != 0).sum(1), generator)
        return rescaled(chosen, kept.norm(dim=1))
    return kept


def targets(arm: str, h: Tensor, values: Tensor, indices: Tensor, decode: Callable[[Tensor, Tensor], Tensor], y: Tensor,
            example_ids: Tensor, *, n_classes: int, n_latents: int, keep: int, keep_per_example: int,
            seed: int, centre: Tensor | None = None) -> tuple[Tensor, dict[str, float]]:
    """The constant targets t [N, D] of an arm, row i for example_ids[i], and how much sharpening kept.

    h [N, D]: activations; values, indices [N, k]: their codes; decode: codes to raw activations; centre [D]: what the
    cosine is taken about, None: the origin. Raises InputError for an arm without targets, or one that sharpens nothing.
    Returned beside t: kept_codes_frac and kept_energy_frac (sum of squares), both 0-1, of the decoded codes.
    """
    arm = method(arm)
    if arm not in ARMS or arm in NO_TARGET:
        raise InputError(f"{arm!r} has no targets; use one of {', '.join(a for a in ARMS if a not in NO_TARGET)}")
    generator = torch.Generator().manual_seed(seed)
    if arm == "random_unit":
        return about(centre, random_unit(example_ids, h.shape[1], seed), h), {}
    if arm == "constant" and centre is not None:  # decode(0) is the centre itself and has no direction from it
        return about(centre, random_unit(torch.zeros_like(example_ids), h.shape[1], seed), h), {}
    if arm == "to_zero":
        if centre is None:
            raise InputError("to_zero needs AUX_CENTRED=True: from the origin, 0 lies in no direction")
        return torch.zeros_like(h), {}
    if arm == "class_mean":
        means = torch.zeros(n_classes, h.shape[1], dtype=torch.float64).index_add_(0, y, h.double())
        return (means / torch.bincount(y, minlength=n_classes).clamp(min=1)[:, None])[y].float(), {}
    base = "per_class" if arm.startswith("permuted") else arm
    kept = sharpened_codes(base, values, indices, y, n_classes, n_latents, keep, keep_per_example, generator)
    share = {
        "kept_codes_frac": float((kept != 0).sum() / (values != 0).sum().clamp(min=1)),
        "kept_energy_frac": float(kept.double().square().sum() / values.double().square().sum().clamp(min=1e-300)),
    }
    t = decode(kept, indices)
    if arm == "permuted":
        t = t[derangement(len(t), generator)]
    if arm == "permuted_in_class":
        t = t[derangement_in_class(y, generator)]
    return t, share
