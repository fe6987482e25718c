"""Every long script, killed at random moments and at random files, ends with the bytes of a run that was never disturbed.

FAULTS=n in the environment asks for n kills of each script, half of them at a moment drawn over the time that the undisturbed
run took, half at a file drawn from those it wrote; `make faults` does that and prints the table.
"""
import json
import os
import random
import shutil

import pytest
from conftest import TEXTS, tiny_model, word_tokenizer
from forked import Forks

KILLS = int(os.environ.get("FAULTS", 4))  # of each script
PER_CHAIN = 4  # kills before a run is left to end
OFTEN = {"lib.training.CHECKPOINT_SECONDS": 0.02, "lib.training.CHECKPOINT_SHARE": 1.0, "lib.activations.BLOCK_TEXTS": 16}
VERIFY, CEPTION, EMBEDDED = (f"experiments/{name}" for name in ("verify_sae_training", "sae_ception", "embedded_default"))
SAVE = ["MODEL={data}/llama", "DATASET={data}/train.jsonl", "LAYER_SIGNATURE=resid_post:1,resid_post:0", "SHARD_ROWS=60", "PREFLIGHT=False"]
TRAIN = ["N_LATENTS_MULTIPLIER=4", "EPOCHS=12", "BATCH_SIZE_TRAIN=64", "TOP_K=3", "PRECISION=float32"]
DATA = ["MODEL={data}/llama", "DATASET={data}/train.jsonl", "VAL_DATASET={data}/val.jsonl", "TEST_DATASET={data}/test.jsonl", "DATA_LIMIT=None"]
BASELINE = [f"{CEPTION}/01_train_baseline.py", *DATA, "EPOCHS_PER_CYCLE=6", "BATCH_SIZE=16"]
SAE = [f"{CEPTION}/02_train_sae.py", "SAE_EPOCHS=4", "SAE_BATCH_SIZE=64", "TOP_K=4"]
CYCLE = [f"{CEPTION}/04_train_cycle.py", *BASELINE[1:], *SAE[1:], "SEEDS=0,", "ARMS=('lambda0','per_class')", "KEEP_PCT=5.0", "ABSORPTION_TOKENS=200"]
STORIES = [f"{EMBEDDED}/01_write_stories.py", "N_STORIES=240"]
MODEL = [f"{EMBEDDED}/02_train_story_model.py", "HIDDEN=16", "LAYERS=1", "HEADS=2", "MLP_WIDTH=16", "N_MERGES=50", "EPOCHS=2", "BATCH_SIZE=8",
         "WARMUP=2", "SAVE_EVERY=3"]  # fmt: skip
# Each script after those that it needs.
SCRIPTS = {
    "verify 01": [[f"{VERIFY}/01_save_activations.py", *SAVE]],
    "verify 02": [[f"{VERIFY}/01_save_activations.py", *SAVE], [f"{VERIFY}/02_train_sae.py", *TRAIN]],
    "sae_ception 01": [BASELINE],
    "sae_ception 02": [BASELINE, SAE],
    "sae_ception 03": [BASELINE, SAE, [f"{CEPTION}/03_train_auxiliary.py", "KEEP_PCT=5.0"]],
    "sae_ception 04": [CYCLE],
    "embedded 01": [STORIES],
    "embedded 02": [STORIES, MODEL],
}


@pytest.fixture(scope="module")
def forks():
    with Forks() as server:
        yield server


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A tiny model, and texts whose mood is told by a word."""
    folder = tmp_path_factory.mktemp("data")
    tiny_model("llama").save_pretrained(folder / "llama")
    word_tokenizer().save_pretrained(folder / "llama")
    lines = [{"text": f"{TEXTS[i % 6]} {('happy', 'sad')[i % 2]}", "mood": i % 2, "topic": i % 4} for i in range(90)]
    for name, part in (("train", lines), ("val", lines[:20]), ("test", lines[20:50])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in part))
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".log"}


def disturbed(rng, whole):
    """Where to kill: at a moment of the undisturbed run's time, or at one of its files."""
    if rng.random() < 0.5:
        return {"kill_after": rng.uniform(0, whole.seconds)}
    return {"kill_at_write": rng.randint(1, whole.writes)}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_killed_script_ends_with_the_same_bytes(forks, data, tmp_path, name, record_property):
    *before, (script, *arguments) = [[part.format(data=data) for part in command] for command in SCRIPTS[name]]
    for needed, *rest in before:
        done = forks.run(needed, rest, tmp_path / "before", patches=OFTEN)
        assert done.code == 0, done.said
    (tmp_path / "before").mkdir(exist_ok=True)
    shutil.copytree(tmp_path / "before", tmp_path / "whole")
    whole = forks.run(script, arguments, tmp_path / "whole", patches=OFTEN)
    assert whole.code == 0, whole.said
    expected, rng, kills, chain = contents(tmp_path / "whole"), random.Random(name), 0, 0
    while kills < KILLS:
        chain += 1
        store = tmp_path / f"killed_{chain}"
        shutil.copytree(tmp_path / "before", store)
        for _ in range(min(PER_CHAIN, KILLS - kills)):
            ended = forks.run(script, arguments, store, patches=OFTEN, **disturbed(rng, whole))
            assert ended.code in (0, -9), ended.said
            kills += ended.code == -9
        ended = forks.run(script, arguments, store, patches=OFTEN)
        assert ended.code == 0, ended.said
        found = contents(store)
        assert found.keys() == expected.keys()
        assert [path for path in expected if found[path] != expected[path]] == []
        shutil.rmtree(store)
    record_property("fault", f"SIGKILL in {name}")
    record_property("tried", kills)
