"""Which codes of an SAE count as firing in SynthSAEBench: rules that are chosen on other samples and see no label.

own            what the SAE does: its k largest codes, or those above its thresholds
threshold l0   one threshold for all latents, at that mean L0
pruned l0      a threshold at prune_from times that L0; then codes go whose removal, one at a time, raises the squared
               error least, down to that L0
odds l0        the same candidates; then codes go whose latents fire with the least posterior odds
even odds      the candidates whose latents fire more likely than not: an L0 that nobody has to know
conditional l0 as odds, of more candidates, where a latent's odds depend on which others fire (synth_context.py)
even conditional  those more likely than not
batch k        BatchTopK over groups of samples, as SAELens scores an SAE that it trained with it
"""
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from synth_context import Context, learn, of_others
from synth_scores import ROWS, Codes, Dictionary, Encode, Rule, costs, decode, select
from torch import Tensor

from lib.sae import SAE

GROUP = 1024  # samples over which BatchTopK chooses, as SAELens does where it scores
PRIOR = 5.0  # codes that the mean variance of all latents counts for, in the variance of one
TINY = 1e-12  # noise of an SAE without error, variance of a code that is always the same
CONTEXTS = 4  # times that the context is learnt, each from what is kept by the last one
LOOKS = 3  # at which codes of a sample are kept, the others being what the last look kept
ROUNDS = 8  # in which codes are kept by what the last round's say of their latents; their number settles in four


def everything(x: Tensor, values: Tensor, latents: Tensor, dictionary: Dictionary) -> Tensor:
    """Every code that is not 0."""
    return values != 0


def above(threshold: float | Tensor) -> Rule:
    """Codes above one threshold for all latents, or above their own ones [F]."""
    if isinstance(threshold, float):
        return lambda x, values, latents, dictionary: values > threshold
    return lambda x, values, latents, dictionary: values > threshold[latents]


def batch_topk(k: float) -> Rule:
    """The k n largest codes of each group of n samples: how SAELens scores an SAE that it trained with BatchTopK."""
    def kept(x: Tensor, values: Tensor, latents: Tensor, dictionary: Dictionary) -> Tensor:
        parts = []
        for part in values.split(GROUP):
            least = part.flatten().topk(min(int(k * len(part)), part.numel())).values[-1]
            parts.append((part >= least) & (part > 0))
        return torch.cat(parts)

    return kept


def pruned(threshold: float, price: float) -> Rule:
    """Codes above a threshold whose removal, one at a time, raises the squared error by `price` or more."""
    def kept(x: Tensor, values: Tensor, latents: Tensor, dictionary: Dictionary) -> Tensor:
        found = values > threshold
        found[found.clone()] = costs(x, select(values, latents, found), dictionary) >= price
        return found

    return kept


class Known(NamedTuple):
    """What is known of the latents [F] before a sample is seen, and of the error."""

    rate: Tensor
    """Share of the samples on which each fires."""
    mean: Tensor
    """Of its codes where it fires."""
    variance: Tensor
    """The same codes'."""
    noise: float
    """Mean squared error along one direction."""


def known_of(latents: Tensor, values: Tensor, *, n_samples: int, n_latents: int, noise: float) -> Known:
    """From the codes that are kept; the variance of a latent with few of them is drawn to the mean of all."""
    count, total, square = (torch.zeros(n_latents).index_add_(0, latents, values**power) for power in range(3))
    mean = total / count.clamp(min=1)
    variance = (square / count.clamp(min=1) - mean**2).clamp(min=TINY)
    common = variance[count > 0].mean()
    return Known((count + 0.5) / (n_samples + 1), mean, (count * variance + PRIOR * common) / (count + PRIOR), noise)


def log_odds(latents: Tensor, values: Tensor, prices: Tensor, known: Known) -> Tensor:
    """Of each code's latent firing against its not firing, given the sample and the other codes, by Bayes' rule.

    With normal errors of variance `noise` along each direction, codes normal about their latent's mean, a dictionary of
    unit rows, and the code integrated out about its value (Laplace): price / (2 noise) + log N(value; mean, variance)
    + log(2 pi noise) / 2 + log(rate / (1 - rate)). So a rare latent needs more evidence, and so does an unusual code.
    """
    rate, mean, variance = known.rate[latents], known.mean[latents], known.variance[latents]
    evidence = prices / known.noise - (values - mean).square() / variance + (known.noise / variance).log()
    return evidence / 2 + rate.logit()


def likely(threshold: float, known: Known, least: float) -> Rule:
    """Codes above a threshold whose latents fire with log odds of `least` or more."""
    def kept(x: Tensor, values: Tensor, latents: Tensor, dictionary: Dictionary) -> Tensor:
        found = values > threshold
        codes = select(values, latents, found)
        found[found.clone()] = log_odds(codes.latent, codes.value, costs(x, codes, dictionary), known) >= least
        return found

    return kept


def conditional(threshold: float, known: Known, context: Context, *, starts: float, least: float) -> Rule:
    """Codes above a threshold whose latents fire with log odds of `least` or more, given the others that are kept; at
    first those with log odds of `starts` or more without context.
    """
    def kept(x: Tensor, values: Tensor, latents: Tensor, dictionary: Dictionary) -> Tensor:
        found = values > threshold
        codes, samples = select(values, latents, found), found.nonzero()[:, 0]
        alone = log_odds(codes.latent, codes.value, costs(x, codes, dictionary), known)
        on = alone >= starts
        for _ in range(LOOKS):
            on = alone + of_others(context, samples, codes.latent, on) >= least
        found[found.clone()] = on
        return found

    return kept


