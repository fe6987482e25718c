"""The auxiliary loss: targets by example id, the cosine that pulls towards them, and a probe of how hard it pulls.

    L_total = L_task + weight * L_aux      with L_aux = mean(1 - cos(h_i, t_i))

h_i is live, so its gradient reaches the target layer and what stands below it; t_i is a constant of example i. Other
arms have another L_aux of h (Penalty), or change h itself while the network trains (cycles/ablation.py).
"""
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy

from cycles.examples import Entries, make_batch
from cycles.labels import draw
from cycles.sharding import is_sharded
from cycles.tasks import Task
from lib.distributed import add_up
from lib.environment import InputError

if TYPE_CHECKING:
    from cycles.fine_tuning import TuneSettings

COSINE_EPS = 1e-8  # rows with a smaller norm get no auxiliary gradient
PROBE_EXAMPLES = 256  # training examples on which the auxiliary loss and its gradient are compared at start and end


def auxiliary_loss(h: Tensor, t: Tensor, centre: Tensor | None = None) -> Tensor:
    """1 - cos(h_i, t_i) for each row of h [B, D], live, and t [B, D], constant: [B]; about `centre` [D] if given."""
    t = t.detach()
    if centre is not None:
        h, t = h - centre, t - centre
    return 1 - cosine_similarity(h, t, dim=1, eps=COSINE_EPS)


class Auxiliary:
    """What an arm does to training beside the task loss."""

    def loss(self, h: Tensor, ids: Tensor) -> Tensor:
        """L_aux of each row of h [B, D], the activations of the examples ids [B]: [B]."""
        raise NotImplementedError

    def distance(self, h: Tensor, ids: Tensor) -> Tensor | None:
        """1 - cosine of each row to its target, [B]; None where there are no targets."""
        return None

    def while_training(self, model: Any) -> AbstractContextManager:
        """In force during every forward pass that trains, and in no other."""
        return nullcontext()


class Penalty(Auxiliary):
    """A loss of the activations of a batch, the same for each of its rows."""

    def __init__(self, of_batch: Callable[[Tensor, Tensor], Tensor]):
        """of_batch(h [B, D], ids [B]): a number, as cycles.penalties.penalty makes them."""
        self.of_batch = of_batch

    def loss(self, h: Tensor, ids: Tensor) -> Tensor:
        return self.of_batch(h, ids).expand(len(h))


class Targets(Auxiliary):
    """Constant targets by example id: at(ids) does not depend on the order of the loader."""

    def __init__(self, ids: Tensor, t: Tensor, centre: Tensor | None = None, variance: float | None = None):
        """ids int64 [N] distinct, t [N, D]; the cosine is taken about centre [D], or the origin where it is None.

        variance: the loss is the mean squared error over the units divided by this, instead of 1 - cosine.
        """
        self.t, self.centre, self.variance = t.float(), centre, variance
        self.row = torch.full((int(ids.max()) + 1,), -1)
        self.row[ids] = torch.arange(len(ids))

    def at(self, ids: Tensor, device: torch.device) -> Tensor:
        """The targets [B, D] of the examples. Raises InputError for an example without one."""
        ids = ids.cpu()
        if len(ids) and (int(ids.max()) >= len(self.row) or bool((self.row[ids] < 0).any())):
            raise InputError("a training example has no target: the targets were made for another split; make them "
                             "again")
        return self.t[self.row[ids]].to(device)

    def loss(self, h: Tensor, ids: Tensor) -> Tensor:
        if self.variance is not None:
            return (h - self.at(ids, h.device)).square().mean(1) / self.variance
        return self.distance(h, ids)

    def distance(self, h: Tensor, ids: Tensor) -> Tensor:
        centre = None if self.centre is None else self.centre.to(h.device)
        return auxiliary_loss(h, self.at(ids, h.device), centre)


def probe_ids(task: Task) -> Tensor:
    """The training examples on which the pull is measured: the same for all arms, with each class's share."""
    return draw(task.splits["train"], task.y, PROBE_EXAMPLES, seed=0)


def probe(
    model: nn.Module, task: Task, targets: Auxiliary, settings: "TuneSettings", *, entries: Entries | None = None
) -> dict[str, float]:
    """The state of the auxiliary loss on probe_ids, in eval mode and in batches as in training.

    loss (mean, as trained), zero_norm_frac (rows of h without direction), grad_ratio = |weight * grad L_aux| /
    |grad L_task| over the parameters that L_aux reaches, and with targets cos (mean, about the same centre as the
    loss).
    """
    model.eval()
    device = next(model.parameters()).device
    ids = probe_ids(task)
    parameters = [p for p in model.parameters() if p.requires_grad]
    sums = torch.zeros(3, dtype=torch.float64)
    gradients: list[list[Tensor | None]] = []
    for of_task in (True, False):  # one pass each: the graph of sharded weights can't be walked twice
        for part in ids.split(settings.batch_size):
            batch = make_batch(task, part, device, entries)
            h, logits = model(batch)
            if of_task:
                cross_entropy(logits, batch["y"], reduction="sum").backward()
                continue
            aux = targets.loss(h, part).sum()
            far = targets.distance(h, part)
            if aux.requires_grad:
                (settings.aux_weight * aux).backward()
            found = [aux, (h.norm(dim=1) == 0).sum(), torch.zeros_like(aux) if far is None else far.sum()]
            sums += torch.stack([x.detach() for x in found]).cpu().double()
        gradients.append([p.grad for p in parameters])
        model.zero_grad(set_to_none=True)
    reached = [(task_g, aux_g) for task_g, aux_g in zip(*gradients) if task_g is not None and aux_g is not None]
    task_norm, aux_norm = (sum(_square_sum(pair[i]) for pair in reached) ** 0.5 for i in (0, 1))
    loss, zero, far_away = (sums / len(ids)).tolist()
    return {"loss": loss, "zero_norm_frac": zero, "grad_ratio": aux_norm / task_norm if task_norm else 0.0,
            **({} if far is None else {"cos": 1 - far_away})}


def _square_sum(gradient: Tensor) -> float:
    """Sum of squares, over all ranks' shares; in float64 on the CPU, because not every device has it."""
    own = gradient.to_local() if is_sharded(gradient) else gradient  # type: ignore[attr-defined, operator]
    total = own.detach().cpu().double().square().sum()
    if is_sharded(gradient):
        add_up(total)
    return float(total)


def pull_summary(progress: dict[str, Any], end: dict[str, float], weight: float) -> dict[str, float]:
    """The auxiliary loss of a whole training: the probe at its start and end, and the ratio of the two losses."""
    start = progress["start"]
    task_loss, aux_loss = progress["sums"]
    cosines = {"cos_start": start["cos"], "cos_end": end["cos"]} if "cos" in end else {}
    return {
        "loss_start": start["loss"], "loss_end": end["loss"], **cosines,
        "loss_ratio": weight * aux_loss / max(task_loss, 1e-12),
        "grad_ratio": start["grad_ratio"], "grad_ratio_end": end["grad_ratio"], "zero_norm_frac": end["zero_norm_frac"],
    }
