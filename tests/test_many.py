"""Many SAEs from one read: the bytes of single trainings, what is read, kills, memory, and the script's SAES."""
import logging
import signal
from dataclasses import replace
from itertools import product

import pytest
from test_training import SMALL, Drawn, make_rows, split_rows

import lib.batches as batches_module
import lib.training.loop as training
import lib.training.many as many
from lib.environment import InputError
from lib.sae import sae_hash
from lib.training.kinds import KINDS
from lib.training.loop import TrainSettings, train_sae
from lib.training.many import Job, group_jobs, train_saes

BASE = TrainSettings(**SMALL | {"epochs": 2})
GRID = [replace(BASE, kind=kind, top_k=k, n_latents=size, seed=seed)
        for (kind, k, size), seed in product([(kind, 4, 48) for kind in KINDS] + [("topk", 2, 48), ("topk", 4, 96)],
                                             (0, 1))]


@pytest.fixture(params=["memory", "buffers"])
def in_memory(request, monkeypatch):
    if request.param == "buffers":
        monkeypatch.setattr(batches_module, "BUFFER_BYTES", 1)
    return request.param == "memory"


@pytest.fixture
def layers():
    return [split_rows(make_rows(900, seed=seed)[0], 100) for seed in (0, 1)]


def made(found):
    return {number: (sae_hash(sae), history) for number, sae, history in found}


def alone(jobs):
    found = [train_sae(job.source, job.settings, progress=False) for job in jobs]
    return {number: (sae_hash(sae), history) for number, (sae, history) in enumerate(found)}


def test_each_of_many_has_the_bytes_of_a_training_of_its_own(layers, in_memory):
    """All kinds, two sizes, two k, two seeds, two layers, and settings that part batches or ends."""
    jobs = [Job(rows, settings) for rows, settings in product(layers[:1], GRID)]
    jobs += [Job(layers[1], BASE), Job(layers[1], replace(BASE, whiten=0.0)), Job(layers[1], replace(BASE, epochs=1)),
             Job(layers[1], replace(BASE, batch_size=50)), Job(layers[1], replace(BASE, batch_size=2000))]
    assert made(train_saes(jobs, progress=False)) == alone(jobs)


def test_what_is_read_is_read_once(layers, in_memory, monkeypatch):
    rows, read, real = layers[0], [], batches_module.read_rows
    monkeypatch.setattr(batches_module, "read_rows",
                        lambda shards, ids, *rest: (read.append(len(ids)), real(shards, ids, *rest))[1])
    jobs = [Job(rows, replace(BASE, top_k=k, seed=seed)) for k, seed in product((2, 3, 4), (0, 1))]
    assert len(list(train_saes(jobs, progress=False))) == 6
    per_pass = rows.n_train if in_memory else rows.n_train // 64 * 64
    assert sum(read) == (per_pass if in_memory else 2 * 2 * per_pass)  # seeds and epochs
    assert [len(group.numbers) for group in group_jobs(jobs)] == ([6] if in_memory else [3, 3])


