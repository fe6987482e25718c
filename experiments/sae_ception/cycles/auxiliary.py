"""The auxiliary loss: targets by example id, the cosine that pulls towards them, and a probe of how hard it pulls.

    L_total = L_task + weight * L_aux      with L_aux = mean(1 - cos(h_i, t_i))

h_i is live, so its gradient reaches the target layer and what stands below it; t_i is a constant of example i.
"""
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


class Targets:
    """Constant targets by example id: at(ids) does not depend on the order of the loader."""

    def __init__(self, ids: Tensor, t: Tensor, centre: Tensor | None = None):
        """ids int64 [N] distinct, t [N, D]; the cosine is taken about centre [D], or the origin where it is None."""
        self.t, self.centre = t.float(), centre
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
        """The auxiliary loss of each row of h [B, D]: [B]."""
        centre = None if self.centre is None else self.centre.to(h.device)
        return auxiliary_loss(h, self.at(ids, h.device), centre)


def probe_ids(task: Task) -> Tensor:
    """The training examples on which the pull is measured: the same for all arms, with each class's share."""
    return draw(task.splits["train"], task.y, PROBE_EXAMPLES, seed=0)


def probe(
    model: nn.Module, task: Task, targets: Targets, settings: "TuneSettings", *, entries: Entries | None = None
) -> dict[str, float]:
    """The state of the auxiliary loss on probe_ids, in eval mode.

    loss (mean 1 - cos as trained), cos (mean, about the same centre as the loss), zero_norm_frac (rows of h without
    direction), and grad_ratio = |weight * grad L_aux| / |grad L_task| over the parameters that L_aux reaches.
    """
    model.eval()
    device = next(model.parameters()).device
    ids = probe_ids(task)
    parameters = [p for p in model.parameters() if p.requires_grad]
    sums = torch.zeros(2, dtype=torch.float64)
    gradients: list[list[Tensor | None]] = []
    for of_task in (True, False):  # one pass each: the graph of sharded weights can't be walked twice
        for part in ids.split(settings.batch_size):
            batch = make_batch(task, part, device, entries)
            h, logits = model(batch)
            if of_task:
                cross_entropy(logits, batch["y"], reduction="sum").backward()
                continue
            aux = targets.loss(h, part).sum()
            (settings.aux_weight * aux).backward()
            sums += torch.stack([aux.detach(), (h.norm(dim=1) == 0).sum()]).cpu().double()
        gradients.append([p.grad for p in parameters])
        model.zero_grad(set_to_none=True)
    reached = [(task_g, aux_g) for task_g, aux_g in zip(*gradients) if task_g is not None and aux_g is not None]
    task_norm, aux_norm = (sum(_square_sum(pair[i]) for pair in reached) ** 0.5 for i in (0, 1))
    loss, zero = (sums / len(ids)).tolist()
    return {"loss": loss, "cos": 1 - loss, "zero_norm_frac": zero,
            "grad_ratio": aux_norm / task_norm if task_norm else 0.0}


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
    return {
        "loss_start": start["loss"], "loss_end": end["loss"], "cos_start": start["cos"], "cos_end": end["cos"],
        "loss_ratio": weight * aux_loss / max(task_loss, 1e-12),
        "grad_ratio": start["grad_ratio"], "grad_ratio_end": end["grad_ratio"], "zero_norm_frac": end["zero_norm_frac"],
    }
