"""Training an SAE on activations, from shuffled batches to the best epoch's weights.

    rows = rows_of_run(run, hook)                       # or rows_of_tensor(x, is_val)
    sae, history = train_sae(rows, TrainSettings(n_latents=512, top_k=8), folder)

step.py and fast_step.py in this folder have the mathematics of one step, kinds.py the kinds of SAE, settings.py the
settings and rules, checkpoints.py history and checkpoints. A training that was killed at any moment and is called again
resumes from its last checkpoint, which Ctrl-C and SIGTERM write before they end it, and ends with the same bytes.
"""
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..batches import Source
from ..distributed import beat, rank, wait_for_all, world_size
from ..environment import as_device, log
from ..files import fingerprint
from ..metrics.reconstruction import Reconstruction
from ..sae import SAE, make_sae, refining, sae_hash
from . import checkpoints
from .fast_step import fast_step
from .kinds import KINDS, most_codes
from .settings import Plan, TrainSettings, aux_weight_at, check_settings, falling_k, make_plan, schedule
from .start import check_start, rows_about
from .step import folded_weights, whitening
from .stopping import stop_between_steps
from .workspace import Workspace

MAXIMA_ROWS = 1_000_000  # of training and of validation, whose codes are compared


def score(sae: SAE, batches: Iterator[Tensor]) -> dict[str, float]:
    """Reconstruction metrics of an SAE over batches of raw activations; see lib/metrics/reconstruction.py."""
    sums = Reconstruction(sae.n_latents)
    for x in batches:
        beat()
        x = x.to(sae.mean.device)
        values, indices = sae.encode(x)
        sums.add(x, sae.decode(values, indices), values, indices)
    return sums.result()


def highest_codes(sae: SAE, source: Source) -> Tensor:
    """Each latent's highest code, float32 [F], over about a million training and a million validation rows at most."""
    maxima = torch.zeros(sae.n_latents, device=sae.mean.device)
    for x in chain(source.sample(False, MAXIMA_ROWS), source.sample(True, MAXIMA_ROWS)):
        beat()
        values, indices = sae.encode(x.to(sae.mean.device))
        maxima.scatter_reduce_(0, indices.flatten(), values.flatten(), "amax")
    return maxima.cpu()


@dataclass
class Training:
    """One SAE in training: `begin` makes it, `take_batch` moves it by a step, `finish` gives the SAE."""

    source: Source
    settings: TrainSettings
    plan: Plan
    transform: Tensor
    """[D, D], of centred rows to what the step sees."""
    made: dict[str, Any]
    """Progress (lib.training.checkpoints)."""
    take_step: Callable[..., None]
    track: Callable[[dict[str, float]], None]
    checkpoint: Path | None
    failed: checkpoints.Diverged | None = None

    @property
    def step(self) -> int:
        """Steps taken."""
        return int(self.made["state"]["step"])

    @property
    def is_open(self) -> bool:
        return self.step < self.plan.n_steps and self.failed is None

    @property
    def wants(self) -> tuple[Any, ...]:
        """Trainings for which this is equal get the same batches."""
        return id(self.source), self.settings.whiten, self.settings.batch_size, self.settings.seed


def train_sae(
    source: Source, settings: TrainSettings, folder: Path | None = None, device: torch.device | str = "cpu",
    progress: bool = True, track: Callable[[dict[str, float]], None] = lambda record: None, start: SAE | None = None,
) -> tuple[SAE, dict[str, Any]]:
    """Train an SAE on the source's training rows; returns the best epoch's by validation EV, and the history.

    folder: keeps checkpoints/last.pt, from which a training with the same settings and rows resumes; None keeps
    nothing. progress: show a bar. track: called with each new entry of the history's `train`, and of its `val` as
    val_<name> (lib/trackers.py). start: an SAE from whose weights and centre training goes on (lib/training/start.py).
    history: see `empty_history` and UNITS in lib/training/checkpoints.py. With several ranks all train the same SAE:
    each takes its part of every batch, and only rank 0 writes.

    Raises InputError for settings that can't work, or can't continue `start`, for a loss that is no longer finite, and
    if `folder` holds an unfinished training with other settings.
    """
    training = begin(source, settings, folder, device, track=track, start=start)
    take_batches([training], progress)
    return finish(training)


