"""Hook points that share a pass of the model: the bytes of single trainings, what is read, and changed texts."""
import signal
from dataclasses import replace
from itertools import count

import pytest
import torch

import lib.training.loop as loop
import lib.training.many as many
from activation_buffer import mixing
from activation_buffer.mixing import LivePass
from activation_buffer.rows import LiveRows
from lib.batches import rows_of_tensor
from lib.environment import InputError
from lib.sae import sae_hash
from lib.training.loop import TrainSettings, train_sae
from lib.training.many import Job, group_jobs, memory_needed, seconds_needed, train_saes

WIDTHS, BLOCK_ROWS, WINDOW = [8, 6, 10], 200, 4
BASE = TrainSettings(n_latents=16, top_k=2, epochs=2, batch_size=100, precision="float32")  # 20 steps
stored = [rows_of_tensor(torch.randn(400, width, generator=torch.Generator().manual_seed(width)),
                         torch.arange(400) < 100) for width in WIDTHS]


class Model:
    """Gives the rows of all points, and counts what it reads; `texts` are those of each block."""

    def __init__(self, texts="texts"):
        self.texts, self.read_blocks = texts, []

    def read(self, first, points):
        for number in count(first):
            self.read_blocks.append((number, tuple(points)))
            made = [torch.randn(BLOCK_ROWS, WIDTHS[i], generator=torch.Generator().manual_seed(10 * number + i))
                    for i in points]
            yield torch.cat(made, 1), f"{self.texts} {number}"

    def rows(self):
        live = LivePass(self.read, 2000, WINDOW, WIDTHS)
        return [LiveRows(rows, live, i, epochs=2, mean=rows.mean, covariance=rows.covariance,
                         buffer_bytes=1000 * (i + 1), timed=lambda point: 1.0 + point)
                for i, rows in enumerate(stored)]


def jobs_on(rows, folder=None, points=(0, 1), ks=(2, 3)):
    return [Job(rows[i], replace(BASE, top_k=k), folder and folder / f"{i} {k}") for i in points for k in ks]


def made(found):
    return {number: (sae_hash(sae), history) for number, sae, history in found}


def alone(jobs):
    """Each with a model of its own."""
    found = [train_sae(Model().rows()[job.source.point], job.settings, progress=False) for job in jobs]
    return {number: (sae_hash(sae), history) for number, (sae, history) in enumerate(found)}


@pytest.fixture
def killed(monkeypatch):
    """Train the jobs until Ctrl-C comes in that step, counted over all."""
    def train(jobs, n_steps):
        real, steps = loop.fast_step, count(1)

        def interrupted(*args, **options):
            if next(steps) == n_steps:
                signal.raise_signal(signal.SIGINT)
            real(*args, **options)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(many, "seconds_needed", lambda *rest: 0.0)
            patch.setattr(loop, "fast_step", interrupted)
            list(train_saes(jobs, progress=False))

    return train


def test_hook_points_share_a_pass_and_each_has_the_bytes_of_its_own():
    model = Model()
    jobs = jobs_on(model.rows(), points=(2, 0))
    assert made(train_saes(jobs, progress=False)) == alone(jobs)
    assert model.read_blocks == [(number, (0, 2)) for number in range(10)]  # the third point is not even looked at


def test_they_share_one_buffer(monkeypatch):
    buffers = []

    class Seen(mixing.Buffer):
        def __init__(self, *given, **named):
            super().__init__(*given, **named)
            buffers.append(self)

    monkeypatch.setattr(mixing, "Buffer", Seen)
    list(train_saes(jobs_on(Model().rows(), points=(0, 1, 2)), progress=False))
    assert [buffer.rows.shape[1] for buffer in buffers] == [sum(WIDTHS)]


@pytest.mark.parametrize("n_steps", [1, 30, 79])
def test_after_a_kill_they_go_on_in_one_pass(killed, tmp_path, n_steps):
    killed(jobs_on(Model().rows(), tmp_path), n_steps)
    model = Model()
    jobs = jobs_on(model.rows(), tmp_path)
    assert made(train_saes(jobs, progress=False)) == alone(jobs)
    assert len({number for number, _ in model.read_blocks}) == len(model.read_blocks)


