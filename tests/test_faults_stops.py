"""Every long script is stopped otherwise than by a kill: Ctrl-C, a second process, other constants, a full disk."""
import random
import shutil
import signal
import subprocess

import pytest
import torch
from conftest import sae_of
from forked import SCRIPTS, contents

ALL = pytest.mark.parametrize("name", SCRIPTS)
# The same script with another value of one constant, and what it must say of it.
OTHER = {
    "sae_ception 01": (["LR=0.5"], "lr was 0.001, is 0.5"),
    "sae_ception 02": (["TOP_K=2"], "top_k was 4, is 2"),
    "sae_ception 03": (["AUX_WEIGHT=0.5"], "aux_weight was 1.0, is 0.5"),
    "sae_ception 04": (["LR=0.5"], "lr was 0.001, is 0.5"),
    "embedded 02": (["HIDDEN=32"], "HIDDEN was 16, is 32"),
}
OTHER_AFTER = {
    "sae_ception 01": (["LR=0.5"], "LR was 0.001, is 0.5"),
    "sae_ception 02": (["TOP_K=2"], "TOP_K was 4, is 2"),
    "sae_ception 03": (["AUX_WEIGHT=0.5"], "AUX_WEIGHT was 1.0, is 0.5"),
    "sae_ception 04": (["EVAL_LIMIT=5"], "EVAL_LIMIT was 1000, is 5"),
    "embedded 01": (["SEED=1"], "SEED was 0, is 1"),
    "embedded 02": (["HIDDEN=32"], "HIDDEN was 16, is 32"),
}


def fault(record_property, kind, tried=1):
    """Put a line into the table that ends the run of the tests."""
    record_property("fault", kind)
    record_property("tried", tried)


def only_error(ended):
    """The one line that a refusal is."""
    lines = [line for line in ended.said.splitlines() if line.startswith("error: ")]
    assert ended.code == 2 and len(lines) == 1 and "Traceback" not in ended.said, ended.said
    return lines[0]


def ends_as_undisturbed(forks, whole, store):
    ended = forks.run(whole.command, store)
    assert ended.code == 0, ended.said
    found = contents(store)
    assert found.keys() == whole.files.keys()
    assert [path for path in found if found[path] != whole.files[path]] == []


@ALL
def test_ctrl_c_says_that_the_run_can_go_on(forks, undisturbed, tmp_path, name, record_property):
    fault(record_property, "Ctrl-C")
    whole, store = undisturbed(name), tmp_path / "store"
    shutil.copytree(whole.before, store)
    ended = forks.run(whole.command, store, kill_at_write=random.Random(name).randint(1, whole.ended.writes),
                      kind=signal.SIGINT)
    assert ended.code == 130 and "stopped; rerun the same command to resume" in ended.said
    assert "Traceback" not in ended.said and "error:" not in ended.said
    ends_as_undisturbed(forks, whole, store)


