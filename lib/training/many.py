"""Many SAEs from one read of their activations.

    jobs = [Job(rows, settings, folder_of(settings)) for settings in grid]
    for number, sae, history in train_saes(jobs, device):    # logs first what they will take
        ...

Each SAE has the bytes of a training of its own (lib.training.loop.train_sae), resumes like it, and is given as soon as
it is finished. What they share:

- Rows that fit into one buffer (lib.batches.BUFFER_BYTES) are read and whitened once for all SAEs on them with the same
  `whiten`. Each SAE is trained to its end before the next, so memory holds one SAE and one copy of the rows.
- Of more rows, SAEs with the same `whiten`, batch size and seed see the same batches, and step through them side by
  side. Each seed orders the rows in its own way, and so reads for itself, one after another.
- Sources that are not stored, as the hook points of a running model, give their batches once to all SAEs that want the
  same ones, and all SAEs on such sources with the same seed step side by side: a pass of the model is theirs together.
"""
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..batches import Rows, Source, buffer_rows
from ..distributed import world_size
from ..environment import InputError, as_device, log
from ..files import fingerprint
from ..sae import SAE
from .checkpoints import Diverged
from .loop import begin, finish, step_of, take_batches
from .settings import TrainSettings, check_settings, make_plan
from .start import check_start, rows_about
from .step import init_state
from .workspace import TILE_BYTES, TILE_ROWS

TIMED_STEPS = 2  # taken to tell how long a training will take
KEPT = 6  # float32 arrays [F, D] of a training: two matrices and their four moments
BEST = {"cpu": 2}  # those of the best epoch, which lie in the CPU's memory
SCORE_BYTES = 2  # at least, of a pre-activation
MEMINFO, MEMORY_LIMIT = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True, eq=False)
class Job:
    """One SAE to train: the arguments of train_sae. Jobs share what they read where `source` is the same object."""

    source: Source
    settings: TrainSettings
    folder: Path | None = None
    track: Callable[[dict[str, float]], None] = lambda record: None
    start: SAE | None = None


class Group(NamedTuple):
    """Jobs that share what they read."""

    numbers: list[int]
    """Places in the list of jobs."""
    together: bool
    """Whether they step side by side; else one is trained after the other, on rows that stay in memory."""


def train_saes(
    jobs: Sequence[Job], device: torch.device | str = "cpu", progress: bool = True
) -> Iterator[tuple[int, SAE, dict[str, Any]]]:
    """Train all these SAEs; yields the job's place in `jobs`, the SAE and its history, each as soon as it is finished.

    Raises InputError as train_sae does, before anything is read where settings are at fault or memory can't suffice. A
    training that diverges does not stop the others: Diverged says at the end which one did.
    """
    device, jobs = as_device(device), _centred(jobs)
    for job in jobs:
        check_settings(job.settings, job.source)
    groups = group_jobs(jobs)
    if len(jobs) > 1:
        _require_memory(memory_needed(jobs, groups, device), len(jobs), device)
        log.info("%d SAEs: %s", len(jobs), _told(jobs, groups, device))
    failed: dict[int, Diverged] = {}
    for group in groups:
        members = {number: jobs[number] for number in group.numbers}
        if not group.together and isinstance(rows := jobs[group.numbers[0]].source, Rows):
            rows = replace(rows, kept={})
            members = {number: replace(job, source=rows) for number, job in members.items()}
        for part in [members] if group.together else [{number: job} for number, job in members.items()]:
            trainings = {number: begin(job.source, job.settings, job.folder, device, track=job.track, start=job.start)
                         for number, job in part.items()}
            take_batches(list(trainings.values()), progress)
            for number in part:
                try:
                    sae, history = finish(trainings.pop(number))
                except Diverged as error:
                    failed[number] = error
                else:
                    yield number, sae, history
    if failed:
        number, first = next(iter(failed.items()))
        s = jobs[number].settings
        raise Diverged(f"{len(failed)} of {len(jobs)} SAEs diverged, the first with KIND={s.kind}, TOP_K={s.top_k}, "
                       f"SEED={s.seed}: {first}")


def _centred(jobs: Sequence[Job]) -> list[Job]:
    """The jobs with rows about the centre of the SAE that they start from: one source for equal centres."""
    sources: dict[tuple[int, str], Source] = {}
    for job in jobs:
        if job.start is not None:
            check_start(job.start, job.settings, len(job.source.mean))
    return [job if job.start is None else
            replace(job, source=sources.setdefault((id(job.source), fingerprint(job.start.mean)),
                                                   rows_about(job.source, job.start.mean))) for job in jobs]


