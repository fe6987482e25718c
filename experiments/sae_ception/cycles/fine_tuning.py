"""The training loop of a classifier: task loss, auxiliary loss, the epoch that is kept, resume.

    history = fine_tune(model, task, TuneSettings(epochs=3, aux_weight=1.0), Targets(ids, t), checkpoint=path)
"""
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from cycles import schemas
from cycles.classifier import Entries, auxiliary_loss, load_trained, make_batch, outputs, own_examples, trained_state
from cycles.labels import draw
from cycles.sharding import is_sharded, shared_like, whole
from cycles.tasks import Task
from lib.distributed import add_up, agree, rank, world_size
from lib.environment import InputError, first_line
from lib.files import fingerprint, read_torch, write_torch
from lib.outputs import is_current

PROBE_EXAMPLES = 256  # training examples on which the auxiliary loss and its gradient are compared at start and end
GROUPED_BATCHES = 20  # text batches whose examples are sorted by length together: less padding


@dataclass(frozen=True)
class TuneSettings:
    """What decides the trained weights, besides the data and the starting point."""

    epochs: int
    batch_size: int = 64
    lr: float = 1e-3
    optimizer: str = "adam"
    """adam (no weight decay) or adamw."""
    weight_decay: float = 0.0
    warmup_steps: int = 0
    decay: bool = False
    """Linear decay of the learning rate to 0 after the warm-up."""
    clip_norm: float | None = None
    accumulate: int = 1
    """Batches of one optimiser step; the last group of an epoch may be smaller and steps too."""
    aux_weight: float = 0.0
    """lambda."""
    seed: int = 0
    """Draws the order of the examples and dropout."""
    select: str = "last"
    """Whose weights the model ends with: of the last epoch, or of the best one by validation."""


class Targets:
    """Constant targets by example id: at(ids) is the same whatever the order of the loader."""

    def __init__(self, ids: Tensor, t: Tensor, centre: Tensor | None = None):
        """ids int64 [N] distinct, t [N, D]; centre [D]: the cosine is taken about it, None: about the origin."""
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


def epoch_batches(task: Task, ids: Tensor, batch_size: int, seed: int, epoch: int) -> list[Tensor]:
    """The examples of one pass in batches, in an order drawn from (seed, epoch); texts of like length together."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = ids[torch.randperm(len(ids), generator=generator)]
    if not task.tokens:
        return list(order.split(batch_size))
    batches = []
    for group in order.split(batch_size * GROUPED_BATCHES):
        lengths = torch.tensor([len(task.tokens[i].ids) for i in group.tolist()])
        batches += group[lengths.argsort(stable=True)].split(batch_size)
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def learning_rate(step: int, n_steps: int, settings: TuneSettings) -> float:
    """Learning rate of step 0..n_steps-1: linear warm-up, then constant or linear to 0."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    if not settings.decay:
        return settings.lr
    return settings.lr * (n_steps - step) / max(1, n_steps - settings.warmup_steps)


def _optimizer(model: nn.Module, settings: TuneSettings) -> torch.optim.Optimizer:
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    if settings.optimizer not in kinds:
        raise InputError(f"OPTIMIZER={settings.optimizer!r} is none of {', '.join(kinds)}")
    decay = settings.weight_decay if settings.optimizer == "adamw" else 0.0
    parameters = [p for p in model.parameters() if p.requires_grad]
    return kinds[settings.optimizer](parameters, lr=settings.lr, weight_decay=decay, fused=True)