@ALL
def test_a_second_process_is_told_who_holds_the_run(forks, undisturbed, tmp_path, name, record_property):
    fault(record_property, "a second process on the same run")
    whole, store = undisturbed(name), tmp_path / "store"
    shutil.copytree(whole.before, store)
    first = forks.run(whole.command, store, kill_at_write=max(1, whole.ended.writes // 2), kind=signal.SIGSTOP)
    assert first.code == -signal.SIGSTOP
    try:
        held = contents(store)
        line = only_error(forks.run(whole.command, store))
        assert f"is in use by process {first.process};" in line
        assert contents(store) == held
    finally:
        forks.end(first)
    ends_as_undisturbed(forks, whole, store)


def has_progress(store):
    """Whether a checkpoint of an unfinished training lies in the store."""
    for path in (*store.rglob("last.pt"), *store.rglob("*_unfinished.pt"), *store.rglob("story_model.pt")):
        # an SAE's first one is written before any step
        if int(torch.load(path, weights_only=True).get("state", {}).get("step", 1)):
            return True
    return False


def but_locks(files):
    return {path: data for path, data in files.items() if not path.endswith((".lock", ".tmp"))}


@pytest.mark.parametrize("name", OTHER)
def test_an_unfinished_run_is_not_continued_with_other_constants(forks, undisturbed, tmp_path, name, record_property):
    fault(record_property, "an unfinished run started with other constants")
    whole, store = undisturbed(name), tmp_path / "store"
    change, said = OTHER[name]
    shutil.copytree(whole.before, store)
    at = 2
    while not has_progress(store):
        assert forks.run(whole.command, store, kill_at_write=at).code == -signal.SIGKILL
        at += 2
    held = contents(store)
    line = only_error(forks.run([*whole.command, *change], store))
    assert said in line and "finish that" in line
    assert but_locks(contents(store)) == but_locks(held)
    ends_as_undisturbed(forks, whole, store)


@pytest.mark.parametrize("name", OTHER_AFTER)
def test_a_finished_run_is_not_replaced_by_one_with_other_constants(
    forks, undisturbed, tmp_path, name, record_property
):
    fault(record_property, "a finished run started with other constants")
    whole, store = undisturbed(name), tmp_path / "store"
    change, said = OTHER_AFTER[name]
    write(store, whole.files)
    assert said in only_error(forks.run([*whole.command, *change], store))
    assert contents(store) == whole.files


def write(store, files):
    for path, data in files.items():
        (store / path).parent.mkdir(parents=True, exist_ok=True)
        (store / path).write_bytes(data)


@pytest.mark.parametrize("finished", [False, True])
def test_other_constants_make_another_sae(forks, undisturbed, tmp_path, record_property, finished):
    fault(record_property, f"{'a finished' if finished else 'an unfinished'} run started with other constants")
    whole, store = undisturbed("verify 02"), tmp_path / "store"
    shutil.copytree(whole.before, store)
    at = 2
    while not (finished or has_progress(store)):
        assert forks.run(whole.command, store, kill_at_write=at).code == -signal.SIGKILL
        at += 2
    if finished:
        write(store, whole.files)
    held = but_locks(contents(store))
    ended = forks.run([*whole.command, "TOP_K=2"], store)
    assert ended.code == 0 and len(list((store / "verify_sae_training" / "saes").iterdir())) == 2
    last = {"verify_sae_training/last_sae.txt"}
    now = contents(store)
    assert {name: now.get(name) for name in held.keys() - last} == {name: held[name] for name in held.keys() - last}
    shutil.rmtree(sae_of(store))
    ends_as_undisturbed(forks, whole, store)


def test_other_constants_make_another_run_of_activations(forks, undisturbed, tmp_path, record_property):
    fault(record_property, "an unfinished run started with other constants")
    whole, store = undisturbed("verify 01"), tmp_path / "store"
    shutil.copytree(whole.before, store)
    assert forks.run(whole.command, store, kill_at_write=6).code == -signal.SIGKILL
    held = but_locks(contents(store))
    assert forks.run([*whole.command, "MAX_LENGTH=5"], store).code == 0
    found = contents(store)
    assert {path: found[path] for path in held} == held
    assert len(list((store / "verify_sae_training" / "runs").iterdir())) == 2


@pytest.fixture
def small_disk(tmp_path):
    """small_disk(n_bytes): a folder on a file system of that size; called again, its new size."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = []

    def resize(n_bytes):
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"{''.join(options)}size={n_bytes}", "tmpfs", str(folder)],
                              capture_output=True)
        options[:] = ["remount,"]
        if done.returncode:
            pytest.skip("file systems can't be mounted here")
        return folder

    yield resize
    subprocess.run(["umount", "-l", str(folder)], capture_output=True)


@ALL
def test_a_full_disk_stops_cleanly_and_the_run_goes_on_when_there_is_room(
    forks, undisturbed, small_disk, name, record_property
):
    """The disk is full at the start, then has more and more room, until the run can end."""
    whole = undisturbed(name)
    least = sum(-(-len(data) // 4096) * 4096 for data in contents(whole.before).values()) + 2 * 4096
    most = sum(-(-len(data) // 4096) * 4096 for data in whole.files.values())
    store = small_disk(least + 16 * 4096) / "store"
    shutil.copytree(whole.before, store)
    stops = 0
    for share in (0.1, 0.5, 0.9):
        small_disk(int(least + share * (most - least)) + 16 * 4096)
        ended = forks.run(whole.command, store)
        if ended.code == 0:
            break
        line = only_error(ended)
        assert "make room" in line
        assert not list(store.rglob(".*.tmp"))
        stops += 1
    assert stops
    fault(record_property, "a full disk, then room", stops)
    small_disk(1 << 28)
    ends_as_undisturbed(forks, whole, store)