@pytest.mark.parametrize("ahead", [(0, 1), (1, 0)])
def test_those_ahead_wait_for_those_behind(killed, tmp_path, ahead):
    """One was trained further by itself; another is not begun."""
    killed(jobs_on(Model().rows(), tmp_path, points=ahead, ks=(2,)), 14)
    killed(jobs_on(Model().rows(), tmp_path, points=ahead[:1], ks=(2,)), 7)
    model = Model()
    jobs = jobs_on(model.rows(), tmp_path, points=(0, 1, 2), ks=(2,))
    assert made(train_saes(jobs, progress=False)) == alone(jobs)
    assert model.read_blocks == [(number, (0, 1, 2)) for number in range(10)]


def test_one_that_diverges_leaves_the_others(tmp_path):
    jobs = jobs_on(Model().rows(), tmp_path, ks=(2,))
    jobs[0] = replace(jobs[0], settings=replace(BASE, lr=1e30, aligned=False))
    found = []
    with pytest.raises(InputError, match="1 of 2 SAEs diverged"):
        found.extend(train_saes(jobs, progress=False))
    assert made(found) == {1: alone(jobs[1:])[0]}


def test_a_point_may_be_trained_on_twice():
    """A second pass begins from the first block."""
    model = Model()
    rows = model.rows()
    first, again = (made(train_saes(jobs_on(rows, ks=(2,)), progress=False)) for _ in range(2))
    assert first == again and [number for number, _ in model.read_blocks] == [*range(10), *range(10)]


def test_seeds_are_passes_of_their_own_one_after_another():
    passes = [Model().rows() for _ in range(2)]
    jobs = [Job(rows[i], replace(BASE, seed=seed)) for i in (0, 1) for seed, rows in enumerate(passes)]
    assert [group.numbers for group in group_jobs(jobs)] == [[0, 2], [1, 3]]


def test_memory_and_time_hold_the_buffers_of_all_points_and_one_pass():
    jobs = jobs_on(Model().rows(), points=(0, 1, 2), ks=(2,))
    one, all_three = (memory_needed(some, group_jobs(some), torch.device("cpu")) for some in (jobs[:1], jobs))
    of_saes = [4 * 8 * 16 * width + 2 * 100 * 16 for width in WIDTHS]
    assert one == 1000 + of_saes[0] and all_three == 6000 + sum(of_saes)
    seconds = seconds_needed(jobs, group_jobs(jobs), torch.device("cpu"))
    assert 3.0 * 2000 <= seconds < 3.0 * 2000 + 60


@pytest.mark.parametrize("n_steps", [5, 60])
def test_other_texts_after_a_kill_are_refused(killed, tmp_path, n_steps):
    killed(jobs_on(Model().rows(), tmp_path), n_steps)
    with pytest.raises(InputError, match="no longer the one that this training has read"):
        list(train_saes(jobs_on(Model("others").rows(), tmp_path), progress=False))
    jobs = jobs_on(Model().rows(), tmp_path)
    assert made(train_saes(jobs, progress=False)) == alone(jobs)


@pytest.mark.parametrize("new", [1, 0])
def test_one_that_waits_does_not_go_on_with_other_texts(killed, tmp_path, new):
    """It is ahead of one that begins only now, at another point or at its own."""
    killed(jobs_on(Model().rows(), tmp_path, points=(0,), ks=(2,)), 12)
    rows = Model("others").rows()
    jobs = [Job(rows[0], BASE, tmp_path / "0 2"), Job(rows[new], replace(BASE, top_k=3))]
    with pytest.raises(InputError, match="no longer the one that this training has read"):
        list(train_saes(jobs, progress=False))


def test_rows_are_not_given_out_of_turn():
    rows = Model().rows()
    first, second = (iter(each.batches(torch.eye(width), 100, seed=0, begun=[(0, {})]))
                     for each, width in zip(rows[:2], WIDTHS))
    next(first), next(first)
    with pytest.raises(RuntimeError, match="side by side"):
        next(second)
