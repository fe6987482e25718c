"""Whatever lies in the place of a file of the store, its reader says so in one line that names it, and touches
nothing.
"""
import copy
import functools
import json
import operator
import os
import random
import zipfile

import pytest
import torch
from conftest import PROJECT
from corpora import require_trained_on
from forked import contents
from reports import up_to_date
from safetensors.torch import save
from saved_model import hook_of_run

from checks.layers import LAYERS
from checks.verification import VERIFICATION
from concepts.codes import encode_run
from concepts.top_texts import read_top_texts
from cycles import schemas as cycle_schemas
from cycles.sealed import read_sealed
from cycles.stamps import finished
from lib import schemas
from lib.batches import rows_of_run, rows_of_tensor
from lib.environment import InputError
from lib.files import read_json, read_torch, write_json, write_tensors, write_torch
from lib.sae import load_sae
from lib.saes import find_sae, trained_as
from lib.schemas import Misfit, check, check_tensors
from lib.store import open_run, store_root
from lib.training.checkpoints import HISTORY, read_checkpoint
from lib.training.loop import TrainSettings, train_sae

ALTERED = int(os.environ.get("FAULTS", 20))  # times that an entry of each kind of file is altered
VERIFY, CYCLE = "verify_sae_training", "sae_ception/tiny/per_class/seed_0"


def whole_run(path):
    run = open_run(VERIFY, verify=True)
    return [run.texts, run.rows, rows_of_run(run, run.hooks[0]).mean]


# kind of file -> (the script that leaves it, where it lies, its reader)
KINDS = {
    "run id": ("verify 02", f"{VERIFY}/run_id.txt", whole_run),
    "manifest": ("verify 02", f"{VERIFY}/runs/*/manifest.json", whole_run),
    "meta": ("verify 02", f"{VERIFY}/runs/*/meta.json", whole_run),
    "texts": ("verify 02", f"{VERIFY}/runs/*/texts.jsonl", whole_run),
    "rows": ("verify 02", f"{VERIFY}/runs/*/rows/shard_00001.safetensors", whole_run),
    "activations": ("verify 02", f"{VERIFY}/runs/*/llama*/shard_00001.safetensors", whole_run),
    "statistics": ("verify 02", f"{VERIFY}/runs/*/llama*/stats.safetensors", whole_run),
    "scalars": ("verify 02", f"{VERIFY}/runs/*/llama*/stats.json", whole_run),
    "SAE": ("verify 02", f"{VERIFY}/saes/*/topk_sae.pt", load_sae),
    "sidecar": ("verify 02", f"{VERIFY}/saes/*/topk_sae.json", lambda path: read_json(path, schemas.SAE_SIDECAR)),
    "history": ("verify 02", f"{VERIFY}/saes/*/training_history.json", lambda path: read_json(path, HISTORY)),
    "stamp": ("sae_ception 04", f"{CYCLE}/checkpoints/model_cycle_1_best.stamp.json",
              lambda path: finished(path.with_name("model_cycle_1_best.pt"), "k", {})),
    "setting": ("sae_ception 04", f"{CYCLE}/constants.json", lambda path: read_json(path, cycle_schemas.SETTING)),
    "cycle's history": ("sae_ception 04", f"{CYCLE}/history_cycle_1.json",
                        lambda path: read_json(path, cycle_schemas.CYCLE_HISTORY)),
    "results": ("sae_ception 04", f"{CYCLE}/results_cycle_1.json", lambda path: read_json(path, cycle_schemas.RESULTS)),
    "targets": ("sae_ception 04", f"{CYCLE}/targets_cycle_0.safetensors", read_sealed),
    "report": ("embedded 01", "embedded/stories/report.json", lambda path: up_to_date(path, {})),
}
EMPTY_VERIFICATION = {"run_id": "r", "sae_hash": "0" * 16, "checks": [], "concept_recovery": []}
EMPTY_LAYERS = {"constants": {"MODEL": "m"}, "layers": [], "recommended": "a", "reason": "b"}
SMALL = {  # files that notebooks leave: content, reader
    "verification.json": (EMPTY_VERIFICATION, lambda path: read_json(path, VERIFICATION)),
    "layers.json": (EMPTY_LAYERS, lambda path: read_json(path, LAYERS)),
    "top_texts.json": ({"meta": {}, "0": [], "middle": {"0": []}}, read_top_texts),
}
HOSTILE = {
    "nothing": b"", "null": b"null", "list": b"[]", "dict": b"{}", "number": b"17", "brackets": b"[" * 100_000,
    "braces": b'{"a":' * 100_000,
    "closed brackets": b"[" * 900 + b"]" * 900, "huge number": b'{"n_rows": ' + b"9" * 4000 + b"}",
    "longer number": b"9" * 10_000, "infinite": b'{"a": 1e999}',
    "NaN": b'{"a": NaN}', "twice": b'{"a": 1, "a": 2}', "latin-1": b'{"a": "\xe9"}',
    "byte order mark": b"\xef\xbb\xbf{}", "zeros": bytes(1000),
    "web page": b"<!DOCTYPE html><html>404</html>",
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
    "zip": b"PK\x05\x06" + bytes(18), "tensors": save({"y": torch.zeros(2)}), "escape": b"../../../etc/passwd",
}
SPECIAL = ("folder", "pipe")


