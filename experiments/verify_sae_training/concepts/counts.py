"""What is counted of each latent besides its firings: its histogram, the tokens it fires on, the latents beside it.

All counts are exact. The pairs of a latent and a token, and of two latents, can be too many to hold: above a limit they
are counted on rows drawn evenly by seed, and the result says on how many.
"""
from typing import NamedTuple

import torch
from torch import Tensor

from concepts.codes import Codes

HISTOGRAM_BINS = 30
FIRINGS = 2**26  # codes whose tokens are counted, at most
PAIRS = 2**26  # pairs of codes on one row that are counted, at most, if rows fire as many latents as on average
PENDING = 2**22  # keys held before they are merged, and pairs looked at together
MIN_TOGETHER = 5  # rows on which two latents must fire together to be listed


class TokenShares(NamedTuple):
    """The T tokens with most of each latent's activation, highest first."""

    rows: Tensor
    """The first row of the corpus that holds the token, int64 [F, T]; -1: none."""
    share: Tensor
    """Share of the latent's total activation, float32 [F, T]."""
    fires: Tensor
    """Firings on the token, int64 [F, T]."""
    mean: Tensor
    """Mean of the codes over 0 on the token, float32 [F, T]."""
    fired: Tensor
    """Share of the token's occurrences on which the latent fires, float32 [F, T]."""
    n_rows: int
    """Rows on which all this was counted."""


class Cofiring(NamedTuple):
    """For each latent the C others that fire on the same rows most above chance, highest first."""

    latents: Tensor
    """int64 [F, C]; -1: none."""
    phi: Tensor
    """Correlation of "fires" over the rows, float32 [F, C]."""
    together: Tensor
    """Rows on which both fire, int64 [F, C]."""
    n_rows: int
    """Rows on which all this was counted."""


def code_histograms(codes: Codes, maxima: Tensor) -> Tensor:
    """How often each latent's code falls into each of HISTOGRAM_BINS equal bins from 0 to its highest, int64 [F, bins].

    maxima: the highest codes, [F]. A code on an edge counts for the bin above it, the highest for the last.
    """
    counts = torch.zeros(codes.n_latents * HISTOGRAM_BINS, dtype=torch.long)
    for _, values, indices in codes:
        fired = values > 0
        latent = indices[fired].long()
        at = bin_of(values[fired], maxima[latent], HISTOGRAM_BINS)
        counts += torch.bincount(latent * HISTOGRAM_BINS + at, minlength=len(counts))
    return counts.view(codes.n_latents, HISTOGRAM_BINS)


def bin_of(values: Tensor, maxima: Tensor, n: int) -> Tensor:
    """Which of n equal bins from 0 to its maximum each value is in, int64; values and maxima: [M], over 0."""
    return (values.double() / maxima.double() * n).long().clamp(max=n - 1)


def draw_rows(n_rows: int, limit: int, seed: int = 0) -> Tensor:
    """bool [n_rows]: all rows, or `limit` of them drawn evenly."""
    if n_rows <= limit:
        return torch.ones(n_rows, dtype=torch.bool)
    drawn = torch.zeros(n_rows, dtype=torch.bool)
    drawn[torch.randperm(n_rows, generator=torch.Generator().manual_seed(seed))[:limit]] = True
    return drawn


class _Sums:
    """Counts and sums by integer key, merged now and then so that memory is that of the distinct keys."""

    def __init__(self) -> None:
        self.keys, self.counts = torch.zeros(2, 0, dtype=torch.long)
        self.sums = torch.zeros(0, dtype=torch.double)
        self.held: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, keys: Tensor, values: Tensor) -> None:
        """Count each key once, with its value."""
        self.held.append((keys, torch.ones_like(keys), values.double()))
        if sum(len(keys) for keys, _, _ in self.held) > max(PENDING, len(self.keys)):
            self.merge()

    def merge(self) -> None:
        columns = zip((self.keys, self.counts, self.sums), *self.held)
        keys, counts, sums = (torch.cat(column) for column in columns)
        self.keys, place = keys.unique(return_inverse=True)
        self.counts = torch.zeros_like(self.keys).index_add_(0, place, counts)
        self.sums = torch.zeros(len(self.keys), dtype=torch.double).index_add_(0, place, sums)
        self.held = []


