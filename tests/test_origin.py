"""What an output was made from is asked of the output itself; what lies in a store grants no trust and is not lost."""
import json
import re
import runpy
import shutil
import sys

import pytest
import torch
from conftest import PROJECT, TEXTS, sae_of, tiny_model, word_tokenizer
from forked import BASELINE, SAE, TRAIN, VERIFY, contents

from lib.batches import rows_of_tensor
from lib.environment import InputError
from lib.files import read_json, write_json
from lib.models import load_tokenizer, source_of_run, tokenizer_identity, weights_of
from lib.sae import load_sae, sae_hash, save_sae
from lib.store import provenance
from lib.training.checkpoints import Diverged
from lib.training.loop import TrainSettings, train_sae

STEP_1, STEP_2, CHOOSE, IMPORT = (f"{VERIFY}/{name}.py"
                                  for name in ("01_save_activations", "02_train_sae", "choose_k", "import_sae"))
QUICK = [STEP_2, *TRAIN[:1], "EPOCHS=2", "BATCH_SIZE_TRAIN=64", "PRECISION=float32"]


@pytest.fixture
def model_and_texts(tmp_path):
    """Folder of a tiny model, and a file of texts, both of this test alone."""
    tiny_model("llama").save_pretrained(tmp_path / "models" / "mine")
    word_tokenizer().save_pretrained(tmp_path / "models" / "mine")
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 8))
    return tmp_path / "models" / "mine", tmp_path / "texts.jsonl"


@pytest.fixture
def step_1(model_and_texts):
    folder, texts = model_and_texts
    return [STEP_1, f"MODEL={folder}", f"DATASET={texts}", "LAYER_SIGNATURE=resid_post:1", "PREFLIGHT=False"]


def ok(ended):
    assert ended.code == 0, ended.said
    return ended.said


def only_error(ended):
    lines = [line for line in ended.said.splitlines() if line.startswith("error: ")]
    assert ended.code == 2 and len(lines) == 1 and "Traceback" not in ended.said, ended.said
    return lines[0]


@pytest.fixture
def trained(undisturbed, tmp_path):
    """A store with a run and no SAE yet, and its folder of this experiment."""
    shutil.copytree(undisturbed("verify 02").before, tmp_path / "store")
    return tmp_path / "store", tmp_path / "store" / "verify_sae_training"


def belongs(folder):
    """The SAE's constants, after checking that its history is its own."""
    sae, history = load_sae(folder / "topk_sae.pt"), read_json(folder / "training_history.json")
    assert history["sae_hash"] == sae_hash(sae) and history["constants"] == sae.config["constants"]
    return sae.config["constants"]


# --- trust


def reseal(run, change):
    """Change meta.json as whoever writes the store can: the manifest's checksum and seal are right again."""
    from lib.outputs import list_files

    meta = json.loads((run / "meta.json").read_text())
    change(meta)
    write_json(run / "meta.json", meta)
    manifest = json.loads((run / "manifest.json").read_text())
    del manifest["sha256"]
    manifest["files"] = [list_files(run, ["meta.json"])[0] if entry["file"] == "meta.json" else entry
                         for entry in manifest["files"]]
    write_json(run / "manifest.json", manifest, sealed=True)


def test_a_store_cant_make_code_run(forks, step_1, model_and_texts, tmp_path):
    store, (folder, _) = tmp_path / "store", model_and_texts
    ok(forks.run(step_1, store))
    ran = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nfrom transformers import LlamaConfig as C, "
                                    "LlamaForCausalLM as M\n")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "evil.C",
                                                                          "AutoModelForCausalLM": "evil.M"}}))
    run = next((store / "verify_sae_training" / "runs").iterdir())
    reseal(run, lambda meta: meta["constants"].update(TRUST_REMOTE_CODE=True))
    command = [CHOOSE, "KS=2,", "EPOCHS=1", "N_TEXTS=2", "BATCH_SIZE_TRAIN=64"]
    assert "set TRUST_REMOTE_CODE=True" in only_error(forks.run(command, store))
    reseal(run, lambda meta: meta["constants"].update(TRUST_REMOTE_CODE=False))
    forks.run(command, store)
    assert not ran.exists()