def put(path, hostile):
    """Replace a file by hostile content."""
    path.unlink(missing_ok=True)
    if hostile == "folder":
        path.mkdir()
    elif hostile == "pipe":
        os.mkfifo(path)
    else:
        path.write_bytes(HOSTILE[hostile])


def take_away(path):
    path.rmdir() if path.is_dir() else path.unlink()


def refused(read, path):
    """The one line that the reader says."""
    with pytest.raises(InputError) as error:
        read(path)
    said = str(error.value)
    assert "\n" not in said and len(said) < 1200, said
    return said


@pytest.fixture
def store_of(undisturbed, tmp_path, monkeypatch):
    def fill(name):
        for file, data in undisturbed(name).files.items():
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_bytes(data)
        monkeypatch.setenv("STORE_DIR", str(tmp_path))
        return tmp_path

    return fill


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_content_is_one_line(store_of, kind):
    name, pattern, read = KINDS[kind]
    store = store_of(name)
    path = next(store.glob(pattern))
    others = {file: data for file, data in contents(store).items() if store / file != path}
    whole = path.read_bytes()
    for hostile in (*HOSTILE, *SPECIAL):
        put(path, hostile)
        said = refused(read, path)
        assert str(path.parent) in said or kind == "run id", f"{hostile}: {said}"
        take_away(path)
    path.write_bytes(whole)
    read(path) if kind != "stamp" else refused(read, path)
    assert {file: data for file, data in contents(store).items() if store / file != path} == others


@pytest.mark.parametrize("name", SMALL)
def test_hostile_content_of_a_notebooks_file_is_one_line(tmp_path, name):
    good, read = SMALL[name]
    path = tmp_path / name
    for hostile in {*HOSTILE, *SPECIAL} - ({"dict"} if name == "top_texts.json" else set()):
        put(path, hostile)
        assert str(path) in refused(read, path), hostile
        take_away(path)
    path.write_text(json.dumps(good))
    read(path)


SEALED = [kind for kind in KINDS
          if kind in ("manifest", "sidecar", "history", "stamp", "setting", "cycle's history", "results")]


@pytest.mark.parametrize("kind", SEALED)
def test_a_seal_cant_be_taken_off(store_of, kind):
    name, pattern, read = KINDS[kind]
    path = next(store_of(name).glob(pattern))
    content = json.loads(path.read_text())
    del content["sha256"]
    path.write_text(json.dumps(content))
    assert "has no seal" in refused(read, path)


FORGED = {  # manifest -> manifest, with a seal that is right
    "absolute path": lambda m: m["files"][0].update(file="/etc/passwd"),
    "path that climbs": lambda m: m["hooks"][next(iter(m["hooks"]))][0].update(file="../../x.safetensors"),
    "hidden path": lambda m: m["files"][0].update(file=".git/config"),
    "hook that climbs": lambda m: m["hooks"].update({"..": m["rows"]}),
    "no hooks": lambda m: m["hooks"].clear(),
    "rows of another number": lambda m: m["rows"][0].update(rows=m["rows"][0]["rows"] + 1),
    "other sum": lambda m: m.update(n_rows=m["n_rows"] + 1),
    "file without checksum": lambda m: m["files"].pop(),
    "rows as text": lambda m: m.update(n_rows=str(m["n_rows"])),
    "negative": lambda m: m["rows"][0].update(rows=-3),
}


@pytest.mark.parametrize("how", FORGED)
def test_a_manifest_with_a_right_seal_is_checked_all_the_same(store_of, how):
    path = next(store_of("verify 02").glob(KINDS["manifest"][1]))
    content = json.loads(path.read_text())
    del content["sha256"]
    FORGED[how](content)
    write_json(path, content, sealed=True)
    assert "manifest.json" in refused(whole_run, path)


def reseal(run, path):
    """Put a changed file's size and checksum into the manifest, as whoever writes the store can."""
    from lib.outputs import list_files

    manifest = json.loads((run / "manifest.json").read_text())
    del manifest["sha256"]
    manifest["files"] = [entry if run / entry["file"] != path else list_files(run, [entry["file"]])[0]
                         for entry in manifest["files"]]
    write_json(run / "manifest.json", manifest, sealed=True)