class Candidates(NamedTuple):
    """All codes above a threshold on the samples that choose."""

    samples: Tensor
    latents: Tensor
    values: Tensor
    prices: Tensor
    """Squared error without the code - with it."""
    noise: float
    """Mean squared error along one direction, with all of them."""


def candidates(parts: Sequence[tuple[Tensor, Tensor, Tensor]], low: float, dictionary: Dictionary) -> Candidates:
    """From parts of the samples, each x [n, D] with its values and latents [n, K]."""
    codes: list[Codes] = []
    samples, prices, squares, n = [], [], 0.0, 0
    for x, values, latents in parts:
        codes.append(select(values, latents, values > low))
        samples.append((values > low).nonzero()[:, 0] + n)
        prices.append(costs(x, codes[-1], dictionary))
        squares, n = squares + float((x - decode(codes[-1], dictionary)).square().sum()), n + len(x)
    return Candidates(
        torch.cat(samples), torch.cat([c.latent for c in codes]), torch.cat([c.value for c in codes]),
        prices=torch.cat(prices), noise=max(squares / (n * dictionary.rows.shape[1]), TINY))


def settle(
    found: Candidates, n_samples: int, n_latents: int, mean_l0: float, even: bool = False
) -> tuple[Known, float]:
    """What the codes that are kept say of their latents, and the log odds from which they are kept: mean_l0's, or 0."""
    kept, least = found.prices >= _nth(found.prices, mean_l0 * n_samples), 0.0
    for _ in range(ROUNDS):
        known = known_of(found.latents[kept], found.values[kept], n_samples=n_samples, n_latents=n_latents,
                         noise=found.noise)
        odds = log_odds(found.latents, found.values, found.prices, known)
        least = 0.0 if even else _nth(odds, mean_l0 * n_samples)
        kept = odds >= least
    return known, least


def in_context(
    found: Candidates, low: float, *, n_samples: int, n_latents: int, mean_l0: float, even: bool = False
) -> tuple[Rule, float]:
    """The conditional rule for candidates above `low`, by what the codes that are kept say of their latents and of each
    other, and the log odds from which it keeps them.
    """
    known, starts = settle(found, n_samples, n_latents, mean_l0)
    kept = log_odds(found.latents, found.values, found.prices, known) >= starts
    for _ in range(CONTEXTS):
        samples, latents = found.samples[kept], found.latents[kept]
        then = known_of(latents, found.values[kept], n_samples=n_samples, n_latents=n_latents, noise=found.noise)
        context = learn(samples, latents, n_samples=n_samples, n_latents=n_latents)
        odds = log_odds(found.latents, found.values, found.prices, then)
        odds += of_others(context, found.samples, found.latents, kept)
        least = 0.0 if even else _nth(odds, mean_l0 * n_samples)
        kept = odds >= least
    return conditional(low, then, context, starts=starts, least=least), least


def codings_of(
    sae: SAE, x: Tensor, mean_l0: Sequence[float], prune_from: float, *, condition_from: float,
    batch_k: float | None = None,
) -> tuple[list[tuple[Encode, dict[str, Rule]]], dict[str, float]]:
    """The rules for an SAE's codes, chosen on samples x [n, D] without labels, and the numbers that were chosen.

    prune_from, condition_from: candidates of pruning and odds, and of conditional odds, over the mean L0. batch k only
    if batch_k is given; the even rules start from the candidates of the largest mean_l0.
    """
    def from_(floor: float) -> Encode:
        return replace(sae, threshold=torch.full_like(sae.b_enc, floor), top_k=sae.n_latents).encode

    n, dictionary, largest = len(x), Dictionary(sae.W_dec, sae.mean), max([*mean_l0, batch_k or 0])
    few = x[:ROWS]
    floor = _nth(from_(0.0)(few)[0], 1.5 * max(prune_from, condition_from) * largest * len(few))
    parts = [(part, *from_(floor)(part)) for part in x.split(ROWS)]
    values = torch.cat([values[values > 0] for _, values, _ in parts])
    rules: dict[str, Rule] = {} if batch_k is None else {f"batch {batch_k:g}": batch_topk(batch_k)}
    chosen: dict[str, float] = {}
    for l0 in sorted(mean_l0):
        threshold, low = _nth(values, l0 * n), _nth(values, prune_from * l0 * n)
        found = candidates(parts, low, dictionary)
        price = _nth(found.prices, l0 * n)
        known, least = settle(found, n, sae.n_latents, l0)
        chosen |= {f"threshold {l0:g}": threshold, f"pruned {l0:g}": price, f"odds {l0:g}": least}
        wide = _nth(values, condition_from * l0 * n)
        by_context = partial(in_context, candidates(parts, wide, dictionary), wide, n_samples=n,
                             n_latents=sae.n_latents, mean_l0=l0)
        rules |= {f"threshold {l0:g}": above(threshold), f"pruned {l0:g}": pruned(low, price),
                  f"odds {l0:g}": likely(low, known, least)}
        rules[f"conditional {l0:g}"], chosen[f"conditional {l0:g}"] = by_context()
    rules["even odds"] = likely(low, settle(found, n, sae.n_latents, l0, even=True)[0], 0.0)
    rules["even conditional"] = by_context(even=True)[0]
    if sae.threshold is None or sae.top_k < sae.n_latents:
        return [(sae.encode, {"own": everything}), (from_(floor), rules)], chosen
    floor = min(floor, float(sae.threshold.min()))  # one coding serves all rules
    return [(from_(floor), {"own": above(sae.threshold), **rules})], chosen


def _nth(values: Tensor, n: float) -> float:
    """The n-th largest."""
    return float(values.flatten().topk(max(1, min(int(n), values.numel()))).values[-1])
