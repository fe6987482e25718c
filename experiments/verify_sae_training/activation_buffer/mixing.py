"""Rows that arrive in blocks, mixed in memory while they pass, at one hook point or at several in one pass.

    live = LivePass(read, n_tokens=10_000_000, window=15, widths=[64, 64])
    batches = live.join(0, 1024, seed=0, begun=[(0, {})])
    x = batches.take(0, step=0)

Each row of block b leaves the buffer in one of the rounds b to b + window - 1, drawn by the seed and b. A round takes
the next block in and gives out all rows that leave in it, in random order. So a batch mixes rows of `window` blocks,
while little more than half of that is in memory, and a row is gone after `window` rounds: whoever resumes reads the
last `window` blocks once more, and has every row where it was. The first round waits for half as many. When n_tokens
rows have come no more are read, and the last round gives out all that is left.

All hook points have the same rows in the same order, so they share a buffer that is as wide as all of them, and a place
in it says nothing of any of them. Where trainings were interrupted at different steps, the pass goes on from the first
of their places, and the others wait.

Several ranks read a part of each block each, the first rows first. They draw for the rows of all, and agree on every
batch; a rank gives those of its rows that it has of them.
"""
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lib.batches import Begun
from lib.distributed import add_up, rank, world_size
from lib.environment import InputError
from lib.files import fingerprint
from lib.schemas import COUNT, POSITIVE, SHORT_HASH, Misfit, check

from .buffer import Buffer

PLACE = {"round": COUNT, "given": POSITIVE, "n_blocks": COUNT, "n_rows": COUNT, "n_over": COUNT, "texts": SHORT_HASH}
EMPTY_BLOCKS = 100  # in a row, after which nothing more is hoped for
CHANGED = ("the data set is no longer the one that this training has read: put its texts back as they were, or delete "
           "the unfinished SAE's folder to train anew")
Read = Callable[[int, list[int]], Iterator[tuple[Tensor, str]]]


@dataclass
class LivePass:
    """Rows that a model gives while it reads texts, once for all hook points that want the same batches."""

    read: Read
    """read(b, points): this rank's raw rows of block b, of block b + 1 and so on without end, the same at every call,
    with a word that other texts would change. Rows: [R_i, D_1 + D_2 + ...], the numbered points side by side.
    """
    n_tokens: int
    """Training rows to give."""
    window: int
    """Rounds in which a row may leave the buffer."""
    widths: list[int]
    """D of each hook point."""
    _coming: WeakValueDictionary[tuple[int, int], "Batches"] = field(default_factory=WeakValueDictionary)

    def join(self, point: int, batch_size: int, *, seed: int, begun: Begun) -> "Batches":
        """The batches that all share who join before the first one is taken, this hook point among them.

        begun: as lib.batches.Source.batches has it. Raises InputError if a place is damaged.
        """
        found = self._coming.get((batch_size, seed))
        if found is None or found.is_begun:
            found = self._coming[batch_size, seed] = Batches(self, batch_size, seed)
        found.points = sorted({*found.points, point})
        found.begun += [(step, _checked(place) if step else {}) for step, place in begun]
        return found


