"""Which tokens show what a latent does: its top texts, draws over the range of its codes, near misses, silent tokens.

    rows = torch.cat([firings.top_rows, over_range(codes, firings), silent_rows(codes, shares)], 1)
    windows = codes_around(codes, rows, window_sizes(...))

An example is a row of the corpus, shown with its neighbours. Groups of examples, in this order:

    top        the texts with the highest codes, one token each
    interval   for each fifth of the range from 0 to the highest code, strongest first, tokens drawn evenly from those
               whose code is in it, but for those among the top
    near miss  tokens, among rows drawn evenly, on which the latent came closest to firing and did not
    zero       tokens drawn evenly from the silent ones among the three tokens with most of its activation
"""
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from concepts.codes import Codes, codes_at
from concepts.counts import HISTOGRAM_BINS, TokenShares, bin_of, draw_rows
from concepts.firings import LOW, Firings, keep_highest, pack, peaks_of_texts, scramble, unpack
from lib.batches import batches_in_order, read_rows
from lib.sae import SAE

INTERVALS, PER_INTERVAL, NEAR, ZERO = 5, 2, 2, 2  # HISTOGRAM_BINS is a multiple of the first
WINDOW = (20, 10)  # stored tokens shown before and after the peak of a top text
SHORT_WINDOW = (10, 5)  # and of the other examples
NEAR_OF_ROW = 16  # latents of one row that may be near misses
NEAR_ROWS = 2**15  # rows among which near misses are looked for
NEAR_CELLS = 2**28  # pre-activations that this may take; fewer rows for a large SAE
ZERO_TOKENS, ZERO_TRIES = 3, 16  # tokens of a latent, and rows of each, that are looked at for a silent one


class Misses(NamedTuple):
    """The nearest misses of each latent, nearest first."""

    rows: Tensor
    """int64 [F, NEAR]; -1: none."""
    scores: Tensor
    """Pre-activations, float32 [F, NEAR], in x' units."""
    needed: Tensor
    """What they would have had to exceed, float32 [F, NEAR]."""
    n_rows: int
    """Rows that were looked at."""

    @classmethod
    def none(cls, n_latents: int) -> "Misses":
        """Of latents for which none are known."""
        nothing = torch.zeros(n_latents, NEAR)
        return cls(torch.full((n_latents, NEAR), -1), nothing, nothing.clone(), n_rows=0)


class Windows(NamedTuple):
    """The codes of each example's latent on the tokens around it; codes of 0 are not kept."""

    starts: Tensor
    """Where the codes of each example begin, and the end, int64 [F * E + 1]."""
    offsets: Tensor
    """Position relative to the example's row, int32 [A]."""
    values: Tensor
    """float32 [A]."""


