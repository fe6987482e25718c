"""Samples of a synthetic world (SynthSAEBench, arXiv 2602.14687), exact and fast: only what can fire is drawn.

    world = load_world(path)                      # what draw_world.py wrote with SAELens' own classes
    draw = Sampler(world, scaled=False, seed=1)
    x, index, value, count = draw(first=0, n=1024)

A feature fires where L.u + sqrt(d) e > t, with 25 factors u that a sample's features share and e of its own. Given u
all features are independent: feature i fires with q_i = Phi((L_i.u - t_i) / sqrt(d_i)). So children of silent parents
need not be drawn, and features outside the trees are proposed block by block, by geometric skips under a bound of the
block's q, and accepted with q over the bound. What is drawn has the distribution of SAELens' sampler, which draws
16,384 normals a sample.

Order, as there: a root or a feature outside the trees fires; its magnitude is max(0, mean + std N), and 0 is silence;
of its children that fire, with magnitudes of their own, one wins, each with equal chance; then the winner's children.
`scaled`: a child's magnitude is multiplied by its parent's value over its parent's mean.

Every sample has random numbers of its own (SplitMix64, its start and its odd step hashed from seed and number), so a
sample depends on neither the number of threads nor what was drawn before it.
"""
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numba import prange
from safetensors.torch import load_file
from torch import Tensor

from lib.training.kernels import compiled

