"""The rows of one hook point of a running model: a source of training rows (lib.batches.Source).

    rows = LiveRows(stored, live, point=0, epochs=10, mean=stored.mean, covariance=stored.covariance)
    sae, history = train_sae(rows, settings, folder)

Rows of several hook points of one pass (mixing.py) are trained on side by side: lib.training.many.train_saes does that.
"""
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from torch import Tensor

from lib.batches import EVAL_ROWS, Begun, Rows
from lib.distributed import world_size

from .mixing import Batches, LivePass


@dataclass
class LiveRows:
    """Training rows of a pass; rows to score on, and statistics, from stored rows of the same kind."""

    stored: Rows
    live: LivePass
    point: int
    """Its number among the hook points of the pass."""
    epochs: int
    """Parts that the pass is cut into; the SAE is scored after each."""
    mean: Tensor
    """[D], taken off every row."""
    covariance: Tensor
    """[D, D], about the mean."""
    buffer_bytes: int = 0
    """Of memory in which its rows wait."""
    timed: Callable[[int], float] = lambda point: 0.0
    """Seconds that the model takes for a row, up to a hook point of the pass."""
    _place: dict[str, Any] = field(default_factory=dict)
    """Of the batch that was given last."""

    @property
    def scale(self) -> float:
        """sqrt(mean squared norm of x - mean), the divisor of x'."""
        return float(self.covariance.cpu().double().trace().sqrt())

    @property
    def n_tokens(self) -> int:
        """Rows of the whole training."""
        return self.live.n_tokens

    @property
    def n_train(self) -> int:
        """Rows of an epoch."""
        return self.n_tokens // self.epochs

    @property
    def n_val(self) -> int:
        return self.stored.n_val

    def seconds_a_row(self) -> float:
        return self.timed(self.point) / world_size()

    def sample(self, validation: bool, limit: int | None = EVAL_ROWS) -> Iterator[Tensor]:
        return self.stored.sample(validation, limit)

    def batches(self, transform: Tensor, batch_size: int, *, seed: int, begun: Begun) -> Iterator[Tensor]:
        """As lib.batches.Source has it. It joins the pass at once, and shares it with all that join before the first
        batch is asked for.
        """
        shared = self.live.join(self.point, batch_size, seed=seed, begun=begun)
        return self._whitened(shared, transform, first=min(step for step, _ in begun))

    def _whitened(self, shared: Batches, transform: Tensor, first: int) -> Iterator[Tensor]:
        mean = self.mean.to(transform.device)
        for step in count(first):
            if (rows := shared.take(self.point, step)) is None:
                return
            self._place = shared.place
            yield (rows.to(transform.device).float() - mean) @ transform

    def place(self) -> dict[str, Any]:
        """Round and batches given in it, blocks and rows read, rows left over by the round before, and a word for the
        texts that are read again to go on from there.
        """
        return dict(self._place)