@torch.no_grad()
def near_misses(sae: SAE, shards: list[Tensor], text_id: Tensor, seed: int = 0) -> Misses:
    """The tokens on which latents came closest to firing: highest pre-activation over what firing would have taken.

    A latent fires where it is among the k highest of a row and over its threshold, if it has one. Of each row the
    NEAR_OF_ROW latents that came closest count. A latent that fires wherever its pre-activation is over 0 has no near
    miss, and no latent has one where codes are not pre-activations. shards: raw activations; text_id: of their rows,
    [N].
    """
    drawn = draw_rows(len(text_id), min(NEAR_ROWS, max(1, NEAR_CELLS // sae.n_latents)), seed)
    best = torch.zeros(sae.n_latents, NEAR, dtype=torch.long)
    for ids, x in batches_in_order(shards, drawn, size=max(64, 2**24 // sae.n_latents)):
        x = x.to(sae.mean)
        pre = functional.linear((x - sae.mean) / sae.scale, sae.W_enc, sae.b_enc)
        codes, fired = sae.encode(x)
        if not torch.allclose(torch.where(codes > 0, pre.gather(1, fired), 0), codes, rtol=1e-3, atol=1e-4):
            return Misses.none(sae.n_latents)
        needed = codes[:, -1:] if codes.shape[1] == sae.top_k else torch.zeros_like(codes[:, :1])
        if sae.threshold is not None:
            needed = torch.maximum(needed, sae.threshold)
        ratio = pre / needed.clamp(min=1e-12)
        # What fired is at 1 or above, or below it by rounding: the product may add up in another order.
        ratio = torch.where((needed > 0) & (ratio > 0) & (ratio < 1 - 1e-5), ratio, 0)
        near = ratio.topk(min(NEAR_OF_ROW, sae.n_latents), dim=1)
        row, slot = near.values.gt(0).nonzero(as_tuple=True)
        rows, latents = ids[row.cpu()], near.indices[row, slot].cpu()
        packed = pack(near.values[row, slot].cpu(), rows)
        keep_highest(best, *peaks_of_texts(text_id[rows].long(), latents, packed))
    ratios, rows = unpack(best)
    scores = _pre_activations(sae, shards, rows)
    return Misses(rows, scores, torch.where(rows >= 0, scores / ratios, 0), int(drawn.sum()))


def _pre_activations(sae: SAE, shards: list[Tensor], rows: Tensor) -> Tensor:
    """The pre-activation of latent i on rows[i, j], float32 [F, M]; 0 where the row is -1."""
    found = torch.zeros(rows.shape)
    for first in range(0, len(rows), 2048):
        part = rows[first : first + 2048]
        latent, place = (part >= 0).nonzero(as_tuple=True)
        distinct, line = part[latent, place].unique(return_inverse=True)
        if len(distinct):
            x = (read_rows(shards, distinct).to(sae.mean) - sae.mean) / sae.scale
            here = (x[line] * sae.W_enc[first + latent]).sum(1) + sae.b_enc[first + latent]
            found[first + latent, place] = here.cpu()
    return found


def over_range(codes: Codes, firings: Firings) -> Tensor:
    """Rows drawn evenly for each fifth of each latent's range of codes, int64 [F, INTERVALS * PER_INTERVAL]; -1: none.

    The strongest fifth comes first. Rows of firings.top_rows are not drawn again.
    """
    shown = (firings.top_rows * codes.n_latents + torch.arange(codes.n_latents)[:, None])[firings.top_rows >= 0]
    shown = torch.cat([shown.sort().values, torch.tensor([torch.iinfo(torch.long).max])])
    table = torch.zeros(codes.n_latents * INTERVALS, PER_INTERVAL, dtype=torch.long)
    for start, values, indices in codes:
        row, slot = values.gt(0).nonzero(as_tuple=True)
        latent, rows = indices[row, slot].long(), start + row
        pair = rows * codes.n_latents + latent
        new = shown[torch.searchsorted(shown, pair)] != pair
        latent, rows, pair, value = latent[new], rows[new], pair[new], values[row, slot][new]
        at = bin_of(value, firings.max[latent], HISTOGRAM_BINS)
        interval = INTERVALS - 1 - at // (HISTOGRAM_BINS // INTERVALS)
        keep_highest(table, latent * INTERVALS + interval, scramble(pair) << 32 | (LOW - rows))
    return unpack(table)[1].view(codes.n_latents, INTERVALS * PER_INTERVAL)


def silent_rows(codes: Codes, shares: TokenShares, seed: int = 0) -> Tensor:
    """Rows drawn evenly from those of a latent's first tokens on which it is silent, int64 [F, ZERO]; -1: none found.

    Of each token ZERO_TRIES rows are looked at: a token that nearly always fires the latent may show none.
    """
    token_id = codes.rows["token_id"].long()
    order = token_id.argsort(stable=True)
    tokens = shares.rows[:, :ZERO_TOKENS]
    ids = token_id[tokens.clamp(min=0)]
    first, beyond = (torch.searchsorted(token_id[order], ids, right=right) for right in (False, True))
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(ZERO_TRIES, *ids.shape, generator=generator, dtype=torch.double)
    at = (first + (draws * (beyond - first)).long()).permute(1, 0, 2).reshape(len(ids), -1)
    rows = order[at].where((tokens >= 0).repeat(1, ZERO_TRIES), -1)
    latents = torch.arange(len(ids)).repeat_interleave(rows.shape[1])
    silent = (codes_at(codes, rows.flatten(), latents).view(rows.shape) == 0) & (rows >= 0)
    found = torch.full((len(ids), ZERO), -1)
    for place in range(ZERO):
        has, pick = silent.any(1), silent.int().argmax(1)
        found[has, place] = rows[has, pick[has]]
        silent &= rows != found[:, place : place + 1]
    return found


def codes_around(codes: Codes, rows: Tensor, windows: Tensor) -> Windows:
    """The codes of latent i around rows[i, j], within the same text, in one pass.

    rows: int64 [F, E], -1: none. windows: stored tokens looked at before and after each, int64 [E, 2].
    """
    text_id = codes.rows["text_id"]
    there = rows.flatten() >= 0
    example = there.nonzero()[:, 0]
    order = rows.flatten()[there].argsort(stable=True)
    example, peak = example[order], rows.flatten()[there][order]
    latent = example // rows.shape[1]
    before, after = windows[example % rows.shape[1]].T
    back, ahead = windows.amax(0).tolist()
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for start, values, indices in codes:
        bounds = torch.tensor([start - ahead, start + len(values) + back])
        near = slice(*torch.searchsorted(peak, bounds).tolist())
        for offset in range(-back, ahead + 1):
            row = peak[near] + offset
            inside = (row >= start) & (row < start + len(values)) & (-offset <= before[near]) & (offset <= after[near])
            line = inside.nonzero()[:, 0]
            line = line[text_id[row[line]] == text_id[peak[near][line]]]
            local = row[line] - start
            code = (values[local] * (indices[local] == latent[near][line, None])).sum(1)
            hit = code > 0
            found.append((example[near][line[hit]], torch.full((int(hit.sum()),), offset).int(), code[hit]))
    examples, offsets, acts = (torch.cat(column) for column in zip(*found))
    order = (examples * (back + ahead + 1) + offsets).argsort()
    starts = torch.bincount(examples, minlength=rows.numel()).cumsum(0)
    return Windows(torch.cat([torch.zeros(1, dtype=torch.long), starts]), offsets[order], acts[order])
