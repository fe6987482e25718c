"""The rows that wait to be mixed: which round each leaves in, and where it is kept.

    buffer = Buffer(window=15, seed=0, first_round=7)
    buffer.take(0, rows, counts=[len(rows)])           # the rows of block 0
    numbers = buffer.leave(7, everything=False)        # in random order
    buffer.rows_of(numbers), buffer.free(numbers)
"""
from collections import defaultdict

import torch
from torch import Tensor

from lib.distributed import rank


class Buffer:
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
        rounds = number + torch.randint(self.window, (sum(counts),), generator=generator_of(self.seed, number, 0))
        rounds.clamp_(min=self.window // 2)
        before = sum(counts[: rank()])
        own, stays = slice(before, before + len(block)), rounds >= self.first_round
        numbers = torch.full((len(rounds),), -1)
        numbers[own][stays[own]] = self._store(block[stays[own]])
        for leaves in range(self.first_round, number + self.window):
            self.leaving[leaves].append(numbers[rounds == leaves])

    def leave(self, number: int, everything: bool) -> Tensor:
        """The numbers of the rows that leave in a round, or of all that are left, in random order."""
        numbers = torch.cat([part for leaves in (sorted(self.leaving) if everything else [number])
                             for part in self.leaving.pop(leaves)])
        return numbers[torch.randperm(len(numbers), generator=generator_of(self.seed, number, 1))]

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


def generator_of(seed: int, number: int, purpose: int) -> torch.Generator:
    """Of where the rows of a block go (0), or of the order in a round (1)."""
    return torch.Generator().manual_seed(2 * (seed * 1_000_003 + number) + purpose)