ODD = (None, True, 0, -1, 2**70, 1.5, "", "../x", "\u00b2", [], {}, [None], {"a": 1}, [[]], [1, 2, 3], 1e308)


def places(value, path=()):
    """The paths to all values inside a nested one, of long lists the first few."""
    yield path
    for key in value if isinstance(value, dict) else range(min(4, len(value))) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


def altered(value, rng):
    """A copy with one entry replaced, taken away or added."""
    value = copy.deepcopy(value)
    *above, last = rng.choice([path for path in places(value) if path])
    inner = functools.reduce(operator.getitem, above, value)
    if (how := rng.random()) < 0.25:
        del inner[last]
    elif how < 0.35 and isinstance(inner, dict):
        inner["\u00b2"] = rng.choice(ODD)
    else:
        inner[last] = rng.choice(ODD)
    return value


def whole_use(path):
    """All that steps ask of a run and its SAE before they compute."""
    run, sae = open_run(VERIFY), load_sae(next(path for path in store_root().rglob("topk_sae.pt")))
    open_run(VERIFY, sae.config["run_id"])
    require_trained_on(sae, run, sae.config["hook"])
    hook_of_run(run, sae.config["hook"])
    trained_as({"activations": "x"})
    read_json(find_sae() / "training_history.json", HISTORY)
    return list(encode_run(run, sae.config["hook"], sae)), [rows_of_run(run, hook).scale
                                                            for hook in run.hooks], run.texts


@pytest.mark.parametrize("kind", ["manifest", "meta", "scalars", "history", "sidecar", "SAE"])
def test_an_altered_entry_under_a_right_seal_is_told_or_does_no_harm(store_of, kind):
    """Whoever writes a store can also write its seals: what is read must fit, or be refused in one line."""
    path, rng = next(store_of("verify 02").glob(KINDS[kind][1])), random.Random(kind)
    run = (next(path.parents[i] for i in (0, 1) if (path.parents[i] / "manifest.json").exists())
           if kind in ("manifest", "meta", "scalars") else None)
    manifest = (run / "manifest.json").read_bytes() if run else b""
    good = torch.load(path, weights_only=True) if kind == "SAE" else json.loads(path.read_text())
    good.pop("sha256", None)
    told = 0
    for _ in range(ALTERED):
        if kind == "SAE":
            write_torch(path, altered(good, rng))
        elif kind in ("meta", "scalars"):
            path.write_text(json.dumps(altered(good, rng)))
            reseal(run, path)
        else:
            write_json(path, altered(good, rng), sealed=True)
        try:
            whole_use(path)
            read_json(path, schemas.SAE_SIDECAR) if kind == "sidecar" else None
        except InputError as error:
            assert "\n" not in str(error)
            told += 1
        if run:
            (run / "manifest.json").write_bytes(manifest)
    assert told > ALTERED / 10


def test_a_link_out_of_the_run_is_refused(store_of, tmp_path_factory):
    path = next(store_of("verify 02").glob(KINDS["activations"][1]))
    outside = tmp_path_factory.mktemp("outside") / "shard"
    path.rename(outside)
    path.symlink_to(outside)
    assert "is a link that leaves" in refused(whole_run, path)


@pytest.mark.parametrize("column, value",
                         [("text_id", 10_000), ("text_id", -1), ("char_end", 10_000), ("char_start", -1)])
def test_rows_that_point_outside_their_texts_are_refused(store_of, column, value):
    from lib.files import read_tensors

    path = next(store_of("verify 02").glob(KINDS["rows"][1]))
    columns = {name: tensor.clone() for name, tensor in read_tensors(path).items()}
    columns[column][3] = value
    write_tensors(path, columns, note=[0, 0])
    reseal(path.parent.parent, path)
    assert "is damaged" in refused(whole_run, path)


@pytest.mark.parametrize("change, said", [
    (lambda lines: lines[:-1], "texts"), (lambda lines: [lines[1], lines[0], *lines[2:]], "line 1"),
    (lambda lines: ['{"text_id": 0, "text": null}', *lines[1:]], "line 1"),
])
def test_texts_that_do_not_fit_are_refused(store_of, change, said):
    path = next(store_of("verify 02").glob(KINDS["texts"][1]))
    path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")
    reseal(path.parent, path)
    assert said in refused(whole_run, path)


def sae_content(path):
    return torch.load(path, weights_only=True)


