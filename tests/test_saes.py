"""Trained SAEs by name: found by name, path or as the last one; stores from before they had names."""
import json
import os
import shutil

import pytest
import torch
from test_verify_scripts import script  # noqa: F401  (a fixture)

from lib.environment import InputError
from lib.files import write_json
from lib.sae import load_sae, make_sae, sae_hash, save_sae
from lib.saes import find_sae, list_saes, made_from, remember, sae_folder, trained_as

MADE = {"KIND": "topk", "TOP_K": 2, "SEED": 7, "PRESET": "quick", "RUN_ID": None}
ORIGIN = {"model": {"name": "user/My model", "class": "LlamaForCausalLM"}, "hook": "llamaforcausallm_model_layers_3",
          "data_digest": "abc", "constants": MADE}


def an_sae(seed=0, **change):
    W = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))
    return make_sae(W, torch.zeros(6), W, torch.zeros(4), 1.0, top_k=2, config=ORIGIN | change)


def put(sae, folder):
    save_sae(sae, folder / "topk_sae.pt", probe=torch.eye(4))
    return folder


def test_a_name_says_what_was_trained():
    about = ORIGIN | {"n_latents": 6}
    name = sae_folder(about).name
    assert name.startswith("My_model-model_layers_3-topk2-6-seed7-")
    assert sae_folder(about | {"layer": "resid_post:3"}).name.startswith("My_model-resid_post_3-topk2-6-seed7-")
    assert sae_folder(about | {"constants": MADE | {"PRESET": "full", "RUN_ID": "x"}}).name == name
    for change in ({"constants": MADE | {"EPOCHS": 3}}, {"data_digest": "abd"}):
        assert sae_folder(about | change).name != name
    hostile = about | {"model": {"name": "../../.."}, "hook": "/../x y", "layer": None}
    assert sae_folder(hostile).parent == sae_folder(about).parent and "/" not in sae_folder(hostile).name


def test_found_by_name_path_or_as_the_last(own_store, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="run 02_train_sae.py first"):
        find_sae()
    saes = own_store / "verify_sae_training" / "saes"
    first, second = put(an_sae(0), saes / "first"), put(an_sae(1), saes / "second")
    os.utime(first / "topk_sae.pt", (1, 1))
    assert list_saes() == [first, second] and find_sae() == second
    remember(first)
    assert find_sae() == find_sae("first") == find_sae(first) == find_sae(str(first / "topk_sae.pt")) == first
    elsewhere = put(an_sae(2), tmp_path / "my sae")
    monkeypatch.chdir(tmp_path)
    assert find_sae("my sae").resolve() == elsewhere and elsewhere not in list_saes()
    for wrong in ("secnd", "saes", str(saes), str(first / "topk_sae.json"), "../saes", ""):
        with pytest.raises(InputError, match="there is no SAE called") as told:
            find_sae(wrong)
    with pytest.raises(InputError, match="there are second"):
        find_sae("secnd")
    assert "\n" not in str(told.value)
    (saes.parent / "last_sae.txt").write_text("gone")
    with pytest.raises(InputError, match="'gone'"):
        find_sae()


def test_a_renamed_last_sae_does_not_hide_the_others(own_store, script, caplog):  # noqa: F811
    saes = own_store / "verify_sae_training" / "saes"
    first = put(an_sae(0), saes / "first")
    put(an_sae(1), saes / "second")
    remember(first)
    first.rename(saes / "mine")
    code, out, _ = script("list_saes.py")
    assert code == 0 and "mine" in out and "second" in out and "*" not in out and "'first'" in caplog.text


def test_a_training_is_found_by_what_decides_it(own_store, caplog):
    folder = put(an_sae(), own_store / "verify_sae_training" / "saes" / "renamed")
    assert trained_as(made_from(ORIGIN)) is None  # it has no history: unfinished
    (folder / "training_history.json").touch()
    assert trained_as(made_from(ORIGIN | {"constants": MADE | {"PRESET": "standard"}})) == folder
    assert trained_as(made_from(ORIGIN | {"constants": MADE | {"TOP_K": 3}})) is None
    (folder / "topk_sae.json").write_text("{")
    assert trained_as(made_from(ORIGIN)) is None and "skipping an SAE" in caplog.text


def test_a_store_from_before_saes_had_names_still_opens(own_store):
    """Two SAEs of then: the last in sae_model/ with its files beside it, and one that it had replaced."""
    root, mine, replaced = own_store / "verify_sae_training", an_sae(0), an_sae(1, data_digest="other")
    put(mine, root / "sae_model")
    hashes = [sae_hash(mine), sae_hash(replaced)]
    put(replaced, root / f"sae_model_{hashes[1]}")
    write_json(root / f"sae_model_{hashes[1]}" / "training_history.json", {"sae_hash": hashes[1]})
    for name in ("training_history", "verification", "steering"):
        write_json(root / f"{name}.json", {"sae_hash": hashes[0]})
    write_json(root / "top_texts.json", {"meta": {"sae_hash": hashes[0]}})
    write_json(root / "concepts.json", {"sae_hash": hashes[1], "concepts": {}})  # named before the other was trained
    write_json(root / f"concepts_{hashes[0]}.json", {"sae_hash": hashes[0], "concepts": {"1": {}}})
    write_json(root / "layers.json", {"recommended": "resid_post:1"})
    (root / "concepts.csv").write_text("of concepts.json")
    (root / "latent_stats.safetensors").write_text("of top_texts.json")
    (root / "controls").mkdir()
    (root / "controls" / "untrained.pt").write_text("costly")
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    last, = (folder for folder in list_saes() if folder == find_sae())
    other, = set(list_saes()) - {last}
    assert [sae_hash(load_sae(folder / "topk_sae.pt")) for folder in (last, other)] == hashes
    common = {"topk_sae.pt", "topk_sae.json", "training_history.json", "concepts.json"}
    assert {path.name for path in last.iterdir()} == common | {
        "verification.json", "steering.json", "top_texts.json", "latent_stats.safetensors", "controls"}
    assert {path.name for path in other.iterdir()} == common | {"concepts.csv"}
    assert json.loads((last / "concepts.json").read_text())["concepts"] == {"1": {}}
    assert {path: path.read_bytes() for path in before} == before, "nothing is moved"
    (last / "verification.json").unlink()
    assert len(list_saes()) == 2 and not (last / "verification.json").exists(), "taken over once"
    write_json(last / "steering.json", {})
    assert before[root / "steering.json"] == (root / "steering.json").read_bytes(), "a write replaces, it doesn't alter"
    shutil.rmtree(root / "saes")
    (root / "last_sae.txt").unlink()
    assert len(list_saes()) == 2