BLOCK = 16  # features that share a bound
STEPS, REACH = 64, 8.0  # grid of the bound: steps of 1 / 64 from -8 to 8 standard deviations
ROOM = 256  # features of one sample at most
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
MIX_1, MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
S11, S27, S30, S31 = (np.uint64(s) for s in (11, 27, 30, 31))
ONE = np.uint64(1)
TO_UNIT = 2.0**-53


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
        n = len(world.features)
        parent = world.parent.numpy()
        first, many = np.zeros(n, np.int32), np.zeros(n, np.int32)
        inner = np.flatnonzero(parent >= 0)
        np.add.at(many, parent[inner], 1)
        first[parent[inner[::-1]]] = inner[::-1]  # the smallest number stays
        free = np.flatnonzero(parent < 0)
        free = free[np.argsort(world.threshold.numpy()[free], kind="stable")]  # alike in frequency within a block
        n_blocks = -(-len(free) // BLOCK)
        spare = n_blocks * BLOCK - len(free)
        scaled_factor = world.factor / world.spread[:, None]
        shift = -world.threshold / world.spread
        # Feature j of block b stands in column j * n_blocks + b: the maximum over a block is one of whole vectors.
        place = np.concatenate([free, np.full(spare, -1)]).reshape(n_blocks, BLOCK).T.reshape(-1)
        of = torch.from_numpy(np.where(place < 0, 0, place))
        self.factor_free = scaled_factor[of].T.contiguous()
        self.shift_free = torch.where(torch.from_numpy(place) < 0, torch.tensor(-math.inf), shift[of])
        self.seed, self.rank, self.n_blocks = seed, world.factor.shape[1], n_blocks
        rows, bias = (world.features, world.bias) if transform is None else (world.features @ transform,
                                                                             world.bias @ transform)
        self.rows, self.bias = rows.contiguous().numpy(), bias.numpy()
        self.tree = (first, many, scaled_factor.numpy(), shift.numpy(), world.mean.numpy(), world.std.numpy())
        self.free, self.scaled = place.astype(np.int32), scaled
        self.bounds = _bounds()

    def __call__(self, first: int, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Samples first ... first + n - 1: x [n, D]; index int32, value float32 [n, ROOM] of what fires; count [n]."""
        u = np.empty((n, self.rank), np.float32)
        _factors(self.seed, first, u)
        z = torch.addmm(self.shift_free, torch.from_numpy(u), self.factor_free).numpy()
        index, value = np.empty((n, ROOM), np.int32), np.empty((n, ROOM), np.float32)
        count, x = np.empty(n, np.int32), np.empty((n, self.rows.shape[1]), np.float32)
        _fire((self.seed, first, self.scaled), (u, z, self.free, self.bounds), self.tree, (index, value), count=count)
        if count.max(initial=0) >= ROOM:
            raise RuntimeError(f"a sample has {ROOM} features or more")
        _add_up((index, value), count, rows=self.rows, bias=self.bias, x=x)
        return torch.from_numpy(x), torch.from_numpy(index), torch.from_numpy(value), torch.from_numpy(count)


def _bounds() -> np.ndarray:
    """[grid, 3]: q at the grid's point, (1 - q)^BLOCK, log(1 - q)."""
    z = torch.arange(int(2 * REACH * STEPS) + 2, dtype=torch.float64) / STEPS - REACH
    q = torch.special.ndtr(z).clamp(1e-300, 1 - 1e-12)
    return torch.stack([q, torch.exp(BLOCK * torch.log1p(-q)), torch.log1p(-q)], 1).numpy()


@compiled()
def _hash(x):
    x = (x ^ (x >> S30)) * MIX_1
    x = (x ^ (x >> S27)) * MIX_2
    return x ^ (x >> S31)


@compiled()
def _start(seed, number):
    """State and odd step of a sample's random numbers."""
    key = _hash(_hash(np.uint64(seed) + GOLDEN) + np.uint64(number) * GOLDEN)
    return key, _hash(key + GOLDEN) | ONE


@compiled()
def _uniform(state):
    """In (0, 1)."""
    return (np.float64(_hash(state) >> S11) + 0.5) * TO_UNIT


@compiled()
def _normal(state, step):
    return math.sqrt(-2 * math.log(_uniform(state))) * math.cos(2 * math.pi * _uniform(state + step))


@compiled()
def _phi(z):
    return 0.5 * math.erfc(-z * 0.7071067811865476)


@compiled(parallel=True)
def _factors(seed, first, u):
    """Standard normals u [n, R]; number i of a sample takes its random numbers 2 i and 2 i + 1."""
    for r in prange(len(u)):
        state, step = _start(seed, np.uint64(first) + np.uint64(r))
        for i in range(u.shape[1]):
            u[r, i] = _normal(state, step)
            state += step + step


@compiled(parallel=True)
def _fire(sample, drawn, tree, found, count):
    seed, first, scaled = sample
    u, z, free, bounds = drawn
    index, value = found
    n_blocks = len(free) // BLOCK
    first_child, n_children, factor, shift, mean, std = tree
    rank, last = u.shape[1], len(bounds) - 1
    for r in prange(len(u)):
        state, step = _start(seed, np.uint64(first) + np.uint64(r))
        state += np.uint64(2 * rank) * step
        row, n = z[r], 0
        top = row[:n_blocks].copy()
        for j in range(1, BLOCK):
            for b in range(n_blocks):
                other = row[j * n_blocks + b]
                top[b] = other if other > top[b] else top[b]
        for b in range(n_blocks):
            at = min(max(int((top[b] + REACH) * STEPS) + 1, 0), last)
            guess = _uniform(state)
            state += step
            if guess <= bounds[at, 1]:
                continue
            position = int(math.log(guess) / bounds[at, 2])
            while position < BLOCK:
                column = position * n_blocks + b
                accept = _uniform(state) * bounds[at, 0] < _phi(row[column])
                state += step
                if accept:
                    f = free[column]
                    amount = mean[f] + std[f] * _normal(state, step)
                    state += step + step
                    while amount > 0 and n < ROOM:
                        index[r, n], value[r, n] = f, amount
                        n += 1
                        winner, won, firing = -1, 0.0, 0
                        for c in range(first_child[f], first_child[f] + n_children[f]):
                            total = shift[c]
                            for i in range(rank):
                                total += factor[c, i] * u[r, i]
                            fires = _uniform(state) < _phi(total)
                            state += step
                            if fires:
                                own = mean[c] + std[c] * _normal(state, step)
                                state += step + step
                                if own > 0:
                                    firing += 1
                                    if _uniform(state) * firing < 1:
                                        winner, won = c, own
                                    state += step
                        if winner < 0:
                            break
                        amount = won * amount / mean[f] if scaled else won
                        f = winner
                position += 1 + int(math.log(_uniform(state)) / bounds[at, 2])
                state += step
        count[r] = n


@compiled(parallel=True)
def _add_up(found, count, rows, bias, x):
    """x = bias + sum of value times feature."""
    index, value = found
    for r in prange(len(x)):
        out = x[r]
        out[:] = bias
        for c in range(count[r]):
            row, amount = rows[index[r, c]], value[r, c]
            for d in range(len(out)):
                out[d] += amount * row[d]
