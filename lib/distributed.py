"""One script as several processes under torchrun: which rank am I, wait for the others, add up over all.

    torchrun --nproc-per-node 4 02_train_sae.py

torch.distributed does the work: gloo between CPUs, NCCL between GPUs. A script started without torchrun is one rank,
for which nothing here does anything. All ranks see one store: on several nodes it lies on a shared file system.
"""
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

PATIENCE = timedelta(hours=12)  # how long a rank waits for slower ones; when one dies, torchrun ends them all at once


@contextmanager
def ranks() -> Iterator[None]:
    """Join the group that torchrun started, and leave it when the block ends."""
    if (os.environ.get("WORLD_SIZE") or "1") == "1":
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # from here on "cuda" means this GPU
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process, from 0. Rank 0 writes what only one process may write."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """How many processes work together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def add_up(*tensors: Tensor) -> None:
    """Replace each tensor by its sum over all ranks, with the same bits on every rank."""
    if world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def agree(answer: bool) -> bool:
    """Whether all ranks give the same answer."""
    yes = torch.tensor(int(answer))
    add_up(yes)
    return int(yes) in (0, world_size())


def wait_for_all() -> None:
    """Return once every rank has called this."""
    add_up(torch.zeros(1))


def own_part(n: int) -> slice:
    """This rank's part of n things in a row: parts follow one another, and their sizes differ by at most one."""
    return slice(n * rank() // world_size(), n * (rank() + 1) // world_size())
