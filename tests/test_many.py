"""Many SAEs from one read: the bytes of single trainings, what is read, kills, memory, and the script's SAES."""
import logging
import shutil
from copy import copy
from dataclasses import replace
from itertools import product

import pytest
import torch
from test_training import SMALL, Drawn, make_rows, split_rows, stop_in_step
from test_verify_scripts import TRAIN, files, script, source  # noqa: F401  (two fixtures)

import lib.batches as batches_module
import lib.training.many as many
from lib.environment import InputError
from lib.sae import sae_hash
from lib.saes import list_saes
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
    found = [train_sae(job.source, job.settings, progress=False, start=job.start) for job in jobs]
    return {number: (sae_hash(sae), history) for number, (sae, history) in enumerate(found)}


def test_each_of_many_has_the_bytes_of_a_training_of_its_own(layers, in_memory):
    """All kinds, two sizes, two k, two seeds, two layers, and settings that part batches or ends."""
    jobs = [Job(rows, settings) for rows, settings in product(layers[:1], GRID)]
    jobs += [Job(layers[1], BASE), Job(layers[1], replace(BASE, whiten=0.0)), Job(layers[1], replace(BASE, epochs=1)),
             Job(layers[1], replace(BASE, batch_size=50)), Job(layers[1], replace(BASE, batch_size=2000))]
    assert made(train_saes(jobs, progress=False)) == alone(jobs)


def test_what_is_read_is_read_once(layers, in_memory, monkeypatch):
    rows, read, real = layers[0], [], batches_module.read_rows
    monkeypatch.setattr(many, "seconds_needed", lambda *rest: 0.0)
    monkeypatch.setattr(batches_module, "read_rows",
                        lambda shards, ids, *rest: (read.append(len(ids)), real(shards, ids, *rest))[1])
    jobs = [Job(rows, replace(BASE, top_k=k, seed=seed)) for k, seed in product((2, 3, 4), (0, 1))]
    assert len(list(train_saes(jobs, progress=False))) == 6
    per_pass = rows.n_train if in_memory else rows.n_train // 64 * 64
    assert sum(read) == (per_pass if in_memory else 2 * 2 * per_pass)  # seeds and epochs
    assert [len(group.numbers) for group in group_jobs(jobs)] == ([6] if in_memory else [3, 3])


