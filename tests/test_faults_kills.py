"""Every long script, killed at random moments and at random files, ends with the bytes of a run that was never
disturbed.

FAULTS=n in the environment asks for n kills of each script, half of them at a moment drawn over the time that the
undisturbed run took, half at a file drawn from those it wrote; `make faults` does that and prints the table.
"""
import os
import random
import shutil

import pytest
from forked import SCRIPTS, contents

KILLS = int(os.environ.get("FAULTS", 3))  # of each script
PER_CHAIN = 4  # kills before a run is left to end


def disturbed(rng, whole):
    """Where to kill: at a moment of the undisturbed run's time, or at one of its files."""
    if rng.random() < 0.5:
        return {"kill_after": rng.uniform(0, whole.seconds)}
    return {"kill_at_write": rng.randint(1, whole.writes)}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_killed_script_ends_with_the_same_bytes(forks, undisturbed, tmp_path, name, record_property):
    whole, rng, kills = undisturbed(name), random.Random(name), 0
    while kills < KILLS:
        store = tmp_path / f"after_{kills}"
        shutil.copytree(whole.before, store)
        for _ in range(min(PER_CHAIN, KILLS - kills)):
            ended = forks.run(whole.command, store, **disturbed(rng, whole.ended))
            assert ended.code in (0, -9), ended.said
            kills += ended.code == -9
        ended = forks.run(whole.command, store)
        assert ended.code == 0, ended.said
        found = contents(store)
        assert found.keys() == whole.files.keys()
        assert [path for path in found if found[path] != whole.files[path]] == []
        shutil.rmtree(store)
    record_property("fault", f"SIGKILL in {name}")
    record_property("tried", kills)


@pytest.mark.parametrize("name, folder", [("verify 02", "*/saes/*topk*"), ("embedded 02", "embedded")])
def test_a_checkpoint_left_by_a_run_killed_at_its_very_end_is_deleted(forks, undisturbed, tmp_path, name, folder):
    whole, store = undisturbed(name), tmp_path / "store"
    shutil.copytree(whole.before, store)
    assert forks.run(whole.command, store).code == 0
    left = next(store.glob(folder)) / "checkpoints" / "last.pt"
    left.parent.mkdir()
    left.touch()
    assert forks.run(whole.command, store).code == 0
    assert contents(store) == whole.files
