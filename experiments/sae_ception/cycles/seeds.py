"""All arms of a seed, and several seeds side by side.

    all_cycles(session)                                                            # of one seed
    with in_processes(of_seed, constants, (0, 1, 2), workers=3, threads=1) as jobs:
        for result in as_they_end(jobs, look): ...

Small models gain little from a second thread, so seeds share the cores as processes. A process saves what it has and
ends when the main one goes away, however that happens.
"""
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from cycles.acting import lambda0_cosine
from cycles.arms import definition
from cycles.session import Session
from cycles.stamps import Constants
from cycles.steps import evaluate_cycle, train_cycle_sae, train_model
from lib.distributed import world_size
from lib.environment import InputError, log, log_to
from lib.outputs import in_use

SMALL = 50_000_000  # weights of a model that each process may load for itself
LAST_SECONDS = 30  # that a process has to save what it is at

Cosines = dict[tuple[str, int, int], float]
"""(arm, seed, cycle) -> the cosine of lambda0's model to the arm's targets: what the arm reaches unpulled."""


def of_seed(c: Constants, seed: int) -> Cosines:
    """all_cycles of a seed whose data and model are loaded here."""
    level = log.level
    log.setLevel(logging.WARNING)  # what a session says of data and model is the same for every seed
    session = Session(c, seed)
    log.setLevel(level)
    return all_cycles(session)


def all_cycles(session: Session, tick: Callable[[], Any] = lambda: None) -> Cosines:
    """Train and evaluate the baseline and every cycle of every arm of a seed; what is finished is not made again.

    tick: called after each of them.
    """
    c = session.c
    with in_use(session.folder("baseline", 0)):
        for arm, cycle in stages(c):
            train_model(session, arm, cycle)
            for sae_seed in range(c["N_SAE_SEEDS"]):
                train_cycle_sae(session, arm, cycle, sae_seed)
            evaluate_cycle(session, arm, cycle)
            tick()
        if "lambda0" not in c["ARMS"]:
            return {}
        return {(arm, session.seed, cycle): lambda0_cosine(session, arm, cycle)
                for arm, cycle in stages(c) if cycle and definition(arm).has_targets}


def stages(c: Constants) -> list[tuple[str, int]]:
    """Arm and cycle of all models of a seed, in the order in which they are made."""
    return [("baseline", 0), *((arm, cycle) for arm in c["ARMS"] for cycle in range(1, c["CYCLES"] + 1))]


def n_evaluated(root: Path, c: Constants) -> int:
    """How many models of all seeds have their scores in the setting's folder."""
    return sum((root / arm / f"seed_{seed}" / f"results_cycle_{cycle}.json").exists()
               for seed in c["SEEDS"] for arm, cycle in stages(c))


def n_workers(session: Session, seeds: tuple[int, ...]) -> int:
    """How many processes serve the seeds best: one each, at most two a core; one in all on a GPU or a large model."""
    small = sum(p.numel() for p in session.model.parameters()) <= SMALL
    if session.device.type != "cpu" or world_size() > 1 or not small:
        return 1
    cores = torch.get_num_threads()
    return min(len(seeds), 2 * cores) if cores > 1 else 1


@contextmanager
def in_processes(
    work: Callable[[Constants, int], Any], c: Constants, seeds: tuple[int, ...], *, workers: int, threads: int,
    log_file: Path | None = None,
) -> Iterator[set[Future[Any]]]:
    """work(c, seed) for each seed in `workers` processes of `threads` threads each: yields their futures.

    log_file: what they say goes there and to the console; None: they say nothing. Their bars are not shown. Raises
    InputError if one of them is killed.
    """
    os.environ["OMP_NUM_THREADS"] = str(threads)  # of the processes below, before they import anything
    context = get_context("spawn")
    going, keep_going = context.Pipe(duplex=False)
    try:
        with ProcessPoolExecutor(workers, context, _begin, (going, log_file, threads)) as pool:
            try:
                jobs = {pool.submit(_call, work, c, seed) for seed in seeds}
                # Python's pool wakes its watching thread before it starts a process, so the last could die unseen.
                pool.submit(int)
                yield jobs
            except BaseException:
                keep_going.close()  # or the pool would wait for what they are at
                raise
    except BrokenProcessPool:
        raise InputError("a process of WORKERS was killed, perhaps for want of memory; lower WORKERS, then rerun the "
                         "same command to resume") from None
    finally:
        keep_going.close()


def as_they_end(jobs: set[Future[Any]], look: Callable[[], Any]) -> Iterator[Any]:
    """The jobs' results, each when it is there; `look` is called every two seconds. Raises what a job raised."""
    while jobs:
        ended, jobs = wait(jobs, timeout=2, return_when=FIRST_COMPLETED)
        look()
        for job in ended:
            yield job.result()


def _begin(going: Connection, log_file: Path | None, threads: int) -> None:
    """Make this process one of several: last in line, without bars, gone when the main process goes."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    Thread(target=_end_with, args=(going,), daemon=True).start()
    if hasattr(os, "nice"):
        os.nice(10)  # a study takes hours
    torch.set_num_threads(threads)
    # Each writes its own lines: a queue to the main process would hang with the lock of one that is killed.
    if log_file is not None:
        log_to(log_file)
    else:
        log.setLevel(logging.ERROR)
    sys.stderr = open(os.devnull, "w")  # the bars; what goes wrong reaches the main process as errors


def _end_with(going: Connection) -> None:
    """Wait until the other end of `going` is closed, by the main process or by its death; then end this one."""
    with suppress(EOFError):
        going.recv()
    os.kill(os.getpid(), signal.SIGINT)  # a training saves its step
    time.sleep(LAST_SECONDS)
    os._exit(1)  # files are written whole or not at all


def _call(work: Callable[[Constants, int], Any], c: Constants, seed: int) -> Any:
    try:
        return work(c, seed)
    except KeyboardInterrupt:
        os._exit(130)  # the pool would begin the next seed
