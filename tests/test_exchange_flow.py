"""Steps 3 to 7 on SAEs that others published, and training that goes on from one."""
import json
import re
import shutil

import pytest
import torch
from conftest import run_notebook, sae_of
from test_exchange_kinds import write_llama_scope, write_sae_lens
from test_exchange_scripts import trained  # noqa: F401  (a fixture)
from test_verify_scripts import FOLDER, TRAIN, script, source  # noqa: F401  (two fixtures)

from lib.exchange.folded import fold
from lib.sae import load_sae
from lib.saes import find_sae, list_saes
from lib.store import open_run

PLACE = {"metadata": {"sae_lens_version": "6.54.12", "hook_name": "blocks.1.hook_resid_post", "model_name": "model"}}


@pytest.fixture
def published(trained, tmp_path):  # noqa: F811
    """publish(kind): the folder of an SAE of SAELens with the weights of the trained one, sparse by its own means."""
    sae = load_sae(trained / "topk_sae.pt")
    folded, x = fold(sae), torch.cat(open_run("verify_sae_training").shards(sae.config["hook"])).float()
    cut = sae.scale * sae.encode(x)[0][:, -1].mean()
    base = {"W_enc": folded.W.T, "W_dec": folded.W_dec, "b_dec": folded.b_dec}

    def publish(kind):
        extra = {"standard": {"b_enc": folded.b - cut}, "topk": {"b_enc": folded.b},
                 "jumprelu": {"b_enc": folded.b, "threshold": torch.full_like(folded.b, float(cut))},
                 "gated": {"b_gate": folded.b - cut, "b_mag": folded.b, "r_mag": torch.zeros_like(folded.b)}}[kind]
        more = {"k": 3} if kind == "topk" else {}
        return write_sae_lens(tmp_path / f"published_{kind}", base | extra, architecture=kind,
                              **(PLACE | more | {"d_in": 16, "d_sae": 64}))

    return publish


@pytest.mark.parametrize("kind", ["standard", "gated"])
def test_notebooks_and_scripts_work_on_an_imported_sae(script, published, own_store, capsys, kind):  # noqa: F811
    code, out, err = script("import_sae.py", f"SOURCE={published(kind)}")
    assert code == 0 and f"sae_lens, {kind}: 64 latents, thresholds" in out, err
    sae = load_sae(sae_of(own_store) / "topk_sae.pt")
    assert sae.top_k == 64 and sae.maxima is not None and 1 < sae.config["final"]["l0_mean"] < 40
    assert f"-sae_lens-{kind}-64-" in sae_of(own_store).name
    code, out, _ = script("list_saes.py")
    assert code == 0 and re.search(r"-sae_lens-\S+ +\S+ +64 +- ", out) and re.search(r"topk3\S+ +\S+ +64 +3 ", out), out
    assert {"kind": kind, "hook": "resid_post:1", "model_name": "model"}.items() <= sae.config["imported"].items()
    names = run_notebook(FOLDER / "03_analyze_training.ipynb")
    said = capsys.readouterr().out
    assert f"trained elsewhere ({kind} SAE of sae_lens" in said and "mean L0 = " in said
    checks = {row["check"]: row["verdict"] for row in names["checks"]}
    assert checks["reload"] == "PASS" and not {"l0_cap", "l0_mean", "units", "weights_moved"} & set(checks)
    for name in ("04_name_sae_concepts.ipynb", "05_show_concepts.ipynb"):
        run_notebook(FOLDER / name, **({"MY_TEXT": "dog"} if name.startswith("05") else {}))
    folder = find_sae()
    concepts = json.loads((folder / "concepts.json").read_text())["concepts"]
    assert (folder / "concepts.html").exists() and concepts
    code, out, err = script("06_steer_model.py", f"LATENT={next(iter(concepts))}", "STRENGTHS=0,2", "SAMPLES=1",
                            "N_TOKENS=4", "PROMPTS=the cat")
    assert code == 0, err
    for wanted in ("all", "delphi", "neuronpedia"):
        code, out, err = script("export_sae.py", f"FORMAT={wanted}")
        assert code == 0, err
    assert not (folder / "exports/sparsify").exists() and (folder / "exports/dictionary_learning").exists()


