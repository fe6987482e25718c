"""Rows that arrive in blocks, mixed in memory while they pass: a source of training rows (lib.batches.Source).

    rows = LiveRows(stored, read, n_tokens=10_000_000, epochs=10, window=15)
    sae, history = train_sae(rows, settings, folder)

Each row of block b leaves the buffer in one of the rounds b to b + window - 1, drawn by the seed and b. A round takes
the next block in and gives out all rows that leave in it, in random order. So a batch mixes rows of `window` blocks,
while little more than half of that is in memory, and a row is gone after `window` rounds: whoever resumes reads the
last `window` blocks once more, and has every row where it was. The first round waits for `window` blocks. When
n_tokens rows have come no more are read, and the last round gives out all that is left.

Several ranks read a part of each block each, the first rows first. They draw for the rows of all, and agree on every
batch; a rank gives those of its rows that it has of them.
"""
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lib.batches import EVAL_ROWS, Rows
from lib.distributed import add_up, own_part, rank, world_size
from lib.environment import InputError
from lib.schemas import COUNT, Misfit, check, check_tensors

PLACE = {"round": COUNT, "given": COUNT, "n_blocks": COUNT, "n_rows": COUNT}
EMPTY_BLOCKS = 100  # in a row, after which nothing more is hoped for
Read = Callable[[int], Iterator[Tensor]]


@dataclass
class LiveRows:
    """Training rows as `read` gives them; rows to score on, and statistics, from stored rows of the same kind."""

    stored: Rows
    read: Read
    """read(b): this rank's raw rows [R_i, D] of block b, of block b + 1 and so on without end, the same at every call.
    """
    n_tokens: int
    """Training rows to give."""
    epochs: int
    """Parts that they are cut into; the SAE is scored after each."""
    window: int
    """Rounds in which a row may leave the buffer."""
    mean: Tensor
    """[D], taken off every row."""
    covariance: Tensor
    """[D, D], about the mean."""
    _place: dict[str, Any] = field(default_factory=dict)

    @property
    def scale(self) -> float:
        """sqrt(mean squared norm of x - mean), the divisor of x'."""
        return float(self.covariance.cpu().double().trace().sqrt())

    @property
    def n_train(self) -> int:
        """Rows of an epoch."""
        return self.n_tokens // self.epochs

    @property
    def n_val(self) -> int:
        return self.stored.n_val

    def sample(self, validation: bool, limit: int | None = EVAL_ROWS) -> Iterator[Tensor]:
        return self.stored.sample(validation, limit)

    def batches(
        self, transform: Tensor, batch_size: int, *, seed: int, step: int, place: dict[str, Any] | None
    ) -> Iterator[Tensor]:
        mean = self.mean.to(transform.device)
        for rows in self._raw_batches(batch_size, seed, place):
            yield (rows.to(transform.device).float() - mean) @ transform

    def place(self) -> dict[str, Any]:
        """Round and batches given in it, blocks and rows read, and `over`: rows left over by the round before."""
        return dict(self._place)

    def _raw_batches(self, batch_size: int, seed: int, place: dict[str, Any] | None) -> Iterator[Tensor]:
        """[batch_size, D] each, over all ranks; every row that was read leaves once, but for the last that no longer
        fill a batch.
        """
        start = {"round": self.window - 1, "given": 0, "n_blocks": 0, "n_rows": 0,
                 "over": torch.zeros(0, len(self.mean))}
        at: dict[str, Any] = _checked(place, len(self.mean)) if place else start
        buffer = _Buffer(self.window, seed, first_round=at["round"])
        first = max(0, at["round"] - self.window + 1) if place else 0
        blocks = self._blocks(first, n_to_fill=at["round"] + 1 - first)
        for number in range(first, at["n_blocks"]):  # what the buffer held is read again
            buffer.take(number, *next(blocks))
        while True:
            while at["n_blocks"] <= at["round"] and at["n_rows"] < self.n_tokens:
                block, counts = next(blocks)
                buffer.take(at["n_blocks"], block, counts)
                at |= {"n_blocks": at["n_blocks"] + 1, "n_rows": at["n_rows"] + sum(counts)}
            is_last = at["n_rows"] >= self.n_tokens
            rows, order = buffer.give(at["round"], at["over"], everything=is_last)
            batches = order.split(batch_size)
            n_full = len(order) // batch_size
            for given in range(at["given"], n_full):
                self._place = at | {"given": given + 1}
                if not len(own := rows[batches[given][batches[given] >= 0]]):
                    raise InputError("a rank has no row of a batch: raise BATCH_SIZE_TRAIN and BUFFER_TOKENS, or start "
                                     "fewer ranks")
                yield own
            if is_last:
                return
            at |= {"round": at["round"] + 1, "given": 0, "over": _of_all_ranks(rows, order[n_full * batch_size :])}

    def _blocks(self, first: int, n_to_fill: int) -> Iterator[tuple[Tensor, list[int]]]:
        """The blocks from number `first` on, each with the numbers of rows that the ranks have of it, and with a bar
        over those that come before the first batch.

        Raises InputError where rows no longer come.
        """
        n_empty = 0
        with tqdm(total=n_to_fill, desc="filling the buffer", unit="block", leave=False, disable=rank() > 0) as bar:
            for block in self.read(first):
                counts = torch.zeros(world_size(), dtype=torch.int64)
                counts[rank()] = len(block)
                add_up(counts)
                n_empty = 0 if counts.any() else n_empty + 1
                if n_empty == EMPTY_BLOCKS:
                    raise InputError("the texts give no more tokens to train on: all are held out, empty or special "
                                     "tokens")
                bar.update()
                if bar.n >= n_to_fill:
                    bar.close()
                yield block, counts.tolist()


