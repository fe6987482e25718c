"""Samples of a synthetic world (SynthSAEBench, arXiv 2602.14687), exact and fast: only what can fire is drawn.

    world = load_world(path)                      # what draw_world.py wrote with SAELens' own classes
    draw = Sampler(world, scaled=False, seed=1)
    x, index, value, count = draw(first=0, n=1024)

A feature fires where L.u + sqrt(d) e > t, with 25 factors u that a sample's features share and e of its own. Given u
all features are independent: feature i fires with q_i = Phi((L_i.u - t_i) / sqrt(d_i)). So children of silent parents
need not be drawn. Of the features without a parent all get 16 random bits, and a bound of q from a bfloat16 product,
with a margin that its rounding can't exceed, silences all but a few; these get 53 more bits and the exact q. What is
drawn has the distribution of SAELens' sampler, which draws 16,384 normals a sample.

Order, as there: a root or a feature outside the trees fires; its magnitude is max(0, mean + std N), and 0 is silence;
of its children that fire, with magnitudes of their own, one wins, each with equal chance; then the winner's children.
`scaled`: a child's magnitude is multiplied by its parent's value over its parent's mean.

Rows are sums of features rounded to bfloat16 (cosine with the world's above .99999), exact otherwise. Every sample has
random numbers of its own, by their numbers (see sampler_loops), so it depends on neither the number of threads, nor
the precision of the bound, nor what was drawn before it.
"""
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from sampler_loops import GRID, PER_WORD, REACH, TAIL, factors, fire
from sampler_rows import add_up
from torch import Tensor
from torch.nn.functional import pad

from lib.training.workspace import low_precision, multiplies_bfloat16

ROOM = 256  # features of one sample at most
CHUNK = 1024  # samples whose bounds are kept at one time; with fewer, threads wait for each other more often
COLUMNS = 8 * PER_WORD  # the number of columns is a multiple of this
NEVER = -100.0  # shift of columns without a feature


@dataclass
class World:
    """What rows are made of."""

    features: Tensor
    """[N, D], unit rows."""
    bias: Tensor
    """[D]."""
    factor: Tensor
    """[N, R]: L."""
    spread: Tensor
    """[N]: sqrt(d), of what a feature does not share."""
    threshold: Tensor
    """[N]: t."""
    mean: Tensor
    """[N]: of the magnitude when it fires."""
    std: Tensor
    """[N]."""
    parent: Tensor
    """int64 [N]; -1: none. Children of one parent are consecutive, and exclude each other."""


def load_world(path: Path) -> World:
    """The world in a file of draw_world.py."""
    return World(**load_file(path))