def group_jobs(jobs: Sequence[Job]) -> list[Group]:
    """The jobs by what they share, in the order in which they are trained."""
    found: dict[tuple[Any, ...], list[int]] = {}
    streams: dict[int, list[Any]] = {}  # of sources that are not stored; a source gives one at a time
    for number, job in enumerate(jobs):
        wanted = job.settings.whiten, job.settings.batch_size, job.settings.seed
        if wanted not in (of_source := streams.setdefault(id(job.source), [])):
            of_source.append(wanted)
        key: tuple[Any, ...] = True, job.settings.seed, of_source.index(wanted)
        if isinstance(rows := job.source, Rows):
            together = len(rows.is_val) > buffer_rows(rows) and rows.n_train >= job.settings.batch_size
            key = together, id(rows), job.settings.whiten
            key += (job.settings.batch_size, job.settings.seed) if together else ()
        found.setdefault(key, []).append(number)
    return [Group(numbers, key[0]) for key, numbers in found.items()]


def memory_needed(jobs: Sequence[Job], groups: list[Group], device: torch.device) -> int:
    """Bytes that these trainings hold at least: rows, SAEs and what a step works on."""
    def of_sae(job: Job) -> int:
        n_latents, rows = job.settings.n_latents, -(-min(job.settings.batch_size, job.source.n_train) // world_size())
        tile = max(TILE_BYTES.get(device.type, TILE_BYTES["cpu"]), SCORE_BYTES * TILE_ROWS * n_latents)
        arrays = KEPT + BEST.get(device.type, 0)
        return 4 * arrays * n_latents * len(job.source.mean) + min(tile, SCORE_BYTES * rows * n_latents)

    def of_rows(group: Group) -> int:
        n_bytes = sum(source.buffer_bytes for source in _sources(jobs, group))
        return n_bytes // world_size() if group.together else n_bytes  # ranks share a buffer's rows

    return max(of_rows(group) + (sum if group.together else max)(of_sae(jobs[number]) for number in group.numbers)
               for group in groups)


def seconds_needed(jobs: Sequence[Job], groups: list[Group], device: torch.device) -> float:
    """How long reading and steps will take, from a sample of rows and a few steps of each shape; scores not counted."""
    steps: dict[TrainSettings, float] = {}
    seconds = 0.0
    for group in groups:
        plans = [make_plan(jobs[number].settings, jobs[number].source.n_train) for number in group.numbers]
        for number, plan in zip(group.numbers, plans):
            job = jobs[number]
            shape = replace(job.settings, seed=0, lr=1e-9, epochs=1, dead_after=10**9, log_every=1)
            if shape not in steps:
                steps[shape] = _seconds_a_step(shape, job.source, device)
            seconds += plan.n_steps * steps[shape]
        epochs = max(jobs[number].settings.epochs for number in group.numbers) if group.together else 1
        seconds += epochs * max(source.seconds_a_row() * source.n_train for source in _sources(jobs, group))
    return seconds


def _seconds_a_step(settings: TrainSettings, source: Source, device: torch.device) -> float:
    width = len(source.mean)
    state = init_state(torch.eye(width, device=device), settings.n_latents, 0, aligned=settings.aligned,
                       kind=settings.kind)
    take_step = step_of(settings, make_plan(settings, source.n_train), state,
                        settings.precision)
    rows = torch.randn(min(settings.batch_size, source.n_train), width, generator=torch.Generator().manual_seed(0))
    x, start = rows.to(device) / width**0.5, 0.0
    for _ in range(1 + TIMED_STEPS):
        take_step(state, x, lr=1e-9, k=settings.top_k)
        state["sums"].tolist()  # waits for the device
        start = start or time.monotonic()
    return (time.monotonic() - start) / TIMED_STEPS


def _sources(jobs: Sequence[Job], group: Group) -> list[Source]:
    """What a group reads: the same rows, or hook points of one pass."""
    return list({id(jobs[number].source): jobs[number].source for number in group.numbers}.values())


def _told(jobs: Sequence[Job], groups: list[Group], device: torch.device) -> str:
    """What they take, in words."""
    most = max((len(group.numbers) for group in groups if group.together), default=1)
    minutes = max(1, round(seconds_needed(jobs, groups, device) / 60))
    return (f"{len(groups)} read{'s' if len(groups) > 1 else ''} of the activations, "
            f"{'one SAE' if most == 1 else f'{most} SAEs'} at a time; about {minutes:,} min and "
            f"{memory_needed(jobs, groups, device) / 1e9:.2g} GB of memory")


def _require_memory(needed: int, n_saes: int, device: torch.device) -> None:
    free = free_memory(device)
    if free is not None and needed > free:
        raise InputError(f"these {n_saes} SAEs need at least {needed / 1e9:.3g} GB of memory at once, {free / 1e9:.3g} "
                         "GB are free; train fewer at once, or smaller ones")


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a CUDA device, or under Linux for the CPU; None where nobody tells."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # from before, for torch alone
        return torch.cuda.mem_get_info(device)[0] + kept
    try:
        lines = MEMINFO.read_text().splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
        limit = MEMORY_LIMIT.read_text().strip() if MEMORY_LIMIT.exists() else "max"
    except (OSError, StopIteration, ValueError):
        return None
    return free if limit == "max" else min(free, int(limit))