def fine_tune(model: nn.Module, task: Task, settings: TuneSettings, targets: Targets | None = None,
              entries: Entries | None = None, checkpoint: Path | None = None, key: str = "",
              log: Callable[[dict[str, float]], None] | None = None, label: str = "training") -> dict[str, Any]:
    """Train `model` in place on the training split and leave it with the weights of its last or best epoch
    (settings.select).

    The best epoch has the highest validation accuracy, the earlier one on a tie; it ends one arm's training sooner than
    another's, so arms that are compared take the last. targets: what h is pulled to
    with settings.aux_weight; None: task loss only. entries: cached states below the first trained block.
    checkpoint: a file from which an interrupted call goes on, if it has the same `key`, with the same result.

    Several ranks share every batch: their gradients are added up, and only the first writes the checkpoint.

    Returns {"epochs": [{loss, aux_loss, val_accuracy, val_loss}], "best_epoch", "kept_epoch", "aux": {..., see
    probe()}}.
    """
    if settings.select not in ("last", "best"):
        raise InputError(f"SELECT_EPOCH={settings.select!r} must be 'last' or 'best'")
    device = next(model.parameters()).device
    key = fingerprint([key, asdict(settings)])
    optimizer = _optimizer(model, settings)
    progress = _load(checkpoint, key, settings, model, optimizer)
    if progress is None:
        start = probe(model, task, targets, settings, entries) if targets is not None else {}
        progress = {"epochs": [], "best_epoch": 0, "best": {}, "start": start, "sums": [0.0, 0.0]}
    per_epoch = -(-len(task.splits["train"].split(settings.batch_size)) // settings.accumulate)
    for epoch in tqdm(range(len(progress["epochs"]), settings.epochs), desc=label, unit="epoch", leave=False):
        means = _one_epoch(model, task, settings, targets, entries, optimizer, epoch, per_epoch * settings.epochs,
                           device)
        _, logits = outputs(model, task, task.splits["val"], settings.batch_size, entries)
        y = task.y[task.splits["val"]]
        accuracy = float((logits.argmax(1) == y).double().mean())
        record = means | {"val_accuracy": accuracy, "val_loss": float(cross_entropy(logits, y))}
        best = max((e["val_accuracy"] for e in progress["epochs"]), default=-1.0)
        progress["epochs"].append(record)
        progress["sums"] = [a + b for a, b in zip(progress["sums"], (means["loss"], means["aux_loss"]))]
        if record["val_accuracy"] > best:
            progress |= {"best_epoch": epoch + 1, "best": trained_state(model) if settings.select == "best" else {}}
        if log is not None:
            log({"epoch": epoch + 1, **record})
        if checkpoint is not None and epoch + 1 < settings.epochs:
            _save(checkpoint, key, settings, progress, model, optimizer)
    if settings.select == "best":
        load_trained(model, progress["best"])
    model.eval()
    kept = progress["best_epoch"] if settings.select == "best" else settings.epochs
    history = {"epochs": progress["epochs"], "best_epoch": progress["best_epoch"], "kept_epoch": kept}
    if targets is not None:
        history["aux"] = _aux_summary(progress, probe(model, task, targets, settings, entries), settings)
    return history


def _one_epoch(model, task, settings, targets, entries, optimizer, epoch, n_steps, device) -> dict[str, float]:
    """One pass over the training split; the mean task and auxiliary loss of its examples."""
    batches = epoch_batches(task, task.splits["train"], settings.batch_size, settings.seed, epoch)
    groups = [batches[i : i + settings.accumulate] for i in range(0, len(batches), settings.accumulate)]
    parameters = [p for p in model.parameters() if p.requires_grad]
    sharded = is_sharded(parameters[0])  # then the backward pass itself takes the mean of the ranks' gradients
    sums: list[Tensor] = []  # stays on the device until the epoch ends: no wait at every step
    model.train()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(settings.seed * 1_000_003 + epoch + 1000 * rank())  # dropout has no generator of its own
        for number, group in enumerate(groups):
            n_group = sum(len(ids) for ids in group)
            for whole_batch in group:
                ids, n = own_examples(whole_batch)
                batch = make_batch(task, ids, device, entries)
                h, logits = model(batch)
                loss = total = cross_entropy(logits, batch["y"])
                aux = torch.zeros(())
                if targets is not None:
                    aux = targets.loss(h, ids).mean()
                    total = loss + settings.aux_weight * aux
                (total * (n / n_group * (world_size() if sharded else 1))).backward()
                sums.append(n * torch.stack([loss.detach(), aux.detach().to(loss)]))
            if not sharded:
                add_up(*(p.grad for p in parameters if p.grad is not None))
            if settings.clip_norm is not None:
                nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
            for param_group in optimizer.param_groups:
                param_group["lr"] = learning_rate(epoch * len(groups) + number, n_steps, settings)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    seen = torch.stack(sums).cpu().double().sum(0)
    add_up(seen)
    loss, aux = (seen / len(task.splits["train"])).tolist()
    if not (math.isfinite(loss) and math.isfinite(aux)):
        raise InputError(f"the loss is no longer finite in epoch {epoch + 1}; lower LR (now {settings.lr:g}) or "
                         "AUX_WEIGHT")
    return {"loss": loss, "aux_loss": aux}


def probe_ids(task: Task) -> Tensor:
    """The training examples on which the auxiliary loss is measured: the same ones for all arms, each class with its
    share.
    """
    return draw(task.splits["train"], task.y, PROBE_EXAMPLES, seed=0)


def probe(
    model: nn.Module, task: Task, targets: Targets, settings: TuneSettings, entries: Entries | None = None
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
    for of_task in (True, False):  # a pass for each: the graph of sharded weights can't be walked twice
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
    """Sum of squares in float64, which only the CPU is sure to have; of the whole where each rank holds a share."""
    own = gradient.to_local() if is_sharded(gradient) else gradient  # type: ignore[attr-defined, operator]
    total = own.detach().cpu().double().square().sum()
    if is_sharded(gradient):
        add_up(total)
    return float(total)


def _aux_summary(progress: dict[str, Any], end: dict[str, float], settings: TuneSettings) -> dict[str, float]:
    start = progress["start"]
    task_loss, aux_loss = progress["sums"]
    return {
        "loss_start": start["loss"], "loss_end": end["loss"], "cos_start": start["cos"], "cos_end": end["cos"],
        "loss_ratio": settings.aux_weight * aux_loss / max(task_loss, 1e-12),
        "grad_ratio": start["grad_ratio"], "grad_ratio_end": end["grad_ratio"], "zero_norm_frac": end["zero_norm_frac"],
    }


def _save(
    path: Path, key: str, settings: TuneSettings, progress: dict[str, Any], model: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    moments = optimizer.state_dict()
    moments["state"] = {i: {name: whole(value) for name, value in of.items()} for i, of in moments["state"].items()}
    content = {"key": key, "settings": asdict(settings), "progress": progress, "state": trained_state(model),
               "optimizer": moments}
    if rank() == 0:
        write_torch(path, content)


def _load(
    path: Path | None, key: str, settings: TuneSettings, model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any] | None:
    """What _save wrote, put into model and optimizer; None if there is nothing. Raises InputError if it is of another
    training.
    """
    is_there = path is not None and path.exists()
    if not agree(is_there):
        raise InputError("only some ranks see the checkpoint; STORE_DIR must lie on a file system that all of them "
                         "share")
    if path is None or not is_there:
        return None
    found = read_torch(path, "train again", schemas.TUNING)
    is_current(path, {**found["settings"], "data, model or output of an earlier step": found["key"]},
               {**asdict(settings), "data, model or output of an earlier step": key},
               "finish that training with its own, or delete it to train anew")
    try:
        load_trained(model, found["state"])
        parameters, moments = optimizer.param_groups[0]["params"], found["optimizer"]
        moments["state"] = {i: {name: shared_like(value, parameters[i]) for name, value in of.items()}
                            for i, of in moments["state"].items()}
        optimizer.load_state_dict(moments)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} is damaged ({first_line(error)}); delete it, then train again"
        ) from None
    return found["progress"]
