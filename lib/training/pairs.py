"""Products and sums over (row, latent) pairs, with their gradients: what the torch step has instead of dense arrays.

Pairs are sorted by latent once, for the gradients of encoder and dictionary.
"""
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

GATHER_BYTES = 64 << 20  # of encoder or dictionary rows copied side by side


class Pairs(NamedTuple):
    """Which latents may fire on which rows: n pairs, sorted by bag. A bag holds a row's latents of one level."""

    row: Tensor
    """int64 [n]."""
    latent: Tensor
    """int64 [n]."""
    bag: Tensor
    """int64 [n], row times levels + level."""
    first: Tensor
    """int64 [rows times levels], where each bag begins."""
    order: Tensor
    """int64 [n], the pairs by latent."""
    starts: Tensor
    """int64 [F], where each latent begins in that order."""
    n_levels: int
    per_row: int | None
    """Pairs of each row; None: they differ."""


def pairs_of(
    row: Tensor, latent: Tensor, *, n_rows: int, n_latents: int, levels: Tensor | None = None, n_levels: int = 1,
    per_row: int | None = None
) -> Pairs:
    """From pairs [n] by row; levels: of each latent, [F], all below n_levels."""
    bag = row
    if levels is not None:
        bag = row * n_levels + levels[latent]
        by_bag = bag.argsort(stable=True)
        row, latent, bag = row[by_bag], latent[by_bag], bag[by_bag]
    return Pairs(row, latent, bag, first=_starts(bag, n_rows * n_levels), order=latent.argsort(stable=True),
                 starts=_starts(latent, n_latents), n_levels=n_levels, per_row=per_row)


def _starts(number: Tensor, n: int) -> Tensor:
    """Where each of the numbers below n begins, once they are sorted."""
    count = torch.zeros(n, dtype=torch.int64, device=number.device).index_add_(0, number, torch.ones_like(number))
    return count.cumsum(0) - count


class Products(torch.autograd.Function):
    """Pre-activations of pairs: x[row] . enc[latent] + bias[latent], [n]."""

    @staticmethod
    def forward(ctx, x, enc, bias, pairs):
        ctx.save_for_backward(x, enc)
        ctx.pairs = pairs
        return dots(x, pairs.row, enc, pairs.latent, per_row=pairs.per_row) + bias[pairs.latent]

    @staticmethod
    def backward(ctx, g):
        (x, enc), pairs = ctx.saved_tensors, ctx.pairs
        g_x = None
        if ctx.needs_input_grad[0]:
            g_x = embedding_bag(pairs.latent, enc, pairs.first[:: pairs.n_levels], per_sample_weights=g, mode="sum")
        g_bias = by_latent(pairs, pairs.row, torch.ones_like(x[:, :1]), g)[:, 0]
        return g_x, by_latent(pairs, pairs.row, x, g), g_bias, None


class Decoded(torch.autograd.Function):
    """Each bag's sum of codes times dictionary rows, [bags, D]."""

    @staticmethod
    def forward(ctx, code, dec, pairs):
        ctx.save_for_backward(code, dec)
        ctx.pairs = pairs
        return embedding_bag(pairs.latent, dec, pairs.first, per_sample_weights=code, mode="sum")

    @staticmethod
    def backward(ctx, g):
        (code, dec), pairs = ctx.saved_tensors, ctx.pairs
        g, per_row = g.contiguous(), pairs.per_row if pairs.n_levels == 1 else None
        return dots(g, pairs.bag, dec, pairs.latent, per_row=per_row), by_latent(pairs, pairs.bag, g, code), None


def dots(rows: Tensor, which: Tensor, table: Tensor, latent: Tensor, *, per_row: int | None) -> Tensor:
    """rows[which[i]] . table[latent[i]], [n], in chunks that bound the copies; per_row: which has so many of each."""
    chunk = max(1, GATHER_BYTES // (4 * rows.shape[1]))
    if per_row:
        chunk = max(1, chunk // per_row)
        both = zip(rows.split(chunk), latent.view(-1, per_row).split(chunk))
        return torch.cat([torch.bmm(table[index], part[:, :, None])[:, :, 0] for part, index in both]).flatten()
    both = zip(which.split(chunk), latent.split(chunk))
    return torch.cat([(rows[here] * table[there]).sum(1) for here, there in both])


def by_latent(pairs: Pairs, which: Tensor, values: Tensor, weight: Tensor) -> Tensor:
    """Sum over each latent's pairs of weight times values[which], [F, columns of values]."""
    order = pairs.order
    return embedding_bag(which[order], values, pairs.starts, per_sample_weights=weight[order], mode="sum")
