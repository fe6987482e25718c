"""What the latents that fire on a sample say of each other one, learnt from codes without labels.

    context = learn(samples, latents, n_samples=n, n_latents=F)     # of the codes that are kept
    more = of_others(context, samples, latents, kept)               # each code's log odds from the others on its sample

A feature of a hierarchy fires only where its parent does, and excludes its siblings. Nobody says which latents are kin,
but their codes show it: the latents become a tree in which those that tell most of each other are neighbours (C. Chow
and C. Liu, Approximating discrete probability distributions with dependence trees, 1968). In a tree a latent depends on
its neighbours alone, so its log odds are those of its rate and, added up over them, log P(neighbour's state | latent
fires) / P(the same | it is silent). Children of one parent that fire together more rarely than by chance exclude each
other besides.
"""
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse import csr_array, triu
from scipy.sparse.csgraph import minimum_spanning_tree
from scipy.special import logit, xlogy
from torch import Tensor

MOST = 0.999  # a latent is never surer of a neighbour: codes miss some firings
MOSTLY = 0.7  # share of a latent's firings on which its parent fires too
RARER = 1.0  # siblings exclude each other where they meet exp(RARER) times more rarely than by chance


class Context(NamedTuple):
    """Of F latents."""

    alone: Tensor
    """[F]: a latent's log odds, beside its rate's, where no other fires."""
    given: csr_array
    """[F, F]: what the second latent's log odds gain where the first fires."""


def learn(samples: Tensor, latents: Tensor, *, n_samples: int, n_latents: int) -> Context:
    """From codes: int64 [C] each, the sample and the latent; a latent occurs once on a sample."""
    fires = _fires(samples, latents, (n_samples, n_latents))
    count, together = fires.sum(0), csr_array(fires.T @ fires)
    first, second = _tree(count, together, n_samples)
    seen, judged = np.concatenate([first, second]), np.concatenate([second, first])
    both, rate = _at(together, seen, judged), (count[seen] + 0.5) / (n_samples + 1)
    if_fires = np.minimum((both + rate) / (count[judged] + 1), MOST)
    if_silent = (count[seen] - both + rate) / (n_samples - count[judged] + 1)
    alone = np.bincount(judged, np.log1p(-if_fires) - np.log1p(-if_silent), minlength=n_latents)
    given = csr_array((logit(if_fires) - logit(if_silent), (seen, judged)), shape=together.shape)
    return Context(torch.from_numpy(alone).float(), (given + _exclusions(count, together, first, second)).tocsr())


def of_others(context: Context, samples: Tensor, latents: Tensor, kept: Tensor) -> Tensor:
    """What each code's log odds get from the codes that are kept, bool [C], on the same sample: float32 [C]."""
    shape = int(samples.max()) + 1 if len(samples) else 1, len(context.alone)
    told = _fires(samples[kept], latents[kept], shape) @ context.given
    return context.alone[latents] + torch.from_numpy(_at(told, samples.numpy(), latents.numpy())).float()


def _fires(samples: Tensor, latents: Tensor, shape: tuple[int, int]) -> csr_array:
    return csr_array((np.ones(len(samples)), (samples.numpy(), latents.numpy())), shape=shape)


def _at(matrix: csr_array, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Entries of a sparse matrix, 0 where it has none; scipy wants arrays of its own."""
    return np.asarray(matrix[rows.copy(), columns.copy()]).ravel() if len(rows) else np.zeros(0)


def _tree(count: np.ndarray, together: csr_array, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The two ends of each edge of the tree of largest mutual information, of pairs that attract each other."""
    pairs = triu(together, 1).tocoo()
    told = mutual_information(count[pairs.row], count[pairs.col], pairs.data, n)
    attract = (pairs.data * n > count[pairs.row] * count[pairs.col]) & (told > 0)
    weights = csr_array((-told[attract], (pairs.row[attract], pairs.col[attract])), shape=together.shape)
    tree = minimum_spanning_tree(weights).tocoo()
    return tree.row, tree.col


def mutual_information(a: np.ndarray, b: np.ndarray, both: np.ndarray, n: int) -> np.ndarray:
    """Of pairs of events on n samples, in nats: how often each of the two occurs, and both of them."""
    cells = ((both, a, b), (a - both, a, n - b), (b - both, n - a, b), (n - a - b + both, n - a, n - b))
    return sum(xlogy(cell, cell * n / (x * y)) for cell, x, y in cells) / n


def _exclusions(count: np.ndarray, together: csr_array, first: np.ndarray, second: np.ndarray) -> csr_array:
    """log of how often siblings meet over how often they would by chance, given their parent, where that is rare."""
    child, parent = np.where(count[first] < count[second], (first, second), (second, first))
    belongs = _at(together, child, parent) >= MOSTLY * count[child]
    kin = csr_array((np.ones(belongs.sum()), (child[belongs], parent[belongs])), shape=together.shape)
    a, b = (kin @ kin.T).nonzero()
    a, b = a[a != b], b[a != b]
    parents = np.zeros(len(count), dtype=np.int64)
    parents[child[belongs]] = parent[belongs]  # one of them, where a latent has several
    chance = count[a] * count[b] / count[parents[a]].clip(min=1)
    rarer = np.log((_at(together, a, b) + 1) / (chance + 1))
    return csr_array((rarer[rarer < -RARER], (a[rarer < -RARER], b[rarer < -RARER])), shape=together.shape)
