"""Training samples of the published world: drawn in the same batches wherever a run resumes, and their moments."""
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch
from sampler import Sampler, World, load_world
from side_by_side import peers_python
from torch import Tensor

from lib.store import experiment_dir

COVARIANCE = 1 << 59  # seed of the samples of the moments: no training has one as large
FIRST = 200_000  # of them
CHUNK = 1 << 14  # samples drawn at one time


def open_world() -> World:
    """The published world, drawn by the peers' Python where it is missing."""
    path = experiment_dir("benchmarks") / "synth_world.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        script = Path(__file__).with_name("draw_world.py")
        subprocess.run([str(peers_python()), str(script), str(part)], check=True)
        part.replace(path)
    return load_world(path)


def moments(world: World, scaled: bool) -> tuple[Tensor, Tensor]:
    """Mean [D] and covariance [D, D], of samples that nothing else sees."""
    draw, width = Sampler(world, scaled, COVARIANCE), len(world.bias)
    total, product = torch.zeros(width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64)
    for start in range(0, FIRST, CHUNK):
        x = draw(start, CHUNK)[0].double()
        total, product = total + x.sum(0), product + x.T @ x
    n = len(range(0, FIRST, CHUNK)) * CHUNK
    mean = total / n
    return mean.float(), (product / n - mean.outer(mean)).float()


def batches(draw: Sampler, size: int, first: int, n_steps: int) -> Iterator[tuple[int, Tensor]]:
    """(step, rows [size, D]) from step `first` on.

    Several batches are drawn at one time, always the same ones together, so that a resumed run sees the same digits.
    """
    per_draw = max(1, CHUNK // size)
    for begin in range(first - first % per_draw, n_steps, per_draw):
        rows = draw(begin * size, min(per_draw, n_steps - begin) * size)[0]
        for step in range(max(first, begin), min(begin + per_draw, n_steps)):
            yield step, rows[(step - begin) * size :][:size]
