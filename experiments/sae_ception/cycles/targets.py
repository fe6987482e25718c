"""What each arm pulls towards: a function of the arm's name for each row of cycles/arms.py that has targets.

    t, share = targets("per_class", Source(h, values, indices, y, ids, ...))

A function takes the Source and returns the targets t [N, D] with, where codes were decoded, the share that was kept.
"""
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cycles import sharpening
from cycles.arms import unlabelled
from lib.environment import InputError
from lib.sae import SAE

Made = tuple[Tensor, dict[str, float]]


@dataclass
class Source:
    """What the frozen model and its SAE gave for N training examples, and how to sharpen it."""

    h: Tensor
    """Activations [N, D]."""
    values: Tensor
    """Codes [N, k]; 0 where a slot did not fire."""
    indices: Tensor
    """Their latents [N, k]."""
    y: Tensor
    """Labels, int64 [N]."""
    ids: Tensor
    """Example ids, int64 [N]."""
    decode: Callable[[Tensor, Tensor], Tensor]
    """Codes to raw activations."""
    n_classes: int
    n_latents: int
    keep: int
    """Latents that a class keeps."""
    keep_per_example: int
    """Codes that an example keeps in the arm per_example."""
    seed: int
    """Draws what is random."""
    centre: Tensor | None = None
    """What the cosine is taken about, [D]; None: the origin."""
    unit: Tensor | None = None
    """What each latent's codes are divided by before latents are ranked, [F]; None: 1."""

    def __post_init__(self):
        self.generator = torch.Generator().manual_seed(self.seed)


MAKERS: dict[str, Callable[[Source], Made]] = {}


def targets(arm: str, x: Source) -> Made:
    """The targets t [N, D] of an arm, one row for each of x.ids, and how much sharpening kept of the decoded codes.

    That is kept_codes_frac and kept_energy_frac (sum of squares), both 0-1. Raises InputError for an arm without
    targets, and where sharpening would change nothing.
    """
    if (name := unlabelled(arm)) not in MAKERS:
        raise InputError(f"{name!r} has no targets; use one of {', '.join(MAKERS)}")
    return MAKERS[name](x)


def arm(make: Callable[[Source], Made]) -> Callable[[Source], Made]:
    """Register a function as the maker of the targets of the arm of its name."""
    MAKERS[make.__name__] = make
    return make


@arm
def per_class(x: Source) -> Made:
    return _decoded(x, _kept(x, _masks(x)))


@arm
def per_example(x: Source) -> Made:
    return _decoded(x, sharpening.per_example(x.values, x.indices, x.keep_per_example))


@arm
def full_recon(x: Source) -> Made:
    return _decoded(x, x.values)


@arm
def random_unit(x: Source) -> Made:
    return _random_directions(x, x.ids)


@arm
def permuted(x: Source) -> Made:
    t, share = per_class(x)
    return t[sharpening.derangement(len(t), x.generator)], share


@arm
def permuted_in_class(x: Source) -> Made:
    t, share = per_class(x)
    return t[sharpening.derangement_in_class(x.y, x.generator)], share


@arm
def random_latents(x: Source) -> Made:
    kept = _kept(x, _masks(x))
    chosen = sharpening.random_latents(x.values, (kept != 0).sum(1), x.generator)
    return _decoded(x, sharpening.rescaled(chosen, kept.norm(dim=1)))


@arm
def shuffled_labels(x: Source) -> Made:
    """True masks, but each example gets the mask of another example's label."""
    return _decoded(x, _kept(x, _masks(x), labels=_shuffled(x)))


@arm
def global_mask(x: Source) -> Made:
    """Masks of shuffled labels are nearly the same for every class: the latents that are largest over all examples."""
    labels = _shuffled(x)
    return _decoded(x, _kept(x, _masks(x, labels), labels))


@arm
def class_mean(x: Source) -> Made:
    sums = torch.zeros(x.n_classes, x.h.shape[1], dtype=torch.float64).index_add_(0, x.y, x.h.double())
    return (sums / torch.bincount(x.y, minlength=x.n_classes).clamp(min=1)[:, None])[x.y].float(), {}