def test_a_directory_never_becomes_a_hub_name(tmp_path, monkeypatch, model_and_texts):
    monkeypatch.chdir(tmp_path)
    from lib.models import load_model, model_identity

    saved = model_identity(load_model("models/mine", torch.device("cpu"), torch.float32), "models/mine")
    monkeypatch.chdir("/")
    assert source_of_run(saved) == str(tmp_path / "models" / "mine")
    shutil.rmtree(tmp_path / "models")
    with pytest.raises(InputError, match="is gone; put it back, or run step 1 again"):
        source_of_run(saved)
    assert source_of_run({"name": "user/model", "path": None}) == "user/model"


# --- step 2


@pytest.mark.parametrize("lr", [1e18, 1e30])
def test_a_training_that_diverges_says_so(lr):
    x = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(Diverged, match="lower LR"):
        train_sae(rows_of_tensor(x, torch.arange(400) < 40), TrainSettings(32, 2, epochs=2, batch_size=60, lr=lr),
                  progress=False)


def test_a_diverged_training_replaces_nothing_and_bars_nothing(forks, trained, monkeypatch, capsys):
    store, folder = trained
    ok(forks.run(QUICK, store))
    before = contents(store)

    def diverge(*_):
        assert list((folder / "saes").glob("*/checkpoints/last.pt"))  # of a training that begins
        raise Diverged("the loss is no longer finite at step 7; lower LR")

    monkeypatch.setattr("lib.training.checkpoints.log_steps", diverge)
    monkeypatch.setenv("STORE_DIR", str(store))
    monkeypatch.setattr(sys, "argv", [*QUICK, "LR=1.0"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(PROJECT / STEP_2), run_name="__main__")
    assert ended.value.code == 2 and capsys.readouterr().err.count("error: ") == 1
    assert contents(store) == before
    assert "already trained" in ok(forks.run(QUICK, store)) and contents(store) == before


def test_each_training_has_a_folder_and_is_found_again(forks, trained):
    """By what decides its weights: not by the preset's name, nor by how the run was named, nor by its folder's name."""
    store, folder = trained
    ok(forks.run([*QUICK, "TOP_K=3"], store))
    first = sae_of(store)
    ok(forks.run([*QUICK, "TOP_K=2"], store))
    second = sae_of(store)
    assert first.parent == second.parent == folder / "saes" and first != second
    assert (belongs(first)["TOP_K"], belongs(second)["TOP_K"]) == (3, 2)
    assert re.fullmatch(r"llama-resid_post_1-topk2-64-seed0-[0-9a-f]{6}", second.name)
    before = contents(folder / "saes")
    run_id = (folder / "run_id.txt").read_text().strip()
    said = ok(forks.run([*QUICK, "TOP_K=3", f"RUN_ID={run_id}", "LAYER=resid_post:1", "LOG_EVERY=7"], store))
    assert "already trained" in said and sae_of(store) == first and contents(folder / "saes") == before
    second.rename(second.with_name("mine"))
    assert "already trained" in ok(forks.run([*QUICK, "TOP_K=2"], store)) and sae_of(store).name == "mine"


def test_a_training_without_its_history_is_finished_and_touches_no_other(forks, trained):
    """As a kill leaves it between the SAE and its history, which is written last."""
    store, _ = trained
    ok(forks.run([*QUICK, "TOP_K=3"], store))
    first, before = sae_of(store), contents(sae_of(store))
    ok(forks.run([*QUICK, "TOP_K=2"], store))
    (first / "training_history.json").unlink()
    assert "already trained" not in ok(forks.run([*QUICK, "TOP_K=3"], store))
    assert sae_of(store) == first and contents(first) == before


def test_an_imported_sae_has_its_own_folder(forks, trained):
    store, _ = trained
    ok(forks.run(QUICK, store))
    own = sae_of(store)
    before = contents(own)
    ok(forks.run([f"{VERIFY}/export_sae.py", "FORMAT=sae_lens"], store))
    source = next((own / "exports" / "sae_lens").rglob("cfg.json")).parent
    ok(forks.run([IMPORT, f"SOURCE={source}"], store))
    imported = sae_of(store)
    assert imported != own and load_sae(imported / "topk_sae.pt").config["imported"]["format"] == "sae_lens"
    assert "already trained" in ok(forks.run(QUICK, store)) and sae_of(store) == own
    assert {name: data for name, data in contents(own).items() if not name.startswith("exports")} == before


def test_an_sae_that_is_not_finite_is_not_written(undisturbed, tmp_path):
    sae = load_sae(next(undisturbed("verify 02").before.parent.glob("whole/**/topk_sae.pt")))
    for spoil in (lambda: sae.config["final"].update(ev=float("-inf")), lambda: sae.W_enc[0].fill_(float("nan"))):
        spoil()
        with pytest.raises(InputError, match="can't be saved"):
            save_sae(sae, tmp_path / "topk_sae.pt", torch.zeros(3, len(sae.mean)))
        sae.config["final"]["ev"] = 0.5
    assert not list(tmp_path.glob("*"))


# --- what it was made from


def test_every_value_of_every_weight_counts():
    model = tiny_model("gpt2")
    before = weights_of(model)
    for name, parameter in model.named_parameters():
        flat = parameter.data.view(-1)
        for at in (0, len(flat) // 2, len(flat) - 1):
            kept = flat[at].item()
            flat[at] += 0.5
            assert weights_of(model) != before, f"{name}[{at}]"
            flat[at] = kept
    assert weights_of(model) == before


def swap_words(folder):
    path = folder / "tokenizer.json"
    state = json.loads(path.read_text())
    state[
        "model"
    ]["vocab"]["cat"], state["model"]["vocab"]["dog"] = state["model"]["vocab"]["dog"], state["model"]["vocab"]["cat"]
    path.write_text(json.dumps(state))


def no_bos(folder):
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": None}))


def late_weights(folder):
    """Another value far behind the first ones of a matrix."""
    model = tiny_model("llama")
    model.model.layers[0].mlp.up_proj.weight.data[-1, -1] += 1
    model.save_pretrained(folder)


@pytest.mark.parametrize("change, part", [(swap_words, "tokenizer"), (no_bos, "tokenizer"), (late_weights, "model")])
def test_a_change_behind_the_same_name_is_noticed(forks, step_1, model_and_texts, tmp_path, change, part):
    store = tmp_path / "store"
    ok(forks.run(step_1, store))
    change(model_and_texts[0])
    error = only_error(forks.run([CHOOSE, "KS=2,", "EPOCHS=1", "N_TEXTS=2", "BATCH_SIZE_TRAIN=64"], store))
    assert "changed since its activations were saved; run step 1 again" in error
    said = ok(forks.run(step_1, store))
    assert (f"the {part} changed since the last run was saved, so this is a new run" in said
            and "already complete" not in said)
    assert len(list((store / "verify_sae_training" / "runs").iterdir())) == 2


def test_using_a_tokenizer_does_not_change_what_it_is(model_and_texts):
    tokenizer = load_tokenizer(str(model_and_texts[0]))
    before = tokenizer_identity(tokenizer)
    tokenizer(["the cat"] * 2, truncation=True, max_length=2, padding=True)
    assert tokenizer_identity(tokenizer) == before


@pytest.mark.parametrize("change, said", [(late_weights, "other weights of MODEL"),
                                          (swap_words, "other data or tokenizer")])
def test_sae_ception_names_what_has_changed(forks, labelled_texts, tmp_path, change, said):
    folder, store = tmp_path / "data", tmp_path / "store"
    shutil.copytree(labelled_texts, folder)
    command = [part.format(data=folder) for part in BASELINE]
    ok(forks.run(command, store))
    change(folder / "llama")
    assert said in only_error(forks.run(command, store))


def test_another_arms_file_is_refused(forks, undisturbed, tmp_path):
    whole, store = undisturbed("sae_ception 04"), tmp_path / "store"
    for path, data in whole.files.items():
        (store / path).parent.mkdir(parents=True, exist_ok=True)
        (store / path).write_bytes(data)
    arms = store / "sae_ception" / "tiny"
    shutil.copy(arms / "lambda0/seed_0/checkpoints/model_cycle_1_best.pt",
                arms / "per_class/seed_0/checkpoints/model_cycle_1_best.pt")
    before = contents(store)
    assert "is not the file that its stamp was made for" in only_error(forks.run(whole.command, store))
    assert contents(store) == before


def test_a_setting_whose_model_directory_is_elsewhere_is_not_asked_from_the_hub(forks, labelled_texts, tmp_path):
    store = tmp_path / "store"
    store.mkdir()
    shutil.copytree(labelled_texts / "llama", store / "my" / "llama")  # scripts are started in the store
    ok(forks.run([BASELINE[0], "MODEL=my/llama", *(part.format(data=labelled_texts) for part in BASELINE[2:])], store))
    (store / "my").rename(store / "other")
    error = only_error(forks.run(SAE, store))
    assert "MODEL=my/llama was" in error and "hub" not in error


def test_without_git_there_is_no_revision_and_no_error(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance()["git"] is None
    monkeypatch.undo()
    monkeypatch.setattr("lib.store.PROJECT", tmp_path)
    assert provenance()["git"] is None