def begin(
    source: Source, settings: TrainSettings, folder: Path | None, device: torch.device | str,
    track: Callable[[dict[str, float]], None] = lambda record: None, start: SAE | None = None,
) -> Training:
    """A training before its next step, resumed from its checkpoint if there is one; see `train_sae`."""
    check_settings(settings, source)
    wait_for_all()  # rank 0 may still be writing the SAE before this one
    device = as_device(device)
    if start is not None:
        check_start(start, settings, len(source.mean))
        source = rows_about(source, start.mean)
    plan = make_plan(settings, source.n_train)
    transform = whitening(source.covariance, settings.whiten).to(device)
    checkpoint = folder / "checkpoints" / "last.pt" if folder else None
    begun = [] if start is None else [sae_hash(start)]
    kind = KINDS[settings.kind]
    tuned = [kind.refine, kind.own, kind.ridge, kind.revive] if kind.refine else []  # unlike what names a kind
    key = fingerprint([asdict(settings), fingerprint(source.mean), source.n_train, str(device), *begun, *tuned])
    made = checkpoints.resumed_or_new(checkpoint, key, settings, plan=plan, transform=transform, start=start)
    log.info("peak learning rate %.1e, %s steps", plan.learning_rate, f"{plan.n_steps:,}")
    return Training(source, settings, plan, transform, made=made, track=track, checkpoint=checkpoint,
                    take_step=step_of(settings, plan, made["state"], made["precision"]))


def take_batches(trainings: list[Training], progress: bool = True) -> None:
    """Take all steps that are left, side by side: trainings that want the same batches get the same ones.

    Checkpoints are written now and then, and on Ctrl-C or SIGTERM. One that diverges is left behind; `finish` raises.
    """
    todo = [training for training in trainings if training.is_open]
    step = min((training.step for training in todo), default=0)
    begun: dict[tuple[Any, ...], list[tuple[int, dict[str, Any]]]] = {}
    for training in todo:  # after a kill, some are ahead and wait
        begun.setdefault(training.wants, []).append((training.step, training.made.get("place", {})))
    batches = {wants: training.source.batches(training.transform, training.settings.batch_size,
                                              seed=training.settings.seed, begun=begun[wants])
               for wants, training in {training.wants: training for training in todo}.items()}
    due = time.monotonic() + checkpoints.CHECKPOINT_SECONDS
    # With several ranks one that stops leaves the others waiting for it, so there Ctrl-C acts at once.
    with stop_between_steps(all(each.checkpoint for each in trainings) and world_size() == 1) as stopped, \
            tqdm(total=sum(each.plan.n_steps for each in trainings), initial=sum(each.step for each in trainings),
                 desc=f"training {'the SAE' if len(trainings) == 1 else f'{len(trainings)} SAEs'}", unit="step",
                 disable=not progress or rank() > 0) as bar:
        while todo := [training for training in todo if training.is_open]:
            given = {wants: next(batches[wants]) for wants in dict.fromkeys(training.wants for training in todo)
                     if step >= min(at for at, _ in begun[wants])}
            for training in (training for training in todo if training.step == step):
                _try_batch(training, given[training.wants], bar)
            step += 1
            if stopped() or time.monotonic() > due:
                due = _save(trainings, step)
            if stopped():
                raise KeyboardInterrupt
    _save(trainings, step)


def _try_batch(training: Training, x: Tensor, bar: tqdm) -> None:
    try:
        val = take_batch(training, x)
    except checkpoints.Diverged as error:
        training.failed = error
        return
    bar.update()
    if val:
        bar.set_postfix(ev=f"{val['val_ev']:.3f}", dead=f"{training.made['history']['train']['dead_pct'][-1]:.1f}%")


