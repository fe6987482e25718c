"""One script as several processes under torchrun: which rank am I, wait for the others, add up over all.

    torchrun --nproc-per-node 4 02_train_sae.py

torch.distributed does the work: gloo between CPUs, NCCL between GPUs. A script started without torchrun is one rank,
for which nothing here does anything. All ranks see one store: on several nodes it lies on a shared file system.

A rank that hangs must not hold the others for hours, and one that is only slow must not be ended. So sums wait for
PATIENCE, and every rank says in its loops that it makes progress (`beat`): where ranks work apart, or wait for one of
them, they go on as long as it does.
"""
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

PATIENCE = timedelta(minutes=10)  # without progress, after which a rank counts as hung
LOADING = timedelta(hours=1)  # the same while a model is read, which says nothing of its progress
LOOK_SECONDS = 5.0  # between two looks at the others


class _Watch:
    """What this rank tells the others of its progress, and sees of theirs, through torchrun's key-value store.

    Rank 0 looks at all others, and they at rank 0: when one rank ends with an error, torchrun ends the rest.
    """

    def __init__(self, store: dist.Store, own: int, n_ranks: int):
        self.store, self.own, self.n_ranks = store, own, n_ranks
        self.peers = list(range(1, n_ranks)) if own == 0 else [0]
        self.told: dict[int, bytes] = {}
        self.silent = dict.fromkeys(self.peers, 0.0)  # seconds
        self.n_beats = self.n_waits = 0
        self.looked = time.monotonic()

    def tell(self, patience: float) -> None:
        self.n_beats += 1
        self.store.set(f"rank {self.own}", f"{self.n_beats} {patience}")

    def look(self) -> None:
        """Raise RuntimeError if a rank has been silent for longer than it said it might be."""
        now = time.monotonic()
        # A gap between two looks is this rank's own silence: it says little about the others'.
        seconds, self.looked = min(now - self.looked, PATIENCE.total_seconds() / 10), now
        for peer, told in zip(self.peers, self.store.multi_get([f"rank {peer}" for peer in self.peers])):
            self.silent[peer] = self.silent[peer] + seconds if told == self.told.get(peer) else 0.0
            self.told[peer] = told
            if self.silent[peer] > float(told.split()[1]):
                raise RuntimeError(f"rank {peer} has made no progress for {self.silent[peer] / 60:.2g} minutes; see "
                                   "what its machine does, and start the same command again to resume")

    def wait(self) -> None:
        self.n_waits += 1
        self.store.add(key := f"wait {self.n_waits}", 1)
        pause = 0.001
        while self.store.add(key, 0) < self.n_ranks:
            time.sleep(pause)
            pause = min(2 * pause, LOOK_SECONDS / 10)
            beat()


_watch: _Watch | None = None


@contextmanager
def ranks() -> Iterator[None]:
    """Join the group that torchrun started, and leave it when the block ends."""
    global _watch
    if (os.environ.get("WORLD_SIZE") or "1") == "1":
        yield
        return
    device = None
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)  # from here on "cuda" means this GPU
    store, own, n_ranks = next(dist.rendezvous("env://", timeout=PATIENCE))
    _watch = _Watch(dist.PrefixStore("progress", store), own, n_ranks)
    _watch.tell(PATIENCE.total_seconds())
    dist.init_process_group("cpu:gloo,cuda:nccl" if device else "gloo", timeout=PATIENCE, store=store, rank=own,
                            world_size=n_ranks, device_id=device)
    try:
        yield
        _watch.tell(float("inf"))  # gone, not hung
    finally:
        _watch = None
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process, from 0. Rank 0 writes what only one process may write."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """How many processes work together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def beat(patience: timedelta | None = None) -> None:
    """Say that this rank makes progress, and look whether the others do; cheap enough for every turn of a loop.

    patience: how long this rank may be silent from now on, for a piece of work without a loop; None: PATIENCE.
    Raises RuntimeError if another rank has hung.
    """
    if _watch and (patience or time.monotonic() - _watch.looked > LOOK_SECONDS):
        _watch.tell((patience or PATIENCE).total_seconds())
        _watch.look()


def add_up(*tensors: Tensor) -> None:
    """Replace each tensor by its sum over all ranks, with the same bits on every rank.

    No rank may come more than PATIENCE after another: `wait_for_all` first, where they worked apart.
    """
    if world_size() > 1:
        beat()
        for tensor in tensors:
            dist.all_reduce(tensor)


def agree(answer: bool) -> bool:
    """Whether all ranks give the same answer."""
    yes = torch.tensor(int(answer))
    add_up(yes)
    return int(yes) in (0, world_size())


def wait_for_all() -> None:
    """Return once every rank has called this, which may be hours later for one that beats until then."""
    if _watch:
        _watch.wait()


def own_part(n: int) -> slice:
    """This rank's part of n things in a row: parts follow one another, and their sizes differ by at most one."""
    return slice(n * rank() // world_size(), n * (rank() + 1) // world_size())
