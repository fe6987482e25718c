"""Seconds of a step on a device, timed where the work is done.

On CUDA a call returns before its work is done, so each step stands between two events on the device's own clock, after
steps that are not counted, and the host waits once, at the end.
"""
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

WARM_UP = 4  # steps that are not counted: they choose kernels and fill the allocator
FEWEST, MOST = 5, 200  # steps that are counted


class Timed(NamedTuple):
    """What some steps took."""

    seconds: float
    """Median of a step."""
    fastest: float
    slowest: float
    host_seconds: float
    """Median of what the host needs to ask for a step; near `seconds`, it waits for the device or holds it up."""
    n_steps: int
    peak_bytes: int | None
    """Most memory that tensors on the device held, those from before the steps included; None on a CPU."""


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_steps(step: Callable[[int], Any], device: torch.device, seconds: float) -> Timed:
    """Time step(0), step(1) ... for about so many seconds, after a few that are not counted."""
    on_cuda = device.type == "cuda"
    for i in range(WARM_UP):
        if i == WARM_UP - 1:
            synchronize(device)
            start = time.perf_counter()
        step(i)
    synchronize(device)
    n = min(MOST, max(FEWEST, int(seconds / max(1e-6, time.perf_counter() - start))))
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(device)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(n + 1)]
        events[0].record()
    marks = [time.perf_counter()]
    for i in range(n):
        step(WARM_UP + i)
        marks.append(time.perf_counter())
        if on_cuda:
            events[i + 1].record()
    synchronize(device)
    taken = [after - before for before, after in zip(marks, marks[1:])]
    host = statistics.median(taken)
    if on_cuda:
        taken = [before.elapsed_time(after) / 1000 for before, after in zip(events, events[1:])]
    peak = torch.cuda.max_memory_allocated(device) if on_cuda else None
    return Timed(statistics.median(taken), min(taken), max(taken), host_seconds=host, n_steps=n, peak_bytes=peak)
