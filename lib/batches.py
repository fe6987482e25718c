"""Stored activations in batches: in order for statistics and scores, shuffled for training.

    for ids, x in batches_in_order(run.shards(hook), run.is_val):        # row numbers [n], float32 [n, D]
    x = read_rows(run.shards(hook), ids)                                 # a few rows at once

Shards are memory-mapped, so only the rows of a batch are read from the disk.
"""
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor

from .distributed import own_part
from .store import Run

BUFFER_BYTES = 2_000_000_000  # whitened rows that are shuffled together; smaller runs stay in memory whole
BATCH_ROWS = 8192  # rows of a batch in order; sums over a run, and so its last digits, depend on it
WHITENED_ROWS = 65_536  # at once, of rows that stay in memory
TIMED_ROWS = 32_768  # read to tell how long a pass takes
EVAL_ROWS = 16_384  # validation rows, and as many training rows, scored after each epoch

Begun = Sequence[tuple[int, dict[str, Any]]]


class Source(Protocol):
    """What a training reads: shuffled training rows, rows to score it on, and what is known of them beforehand.

    Stored rows are one (`Rows`). covariance: of the training rows, or many of them, about `mean`; scale: sqrt of its
    trace. n_train: rows of an epoch. n_val: held-out rows. buffer_bytes: of memory in which rows wait, on all ranks
    together. seconds_a_row: about what reading one takes, measured.
    """

    mean: Tensor
    covariance: Tensor

    @property
    def scale(self) -> float: ...
    @property
    def n_train(self) -> int: ...
    @property
    def n_val(self) -> int: ...
    @property
    def buffer_bytes(self) -> int: ...
    def seconds_a_row(self) -> float: ...

    def sample(self, validation: bool, limit: int | None = EVAL_ROWS) -> Iterator[Tensor]:
        """Raw validation (or training) rows in batches, float32 [n, D]: about `limit`, all that it has with None."""

    def batches(self, transform: Tensor, batch_size: int, *, seed: int, begun: Begun) -> Iterator[Tensor]:
        """Batches of (x - mean) @ transform from the least step of `begun` on, as long as anyone asks, epoch after
        epoch.

        begun: for each training that takes them, its steps so far, and what `place` gave after the last of them; after
        a kill some may be ahead.
        """

    def place(self) -> dict[str, Any]:
        """What must go into a checkpoint, beside the number of steps, to go on after the batch that was given last."""


@dataclass
class Rows:
    """Activations to train on: shards [R_i, D] in any precision, which rows are validation, and their statistics."""

    shards: list[Tensor]
    is_val: Tensor
    """bool [sum R_i]."""
    mean: Tensor
    """[D], of the training rows."""
    covariance: Tensor
    """[D, D], of the training rows about the mean; in a large run of rows spread evenly over it (lib/summaries.py)."""
    kept: dict[str, Tensor] | None = None
    """A dict in which trainings share the whitened rows of a run that fits into one buffer; None: each has its own."""

    @property
    def scale(self) -> float:
        """sqrt(mean squared norm of x - mean) over the rows of the covariance, the divisor of x'."""
        return float(self.covariance.cpu().double().trace().sqrt())

    @cached_property
    def n_train(self) -> int:
        return len(self.is_val) - self.n_val

    @cached_property
    def n_val(self) -> int:
        return int(self.is_val.count_nonzero())  # a sum would first make int64 of the mask

    @property
    def buffer_bytes(self) -> int:
        return 4 * len(self.mean) * min(self.n_train, buffer_rows(self))

    def seconds_a_row(self) -> float:
        ids = (~self.is_val[: len(self.shards[0])]).nonzero()[:TIMED_ROWS, 0]
        start = time.monotonic()
        read_rows(self.shards[:1], ids)
        return (time.monotonic() - start) / max(1, len(ids))

    def sample(self, validation: bool, limit: int | None = EVAL_ROWS) -> Iterator[Tensor]:
        return sample_rows(self, validation, limit)

    def batches(self, transform: Tensor, batch_size: int, *, seed: int, begun: Begun) -> Iterator[Tensor]:
        cache = {} if self.kept is None else self.kept
        epoch, done = divmod(min(step for step, _ in begun), steps_per_epoch(self.n_train, batch_size))
        while True:
            yield from shuffled_batches(self, transform, batch_size, seed=seed, epoch=epoch, start=done, cache=cache)
            epoch, done = epoch + 1, 0

    def place(self) -> dict[str, Any]:
        return {}  # seed and step say it all


def rows_of_run(run: Run, hook: str) -> Rows:
    """The rows of one hook point of a run, memory-mapped."""
    stats = run.stats(hook)
    return Rows(run.shards(hook), run.is_val, stats["mean"], stats["covariance"])


def rows_of_tensor(x: Tensor, is_val: Tensor) -> Rows:
    """Rows from memory: x [N, D] raw activations, is_val bool [N]."""
    train = x[~is_val].cpu().double()
    mean = train.mean(0)
    centred = train - mean
    return Rows([x], is_val, mean.float(), (centred.T @ centred / len(train)).float())


def batches_in_order(
    shards: list[Tensor], wanted: Tensor | None = None, size: int = BATCH_ROWS
) -> Iterator[tuple[Tensor, Tensor]]:
    """The rows where `wanted` (bool [N]; None: everywhere) holds: their numbers int64 [n] and values float32 [n, D].

    Each batch holds what is wanted of `size` neighbouring rows in one shard.
    """
    starts = [0, *accumulate(map(len, shards))]
    for start, shard in zip(starts, shards):
        for piece in shard.split(size):
            ids = torch.arange(start, start + len(piece))
            start += len(piece)
            if wanted is not None:
                piece, ids = piece[wanted[ids]], ids[wanted[ids]]
            if len(ids):
                yield ids, piece.float()


