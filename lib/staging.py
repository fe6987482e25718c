"""The rows of a block of texts: tokenised ahead in a thread, their table, memory that the next block takes again."""
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .environment import InputError
from .hooks import HookPoint
from .texts import Tokens


def one_ahead(pool: Executor, work: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """What work() makes of each item, in order; while one is used, the next is made in the pool's thread."""
    coming: Future | None = None
    for item in items:
        made, coming = coming, pool.submit(work, item)
        if made:
            yield made.result()
    if coming:
        yield coming.result()


@contextmanager
def all_threads() -> Iterator[None]:
    """Let fast tokenizers use every processor inside the block; lib/__init__.py says why they don't elsewhere."""
    before = os.environ["TOKENIZERS_PARALLELISM"]
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        os.environ["TOKENIZERS_PARALLELISM"] = before


def row_table(block: list[Tokens]) -> Tensor:
    """The rows to store of these texts, in order: int32 [R, 5], columns as in store.ROW_COLUMNS."""
    lengths = np.array([len(item.ids) for item in block], np.int64)
    n = int(lengths.sum())
    table = np.empty((n, 5), np.int32)
    table[:, 0] = np.repeat(np.array([item.text_id for item in block], np.int64), lengths)
    table[:, 1] = np.arange(n) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    table[:, 2] = np.fromiter(chain.from_iterable(item.ids for item in block), np.int32, n)
    ends = chain.from_iterable(item.offsets for item in block)
    table[:, 3:] = np.fromiter(chain.from_iterable(ends), np.int32, 2 * n).reshape(n, 2)
    keep = np.fromiter(chain.from_iterable(item.keep for item in block), bool, n)
    return torch.from_numpy(table[keep])


def kept(item: Tokens) -> slice | Tensor:
    """Which tokens of a text are stored: a slice where they are neighbours, which needs no index on a device."""
    wanted = torch.tensor(item.keep, dtype=torch.bool).nonzero()[:, 0]
    if not len(wanted):
        return slice(0, 0)
    first, last = int(wanted[0]), int(wanted[-1])
    return slice(first, last + 1) if len(wanted) == last + 1 - first else wanted


class Staging:
    """Memory for a block's activations, [R, D] of each hook point; on its first pages a copy takes ten times as long.

    From a GPU they come without a wait for each text: wait() before they are read.
    """

    def __init__(self, n_points: int):
        self.memory = [torch.empty(0, 0)] * n_points
        self.n_rows = 0
        self.sent: dict[torch.device, torch.cuda.Event] = {}

    def begin(self, n_rows: int) -> None:
        """Make room for a block of so many rows; those of the block before are lost."""
        self.n_rows = n_rows

    def put(self, point: int, at: int, x: Tensor) -> None:
        """Copy x [n, D] to the rows from `at`."""
        memory = self.memory[point]
        if len(memory) < self.n_rows or memory.shape[1] != x.shape[1] or memory.dtype != x.dtype:
            memory = torch.empty(self.n_rows, x.shape[1], dtype=x.dtype, pin_memory=x.is_cuda)
            self.memory[point] = memory
        memory[at : at + len(x)].copy_(x, non_blocking=x.is_cuda)
        if x.is_cuda and x.device not in self.sent:
            self.sent[x.device] = torch.cuda.Event()

    def end(self) -> None:
        """Say that the block's last rows are on their way."""
        for device, event in self.sent.items():
            event.record(torch.cuda.current_stream(device))

    def wait(self) -> list[Tensor]:
        """The block's activations, [R, D] per hook point, once all have come; [0, 0] if no text had a token."""
        for event in self.sent.values():
            event.synchronize()
        return [memory[: self.n_rows] for memory in self.memory]


def finite_states(
    model: nn.Module, points: list[HookPoint], rows: Tensor, staging: Staging, *, dtype: torch.dtype
) -> list[Tensor]:
    """The activations of a block, [R, D] per point. Raises InputError if they are not finite, or not in `dtype`."""
    found = staging.wait()
    for point, x in zip(points, found):
        # Both ends are NaN if one value is, and rounding to another precision keeps the order.
        if len(x) and not torch.isfinite(torch.stack(x.aminmax()).to(dtype)).all():
            bad = ~torch.isfinite(x.to(dtype)).all(1)
            raise InputError(_not_finite(model, point, rows[bad], x))
    return found


def _not_finite(model: nn.Module, point: HookPoint, bad: Tensor, x: Tensor) -> str:
    """Why some of the activations x are not finite in the stored precision, and in which texts: those of `bad` rows."""
    reason = "beyond the range of float16; set STORE_DTYPE=bfloat16"
    if not torch.isfinite(x).all():
        broken = next((name for name, p in model.named_parameters() if not (p.is_meta or torch.isfinite(p).all())),
                      None)
        reason = (f"not finite, because {broken} of the model is not: download it again" if broken
                  else "not finite; try MODEL_DTYPE=float32")
    texts = ", ".join(map(str, bad[:, 0].unique().tolist()[:5]))
    return f"activations of {point.signature} are {reason} (texts {texts})"