SAE_CHANGES = {
    "k over F": lambda c: c["config"].update(top_k=10_000), "k is text": lambda c: c["config"].update(top_k="3"),
    "no config": lambda c: c.pop("config"),
    "no weights": lambda c: c["state"].pop("W_dec"), "weights as a list": lambda c: c["state"].update(W_enc=[1.0]),
    "other width": lambda c: c["state"].update(mean=torch.zeros(3)),
    "not finite": lambda c: c["state"]["W_dec"].fill_(float("nan")),
    "integers": lambda c: c["state"].update(b_enc=torch.zeros(64, dtype=torch.int64)),
    "no probe": lambda c: c.update(probe=None),
    "size on paper": lambda c: c["state"].update(W_enc=torch.zeros(1).expand(64, 16)),
    "sparse": lambda c: c["state"].update(W_dec=torch.zeros(64, 16).to_sparse()),
    "run that climbs": lambda c: c["config"].update(run_id="../../x"),
    "nested": lambda c: c["config"].update(constants=[[]]),
}


@pytest.mark.parametrize("how", SAE_CHANGES)
def test_an_sae_of_another_shape_is_refused(store_of, how):
    path = next(store_of("verify 02").glob(KINDS["SAE"][1]))
    content = sae_content(path)
    SAE_CHANGES[how](content)
    write_torch(path, content)
    assert str(path) in refused(load_sae, path)


CHECKPOINT_CHANGES = {
    "no state": lambda c: c.pop("state"), "no step": lambda c: c["state"].pop("step"),
    "other shape": lambda c: c["state"].update(dec=torch.zeros(3, 3)),
    "a moment less": lambda c: c["state"].pop("enc_m"), "not finite": lambda c: c["state"]["enc"].fill_(float("inf")),
    "text": lambda c: c["best"].update(ev="1"),
    "uneven history": lambda c: c["history"]["val"]["ev"].append(0.5), "no history": lambda c: c.update(history=[]),
    "unknown kind": lambda c: c["settings"].update(kind="x"),
}


@pytest.mark.parametrize("how", CHECKPOINT_CHANGES)
def test_a_checkpoint_of_another_shape_is_refused(tmp_path, how):
    x = torch.randn(120, 6, generator=torch.Generator().manual_seed(0))
    settings = TrainSettings(12, 2, epochs=1, batch_size=30, precision="float32")
    train_sae(rows_of_tensor(x, torch.arange(120) < 20), settings, tmp_path, progress=False)
    path = tmp_path / "checkpoints" / "last.pt"
    read_checkpoint(path)
    content = torch.load(path, weights_only=True)
    CHECKPOINT_CHANGES[how](content)
    write_torch(path, content)
    assert str(path) in refused(read_checkpoint, path)


def test_a_packed_archive_is_not_unpacked(tmp_path):
    path, packed = tmp_path / "x.pt", tmp_path / "packed.pt"
    write_torch(path, {"a": torch.zeros(1000)})
    with zipfile.ZipFile(path) as plain, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in plain.namelist():
            archive.writestr(name, plain.read(name))
    assert "packed" in refused(lambda p: read_torch(p, "train again"), packed)


def test_integer_keys_do_not_break_a_seal(tmp_path):
    write_json(tmp_path / "x.json", {"by": {i: i for i in range(12)}, "n": (1, 2)}, sealed=True)
    assert read_json(tmp_path / "x.json")["by"]["10"] == 10


@pytest.mark.parametrize("value, wanted", [
    (True, int), (1.5, int), ("1", int), (float("nan"), float), (10**400, float), ([1, float("inf")], [float]),
    ([1, "a"], [float]), (None, str),
    ({"a": 1}, {"b": int}), ({"b": 1}, {schemas.NAME: str}), (3, schemas.Number(int, 4)), ([1], [int, int]),
    ("x", ("a", "b", None)), (2, 1), (True, 1),
    ({"a": [1], "b": []}, schemas.Columns(("a", "b"))),
])
def test_what_does_not_fit_is_told(value, wanted):
    with pytest.raises(Misfit) as told:
        check(value, wanted)
    assert "\n" not in str(told.value)


def test_what_fits_is_taken():
    check({"a": [1, 2.5], "c": {"deep": [None, True]}}, {"a": [float], "b?": int})
    assert check_tensors({"x": torch.zeros(3, 4), "y": torch.zeros(4)},
                         {"x": "float N D", "y": "float32 D", "z?": "int64 N"}) == {"N": 3, "D": 4}


SCRIPTS = [(f"experiments/{VERIFY}/02_train_sae.py", "manifest"), (f"experiments/{VERIFY}/07_test_causality.py", "SAE")]


@pytest.mark.parametrize("script, kind", SCRIPTS)
def test_a_script_ends_with_code_2_and_touches_nothing(forks, store_of, script, kind):
    assert (PROJECT / script).exists()
    store = store_of("verify 02")
    put(next(store.glob(KINDS[kind][1])), "brackets")
    before = contents(store)
    ended = forks.run([script], store)
    assert ended.code == 2 and ended.said.count("error: ") == 1 and "Traceback" not in ended.said, ended.said
    assert contents(store) == before