@pytest.mark.parametrize("own_centre", [True, False])
def test_saes_that_start_from_equal_centres_share_what_is_read(layers, in_memory, monkeypatch, own_centre):
    """Also where each has a copy of the SAE that it starts from."""
    rows, read, real = layers[0], [], batches_module.read_rows
    source, _ = train_sae(layers[0 if own_centre else 1], replace(BASE, epochs=1), progress=False)
    jobs = [Job(rows, replace(BASE, lr=lr), start=copy(source)) for lr in (1e-3, 3e-3)]
    with monkeypatch.context() as patch:
        patch.setattr(many, "seconds_needed", lambda *rest: 0.0)
        patch.setattr(batches_module, "read_rows",
                      lambda shards, ids, *rest: (read.append(len(ids)), real(shards, ids, *rest))[1])
        found = made(train_saes(jobs, progress=False))
    assert sum(read) == (rows.n_train if in_memory else 2 * (rows.n_train // 64 * 64)) and found == alone(jobs)
    with pytest.raises(InputError, match="START_FROM has k = 4; set TOP_K=4"):
        next(train_saes([*jobs, replace(jobs[0], settings=replace(BASE, top_k=3))], progress=False))


@pytest.mark.parametrize("stop_at", [1, 20, 47])
def test_many_that_were_killed_end_with_the_same_bytes(layers, in_memory, monkeypatch, tmp_path, stop_at):
    jobs = [Job(layers[0], replace(BASE, kind=kind, epochs=epochs), tmp_path / kind)
            for kind, epochs in (("topk", 2), ("jumprelu", 1), ("batchtopk", 2))]
    monkeypatch.setattr(many, "log", logging.getLogger("quiet"))
    monkeypatch.setattr(many, "seconds_needed", lambda *rest: 0.0)
    steps = stop_in_step(monkeypatch, stop_at)
    with pytest.raises(KeyboardInterrupt):
        list(train_saes(jobs, progress=False))
    found = made(train_saes(jobs, progress=False))
    assert len(steps) == 2 * 12 + 12 + 2 * 12
    assert found == alone(jobs)


def test_those_ahead_after_a_kill_wait_for_those_behind(layers, monkeypatch, tmp_path):
    """A process may end between the checkpoints of two SAEs."""
    monkeypatch.setattr(batches_module, "BUFFER_BYTES", 1)
    jobs = [Job(layers[0], replace(BASE, top_k=k), tmp_path / str(k)) for k in (2, 4)]
    stop_in_step(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        train_sae(layers[0], jobs[0].settings, jobs[0].folder, progress=False)
    assert made(train_saes(jobs, progress=False)) == alone(jobs)


def test_sources_that_are_not_stored_are_passed_once(monkeypatch, tmp_path):
    """Two sources, as two layers of a model, each for two SAEs; and a second order of the same rows."""
    sources = [Drawn(), Drawn()]
    settings = replace(BASE, batch_size=64, epochs=1)
    jobs = [Job(source, replace(settings, top_k=k), tmp_path / f"{i}{k}")
            for k in (2, 3) for i, source in enumerate(sources)]
    other = Job(sources[0], replace(settings, seed=1), tmp_path / "other")
    assert [group.numbers for group in group_jobs([*jobs, other])] == [[0, 1, 2, 3], [4]]
    monkeypatch.setattr(many, "seconds_needed", lambda *rest: 0.0)
    steps = stop_in_step(monkeypatch, 18)
    with pytest.raises(KeyboardInterrupt):
        list(train_saes(jobs, progress=False))
    fresh = [Drawn(), Drawn()]
    found = made(train_saes([replace(job, source=fresh[i % 2]) for i, job in enumerate(jobs)], progress=False))
    assert len(steps) == 40
    assert found == alone([replace(job, source=Drawn()) for job in jobs])


def killed(jobs, monkeypatch, calls):
    """Train the jobs until Ctrl-C comes in that step, counted over all."""
    monkeypatch.setattr(many, "seconds_needed", lambda *rest: 0.0)
    with monkeypatch.context() as patch:
        stop_in_step(patch, calls)
        with pytest.raises(KeyboardInterrupt):
            list(train_saes(jobs, progress=False))


def drawn(folder, epochs):
    """Jobs of 10 steps an epoch on one source that stores nothing, which is at its beginning."""
    source = Drawn()
    return [Job(source, replace(BASE, batch_size=64, top_k=2 + i, epochs=n), folder / str(i))
            for i, n in enumerate(epochs)]


def drawn_alone(jobs):
    return alone([replace(job, source=Drawn(), folder=None) for job in jobs])


def test_one_that_is_finished_keeps_its_place_while_others_go_on(monkeypatch, tmp_path):
    killed(drawn(tmp_path, (1, 2)), monkeypatch, calls=2 * 10 + 5)
    assert made(train_saes(drawn(tmp_path, (1, 2)), progress=False)) == drawn_alone(drawn(tmp_path, (1, 2)))


def test_one_that_is_ahead_keeps_its_place_while_it_waits(monkeypatch, tmp_path):
    killed(drawn(tmp_path, (2, 2))[:1], monkeypatch, calls=12)
    killed(drawn(tmp_path, (2, 2)), monkeypatch, calls=5)
    assert made(train_saes(drawn(tmp_path, (2,)), progress=False)) == drawn_alone(drawn(tmp_path, (2,)))


def test_one_that_diverges_leaves_the_others(layers, in_memory, tmp_path):
    jobs = [Job(layers[0], replace(BASE, top_k=2), tmp_path / "good"),
            Job(layers[0], replace(BASE, lr=1e30, aligned=False), tmp_path / "bad"),
            Job(layers[0], replace(BASE, top_k=3), tmp_path / "also")]
    found = []
    with pytest.raises(InputError, match="1 of 3 SAEs diverged, the first with KIND=topk, TOP_K=4, SEED=0: "):
        found.extend(train_saes(jobs, progress=False))
    assert made(found) == {number: of for number, of in alone([jobs[0], jobs[0], jobs[2]]).items() if number != 1}
    assert not (tmp_path / "bad" / "checkpoints").exists()


def test_what_cannot_fit_is_refused_before_anything_is_read(layers, monkeypatch):
    jobs = [Job(layers[0], replace(BASE, n_latents=100_000, top_k=k)) for k in (2, 3)]
    monkeypatch.setattr(many, "free_memory", lambda device: 80_000_000)
    monkeypatch.setattr(batches_module, "read_rows", None)
    with pytest.raises(InputError, match="these 2 SAEs need at least 0.0897 GB of memory at once, 0.08 GB are free"):
        next(train_saes(jobs, progress=False))


def test_memory_that_is_asked_for_is_what_a_training_holds(layers, monkeypatch):
    """Of a small SAE the pre-activations of a batch, not of a tile; on a GPU no copy of the best epoch."""
    monkeypatch.setattr(batches_module, "BUFFER_BYTES", 1)
    rows, n = layers[0], 48
    jobs = [Job(rows, replace(BASE, n_latents=n, seed=seed // 2)) for seed in range(4)]
    groups = group_jobs(jobs)
    assert [group.together for group in groups] == [True, True]
    for device, arrays in ("cpu", 8), ("cuda", 6):
        wanted = 2 * (4 * arrays * n * len(rows.mean) + 2 * 64 * n)
        of_rows = 4 * len(rows.mean) * min(rows.n_train, 2 * max(map(len, rows.shards)))
        assert many.memory_needed(jobs, groups, torch.device(device)) == wanted + of_rows


def test_memory_that_torch_keeps_on_a_gpu_counts_as_free(monkeypatch):
    """What an earlier training in the same process has left there."""
    for name, found in ("mem_get_info", (10, 100)), ("memory_reserved", 7), ("memory_allocated", 3):
        monkeypatch.setattr(torch.cuda, name, lambda device, found=found: found)
    assert many.free_memory(torch.device("cuda")) == 14


@pytest.mark.parametrize(("limit", "free"), [("max\n", 3 << 20), ("1000000\n", 1_000_000), (None, 3 << 20)])
def test_a_container_may_have_less_memory_than_its_machine(monkeypatch, tmp_path, limit, free):
    told, path = tmp_path / "meminfo", tmp_path / "memory.max"
    told.write_text("MemTotal: 9999 kB\nMemAvailable: 3072 kB\n")
    if limit:
        path.write_text(limit)
    monkeypatch.setattr(many, "MEMINFO", told)
    monkeypatch.setattr(many, "MEMORY_LIMIT", path)
    assert many.free_memory(torch.device("cpu")) == free
    told.unlink()
    assert many.free_memory(torch.device("cpu")) is None


def test_memory_and_time_are_told_before(layers, in_memory, caplog):
    jobs = [Job(layers[0], replace(BASE, top_k=k)) for k in (2, 3)]
    with caplog.at_level(logging.INFO):
        next(train_saes(jobs, progress=False))
    at_a_time = "one SAE" if in_memory else "2 SAEs"
    assert f"2 SAEs: 1 read of the activations, {at_a_time} at a time; about 1 min and 0.0" in caplog.text


def test_saes_of_the_script_stand_where_single_trainings_put_them(script, source, own_store, monkeypatch):  # noqa: F811
    """Two layers, two k, a kind and a seed, rows in memory and in buffers; what is there is not trained again."""
    layers = "LAYER_SIGNATURE=resid_post:0,resid_post:1"
    assert script("01_save_activations.py", *source, layers, "SHARD_ROWS=100")[0] == 0
    root = own_store / "verify_sae_training"
    for which in ("LAYER=resid_post:0,resid_post:1 TOP_K=2,3", "SEED=1; KIND=jumprelu SEED=1;"):
        assert script("02_train_sae.py", *TRAIN, f"SAES={which}")[0] == 0
        monkeypatch.setattr(batches_module, "BUFFER_BYTES", 1)
    many_files = files(root / "saes")
    assert len(list((root / "saes").iterdir())) == 6 == len(list_saes())
    assert (root / "last_sae.txt").read_text().startswith("model-resid_post_0-jumprelu3-64-seed1-")
    said = script("02_train_sae.py", *TRAIN, "SAES=TOP_K=2,3 SEED=0; SEED=1 LAYER=resid_post:0")
    assert said[0] == 0 and "3 of these SAEs are already trained" in said[1] and "SAE=model-" in said[1]
    monkeypatch.setattr(batches_module, "BUFFER_BYTES", 2**30)
    shutil.rmtree(root / "saes")
    for changes in (["LAYER=resid_post:1", "TOP_K=2"], ["LAYER=resid_post:0"]):
        assert script("02_train_sae.py", *TRAIN, *changes)[0] == 0
    monkeypatch.setattr(batches_module, "BUFFER_BYTES", 1)
    assert script("02_train_sae.py", *TRAIN, "SEED=1", "KIND=jumprelu")[0] == 0
    single = files(root / "saes")
    assert len(single) == 3 * len(many_files) // 6 and single.items() <= many_files.items()


WRONG = [
    (["SAES=TOPK=3"], "SAES can't name TOPK; did you mean TOP_K?; it can name LAYER, N_LATENTS_MULTIPLIER, TOP_K"),
    (["SAES=TOP_K=3,x"], "SAES: TOP_K=x must be a whole number"), (["SAES=TOP_K"], "SAES: TOP_K= must be a whole"),
    (["SAES=TOP_K=2 TOP_K=3"], "SAES names TOP_K twice"),
    (["SAES=KIND=gated"], "SAES: KIND=gated must be one of topk,"), (["SAES=DEVICE=cpu"], "SAES can't name DEVICE"),
    (["SAES=EPOCHS=1,2", "LIVE=True"], "with LIVE=True, SAES can't name EPOCHS"),
    (["SAES=BATCH_SIZE_TRAIN=64,9999", "LIVE=True"], "with LIVE=True, SAES can't name BATCH_SIZE_TRAIN"),
    (["SAES=SEED=0,1", "TRACKER=wandb"], "TRACKER=wandb shows one training at a time"),
    (["SAES=TOP_K=2,9999"], "TOP_K=9999 must be between 1 and the number of latents"),
    (["SAES=LAYER=resid_post:1,resid_post:7"], "not resid_post:7"),
]


def test_wrong_saes_are_refused_in_one_line(script, source, own_store):  # noqa: F811
    assert script("01_save_activations.py", *source, "LAYER_SIGNATURE=resid_post:1")[0] == 0
    for arguments, message in WRONG:
        code, _, err = script("02_train_sae.py", *TRAIN, *arguments)
        assert code == 2 and message in err and len([line for line in err.splitlines() if "error" in line]) == 1
    assert not (own_store / "verify_sae_training" / "saes").exists() or not list_saes()
