"""A random byte is flipped in each kind of file of the store: its reader says so, or gives exactly what was written."""
import json
import os
import random
import shutil
import zipfile

import pytest
import torch

from cycles.sealed import read_sealed
from cycles.stamps import finished
from lib.batches import rows_of_run
from lib.environment import InputError
from lib.files import read_json, read_torch
from lib.outputs import check_files
from lib.sae import load_sae, sae_hash
from lib.store import open_run

FLIPS = int(os.environ.get("FAULTS", 6))  # in each kind of file
CYCLE = "sae_ception/tiny/per_class/seed_0"


def whole_run(path):
    """All that a run gives, with the checksums of large files too."""
    run = open_run("verify_sae_training", verify=True)
    rows = rows_of_run(run, run.hooks[0])
    return [run.meta, run.manifest, run.texts, run.rows, rows.shards, rows.mean, rows.covariance,
            run.stats(run.hooks[1])]


def stories(path):
    folder = path.parent
    check_files(folder, read_json(folder / "report.json")["files"], verify=True)
    return path.read_bytes()


def stamped(path):
    """Whether step 4 would take the output beside the stamp for finished."""
    output = path.with_name(path.name.replace(".stamp.json", ".pt"))
    return finished(output, read_json(path)["key"], read_json(path)["constants"])


# kind of file -> (the run that leaves it, where it lies, its reader)
KINDS = {
    "run id": ("verify 02", "verify_sae_training/run_id.txt", whole_run),
    "manifest": ("verify 02", "verify_sae_training/runs/*/manifest.json", whole_run),
    "meta": ("verify 02", "verify_sae_training/runs/*/meta.json", whole_run),
    "texts": ("verify 02", "verify_sae_training/runs/*/texts.jsonl", whole_run),
    "rows": ("verify 02", "verify_sae_training/runs/*/rows/shard_00001.safetensors", whole_run),
    "activations": ("verify 02", "verify_sae_training/runs/*/llama*/shard_00001.safetensors", whole_run),
    "statistics": ("verify 02", "verify_sae_training/runs/*/llama*/stats.safetensors", whole_run),
    "scalars": ("verify 02", "verify_sae_training/runs/*/llama*/stats.json", whole_run),
    "SAE": ("verify 02", "verify_sae_training/saes/*/topk_sae.pt",
            lambda path: [(sae := load_sae(path)).config, sae_hash(sae)]),
    "SAE, sidecar": ("verify 02", "verify_sae_training/saes/*/topk_sae.json", read_json),
    "history": ("verify 02", "verify_sae_training/saes/*/training_history.json", read_json),
    "classifier": ("sae_ception 04", f"{CYCLE}/checkpoints/model_cycle_1_best.pt", lambda path: read_torch(path, "")),
    "classifier's SAE": ("sae_ception 04", f"{CYCLE}/checkpoints/sae_cycle_1_best.pt",
                         lambda path: [(sae := load_sae(path)).config, sae_hash(sae)]),
    "stamp": ("sae_ception 04", f"{CYCLE}/checkpoints/model_cycle_1_best.stamp.json", stamped),
    "constants": ("sae_ception 04", f"{CYCLE}/constants.json", read_json),
    "cycle's history": ("sae_ception 04", f"{CYCLE}/history_cycle_1.json", read_json),
    "results": ("sae_ception 04", f"{CYCLE}/results_cycle_1.json", read_json),
    "targets": ("sae_ception 04", f"{CYCLE}/targets_cycle_0.safetensors", read_sealed),
    "cached states": ("sae_ception 04", "sae_ception/tiny/cache/*/0.safetensors", read_sealed),
    "summary": ("sae_ception 04", "sae_ception/tiny/summary.json", read_json),
    "stories": ("embedded 02", "embedded/stories/train.jsonl", stories),
    "story model": ("embedded 02", "embedded/model/model.safetensors", stories),
}


def same(a, b):
    """Equality of nested values with tensors in them."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return all(map(same, a, b)) and len(a) == len(b) if isinstance(a, list) else a == b


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_byte_is_told(undisturbed, tmp_path, monkeypatch, kind, record_property):
    name, pattern, read = KINDS[kind]
    for file, data in undisturbed(name).files.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(data)
    monkeypatch.setenv("STORE_DIR", str(tmp_path))
    path = next(tmp_path.glob(pattern))
    data, expected, rng, told = path.read_bytes(), read(path), random.Random(kind), 0
    expected = json.loads(json.dumps(expected)) if path.suffix == ".json" and read is read_json else expected
    for _ in range(FLIPS):
        at = rng.randrange(len(data))
        path.write_bytes(data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :])
        try:
            assert same(read(path), expected), f"byte {at} was altered, and nobody said so"
        except InputError as error:
            assert "\n" not in str(error) and str(tmp_path) in str(error) or kind == "run id"
            told += 1
    assert told
    record_property("fault", f"byte flipped in {kind}")
    record_property("tried", FLIPS)


def test_a_flip_in_a_checkpoint_stops_the_training(forks, undisturbed, tmp_path):
    """The checkpoint of a killed training is damaged: the run names it, and does not go on from it."""
    whole, store = undisturbed("verify 02"), tmp_path / "store"
    shutil.copytree(whole.before, store)
    assert forks.run(whole.command, store, kill_at_write=2).code == -9
    checkpoint = next(store.rglob("last.pt"))
    with zipfile.ZipFile(checkpoint) as archive:  # the archive's padding is not data: a flip there does no harm
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        content = archive.read(largest)
    data = checkpoint.read_bytes()
    at = data.index(content) + len(content) // 2
    checkpoint.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    ended = forks.run(whole.command, store)
    assert ended.code == 2 and f"{checkpoint} is damaged" in ended.said and "Traceback" not in ended.said
    assert not list(store.rglob("topk_sae.pt"))