def test_an_sae_says_where_it_belongs(script, published, tmp_path):  # noqa: F811
    folder = published("standard")
    config = json.loads((folder / "cfg.json").read_text())
    for hook, message in (
        ("blocks.2.hook_mlp_out", "belongs at blocks.2.hook_mlp_out, which run "),
        ("blocks.2.hook_mlp_out", "run 01_save_activations.py with LAYER_SIGNATURE=mlp_out:2"),
        ("blocks.1.attn.hook_z", "belongs at blocks.1.attn.hook_z, the outputs of attention heads"),
    ):
        (folder / "cfg.json").write_text(json.dumps(config | {"metadata": {"hook_name": hook}}))
        code, _, err = script("import_sae.py", f"SOURCE={folder}")
        assert code == 2 and message in err and err.count("\n") == 1, err
    code, out, err = script("import_sae.py", f"SOURCE={published('standard')}", "LAYER=resid_post:1")
    assert code == 0 and "belongs" not in out + err
    (folder / "cfg.json").write_text(json.dumps(config | {"metadata": {"model_name": "gpt2"}}))
    code, out, err = script("import_sae.py", f"SOURCE={folder}")
    assert code == 0 and "trained on gpt2, the run is of" in out + err and "don't say which layer" in out + err


def test_llama_scope_and_an_estimated_norm_come_in(script, published, own_store, tmp_path):  # noqa: F811
    published("standard")
    g = torch.Generator().manual_seed(0)
    parts = {"W_enc": torch.randn(16, 64, generator=g), "b_enc": torch.zeros(64),
             "W_dec": torch.randn(64, 16, generator=g), "b_dec": torch.zeros(16)}
    folder = write_llama_scope(tmp_path / "scope", parts, hook_point_in="blocks.1.hook_resid_post", hook_point_out=None)
    code, out, err = script("import_sae.py", f"SOURCE={folder}")
    assert code == 0 and "llama_scope, jumprelu: 64 latents" in out, err
    folder = write_sae_lens(tmp_path / "norm", parts, architecture="standard", normalize_activations=True, **PLACE)
    code, out, err = script("import_sae.py", f"SOURCE={folder}")
    assert code == 0 and "the SAE wants activations of mean norm 4; these have" in out + err, err


def final_of(name):
    return load_sae(find_sae(name) / "topk_sae.pt").config["final"]


def test_training_goes_on_from_any_sae(script, trained, published, own_store, capsys):  # noqa: F811
    """From one of ours by its name, and from published ones; the same command finds what it made."""
    name, before = trained.name, final_of(trained.name)
    args = [*TRAIN, f"START_FROM={name}"]
    code, out, err = script("02_train_sae.py", *args)
    assert code == 0 and f"START_FROM, held out: EV {before['ev']:.4f}" in out, err
    first = find_sae()
    assert first != trained and final_of(None)["ev"] > before["ev"]
    constants = json.loads((first / "training_history.json").read_text())["constants"]
    assert constants["START_FROM"] == name and len(constants["START_FROM_SAE"]) == 16
    assert "already trained" in script("02_train_sae.py", *args)[1]
    assert "already trained" in script("02_train_sae.py", *TRAIN, f"START_FROM={trained}")[1], "another spelling"
    names = run_notebook(FOLDER / "03_analyze_training.ipynb")
    assert f"continued from {name}" in capsys.readouterr().out
    assert not {"weights_moved", "units"} & {row["check"] for row in names["checks"]}
    assert "already trained" in script("02_train_sae.py", *TRAIN)[1] and find_sae() == trained
    code, out, err = script("02_train_sae.py", *TRAIN, f"START_FROM={published('topk')}")
    assert code == 0 and f"START_FROM, held out: EV {before['ev']:.4f}" in out and find_sae() != trained, err
    assert final_of(None)["ev"] > before["ev"]
    jumps = published("jumprelu")
    code, _, err = script("02_train_sae.py", *TRAIN, "KIND=jumprelu", f"START_FROM={jumps}", "TOP_K=1")
    assert code == 2 and "codes a token; set TOP_K=" in err and err.count("\n") == 1, err
    wanted = err.rsplit("TOP_K=", 1)[1].strip()
    code, out, err = script("02_train_sae.py", *TRAIN, "KIND=jumprelu", f"START_FROM={jumps}", f"TOP_K={wanted}")
    assert code == 0, err
    assert len(list_saes()) == 4