def sample_rows(rows: Rows, validation: bool, limit: int | None = EVAL_ROWS) -> Iterator[Tensor]:
    """Validation (or training) rows in order, float32 batches, thinned evenly to about `limit`."""
    every = max(1, (rows.n_val if validation else rows.n_train) // limit) if limit else 1
    start = seen = 0
    for shard in rows.shards:
        ids = (rows.is_val[start : start + len(shard)] == validation).nonzero()[:, 0]
        keep = ids[-seen % every :: every].contiguous()  # the first of all, and each `every`-th after it
        start, seen = start + len(shard), seen + len(ids)
        edges = torch.arange(BATCH_ROWS, max(BATCH_ROWS, len(shard)), BATCH_ROWS)
        yield from (shard[part].float() for part in keep.tensor_split(torch.searchsorted(keep, edges)) if len(part))


def read_rows(shards: list[Tensor], wanted: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Rows by ascending numbers, or where a mask (bool [N]) holds: float32 [n, D] on the device."""
    ids = wanted.nonzero()[:, 0] if wanted.dtype == torch.bool else wanted
    ends = torch.tensor([*accumulate(map(len, shards))])
    parts = ids.split(torch.searchsorted(ids, ends).diff(prepend=torch.zeros(1, dtype=torch.int64)).tolist())
    out = torch.empty(len(ids), shards[0].shape[1], device=device)
    at = 0
    for shard, end, part in zip(shards, ends.tolist(), parts):
        if len(part):
            out[at : at + len(part)] = shard[part - (end - len(shard))]
            at += len(part)
    return out


def steps_per_epoch(n_train: int, batch_size: int) -> int:
    """Full batches in one pass; one short batch if the rows do not fill any."""
    return max(1, n_train // batch_size)


def shuffled_batches(
    rows: Rows, transform: Tensor, batch_size: int, *, seed: int, epoch: int, start: int = 0,
    cache: dict[str, Tensor] | None = None,
) -> Iterator[Tensor]:
    """One pass over the training rows, from batch `start` on: (x - mean) @ transform, float32 [batch_size, D] on the
    transform's device.

    Shuffled in two levels: the order of the shards, then the rows of a buffer of at least two shards. Rows that don't
    fill a batch go into the next buffer; those left at the end sit out this epoch. The same (seed, epoch) gives the
    same batches. Rows of batches before `start` are not read, unless the buffer keeps them for the next epoch. cache:
    keeps a run that fits into one buffer, so that later epochs only permute it.
    With several ranks, each gets (and reads) its part of every batch.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    starts = [0, *accumulate(map(len, rows.shards))]
    groups = _shuffled_groups(rows, generator)
    cache = {} if cache is None else cache
    if rows.n_train < batch_size:
        groups = [list(range(len(rows.shards)))]  # one short batch a pass, whatever the buffer holds
    if len(groups) == 1:
        groups[0].sort()  # the cache is the same in every epoch
    mean = rows.mean.to(transform.device)
    left_over = torch.empty(0, dtype=torch.int64)
    for group in groups:
        train = [starts[i] + (~rows.is_val[starts[i] : starts[i + 1]]).nonzero()[:, 0] for i in group]
        ids = torch.cat([left_over, *train])
        order = torch.randperm(len(ids), generator=generator)
        n_full = len(ids) if rows.n_train < batch_size else len(ids) // batch_size * batch_size
        batches = [batch[own_part(len(batch))] for batch in order[:n_full].split(batch_size)] if n_full else []
        if len(groups) == 1:
            if "rows" not in cache:
                cache["rows"] = whole = read_rows(rows.shards, ids, transform.device)
                for part in whole.split(WHITENED_ROWS):  # in place: memory holds these rows once
                    part.copy_((part - mean) @ transform)
            own = batches[start:]  # moved at once: with each move the host waits for a GPU
            places = torch.cat(own).to(transform.device).split([len(batch) for batch in own]) if own else ()
            yield from (cache["rows"][where] for where in places)
        elif batches[start:]:
            wanted, place = ids[torch.cat(batches[start:])].sort()  # in the order of the disk
            buffer = read_rows(rows.shards, wanted, transform.device)
            places = place.argsort().to(transform.device).split([len(batch) for batch in batches[start:]])
            yield from ((buffer[where] - mean) @ transform for where in places)
            del buffer  # before the next one is read
        start = max(0, start - len(batches))
        left_over = ids[order[n_full:]]


def buffer_rows(rows: Rows) -> int:
    """How many rows are shuffled together: as many as BUFFER_BYTES hold, at least two shards."""
    return max(2 * max(map(len, rows.shards)), BUFFER_BYTES // (4 * len(rows.mean)))


def _shuffled_groups(rows: Rows, generator: torch.Generator) -> list[list[int]]:
    """The shards in random order, in groups that fit into a buffer together, or hold two shards."""
    per_buffer = buffer_rows(rows)
    groups: list[list[int]] = [[]]
    size = 0
    for i in torch.randperm(len(rows.shards), generator=generator).tolist():
        if groups[-1] and size + len(rows.shards[i]) > per_buffer:
            groups.append([])
            size = 0
        groups[-1].append(i)
        size += len(rows.shards[i])
    return groups