@pytest.mark.parametrize("stop_at", [1, 20, 47])
def test_many_that_were_killed_end_with_the_same_bytes(layers, in_memory, monkeypatch, tmp_path, stop_at):
    jobs = [Job(layers[0], replace(BASE, kind=kind, epochs=epochs), tmp_path / kind)
            for kind, epochs in (("topk", 2), ("jumprelu", 1), ("batchtopk", 2))]
    real, steps = training.fast_step, []

    def interrupted(*args, **options):
        steps.append(1)
        if len(steps) == stop_at:
            signal.raise_signal(signal.SIGINT)
        real(*args, **options)

    monkeypatch.setattr(many, "log", logging.getLogger("quiet"))
    monkeypatch.setattr(many, "seconds_needed", lambda *rest: 0.0)
    monkeypatch.setattr(training, "fast_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(train_saes(jobs, progress=False))
    found = made(train_saes(jobs, progress=False))
    assert len(steps) == 2 * 12 + 12 + 2 * 12
    monkeypatch.setattr(training, "fast_step", real)
    assert found == alone(jobs)


def test_those_ahead_after_a_kill_wait_for_those_behind(layers, monkeypatch, tmp_path):
    """A process may end between the checkpoints of two SAEs."""
    monkeypatch.setattr(batches_module, "BUFFER_BYTES", 1)
    jobs = [Job(layers[0], replace(BASE, top_k=k), tmp_path / str(k)) for k in (2, 4)]
    real, steps = training.fast_step, []

    def interrupted(*args, **options):
        steps.append(1)
        if len(steps) == 5:
            signal.raise_signal(signal.SIGINT)
        real(*args, **options)

    monkeypatch.setattr(training, "fast_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_sae(layers[0], jobs[0].settings, jobs[0].folder, progress=False)
    monkeypatch.setattr(training, "fast_step", real)
    assert made(train_saes(jobs, progress=False)) == alone(jobs)


def test_sources_that_are_not_stored_are_passed_once(monkeypatch, tmp_path):
    """Two sources, as two layers of a model, each for two SAEs; and a second order of the same rows."""
    sources = [Drawn(), Drawn()]
    settings = replace(BASE, batch_size=64, epochs=1)
    jobs = [Job(source, replace(settings, top_k=k), tmp_path / f"{i}{k}")
            for k in (2, 3) for i, source in enumerate(sources)]
    other = Job(sources[0], replace(settings, seed=1), tmp_path / "other")
    assert [group.numbers for group in group_jobs([*jobs, other])] == [[0, 1, 2, 3], [4]]
    real, steps = training.fast_step, []

    def interrupted(*args, **options):
        steps.append(1)
        if len(steps) == 18:
            signal.raise_signal(signal.SIGINT)
        real(*args, **options)

    monkeypatch.setattr(many, "seconds_needed", lambda *rest: 0.0)
    monkeypatch.setattr(training, "fast_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(train_saes(jobs, progress=False))
    fresh = [Drawn(), Drawn()]
    found = made(train_saes([replace(job, source=fresh[i % 2]) for i, job in enumerate(jobs)], progress=False))
    assert len(steps) == 40
    monkeypatch.setattr(training, "fast_step", real)
    assert found == alone([replace(job, source=Drawn()) for job in jobs])


def test_one_that_diverges_leaves_the_others(layers, in_memory, tmp_path):
    jobs = [Job(layers[0], replace(BASE, top_k=2), tmp_path / "good"),
            Job(layers[0], replace(BASE, lr=1e30, aligned=False), tmp_path / "bad"),
            Job(layers[0], replace(BASE, top_k=3), tmp_path / "also")]
    found = []
    with pytest.raises(InputError, match="1 of 3 SAEs diverged, the first with KIND=topk, TOP_K=4, SEED=0: "):
        found.extend(train_saes(jobs, progress=False))
    assert made(found) == {number: of for number, of in alone([jobs[0], jobs[0], jobs[2]]).items() if number != 1}
    assert not (tmp_path / "bad" / "checkpoints" / "last.pt").exists()


def test_what_cannot_fit_is_refused_before_anything_is_read(layers, monkeypatch):
    jobs = [Job(layers[0], replace(BASE, n_latents=100_000, top_k=k)) for k in (2, 3)]
    monkeypatch.setattr(many, "free_memory", lambda device: 90_000_000)
    monkeypatch.setattr(batches_module, "read_rows", None)
    with pytest.raises(InputError, match="these 2 SAEs need at least 0.282 GB of memory at once, 0.09 GB are free"):
        next(train_saes(jobs, progress=False))


def test_memory_and_time_are_told_before(layers, in_memory, caplog):
    jobs = [Job(layers[0], replace(BASE, top_k=k)) for k in (2, 3)]
    with caplog.at_level(logging.INFO):
        next(train_saes(jobs, progress=False))
    at_a_time = "one SAE" if in_memory else "2 SAEs"
    assert f"2 SAEs: 1 read of the activations, {at_a_time} at a time; about 1 min and 0.0" in caplog.text