@pytest.mark.parametrize(("kind", "more", "message"), [
    ("standard", [], "START_FROM is a standard SAE, which no KIND trains"),
    ("topk", ["TOP_K=2"], "START_FROM has k = 3; set TOP_K=3"),
    ("topk", ["N_LATENTS_MULTIPLIER=8"], "START_FROM has 64 latents, not 128; set N_LATENTS_MULTIPLIER=4"),
    ("topk", ["KIND=jumprelu"], "which KIND=jumprelu does not continue; set KIND=topk or matryoshka"),
    (None, ["START_FROM=nothing"], "there is no SAE called 'nothing'"),
    (None, ["START_FROM=user/nothing"], "set a local folder, or a repository that this machine can reach"),
    (None, ["START_FROM=user/nothing/folder"], "error: START_FROM=user/nothing: "),
])
def test_a_start_that_does_not_fit_is_one_line(script, published, kind, more, message):  # noqa: F811
    folders = [f"START_FROM={published(kind)}"] if kind else []
    code, _, err = script("02_train_sae.py", *TRAIN, *folders, *more)
    assert code == 2 and message in err and err.count("\n") == 1, err
    assert len(list_saes()) == 1


def test_a_start_in_one_of_several_folders_is_named(script, published, tmp_path):  # noqa: F811
    """Step 2 has no SUBFOLDER: START_FROM is the whole path; a folder's name needs no slash in it."""
    places = ["blocks.1.hook_resid_post", "blocks.2.hook_resid_post"]
    (tmp_path / "several").mkdir()
    for place in places:
        shutil.copytree(published("topk"), tmp_path / "several" / place)
    for start in ("several", "./several", tmp_path / "several"):
        code, _, err = script("02_train_sae.py", *TRAIN, f"START_FROM={start}")
        assert code == 2 and f"; add to START_FROM the folder of one, like {' or '.join(places)}\n" in err, err
    (tmp_path / "empty").mkdir()
    code, _, err = script("02_train_sae.py", *TRAIN, "START_FROM=empty")
    assert code == 2 and "; set START_FROM to the folder of one SAE\n" in err and err.count("\n") == 1, err
    code, out, err = script("02_train_sae.py", *TRAIN, f"START_FROM=several/{places[0]}")
    assert code == 0 and "START_FROM, held out: EV" in out, err


def test_overcomplete_is_not_set_beside_what_its_loop_cannot_repeat(script, trained, published):  # noqa: F811
    live = ["LIVE=True", "N_TOKENS=4000", "BUFFER_TOKENS=200"]
    for step, said, given in (
        ("02_train_sae.py", "with KIND=batchtopk", [*TRAIN, "KIND=batchtopk"]),
        ("02_train_sae.py", "with LIVE=True", [*TRAIN, *live]),
        ("02_train_sae.py", f"with START_FROM={trained.name}", [*TRAIN, f"START_FROM={trained.name}"]),
        ("import_sae.py", "elsewhere", [f"SOURCE={published('topk')}"]),
    ):
        assert script(step, *given)[0] == 0
        code, _, err = script("compare_with_overcomplete.py", "EPOCHS=1")
        assert code == 2 and f"was trained {said}, and" in err and "set SAE to one that" in err, err
        assert err.count("\n") == 1, err
    code, out, _ = script("compare_with_overcomplete.py", "EPOCHS=1", f"SAE={trained.name}")
    assert code == 0 and "overcomplete   EV" in out