class Batches:
    """One pass: each batch is made once, and kept until the next one is asked for."""

    def __init__(self, live: LivePass, batch_size: int, seed: int):
        self.live, self.batch_size, self.seed = live, batch_size, seed
        self.points: list[int] = []
        self.begun: list[tuple[int, dict[str, Any]]] = []
        self.n_given = 0  # from the first step of a training on
        self.place: dict[str, Any] = {}  # of the batch that was given last
        self._last: Tensor | None = None
        self._raw: Iterator[Tensor] | None = None

    @property
    def is_begun(self) -> bool:
        return self._raw is not None

    def take(self, point: int, step: int) -> Tensor | None:
        """This rank's rows of the batch of that step, raw [<= batch_size, D]; None after the last one.

        Raises InputError if other texts come than those that a training has read before it was interrupted.
        """
        if self._raw is None:
            self.n_given, self.place = min(self.begun, key=lambda each: each[0])
            self._raw = self._raw_batches(self.place)
        while self.n_given <= step:
            if any(step == self.n_given and place != self.place for step, place in self.begun):
                raise InputError(CHANGED)
            self._last, self.n_given = next(self._raw, None), self.n_given + 1
        if self.n_given > step + 1:
            raise RuntimeError("hook points that share a pass take its batches side by side")
        start = sum(self.live.widths[before] for before in self.points if before < point)
        return None if self._last is None else self._last[:, start : start + self.live.widths[point]]

    def _raw_batches(self, place: dict[str, Any]) -> Iterator[Tensor]:
        """[batch_size, D_1 + D_2 + ...] each, over all ranks; every row that was read leaves once, but for the last
        that no longer fill a batch.
        """
        live, batch_size = self.live, self.batch_size
        at: dict[str, Any] = place or dict.fromkeys(PLACE, 0) | {"round": live.window // 2}
        buffer = Buffer(live.window, self.seed, first_round=at["round"])
        first = _first_block(at["round"], live.window) if place else 0
        blocks, texts = self._blocks(first, n_to_fill=at["round"] + 1 - first), dict[int, str]()

        def take(number: int) -> int:
            block, counts, texts[number] = next(blocks)
            buffer.take(number, block, counts)
            return sum(counts)

        for number in range(first, at["n_blocks"]):  # what the buffer held is read again
            take(number)
        if place and place["texts"] != fingerprint(texts):
            raise InputError(CHANGED)
        over = torch.full((at["n_over"],), -1)  # left over by the round before, and the first that this one has given
        while True:
            while at["n_blocks"] <= at["round"] and at["n_rows"] < live.n_tokens:
                n_rows = take(at["n_blocks"])
                at = at | {"n_blocks": at["n_blocks"] + 1, "n_rows": at["n_rows"] + n_rows}
            is_last = at["n_rows"] >= live.n_tokens
            texts = {number: word for number, word in texts.items() if number >= _first_block(at["round"], live.window)}
            at = at | {"n_over": len(over), "texts": fingerprint(texts)}
            numbers = torch.cat([over, buffer.leave(at["round"], everything=is_last)])
            n_full = len(numbers) // batch_size
            for given in range(at["given"], n_full):
                self.place = at | {"given": given + 1}
                if not len(own := buffer.rows_of(numbers[given * batch_size : (given + 1) * batch_size])):
                    raise InputError("a rank has no row of a batch: raise BATCH_SIZE_TRAIN and BUFFER_TOKENS, or start "
                                     "fewer ranks")
                yield own
            if is_last:
                return
            given_out, over = numbers[: n_full * batch_size], numbers[n_full * batch_size :]
            buffer.free(given_out)
            at = at | {"round": at["round"] + 1, "given": 0}

    def _blocks(self, first: int, n_to_fill: int) -> Iterator[tuple[Tensor, list[int], str]]:
        """The blocks from number `first` on, each with the numbers of rows that the ranks have of it and the word for
        its texts, and with a bar over those that come before the first batch.

        Raises InputError where rows no longer come.
        """
        n_empty = 0
        with tqdm(total=n_to_fill, desc="filling the buffer", unit="block", leave=False, disable=rank() > 0) as bar:
            for block, word in self.live.read(first, self.points):
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
                yield block, counts.tolist(), word


def _first_block(number: int, window: int) -> int:
    """The first block of which rows may leave in that round."""
    return max(0, number - window + 1)


def _checked(place: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's place. Raises InputError if it is damaged."""
    try:
        check(place, PLACE)
    except Misfit as misfit:
        raise InputError(f"the checkpoint's place in the texts is damaged: {misfit}; delete it and train "
                         "again") from None
    return dict(place)