def token_shares(codes: Codes, fires: Tensor, n: int = 10, seed: int = 0) -> TokenShares:
    """The n tokens that hold most of each latent's activation, and how often each of them fires it.

    fires: firings of each latent, [F].
    """
    token_id = codes.rows["token_id"].long()
    ids, first_row = _first_rows(token_id)
    drawn = draw_rows(len(codes), int(FIRINGS // _per_row(codes, fires)), seed)
    counted = _Sums()
    for start, values, indices in codes:
        fired = (values > 0) & drawn[start : start + len(values), None]
        row, slot = fired.nonzero(as_tuple=True)
        counted.add(indices[row, slot].long() * len(ids) + torch.searchsorted(ids, token_id[start + row]),
                    values[row, slot])
    counted.merge()
    latent, token = counted.keys // max(1, len(ids)), counted.keys % max(1, len(ids))
    total = torch.zeros(codes.n_latents, dtype=torch.double).index_add_(0, latent, counted.sums)
    occurs = torch.bincount(torch.searchsorted(ids, token_id[drawn]), minlength=len(ids))
    table = best_of_groups(latent, counted.sums, codes.n_latents, n)

    def column(values: Tensor, empty: float = 0) -> Tensor:
        padded = torch.cat([values, values.new_full((1,), empty)])
        return padded[table]  # -1 is the last

    return TokenShares(
        rows=column(first_row[token], -1), share=column(counted.sums / total[latent]).float(),
        fires=column(counted.counts), mean=column(counted.sums / counted.counts).float(),
        fired=column(counted.counts / occurs[token]).float(), n_rows=int(drawn.sum()),
    )


def _per_row(codes: Codes, fires: Tensor) -> float:
    """Latents that fire on a row on average, but at least 1."""
    return max(1.0, float(fires.sum()) / max(1, len(codes)))


def _first_rows(token_id: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct token ids, ascending, and the first row of each."""
    ids, place = token_id.unique(return_inverse=True)
    rows = torch.full_like(ids, len(token_id)).scatter_reduce_(0, place, torch.arange(len(token_id)), "amin")
    return ids, rows


def best_of_groups(groups: Tensor, scores: Tensor, n_groups: int, n: int) -> Tensor:
    """Numbers of the n entries of each group with the highest scores, int64 [n_groups, n]; -1: none, the earlier first.

    groups: int64 [M]; scores: [M].
    """
    order = scores.argsort(descending=True, stable=True)
    order = order[groups[order].argsort(stable=True)]
    ordered = groups[order]
    rank = torch.arange(len(order)) - torch.searchsorted(ordered, ordered)
    kept = rank < n
    table = torch.full((n_groups, n), -1)
    table[ordered[kept], rank[kept]] = order[kept]
    return table


def cofiring(codes: Codes, fires: Tensor, n: int = 5, seed: int = 0) -> Cofiring:
    """The n latents that fire together with each latent most above chance, by the phi coefficient.

    With rows N, firings a and b, and `both`: phi = (N both - a b) / sqrt(a b (N - a) (N - b)), the correlation of two
    binary variables. Pairs that fire together on fewer than MIN_TOGETHER rows are left out. fires: firings of each
    latent, [F].
    """
    k = _per_row(codes, fires)
    drawn = draw_rows(len(codes), int(PAIRS // max(1.0, k * (k - 1) / 2)), seed)
    fires, counted = torch.zeros(codes.n_latents, dtype=torch.long), _Sums()
    for start, values, indices in codes:
        here = drawn[start : start + len(values)]
        slots = torch.combinations(torch.arange(values.shape[1]), 2).T
        size = max(1, PENDING // max(1, slots.shape[1]))
        for fired, latents in zip((values[here] > 0).split(size), indices[here].long().split(size)):
            fires += torch.bincount(latents[fired], minlength=codes.n_latents)
            both = fired[:, slots[0]] & fired[:, slots[1]]
            one, other = latents[:, slots[0]][both], latents[:, slots[1]][both]
            keys = torch.minimum(one, other) * codes.n_latents + torch.maximum(one, other)
            counted.add(keys, torch.zeros(len(keys)))
    counted.merge()
    often = counted.counts >= MIN_TOGETHER
    together = counted.counts[often]
    low, high = counted.keys[often] // codes.n_latents, counted.keys[often] % codes.n_latents
    total, a, b = float(drawn.sum()), fires[low].double(), fires[high].double()
    spread = (a * b * (total - a) * (total - b)).sqrt()
    phi = torch.where(spread > 0, (total * together - a * b) / spread.clamp(min=1e-300), 0)
    groups, others = torch.cat([low, high]), torch.cat([high, low, torch.tensor([-1])])
    table = best_of_groups(groups, torch.cat([phi, phi]), codes.n_latents, n)
    nothing = phi.new_zeros(1)
    phis, rows = torch.cat([phi, phi, nothing])[table], torch.cat([together, together, nothing.long()])[table]
    above = phis > 0
    return Cofiring(latents=torch.where(above, others[table], -1), phi=torch.where(above, phis, 0).float(),
                    together=torch.where(above, rows, 0), n_rows=int(drawn.sum()))