class Sampler:
    """Draws samples by number: sample i of a seed is always the same."""

    def __init__(self, world: World, scaled: bool, seed: int, transform: Tensor | None = None):
        """transform [D, D], symmetric: rows come as x @ transform; it is folded into the features."""
        self.seed, self.scaled, self.rank = seed, scaled, world.factor.shape[1]
        factor, shift = world.factor / world.spread[:, None], -world.threshold / world.spread
        roots = (world.parent < 0).nonzero().flatten()
        roots = roots[world.threshold[roots].argsort(stable=True)]  # what fires often stands side by side
        spare = -len(roots) % COLUMNS
        self.low = low_precision(factor[roots], shift[roots])
        self.low = pad(self.low, (0, 0, 0, spare))
        self.low[len(roots) :, self.rank] = NEVER
        self.z = torch.empty(CHUNK, len(self.low), dtype=torch.bfloat16)
        self.reach = 1.02 / 128 * float(factor[roots].norm(dim=1).max())  # two factors, each off by up to 1 / 256
        record = _records(world, factor, shift)
        self.roots = pad(roots.int(), (0, spare)).numpy(), pad(record[roots], (0, 0, 0, spare)).numpy()
        self.kin, most = _kin(world.parent, record)
        self.tables = _phi(), _layers(), most
        features, bias = world.features, world.bias
        if transform is not None:
            features, bias = features @ transform, bias @ transform
        self.rows, self.bias = features.bfloat16().contiguous().view(torch.uint16).numpy(), bias.numpy()

    def __call__(self, first: int, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Samples first ... first + n - 1: x [n, D]; index int32, value float32 [n, ROOM] of what fires; count [n]."""
        found = np.empty((n, ROOM), np.int32), np.empty((n, ROOM), np.float32), np.empty(n, np.int32)
        u, norm = np.zeros((n, self.roots[1].shape[1] - 4), np.float32), np.empty(n, np.float32)
        x = np.empty((n, len(self.bias)), np.float32)
        factors(self.seed, first, rank=self.rank, layers=self.tables[1], u=u, norm=norm)
        margin = norm * np.float32(self.reach) + np.float32(0.001)
        for start in range(0, n, CHUNK):
            part = slice(start, min(start + CHUNK, n))
            drawn, out = (u[part], self._bound(u[part]), margin[part]), tuple(a[part] for a in found)
            fire((self.seed, first + start, self.scaled, self.rank), drawn, roots=self.roots, kin=self.kin,
                 tables=self.tables, out=out)
            add_up(out, self.rows, bias=self.bias, x=x[part])
        index, value, count = (torch.from_numpy(a) for a in found)
        if n and count.max() >= ROOM:
            raise RuntimeError(f"a sample has {ROOM} features or more")
        return torch.from_numpy(x), index, value, count

    def _bound(self, u: np.ndarray) -> np.ndarray:
        """factors . u + shift of every column, bits of bfloat16 [n, C]."""
        given = torch.zeros(len(u), self.low.shape[1], dtype=torch.bfloat16)
        given[:, : self.rank], given[:, self.rank : self.rank + 2] = torch.from_numpy(u[:, : self.rank]), 1
        z = self.z[: len(u)]
        if multiplies_bfloat16(given.device):
            torch.mm(given, self.low.T, out=z)
        else:
            z.copy_(given.float() @ self.low.float().T)
        return z.view(torch.uint16).numpy()


def _records(world: World, factor: Tensor, shift: Tensor) -> Tensor:
    """[N, U + 4]: see sampler_loops."""
    chance = torch.special.ndtr(world.mean.double() / world.std.double()).float()
    rest = torch.stack([shift, chance, world.mean, world.std], 1)
    return torch.cat([pad(factor, (0, -factor.shape[1] % 4)), rest], 1)


def _kin(parent: Tensor, record: Tensor) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], int]:
    """The children in groups of four (see sampler_loops), and the most children that one feature has, rounded up."""
    many = torch.bincount(parent[parent >= 0], minlength=len(parent))
    inner = (parent >= 0).nonzero().flatten()
    first_child = torch.full_like(parent, len(parent)).scatter_reduce_(0, parent[inner], inner, "amin")
    n_groups = -(-many // 4)
    groups = torch.stack([n_groups.cumsum(0) - n_groups, n_groups], 1)
    own = torch.arange(len(parent)).repeat_interleave(n_groups)
    turn = torch.arange(len(own)) - groups[own, 0]
    child = first_child[own] + 4 * turn
    place = child[:, None] + torch.arange(4)
    there = 4 * turn[:, None] + torch.arange(4) < many[own, None]
    kin = torch.where(there[:, :, None], record[place.clamp(max=len(parent) - 1)], 0).transpose(1, 2).contiguous()
    return (groups.int().numpy(), child.int().numpy(), kin.numpy()), 4 * int(n_groups.max())


def _phi() -> np.ndarray:
    """[steps, 2]: least and largest Phi in each step of the grid, the first and last without end."""
    z = torch.arange(2 * int(REACH) * GRID + 1, dtype=torch.float64) / GRID - REACH
    phi = torch.special.ndtr(z)
    table = torch.stack([phi, torch.cat([phi[1:], torch.ones(1)])], 1)
    table[0, 0] = 0
    return table.numpy()


def _layers() -> np.ndarray:
    """The ziggurat, [257, 2]: half-width of each layer, the widest first, and exp(-x^2 / 2) there."""
    area = TAIL * math.exp(-TAIL**2 / 2) + math.sqrt(math.pi / 2) * math.erfc(TAIL / math.sqrt(2))
    x = [area * math.exp(TAIL**2 / 2), TAIL]
    while len(x) < 256:
        x.append(math.sqrt(-2 * math.log(area / x[-1] + math.exp(-x[-1]**2 / 2))))
    half = np.array([*x, 0.0])
    return np.stack([half, np.exp(-half**2 / 2)], 1)
