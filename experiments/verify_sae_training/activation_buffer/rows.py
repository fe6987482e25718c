"""Rows that arrive in blocks, mixed in memory while they pass: a source of training rows (lib.batches.Source).

    rows = LiveRows(stored, read, n_tokens=10_000_000, epochs=10, window=15)
    sae, history = train_sae(rows, settings, folder)

Each row of block b leaves the buffer in one of the rounds b to b + window - 1, drawn by the seed and b. A round takes
the next block in and gives out all rows that leave in it, in random order. So a batch mixes rows of `window` blocks,
while little more than half of that is in memory, and a row is gone after `window` rounds: whoever resumes reads the
last `window` blocks once more, and has every row where it was. The first round waits for half as many. When n_tokens
rows have come no more are read, and the last round gives out all that is left.

Several ranks read a part of each block each, the first rows first. They draw for the rows of all, and agree on every
batch; a rank gives those of its rows that it has of them.
"""
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

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
    """Of the batch that was given last."""

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
        start = dict.fromkeys(PLACE, 0) | {"round": self.window // 2, "over": torch.zeros(0, len(self.mean))}
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
            numbers = torch.cat([buffer.put_back(at["over"]), buffer.leave(at["round"], everything=is_last)])
            n_full = len(numbers) // batch_size
            for given in range(at["given"], n_full):
                self._place = at | {"given": given + 1}
                if not len(own := buffer.rows_of(numbers[given * batch_size : (given + 1) * batch_size])):
                    raise InputError("a rank has no row of a batch: raise BATCH_SIZE_TRAIN and BUFFER_TOKENS, or start "
                                     "fewer ranks")
                yield own
            if is_last:
                return
            over = _of_all_ranks(buffer, numbers[n_full * batch_size :], len(self.mean))
            buffer.free(numbers)
            at |= {"round": at["round"] + 1, "given": 0, "over": over}

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


class _Buffer:
    """The rows that wait, in one tensor. Of each round it knows the numbers of the rows that leave in it: their places
    in that tensor, or -1 for another rank's.
    """

    def __init__(self, window: int, seed: int, first_round: int):
        self.window, self.seed, self.first_round = window, seed, first_round
        self.rows = torch.empty(0, 0)
        self.empty = torch.empty(0, dtype=torch.int64)  # places that hold no row
        self.leaving: dict[int, list[Tensor]] = defaultdict(list)

    def take(self, number: int, block: Tensor, counts: list[int]) -> None:
        """Spread a block's rows over the rounds; what would leave before the first one leaves in it or, if the
        training is resumed there, has left. counts: of the rows that each rank has of the block.
        """
        rounds = number + torch.randint(self.window, (sum(counts),), generator=_generator(self.seed, number, 0))
        rounds.clamp_(min=self.window // 2)
        before = sum(counts[: rank()])
        own, stays = slice(before, before + len(block)), rounds >= self.first_round
        numbers = torch.full((len(rounds),), -1)
        numbers[own][stays[own]] = self._store(block[stays[own]])
        for leaves in range(self.first_round, number + self.window):
            self.leaving[leaves].append(numbers[rounds == leaves])

    def put_back(self, rows: Tensor) -> Tensor:
        """Keep this rank's part of rows that all ranks have; returns the numbers of all."""
        numbers, part = torch.full((len(rows),), -1), own_part(len(rows))
        numbers[part] = self._store(rows[part])
        return numbers

    def leave(self, number: int, everything: bool) -> Tensor:
        """The numbers of the rows that leave in a round, or of all that are left, in random order."""
        numbers = torch.cat([part for leaves in (sorted(self.leaving) if everything else [number])
                             for part in self.leaving.pop(leaves)])
        return numbers[torch.randperm(len(numbers), generator=_generator(self.seed, number, 1))]

    def rows_of(self, numbers: Tensor) -> Tensor:
        """Those of the numbered rows that are this rank's."""
        return self.rows[numbers[numbers >= 0]]

    def free(self, numbers: Tensor) -> None:
        """Forget these rows."""
        self.empty = torch.cat([self.empty, numbers[numbers >= 0]])

    def _store(self, rows: Tensor) -> Tensor:
        """Keep these rows; returns their places."""
        if (n_new := len(rows) - len(self.empty)) > 0:  # the first block; later only where blocks become larger
            n_new += len(self.rows) // 10 or len(rows) * (self.window // 2 + 2)
            larger = torch.empty(len(self.rows) + n_new, rows.shape[1], dtype=rows.dtype)  # takes memory as it fills
            larger[: len(self.rows)] = self.rows.reshape(-1, rows.shape[1])
            self.empty = torch.cat([self.empty, torch.arange(len(self.rows), len(larger))])
            self.rows = larger
        places, self.empty = self.empty[: len(rows)], self.empty[len(rows) :]
        if len(rows):
            self.rows[places] = rows
        return places


def _of_all_ranks(buffer: _Buffer, numbers: Tensor, width: int) -> Tensor:
    """The numbered rows, [n, D], each from the rank that has it."""
    found = torch.zeros(len(numbers), width)  # float32 holds every stored precision, and gloo adds it up
    if (own := numbers >= 0).any():
        found[own] = buffer.rows_of(numbers).float()
    add_up(found)
    return found.to(buffer.rows.dtype)


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
