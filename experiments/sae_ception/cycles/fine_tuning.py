"""The training loop of a classifier: task loss, auxiliary loss, the epoch that is kept, resume.

    history = fine_tune(model, task, TuneSettings(epochs=3, aux_weight=1.0), Targets(ids, t))
"""
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from cycles.auxiliary import Auxiliary, probe, probe_ids, pull_summary
from cycles.examples import Entries, make_batch, outputs, own_examples, shuffled_batches
from cycles.modules import load_trained, trained_state
from cycles.sharding import is_sharded
from cycles.tasks import Task
from cycles.unfinished import Checkpoint, begun_epoch, load, partial_epoch, save
from lib.distributed import add_up, rank, world_size
from lib.environment import InputError
from lib.files import fingerprint
from lib.training import checkpoints
from lib.training.stopping import stop_between_steps


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


@dataclass
class _Training:
    """What one call of fine_tune works with."""

    model: nn.Module
    task: Task
    settings: TuneSettings
    targets: Auxiliary | None
    entries: Entries | None
    optimizer: torch.optim.Optimizer
    checkpoint: Checkpoint | None
    progress: dict[str, Any] = field(default_factory=dict)
    """Of all epochs that are over; "partial" has what was done of the next one."""
    stopped: Callable[[], bool] = lambda: False
    """Whether Ctrl-C came."""
    due: float = math.inf
    """When to write the next checkpoint, by time.monotonic()."""


def fine_tune(
    model: nn.Module, task: Task, settings: TuneSettings, targets: Auxiliary | None = None, *,
    entries: Entries | None = None, checkpoint: Checkpoint | None = None,
    log: Callable[[dict[str, float]], None] | None = None, label: str = "training",
) -> dict[str, Any]:
    """Train `model` in place on the training split; it ends with the weights of its last or best epoch.

    settings.select says which. The best epoch has the highest validation accuracy, the earlier one on a tie; it ends
    some arms' training sooner than others', so arms that are compared take the last. targets: what h is pulled to, or
    charged for, with settings.aux_weight; None: task loss only. entries: cached states below the first trained block.

    checkpoint: written after every epoch and, by one process alone, now and then within it and where Ctrl-C or SIGTERM
    ends it; a training that resumes from it ends with the same result. Several ranks share every batch: their
    gradients are added up, and what each of them drew within an epoch is not kept, so they resume at whole epochs.

    Returns {"epochs": [{loss, aux_loss, val_accuracy, val_loss}], "best_epoch", "kept_epoch"} and, with targets, "cos"
    of each epoch, the mean cosine to them, and "aux" (cycles.auxiliary.pull_summary). Raises InputError for a loss that
    is no longer finite.
    """
    if settings.select not in ("last", "best"):
        raise InputError(f"SELECT_EPOCH={settings.select!r} must be 'last' or 'best'")
    checkpoint = checkpoint and Checkpoint(checkpoint.path, fingerprint([checkpoint.key, asdict(settings)]))
    training = _Training(model=model, task=task, settings=settings, targets=targets, entries=entries,
                         optimizer=_optimizer(model, settings), checkpoint=checkpoint)
    if checkpoint is not None:
        training.progress = load(checkpoint, asdict(settings), model=model, optimizer=training.optimizer) or {}
        training.due = time.monotonic() + checkpoints.CHECKPOINT_SECONDS
    progress = training.progress = training.progress or _beginning(training)
    with stop_between_steps(checkpoint is not None and world_size() == 1) as training.stopped:
        for epoch in tqdm(range(len(progress["epochs"]), settings.epochs), desc=label, unit="epoch", leave=False,
                          disable=rank() > 0):
            record = _one_epoch(training, epoch) | _validated(training) | _cosine(training)
            _add_epoch(progress, record, training)
            if log is not None:
                log({"epoch": epoch + 1, **record})
            if epoch + 1 < settings.epochs or training.stopped():
                _save(training)
    if settings.select == "best":
        load_trained(model, progress["best"])
    model.eval()
    kept = progress["best_epoch"] if settings.select == "best" else settings.epochs
    history = {"epochs": progress["epochs"], "best_epoch": progress["best_epoch"], "kept_epoch": kept}
    if targets is not None:
        end = probe(model, task, targets, settings, entries=entries)
        history["aux"] = pull_summary(progress, end, settings.aux_weight)
    return history


def _save(training: _Training) -> None:
    """Write a checkpoint, if one is wanted; then end the training where Ctrl-C asked for it."""
    if training.checkpoint is not None:
        start = time.monotonic()
        save(training.checkpoint, asdict(training.settings), training.progress, model=training.model,
             optimizer=training.optimizer)
        training.due = checkpoints.next_due(start)
    if training.stopped():
        raise KeyboardInterrupt


def _beginning(training: _Training) -> dict[str, Any]:
    start = {}
    if (targets := training.targets) is not None:
        start = probe(training.model, training.task, targets, training.settings, entries=training.entries)
    return {"epochs": [], "best_epoch": 0, "best": {}, "start": start, "sums": [0.0, 0.0]}


