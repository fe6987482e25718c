"""The scores of SynthSAEBench (arXiv 2602.14687), however codes are made, by the formulas of SAELens' evals.py.

    dictionary = Dictionary(sae.W_dec, sae.mean)
    codings, chosen = codings_of(sae, other_samples, mean_l0=(15.0, 25.0), prune_from=1.4, condition_from=2.0)
    best, mcc, unique = matching(sae.W_dec, features)
    found = score(codings, dictionary, best, draw=draw, n=1_000_000, n_features=len(features))

MCC     mean |cosine| of the best one-to-one matching of latents and features
F1      of "the latent's code is not 0" against "the feature of its largest |cosine| fires", mean over latents; 0 where
        it is not defined, so for a latent that never fires
EV      1 - squared error over the variance about the mean; unique: share of features among the latents' best ones
dead    latents that never fire on the samples that score

An encoder is a function from rows x [B, D] to values [B, K], descending, 0 where fewer fire, and latents [B, K]. A rule
drops some of its codes; it is chosen on samples that do not score, and never sees a label.
"""
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numba import prange
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import embedding_bag, normalize
from tqdm.auto import tqdm

from lib.training.dots import dot64
from lib.training.kernels import compiled

Encode = Callable[[Tensor], tuple[Tensor, Tensor]]
Draw = Callable[[int, int], tuple[Tensor, Tensor, Tensor, Tensor]]
"""(first, n) -> x [n, D]; feature [n, M], value [n, M]; how many of the M fire in each sample [n] (sampler.py)."""
ROWS = 4096  # samples scored at once


class Dictionary(NamedTuple):
    """What codes are decoded with: x_hat = codes @ rows + centre."""

    rows: Tensor
    """[F, D], of unit norm."""
    centre: Tensor
    """[D]."""


class Codes(NamedTuple):
    """Codes of B samples, one after the other."""

    first: Tensor
    """int64 [B]: where each sample's codes begin."""
    latent: Tensor
    value: Tensor


Rule = Callable[[Tensor, Tensor, Tensor, Dictionary], Tensor]
"""(x [B, D], values [B, K], latents [B, K], dictionary) -> which are kept, bool [B, K] (synth_rules.py)."""


def select(values: Tensor, latents: Tensor, kept: Tensor) -> Codes:
    count = kept.sum(1)
    return Codes(count.cumsum(0) - count, latents[kept], values[kept])


def decode(codes: Codes, dictionary: Dictionary) -> Tensor:
    """x_hat [B, D]."""
    return embedding_bag(codes.latent, dictionary.rows, codes.first, per_sample_weights=codes.value,
                         mode="sum") + dictionary.centre


def costs(x: Tensor, codes: Codes, dictionary: Dictionary) -> Tensor:
    """By how much the squared error rises without each code, the others staying: 2 z r.d + z^2, r = x - x_hat."""
    along = np.empty(len(codes.value), np.float32)
    _dots((x - decode(codes, dictionary)).numpy(), dictionary.rows.contiguous().numpy(), codes.first.numpy(),
          codes.latent.numpy(), along=along)
    return codes.value * (2 * torch.from_numpy(along) + codes.value)


@compiled(parallel=True)
def _dots(rest, rows, first, latent, along):
    """Row of each sample times the dictionary row of each of its codes."""
    for r in prange(len(first)):
        for c in range(first[r], first[r + 1] if r + 1 < len(first) else len(latent)):
            along[c] = dot64(rest[r], rows[latent[c]])


def matching(dictionary: Tensor, features: Tensor) -> tuple[Tensor, float, float]:
    """Each latent's best feature [F], MCC, and the share of features among the best ones."""
    similar = (normalize(dictionary, dim=1) @ normalize(features, dim=1).T).abs()
    best = similar.argmax(1)
    mcc = float(similar.numpy()[linear_sum_assignment(similar.numpy(), maximize=True)].mean())
    return best, mcc, len(best.unique()) / len(best)


def score(
    codings: Sequence[tuple[Encode, dict[str, Rule]]], dictionary: Dictionary, best: Tensor, *, draw: Draw, n: int,
    n_features: int,
) -> dict[str, dict[str, float]]:
    """rule -> f1, precision, recall, l0, ev, dead_pct, over samples 0 ... n - 1; best: each latent's feature."""
    names, size = [name for _, rules in codings for name in rules], len(dictionary.rows)
    fired, both = ({name: torch.zeros(size, dtype=torch.int64) for name in names} for _ in range(2))
    squares, true = dict.fromkeys(names, 0.0), torch.zeros(n_features, dtype=torch.int64)
    total, spread = torch.zeros(len(dictionary.centre), dtype=torch.float64), 0.0
    for start in tqdm(range(0, n, ROWS), desc="scoring", leave=False):
        x, index, _, count = draw(start, min(ROWS, n - start))
        fires = index[torch.arange(index.shape[1]) < count[:, None]].long()
        true += fires.bincount(minlength=n_features)
        on = torch.zeros(len(x), n_features, dtype=torch.bool)
        on[torch.arange(len(x)).repeat_interleave(count), fires] = True
        total, spread = total + x.sum(0, dtype=torch.float64), spread + float(x.square().sum(dtype=torch.float64))
        for encode, rules in codings:
            values, latents = encode(x)
            right = on.gather(1, best[latents])
            for name, rule in rules.items():
                kept = rule(x, values, latents, dictionary)
                fired[name] += latents[kept].bincount(minlength=size)
                both[name] += latents[kept & right].bincount(minlength=size)
                error = x - decode(select(values, latents, kept), dictionary)
                squares[name] += float(error.square().sum(dtype=torch.float64))
    spread -= float(total.square().sum()) / n
    return {name: _summary(fired[name], true[best], both[name], n) | {"ev": 1 - squares[name] / spread}
            for name in names}


def _summary(fired: Tensor, true: Tensor, both: Tensor, n: int) -> dict[str, float]:
    precision, recall = both / fired.clamp(min=1), both / true.clamp(min=1)
    f1 = 2 * precision * recall / (precision + recall).clamp(min=1e-12)
    return {"f1": float(f1.mean()), "precision": float(precision.mean()), "recall": float(recall.mean()),
            "l0": float(fired.sum()) / n, "dead_pct": 100 * float((fired == 0).float().mean())}