@arm
def constant(x: Source) -> Made:
    if x.centre is not None:  # decode(0) is the centre itself, which lies in no direction from there
        return _random_directions(x, torch.zeros_like(x.ids))
    return _decoded(x, torch.zeros_like(x.values))


@arm
def to_zero(x: Source) -> Made:
    if x.centre is None:
        raise InputError("to_zero needs AUX_CENTRED=True: from the origin, 0 lies in no direction")
    return torch.zeros_like(x.h), {}


@arm
def complement(x: Source) -> Made:
    return _decoded(x, _kept(x, ~_masks(x)))


@arm
def contrast(x: Source) -> Made:
    return _decoded(x, _kept(x, sharpening.class_masks(sharpening.contrast(_means(x, x.y)), x.keep)))


@arm
def mse_loss(x: Source) -> Made:
    """The method's targets: only the distance to them is another."""
    return per_class(x)


@arm
def untrained_sae(x: Source) -> Made:
    """The method's targets: only the SAE that x was coded with is another (random_sae)."""
    return per_class(x)


@arm
def pca_targets(x: Source) -> Made:
    """x.h projected onto its x.keep leading principal directions about its mean."""
    if x.keep >= x.h.shape[1]:
        raise InputError(f"pca_targets would keep {x.keep} directions of {x.h.shape[1]}, which is every one; lower "
                         "KEEP_PCT")
    h = x.h.double()
    spread = h - (mean := h.mean(0))
    leading = torch.linalg.eigh(spread.T @ spread)[1][:, -x.keep :]
    projected = spread @ leading @ leading.T
    share = float(projected.square().sum() / spread.square().sum().clamp(min=1e-300))
    return (mean + projected).float(), {"kept_energy_frac": share}


def random_sae(sae: SAE, seed: int) -> SAE:
    """An SAE of this one's shape, centre, scale and sparsity that has learnt nothing.

    Random unit rows are both its dictionary and its encoder, without bias.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.nn.functional.normalize(torch.randn(sae.W_dec.shape, generator=generator)).to(sae.W_dec)
    origin = {name: value for name, value in sae.config.items() if name != "decoder_norm"}
    return replace(sae, W_enc=rows, b_enc=torch.zeros_like(sae.b_enc), W_dec=rows, config=origin)


def _means(x: Source, labels: Tensor) -> Tensor:
    means = sharpening.class_means(x.values, x.indices, labels, n_classes=x.n_classes, n_latents=x.n_latents)
    return means if x.unit is None else means / x.unit


def _masks(x: Source, labels: Tensor | None = None) -> Tensor:
    """bool [C, F]: the latents that each class keeps; labels other than the true ones where given."""
    return sharpening.class_masks(_means(x, x.y if labels is None else labels), x.keep)


def _shuffled(x: Source) -> Tensor:
    return x.y[torch.randperm(len(x.y), generator=x.generator)]


def _kept(x: Source, masks: Tensor, labels: Tensor | None = None) -> Tensor:
    """The values [N, k] that the masks of the labels leave. Raises InputError if that is every code that fires."""
    kept = sharpening.per_class(x.values, x.indices, x.y if labels is None else labels, masks)
    if bool((kept == x.values).all()):
        raise InputError(f"keeping {x.keep} latents per class keeps every code that fires; lower KEEP_PCT")
    return kept


def _decoded(x: Source, kept: Tensor) -> Made:
    """Targets from the kept values [N, k], and their share of all codes."""
    share = {
        "kept_codes_frac": float((kept != 0).sum() / (x.values != 0).sum().clamp(min=1)),
        "kept_energy_frac": float(kept.double().square().sum() / x.values.double().square().sum().clamp(min=1e-300)),
    }
    return x.decode(kept, x.indices), share


def _random_directions(x: Source, ids: Tensor) -> Made:
    return sharpening.about(x.centre, sharpening.random_unit(ids, x.h.shape[1], x.seed), x.h), {}