def _add_epoch(progress: dict[str, Any], record: dict[str, float], training: _Training) -> None:
    best = max((e["val_accuracy"] for e in progress["epochs"]), default=-1.0)
    progress["epochs"].append(record)
    progress["sums"] = [a + b for a, b in zip(progress["sums"], (record["loss"], record["aux_loss"]))]
    if record["val_accuracy"] > best:
        progress["best_epoch"] = len(progress["epochs"])
        progress["best"] = trained_state(training.model) if training.settings.select == "best" else {}


def _optimizer(model: nn.Module, settings: TuneSettings) -> torch.optim.Optimizer:
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    if settings.optimizer not in kinds:
        raise InputError(f"OPTIMIZER={settings.optimizer!r} must be one of {', '.join(kinds)}")
    decay = settings.weight_decay if settings.optimizer == "adamw" else 0.0
    return kinds[settings.optimizer]([p for p in model.parameters() if p.requires_grad], lr=settings.lr,
                                     weight_decay=decay, fused=True)


def scheduled_lr(step: int, n_steps: int, settings: TuneSettings) -> float:
    """Learning rate of step 0..n_steps-1: linear warm-up, then constant or linear to 0."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    if not settings.decay:
        return settings.lr
    return settings.lr * (n_steps - step) / max(1, n_steps - settings.warmup_steps)


def _one_epoch(training: _Training, epoch: int) -> dict[str, float]:
    """One pass over the training split, or the rest of it: the mean task and auxiliary loss of its examples."""
    model, settings, train_ids = training.model, training.settings, training.task.splits["train"]
    batches = shuffled_batches(training.task, train_ids, settings.batch_size, seed=settings.seed, epoch=epoch)
    groups = [batches[i : i + settings.accumulate] for i in range(0, len(batches), settings.accumulate)]
    n_steps = -(-len(train_ids.split(settings.batch_size)) // settings.accumulate) * settings.epochs
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = next(model.parameters()).device
    model.train()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(settings.seed * 1_000_003 + epoch + 1000 * rank())  # dropout has no generator of its own
        done, sums = begun_epoch(training.progress.pop("partial", None), device)  # no wait for the losses at each step
        for number, group in enumerate(groups[done:], done):
            sums += _accumulated(training, group)
            if settings.clip_norm is not None:
                nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
            for param_group in training.optimizer.param_groups:
                param_group["lr"] = scheduled_lr(epoch * len(groups) + number, n_steps, settings)
            training.optimizer.step()
            training.optimizer.zero_grad(set_to_none=True)
            if world_size() == 1 and (training.stopped() or time.monotonic() > training.due):
                _check_finite(training, epoch, torch.stack(sums))
                training.progress["partial"] = partial_epoch(number + 1, sums, device)
                _save(training)
                del training.progress["partial"]
    seen = torch.stack(sums).cpu().double().sum(0)
    add_up(seen)
    _check_finite(training, epoch, seen)
    loss, aux = (seen / len(train_ids)).tolist()
    return {"loss": loss, "aux_loss": aux}


def _check_finite(training: _Training, epoch: int, losses: Tensor) -> None:
    """Raise InputError for a training that diverged, whose checkpoint would only diverge again."""
    if not losses.isfinite().all():
        if training.checkpoint is not None and rank() == 0:
            training.checkpoint.remove()
        raise InputError(f"the loss is not finite in epoch {epoch + 1}; lower LR (now {training.settings.lr:g}) or "
                         "AUX_WEIGHT")


def _accumulated(training: _Training, group: list[Tensor]) -> list[Tensor]:
    """Leave the gradient of one optimiser step in the parameters; the summed task and auxiliary loss of each batch."""
    model, task, targets = training.model, training.task, training.targets
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = next(model.parameters()).device
    sharded = is_sharded(parameters[0])  # then the backward pass itself takes the mean of the ranks' gradients
    n_group = sum(len(ids) for ids in group)
    sums = []
    for whole_batch in group:
        ids, n = own_examples(whole_batch)
        batch = make_batch(task, ids, device, training.entries)
        # Over the backward pass too, where gradient checkpointing computes the layer again.
        with targets.while_training(model) if targets is not None else nullcontext():
            h, logits = model(batch)
            loss = total = cross_entropy(logits, batch["y"])
            aux = torch.zeros(())
            if targets is not None:
                aux = targets.loss(h, ids).mean()
                total = loss + training.settings.aux_weight * aux
            (total * (n / n_group * (world_size() if sharded else 1))).backward()
        sums.append(n * torch.stack([loss.detach(), aux.detach().to(loss)]))
    if not sharded:
        add_up(*(p.grad for p in parameters if p.grad is not None))
    return sums


def _validated(training: _Training) -> dict[str, float]:
    ids, task = training.task.splits["val"], training.task
    _, logits = outputs(training.model, task, ids, training.settings.batch_size, entries=training.entries)
    y = task.y[ids]
    return {"val_accuracy": float((logits.argmax(1) == y).double().mean()), "val_loss": float(cross_entropy(logits, y))}


def _cosine(training: _Training) -> dict[str, float]:
    """The mean cosine to the targets, if there are some, of the examples that cycles.auxiliary.probe takes."""
    ids = probe_ids(training.task)
    if training.targets is None:
        return {}
    h, _ = outputs(training.model, training.task, ids, training.settings.batch_size, entries=training.entries)
    far = training.targets.distance(h, ids)
    return {} if far is None else {"cos": 1 - float(far.double().mean())}