def take_batch(training: Training, x: Tensor) -> dict[str, float] | None:
    """One step on a batch of whitened rows; at the end of an epoch what `track` was told of its scores."""
    made, settings, plan, step = training.made, training.settings, training.plan, training.step
    lr = plan.learning_rate * schedule(step, plan.n_steps)
    training.take_step(made["state"], x, lr=lr, k=falling_k(settings, step, plan.n_steps),
                       aux_weight=aux_weight_at(settings, step, plan.n_steps))
    at = step % plan.steps_per_epoch + 1
    if at % settings.log_every == 0 or at == plan.steps_per_epoch:
        training.track(checkpoints.log_steps(made, plan, lr))
    if at < plan.steps_per_epoch:
        return None
    training.track(val := _end_epoch(training))
    return val


def finish(training: Training) -> tuple[SAE, dict[str, Any]]:
    """The SAE of the best epoch, and the history, after the last step. Raises Diverged if there is none."""
    if training.failed:
        if training.checkpoint and rank() == 0:
            shutil.rmtree(training.checkpoint.parent, ignore_errors=True)  # it would only diverge again
        raise training.failed
    made, settings = training.made, training.settings
    history = made["history"] | {"settings": asdict(settings), "precision": made["precision"],
                                 "units": checkpoints.UNITS, "best_epoch": made["best"]["epoch"]}
    return _sae_of(made["best"], training.source, settings).to(training.transform.device), history


def _save(trainings: list[Training], step: int) -> float:
    """Write the checkpoints after so many steps; returns when the next ones are due."""
    start = time.monotonic()
    for training in trainings:
        if training.checkpoint and not training.failed:
            if training.step == step and (place := training.source.place()):  # others are ahead, or have ended
                training.made["place"] = place
            try:
                checkpoints.save_checkpoint(training.checkpoint, training.made)
            except checkpoints.Diverged as error:
                if world_size() == 1:  # ranks look at different times; they all see it in the loss at the same step
                    training.failed = error
    return checkpoints.next_due(start)


def step_of(settings: TrainSettings, plan: Plan, state: dict[str, Tensor], precision: str) -> Callable[..., None]:
    """take_step(state, x, lr=..., k=..., aux_weight=...) for this kind of SAE."""
    work = Workspace(state, precision, shared=world_size() > 1, kind=settings.kind)
    return partial(fast_step, dead_after=plan.dead_after, work=work, frozen=settings.frozen)


def _end_epoch(training: Training) -> dict[str, float]:
    """Score the SAE as it would be saved now, and enter it into the history; returns what to track."""
    made, source, settings = training.made, training.source, training.settings
    weights = folded_weights(made["state"], source.scale)
    sae = _sae_of(weights, source, settings).to(training.transform.device)
    scores = {block: score(sae, source.sample(validation))
              for block, validation in (("val", True), ("train_sample", False))}
    val = checkpoints.log_epoch(made, training.plan, weights, scores)
    return {name if name == "step" else f"val_{name}": value for name, value in val.items()}


def _sae_of(weights: dict[str, Any], source: Source, settings: TrainSettings) -> SAE:
    """The SAE of folded weights."""
    top_k = most_codes(settings.kind, settings.top_k, settings.n_latents)
    return unfolded(weights, settings.kind, mean=source.mean, scale=source.scale, top_k=top_k)


def unfolded(weights: dict[str, Any], kind: str, *, mean: Tensor, scale: float, top_k: int) -> SAE:
    """The SAE of that kind whose weights lib.training.step.folded_weights gave; they may hold more than those."""
    sae = make_sae(weights["W_enc"], weights["b_enc"], weights["W_dec"], mean=mean, scale=scale, top_k=top_k,
                   threshold=weights.get("threshold"))
    return refining(sae, weights["threshold_first"], KINDS[kind].refine) if KINDS[kind].refine else sae
