"""The world that 05 draws from beside the published one: firing rates, L0, overlap of the directions.

    python world_figures.py                    # seconds; both ways of scaling children
    python world_figures.py N_SAMPLES=1_000_000

The published weights were drawn on a GPU, these on a CPU from the same configuration and seed: other numbers, the same
distribution. Below the roots features fire less often than configured, there as here: of a parent's children at most
one fires. Scaling changes how strongly children fire, not which.

Reads  store/benchmarks/synth_world.safetensors
"""
import checkout  # noqa: F401  (first: finds lib)
from lib.constants import override
from lib.ranges import Count, Seed

N_SAMPLES: Count = 200_000  # that are counted
SEED: Seed = 123            # of these samples
CONSTANTS = override(globals())

import torch
from sampler import Sampler, World
from synth_samples import open_world
from torch import Tensor
from tqdm.auto import tqdm

from lib.environment import run

CHUNK = 1 << 13  # samples drawn at one time
ROWS = 2048      # features whose largest cosine is looked for
FIRST = 4096     # the most frequent features, as many as the protocol has latents
PUBLISHED = {"L0": 34.5, f"L0 of the first {FIRST:,}": 25.0, "mean largest |cosine|": 0.15}


def configured(n: int, most: float = 0.4, least: float = 5e-4) -> Tensor:
    """Firing probabilities [n] of the published configuration: 1 / sqrt(rank), stretched from `least` to `most`."""
    p = torch.arange(1, n + 1, dtype=torch.float64) ** -0.5
    return least + (most - least) * (p - p[-1]) / (p[0] - p[-1])


def levels(parent: Tensor) -> Tensor:
    """How many parents stand above each feature [N]; -1: outside all trees."""
    level, above = torch.zeros_like(parent), parent.clone()
    while (above >= 0).any():
        level += above >= 0
        above = torch.where(above >= 0, parent[above], -1)
    alone = (parent < 0) & (torch.bincount(parent[parent >= 0], minlength=len(parent)) == 0)
    return torch.where(alone, -1, level)


def count_firings(draw: Sampler, n: int, n_features: int) -> Tensor:
    """In how many of samples 0 ... n - 1 each feature fires [N]."""
    total = torch.zeros(n_features, dtype=torch.int64)
    for start in tqdm(range(0, n, CHUNK), desc="samples", leave=False):
        _, index, _, count = draw(start, min(CHUNK, n - start))
        total += index[torch.arange(index.shape[1]) < count[:, None]].bincount(minlength=n_features)
    return total


def largest_cosine(features: Tensor, rows: int = ROWS) -> float:
    """Mean over `rows` features of the largest |cosine| with another one."""
    chosen = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[:rows]
    cosine = (features[chosen] @ features.T).abs_()
    cosine[torch.arange(len(chosen)), chosen] = 0
    return float(cosine.amax(1).mean())


def rates_against_exact(world: World, fired: Tensor, n: int) -> tuple[float, float]:
    """Mean square and largest size of the standardised differences between rates and exact marginals, of features
    without a parent: Phi(-t) times the probability of a magnitude above 0.
    """
    free = world.parent < 0
    p = torch.special.ndtr(-world.threshold[free].double())
    p *= torch.special.ndtr(world.mean[free].double() / world.std[free].double())
    z = (fired[free] - n * p) / (n * p * (1 - p)).sqrt()
    return float(z.square().mean()), float(z.abs().max())


def strength(draw: Sampler, bias: Tensor, n: int) -> tuple[float, float]:
    """Mean magnitude of what fires, and mean length of a row without the bias, in samples 0 ... n - 1."""
    x, index, value, count = draw(0, n)
    on = torch.arange(index.shape[1]) < count[:, None]
    return float(value[on].mean()), float((x - bias).norm(dim=1).mean())


def main() -> None:
    world = open_world()
    fired = count_firings(Sampler(world, False, SEED), N_SAMPLES, len(world.mean))
    rate, wanted, level = fired / N_SAMPLES, configured(len(world.mean)), levels(world.parent)
    print(f"{N_SAMPLES:,} samples" + " " * 17 + "here   published, about")
    for (name, published), value in zip(PUBLISHED.items(), (
            rate.sum(), rate[:FIRST].sum(), largest_cosine(world.features)), strict=True):
        print(f"{name:28s} {value:8.3f}   {published:g}")
    print("\nfeatures" + " " * 31 + "L0   configured")
    for one in level.unique().tolist():
        at, name = level == one, "outside trees" if one < 0 else f"level {one} of the trees"
        print(f"{int(at.sum()):6,d} {name:26s} {rate[at].sum():8.3f}   {wanted[at].sum():.3f}")
    print("\nwithout parent, rates against exact ones: mean z^2 {:.3f}, largest |z| {:.2f}".format(
        *rates_against_exact(world, fired, N_SAMPLES)))
    for scaled in (True, False):
        print("children {}scaled: mean magnitude {:.3f}, mean |x - bias| {:.2f}".format(
            "" if scaled else "not ", *strength(Sampler(world, scaled, SEED), world.bias, CHUNK)))


if __name__ == "__main__":
    run(main)
