"""Statistics of the training rows of a run: taken from each shard as it is written, and put together at the end.

A shard's summary (sum, norms, largest value) is of all its training rows and stands beside it until the run is
finished, so a run that was killed, or shared by several ranks, ends with the same statistics. The covariance needs
D x D products of each row: it is of rows spread evenly over the run, at most most_rows(D), read back once at the end.
"""
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .distributed import add_up, beat, rank, wait_for_all, world_size

MOST_ROWS = 1 << 20  # rows that a covariance is made of, and a median norm
MOST_PRODUCTS = 1 << 37  # rows * D^2 of a covariance, unless that leaves fewer than
LEAST_PER_DIMENSION = 64  # rows: whitening takes the covariance to the power of 1/8, which forgives 15 % of error
SUMMED_ROWS = 256  # rows turned into float64 at once, which a processor's cache holds
PRODUCT_ROWS = 8192  # rows whose products are summed in float32; their sums are in float64
PRODUCT_COLUMNS = 256  # the product is symmetric: of each stripe of columns, what lies on and above the diagonal


class Summary(NamedTuple):
    """What one shard adds to a hook point's statistics."""

    sum: Tensor
    """float64 [D], of the training rows."""
    norms: Tensor
    """float32 [n], of each training row, in order."""
    largest: Tensor
    """float64 [1]: the largest absolute value."""


def summary(x: Tensor, train: Tensor) -> Summary:
    """Of a shard x [R, D] in any precision, the rows where train (bool [R]) holds; the same bits for the same shard."""
    ids = train.nonzero()[:, 0]
    raw, exact = (torch.empty(SUMMED_ROWS, x.shape[1], dtype=dtype) for dtype in (x.dtype, torch.float64))
    total, largest = torch.zeros(x.shape[1], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    norms = []
    for part in ids.split(SUMMED_ROWS) if len(ids) else ():
        rows = torch.index_select(x, 0, part, out=raw[: len(part)])
        found = exact[: len(part)].copy_(rows)
        total += found.sum(0)
        norms.append(torch.linalg.vector_norm(found, dim=1).float())
        largest = torch.maximum(largest, torch.stack(rows.aminmax()).double().abs().max())
    return Summary(total, torch.cat(norms) if norms else torch.zeros(0), largest)


def most_rows(width: int) -> int:
    """How many rows a covariance of that width is made of at most: 2^20 up to width 362, and never below 64 D."""
    return min(MOST_ROWS, max(LEAST_PER_DIMENSION * width, MOST_PRODUCTS // width**2))


def spread_evenly(n: int, most: int) -> Tensor:
    """Ascending int64 numbers below n: all of them, or `most` that lie equally far apart."""
    return torch.arange(n) if n <= most else torch.arange(most) * n // most


def covariance(parts: Iterator[Tensor], mean: Tensor, device: torch.device) -> Tensor:
    """Second moment about `mean` (float64 [D]) of the rows of all parts, [n, D] each: float64 [D, D].

    Products are float32 on the device, about the mean, so that one which is large against the spread costs no digits.
    Each of several ranks forms some stripes of columns of all rows: the same bits as one process.
    """
    width, n = len(mean), 0
    total = torch.zeros(width, width, dtype=torch.float64)
    centre = mean.float().to(device)
    stripes = [slice(at, min(at + PRODUCT_COLUMNS, width)) for at in range(0, width, PRODUCT_COLUMNS)]
    for rows in batched(parts, torch.empty(PRODUCT_ROWS, width)):
        n += len(rows)
        beat()
        x = rows.to(device).sub_(centre)  # on the CPU in its place: fresh memory costs more than the difference
        for stripe in stripes[rank() :: world_size()]:
            total[stripe, stripe.start :] += (x[:, stripe].T @ x[:, stripe.start :]).cpu()
    wait_for_all()
    add_up(total)
    return (total.triu() + total.triu(1).T) / n


def batched(parts: Iterator[Tensor], memory: Tensor) -> Iterator[Tensor]:
    """The rows of all parts in order, as many at a time as `memory` [n, D] has; they stand there until the next."""
    used = 0
    for part in parts:
        while len(part):
            fit = part[: len(memory) - used]
            memory[used : used + len(fit)] = fit
            used, part = used + len(fit), part[len(fit) :]
            if used == len(memory):
                yield memory
                used = 0
    if used:
        yield memory[:used]
