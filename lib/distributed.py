"""One script as several processes under torchrun: which one am I, wait for the others, add up over all.

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
from torch import Tensor, nn

from .environment import InputError

PATIENCE = timedelta(hours=12)  # that a rank waits for slower ones; where one dies, torchrun ends all at once


@contextmanager
def ranks() -> Iterator[None]:
    """Join the group that torchrun has started, and leave it when the block ends.

    Raises InputError where torchrun's variables are set in part, or hold no numbers.
    """
    if (os.environ.get("WORLD_SIZE") or "1") == "1":
        yield
        return
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT"):
        if not os.environ.get(name, "").isdecimal():
            raise InputError(f"{name}={os.environ.get(name, '')} must be a number where WORLD_SIZE is set; start the "
                             "script with torchrun, or unset WORLD_SIZE")
    if not os.environ.get("MASTER_ADDR") or int(os.environ["RANK"]) >= int(os.environ["WORLD_SIZE"]):
        raise InputError("MASTER_ADDR is missing, or RANK is not below WORLD_SIZE; start the script with torchrun, or "
                         "unset WORLD_SIZE")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))  # "cuda" now means this one
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process, from 0; rank 0 is the one that writes what only one may write."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """How many processes work together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def add_up(*tensors: Tensor) -> None:
    """Replace each tensor by its sum over all ranks, the same bits on every rank."""
    if world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def agree(answer: bool) -> bool:
    """Whether all ranks give the same answer."""
    yes = torch.tensor(int(answer))
    add_up(yes)
    return int(yes) in (0, world_size())


def wait_for_all() -> None:
    """Return when every rank has come here."""
    add_up(torch.zeros(1))


def own_part(n: int) -> slice:
    """The part of n things in a row that is this rank's: parts follow each other, and their sizes differ by at most
    one.
    """
    return slice(n * rank() // world_size(), n * (rank() + 1) // world_size())


def shard(model: nn.Module, parts: list[nn.Module]) -> None:
    """Keep of each part's weights, gradients and moments only this rank's share (FSDP); what no part holds is a part
    too.

    A part is gathered on every rank for the moment in which it runs. The weights must not be tied across parts, and are
    of one precision within each. The backward pass leaves in the gradients their mean over the ranks.
    """
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (world_size(),))
    for part in [*parts, model]:
        # Also what belongs to the model itself goes after a pass: left gathered by an evaluation, it would miss the
        # next update.
        fully_shard(part, mesh=mesh, reshard_after_forward=True)


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank holds only a share of it."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or what the ranks' shares of it make together; all ranks must call it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined, operator]


def shared_like(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor`, or this rank's share of it where `like` is a share of a tensor of the same shape."""
    if not is_sharded(like) or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)  # type: ignore[attr-defined]
