"""Ranks that are slow are waited for, and ranks that hang are noticed.

    torchrun --nproc-per-node 2 tests/test_ranks.py      # what a test starts
"""
import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import pytest
import torch
import torch.distributed as dist
from forked import ROOMS

import lib.distributed as distributed
from lib.models import load_model

SHORT, LOOK = timedelta(seconds=3), 0.2  # instead of ten minutes and five seconds


class Ranks:
    """Watches of several ranks in one process, with a clock that only moves when told to."""

    def __init__(self, monkeypatch, n=3):
        self.now = 0.0
        monkeypatch.setattr(distributed.time, "monotonic", lambda: self.now)
        store = dist.HashStore()
        self.watches = [distributed._Watch(store, own, n) for own in range(n)]
        for watch in self.watches:
            watch.tell(distributed.PATIENCE.total_seconds())

    def pass_minutes(self, minutes, telling=(), looking=(0, 1, 2)):
        """Time passes; some ranks beat every five seconds, some look."""
        for _ in range(round(12 * minutes)):
            self.now += 5
            for own in telling:
                self.watches[own].tell(distributed.PATIENCE.total_seconds())
            for own in looking:
                self.watches[own].look()


def test_a_rank_that_beats_is_waited_for_as_long_as_it_takes(monkeypatch):
    ranks = Ranks(monkeypatch)
    ranks.pass_minutes(600, telling=(0, 1, 2))


@pytest.mark.parametrize("hung, notices", [(2, 0), (0, 1), (0, 2)])
def test_a_rank_that_says_nothing_for_ten_minutes_is_named(monkeypatch, hung, notices):
    ranks = Ranks(monkeypatch)
    others = [own for own in range(3) if own != hung]
    ranks.pass_minutes(9.9, telling=others)
    with pytest.raises(RuntimeError, match=f"rank {hung} has made no progress for 10 minutes"):
        ranks.pass_minutes(0.3, telling=others, looking=(notices,))


def test_announced_silence_and_a_rank_that_has_left_are_no_hang(monkeypatch):
    ranks = Ranks(monkeypatch)
    ranks.watches[1].tell(distributed.LOADING.total_seconds())
    ranks.watches[2].tell(float("inf"))
    ranks.pass_minutes(59, telling=(0,), looking=(0,))
    with pytest.raises(RuntimeError, match="rank 1"):
        ranks.pass_minutes(2, telling=(0,), looking=(0,))


def test_a_rank_that_was_away_itself_does_not_blame_the_others(monkeypatch):
    ranks = Ranks(monkeypatch)
    ranks.pass_minutes(1, telling=(0, 1, 2))
    ranks.now += 3600  # one long piece of work on every rank
    ranks.watches[0].look()
    ranks.pass_minutes(8, telling=(), looking=(0,))


def test_a_model_on_the_meta_device_is_the_same_without_its_weights(saved_model):
    """What the ranks that receive their shares build: names, shapes and precisions of what rank 0 reads."""
    path = str(saved_model[0])
    real, empty = (load_model(path, device, torch.bfloat16) for device in (torch.device("cpu"), torch.device("meta")))
    found = [[(name, t.shape, t.dtype) for name, t in [*model.named_parameters(), *model.named_buffers()]]
             for model in (real, empty)]
    assert found[0] == found[1] and all(t.is_meta for t in [*empty.parameters(), *empty.buffers()])


def scenario() -> None:
    """Rank 1 is slow for twice the patience, then hangs: rank 0 must bear the first and notice the second."""
    distributed.PATIENCE, distributed.LOOK_SECONDS = SHORT, LOOK
    with distributed.ranks():
        if distributed.rank() == 1:
            for _ in range(30):
                time.sleep(0.2)
                distributed.beat()
        distributed.wait_for_all()
        distributed.add_up(together := torch.ones(1))
        os.write(1, f"both arrived: {int(together)}\n".encode())  # one write: prints of two processes may interleave
        if distributed.rank() == 1:
            time.sleep(600)
        distributed.wait_for_all()


def test_two_processes_bear_a_slow_rank_and_end_with_one_that_hangs():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ROOMS})
    assert done.returncode and done.stdout.count("both arrived: 2") == 2, done.stderr
    assert "RuntimeError: rank 1 has made no progress" in done.stderr


if __name__ == "__main__":
    scenario()