class _Leaving(NamedTuple):
    """What leaves in one round of one block."""

    rows: Tensor
    """This rank's."""
    places: Tensor
    """int64: where they stand among those of all ranks."""
    n: int
    """Of all ranks."""


class _Buffer:
    """The rows that wait, by the round in which they leave."""

    def __init__(self, window: int, seed: int, first_round: int):
        self.window, self.seed, self.first_round = window, seed, first_round
        self.leaving: dict[int, list[_Leaving]] = defaultdict(list)

    def take(self, number: int, block: Tensor, counts: list[int]) -> None:
        """Spread a block's rows over the rounds; what would leave before the first one leaves in it or, if the
        training is resumed there, has left. counts: of the rows that each rank has of the block.
        """
        rounds = number + torch.randint(self.window, (sum(counts),), generator=_generator(self.seed, number, 0))
        rounds.clamp_(min=self.window - 1)
        before = sum(counts[: rank()])
        own = slice(before, before + len(block))
        for leaves in range(self.first_round, number + self.window):
            which = rounds == leaves
            mine, first = which[own], int(which[:before].sum())
            self.leaving[leaves].append(_Leaving(block[mine], first + torch.arange(int(mine.sum())), int(which.sum())))

    def give(self, number: int, over: Tensor, everything: bool) -> tuple[Tensor, Tensor]:
        """The rows of a round, or all that are left, and the order of all ranks' rows: first those left over by the
        round before. The order names rows by their number, or -1 for another rank's.
        """
        part = own_part(len(over))
        pieces = [_Leaving(over[part], torch.arange(len(over))[part], len(over))]
        for leaves in sorted(self.leaving) if everything else [number]:
            pieces += self.leaving.pop(leaves)
        starts = [0, *accumulate(piece.n for piece in pieces)]
        places = torch.cat([start + piece.places for start, piece in zip(starts, pieces)])
        numbers = torch.full((starts[-1],), -1).scatter_(0, places, torch.arange(len(places)))
        waiting = [piece.rows for piece in pieces]
        pieces.clear()
        rows = _joined(waiting)
        order = torch.randperm(len(numbers) - len(over), generator=_generator(self.seed, number, 1)) + len(over)
        return rows, numbers[torch.cat([torch.arange(len(over)), order])]


def _of_all_ranks(rows: Tensor, numbers: Tensor) -> Tensor:
    """The rows with these numbers, [n, D], where a rank has -1 from the rank that has a number."""
    found = torch.zeros(len(numbers), rows.shape[1])  # float32 holds every stored precision, and gloo adds it up
    found[numbers >= 0] = rows[numbers[numbers >= 0]].float()
    add_up(found)
    return found.to(rows.dtype)


def _joined(pieces: list[Tensor]) -> Tensor:
    """The pieces one after the other; the list is emptied on the way, so that they are not in memory twice."""
    whole = torch.empty(sum(map(len, pieces)), pieces[0].shape[1], dtype=pieces[-1].dtype)
    at = 0
    pieces.reverse()
    while pieces:
        piece = pieces.pop()
        whole[at : at + len(piece)] = piece
        at += len(piece)
    return whole


def _generator(seed: int, number: int, purpose: int) -> torch.Generator:
    """Of where the rows of a block go (0), or of the order in a round (1)."""
    return torch.Generator().manual_seed(2 * (seed * 1_000_003 + number) + purpose)


def _checked(place: dict[str, Any], width: int) -> dict[str, Any]:
    """A checkpoint's place. Raises InputError if it is damaged."""
    try:
        check(place, PLACE)
        check_tensors(place, {"over": "float N D"}, D=width)
    except Misfit as misfit:
        raise InputError(f"the checkpoint's place in the texts is damaged: {misfit}; delete it and train "
                         "again") from None
    return dict(place)
