"""The scripts of experiments/verify_sae_training as a user runs them: order, reruns, kills, wrong input."""
import json
import runpy
import sys

import pytest
import torch
from conftest import ASSETS, PROJECT, run_notebook, run_readme, sae_of, tiny_model

from checks.arm_scores import MEASURES
from checks.verification import RULES
from lib.environment import InputError, run
from lib.sae import load_sae
from lib.saes import find_sae, list_saes
from lib.store import open_run

FOLDER = PROJECT / "experiments" / "verify_sae_training"
SMALL = ["LAYER_SIGNATURE=resid_post:1", "SHARD_ROWS=100"]
TRAIN = ["N_LATENTS_MULTIPLIER=4", "EPOCHS=2", "BATCH_SIZE_TRAIN=64", "TOP_K=3", "PRECISION=float32"]


@pytest.fixture
def script(monkeypatch, capsys, tmp_path):
    """Run a script in this process as __main__; returns (exit code, stdout, stderr)."""

    def call(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        monkeypatch.chdir(tmp_path)
        code = 0
        try:
            runpy.run_path(str(FOLDER / name), run_name="__main__")
        except SystemExit as ended:
            code = ended.code or 0
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


@pytest.fixture
def source(saved_model):
    model, texts = saved_model
    return [f"MODEL={model}", f"DATASET={texts}"]


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and path.suffix != ".log"}


def test_both_steps_and_their_promised_files(script, source, own_store):
    assert script("01_save_activations.py", *source, *SMALL)[0] == 0
    code, out, _ = script("02_train_sae.py", *TRAIN)
    assert code == 0 and "held out: EV" in out
    folder = own_store / "verify_sae_training"
    run_id = (folder / "run_id.txt").read_text().strip()
    assert (folder / "runs" / run_id / "manifest.json").exists()
    history = json.loads((sae_of(own_store) / "training_history.json").read_text())
    assert history["run_id"] == run_id and history["final"]["ev"] > 0
    sae = load_sae(sae_of(own_store) / "topk_sae.pt")
    assert (sae.n_latents, sae.top_k) == (64, 3)
    values, _ = sae.encode(torch.cat(open_run("verify_sae_training").shards(sae.config["hook"])))
    assert ((values > 0).sum(1) <= 3).all()


def test_a_second_run_changes_nothing(script, source, own_store):
    for _ in range(2):
        script("01_save_activations.py", *source, *SMALL)
        script("02_train_sae.py", *TRAIN)
        now = files(own_store)
        if _ == 0:
            before = now
    assert now == before


def test_other_constants_make_another_run_and_the_old_one_stays(script, source, own_store):
    script("01_save_activations.py", *source, *SMALL)
    before = files(own_store / "verify_sae_training" / "runs")
    code, _, _ = script("01_save_activations.py", *source, *SMALL, "MAX_LENGTH=9")
    assert code == 0
    after = files(own_store / "verify_sae_training" / "runs")
    assert {name: after[name] for name in before} == before and len(after) > len(before)


def test_another_split_makes_another_sae(script, source, own_store):
    """All texts are stored, so the activations are the same ones."""
    for given in ([], ["SEED=1", "VAL_FRAC=0.4"]):
        assert script("01_save_activations.py", *source, *SMALL, *given)[0] == 0
        assert "already trained" not in script("02_train_sae.py", *TRAIN)[1]
        last = load_sae(find_sae() / "topk_sae.pt")
        assert last.config["run_id"] == (own_store / "verify_sae_training" / "run_id.txt").read_text().strip()
    assert len(list_saes()) == 2
    assert "already trained" in script("02_train_sae.py", *TRAIN)[1]
    first, run_id = list_saes()[0].name, last.config["run_id"]  # it has seen most of what the second run holds out
    code, _, said = script("02_train_sae.py", *TRAIN, f"START_FROM={first}")
    assert code == 2 and "otherwise divided into training and validation (VAL_FRAC=0.1 SEED=0)" in said
    with pytest.raises(InputError, match="otherwise divided"):
        run_notebook(FOLDER / "03_analyze_training.ipynb", SAE=first, RUN_ID=run_id)


def test_the_layers_are_listed(script, source):
    code, out, _ = script("01_save_activations.py", *source, "LAYER_SIGNATURE=?")
    assert code == 0 and "llamaforcausallm_model_layers_1_post_attention_layernorm" in out


@pytest.mark.parametrize("kind", ["gpt2", "neox", "bert"])
def test_other_architectures(script, source, own_store, tmp_path, kind):
    for path in (tmp_path / "model").glob("model*"):
        path.unlink()
    tiny_model(kind).save_pretrained(tmp_path / "model")
    assert script("01_save_activations.py", *source, *SMALL)[0] == 0
    assert script("02_train_sae.py", *TRAIN)[0] == 0


WRONG_FIRST = [
    (["TOPK=3"], "there is no constant TOPK"),
    (["MAX_LENGHT=3"], "did you mean MAX_LENGTH?"),
    (["MAX_LENGTH=long"], "MAX_LENGTH=long must be a whole number"),
    (["MAX_LENGTH=0"], "MAX_LENGTH=0 must be at least 1"),
    (["BATCH_SIZE_SAVE=-1"], "BATCH_SIZE_SAVE=-1 must be at least 1"),
    (["SHARD_ROWS=0"], "SHARD_ROWS=0 must be at least 1"),
    (["DATA_LIMIT=1"], "DATA_LIMIT=1 must be at least 2"),
    (["VAL_FRAC=1.5"], "VAL_FRAC=1.5 must be below 1"),
    (["PRESET=larg"], "PRESET=larg must be one of quick, standard, full, large, bielik; did you mean large?"),
    (["STORE_DTYPE=int8"], "STORE_DTYPE=int8 must be one of float32, bfloat16, float16"),
    (["MODEL_DTYPE=half"], "MODEL_DTYPE=half must be one of auto, float32, bfloat16, float16"),
    (["DEVICE=tpu9"], "DEVICE=tpu9 must be one of auto, cpu, mps, cuda, cuda:N"),
    (["MODEL=./missing"], "there is no file or directory ./missing"),
    (["MODEL=nobody/nothing"], "set a local directory, or a hub name that this machine can reach"),
    (["MODEL={tmp}/empty"], "can't be loaded"),
    (["DATASET=./missing.jsonl"], "there is no file or directory ./missing.jsonl"),
    (["DATASET=nobody/nothing"], "set a local file, or a hub name that this machine can reach"),
    (["DATASET={tmp}/empty.jsonl"], "is empty"),
    (["DATASET={tmp}/broken.jsonl"], "can't be read"),
    (["DATASET={tmp}/data.xyz"], "has no known ending"),
    (["TEXT_FIELD=body"], "has no field 'body'; it has text: set TEXT_FIELD"),
    (["DATASET={tmp}/blank.jsonl"], "5 of 5 rows have no text in 'text'; the first is row 1 of these, which is blank"),
    (["SKIP_FIRST=500"], "no text yields a token"),
    (["LAYER_SIGNATURE=model.layers.9"], "there is no layer model.layers.9"),
    (["LAYER_SIGNATURE=resid_post:9"], "has blocks 0 to 2"),
    (["HOOK_POINT=middle"], "HOOK_POINT=middle must be one of input, output"),
]


@pytest.mark.parametrize("arguments, message", WRONG_FIRST, ids=[a[0] for a, _ in WRONG_FIRST])
def test_wrong_input_to_step_1_is_one_line_and_writes_nothing(script, source, own_store, tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"text": "a cat"\n{')
    (tmp_path / "blank.jsonl").write_text('{"text": ""}\n' * 5)
    (tmp_path / "data.xyz").write_text("x")
    code, _, err = script("01_save_activations.py", *source, *SMALL, *(a.format(tmp=tmp_path) for a in arguments))
    assert code == 2 and message in err
    assert err.count("\n") == 1 and err.startswith("error: ")
    assert not (own_store / "verify_sae_training" / "run_id.txt").exists()
    assert not (own_store / "verify_sae_training" / "runs").exists()


WRONG_SECOND = [
    (["TOP_K=65"], "TOP_K=65 must be between 1 and the number of latents, 64"),
    (["TOP_K=0"], "TOP_K=0 must be at least 1"),
    (["N_LATENTS_MULTIPLIER=0"], "N_LATENTS_MULTIPLIER=0 must be at least 1"),
    (["EPOCHS=0"], "EPOCHS=0 must be at least 1"),
    (["BATCH_SIZE_TRAIN=0"], "BATCH_SIZE_TRAIN=0 must be at least 1"),
    (["LR=fast"], "LR=fast must be a number or None"),
    (["RUN_ID=nothing"], "run nothing is missing; run 01_save_activations.py, or set RUN_ID to a finished one"),
    (["RUN_ID=../../etc"], "RUN_ID=../../etc must be a file name of letters"),
    (["LAYER=other"], "holds resid_post:1, not other"),
]


@pytest.mark.parametrize("arguments, message", WRONG_SECOND, ids=[a[0] for a, _ in WRONG_SECOND])
def test_wrong_input_to_step_2_is_one_line_and_writes_nothing(script, source, own_store, arguments, message):
    script("01_save_activations.py", *source, *SMALL, "PREFLIGHT=False")
    code, _, err = script("02_train_sae.py", *TRAIN, *arguments)
    assert code == 2 and message in err
    assert err.count("\n") == 1 and err.startswith("error: ")
    assert not list((own_store / "verify_sae_training").glob("saes/*"))


def test_step_2_without_step_1_says_so(script):
    code, _, err = script("02_train_sae.py")
    assert code == 2 and "run 01_save_activations.py first" in err and err.count("\n") == 1


@pytest.mark.parametrize("harm", ["truncated", "missing"])
def test_step_2_refuses_a_damaged_run(script, source, own_store, harm):
    script("01_save_activations.py", *source, *SMALL)
    run_folder = next((own_store / "verify_sae_training" / "runs").iterdir())
    shard = next(path for path in run_folder.rglob("shard_00001.safetensors") if path.parent.name != "rows")
    shard.unlink() if harm == "missing" else shard.write_bytes(shard.read_bytes()[:-4])
    code, _, err = script("02_train_sae.py", *TRAIN)
    assert code == 2 and "shard_00001.safetensors" in err


def test_all_five_steps_on_the_embedded_default(script, own_store, capsys):
    assert script("01_save_activations.py", "DATA_LIMIT=150", "VAL_FRAC=0.3", "PREFLIGHT=False")[0] == 0
    assert script("02_train_sae.py", "EPOCHS=6", "BATCH_SIZE_TRAIN=256")[0] == 0
    names = run_notebook(FOLDER / "03_analyze_training.ipynb")
    verdicts = {row["check"]: row["verdict"] for row in names["checks"]}
    assert set(verdicts) == set(RULES)
    assert all(verdicts[name] == "PASS"
               for name in ("loss_fell", "weights_moved", "l0_cap", "ev", "ev_pca", "ev_random", "reload"))
    leaf = {row["concept"]: row["latent"]["f1"] for row in names["recovery"]}
    assert leaf["negation"] > 0.5
    run_notebook(FOLDER / "04_name_sae_concepts.ipynb")
    run_notebook(FOLDER / "05_show_concepts.ipynb")
    said = run_readme(capsys)
    assert said.count("\n") >= 13 and "'red' " in said and said.splitlines()[-1].startswith("One day")
    folder = sae_of(own_store)
    top = json.loads((folder / "top_texts.json").read_text())
    examples = [e for latent, found in top.items() if latent.isdigit() for e in found]
    assert examples and all(e["token_str"] == e["text"][e["char_start"] : e["char_end"]] for e in examples)
    concepts = json.loads((folder / "concepts.json").read_text())["concepts"]
    assert concepts and all(0 <= c["score"] <= 1 for c in concepts.values() if c["score"] is not None)
    page = (folder / "concepts.html").read_text()
    assert "http://" not in page and "https://" not in page
    effects = json.loads((folder / "concept_effects.json").read_text())
    assert (effects["sae_hash"] == top["meta"]["sae_hash"]
            and all(e["ablated"]["kl"] >= 0 and e["added"]["raised"] for e in effects["effects"].values()))
    code, out, _ = script("06_steer_model.py", "FINALISTS=1", "STRENGTHS=(0,4)", "SAMPLES=1", "N_TOKENS=12",
                          "TEMPERATURE=0")
    plain, same, strong = json.loads((folder / "steering.json").read_text())["sweep"]
    assert code == 0 and same["cost"]["mean"] == 1 and "favoured" in out
    assert plain["texts"] == same["texts"] != strong["texts"] and strong["perplexity"] != same["perplexity"]
    code, out, _ = script("06_steer_model.py", "SEARCH=a", "SAMPLES=2", "N_TOKENS=12", "MAX_COST=3")
    steering = json.loads((folder / "steering.json").read_text())
    found = steering["recommended"]
    assert code == 0 and found["steered"]["strength"] in [row["strength"] for row in steering["sweep"]]
    assert found["unsteered"]["texts"] != steering["sweep"][0]["texts"]  # the seed that reports did not choose
    code, out, _ = script("06_steer_model.py", "SEARCH=a", "TEMPERATURE=0", "N_TOKENS=12", "MAX_COST=3")
    assert code == 0 and "4 continuations of 12 tokens" in out and "other seeds" not in out
    assert script("06_steer_model.py", "SEARCH=xylophone")[0] == 2
    code, _, said = script("06_steer_model.py", "LATENT=99999")
    assert code == 2 and "LATENT=99999 must be at most 1023" in said
    code, out, _ = script("07_test_causality.py", "MIN_F1=0.7", "SAMPLES=6")
    causality = json.loads((folder / "causality.json").read_text())
    assert code == 0 and "Wilcoxon" in out and causality["arms"]["random"]["p_value"] < 0.05
    assert set(causality["arms"]) >= {"latent", "untrained", "frozen_decoder", "frozen_encoder",
                                      "frozen_decoder, same length"}
    code, out, _ = script("08_compare_kinds.py", "ARMS=jumprelu", "SEEDS=0,1,2", "N_LATENTS_MULTIPLIER=2", "EPOCHS=1",
                          "LOSS_TEXTS=5", "RECOVERY_TOKENS=5000", "N_NAMES=10")
    kinds = json.loads((own_store / "verify_sae_training" / "kinds.json").read_text())
    assert code == 0 and "frozen at random" in out and len(kinds["results"]) == 6
    assert all(3 < result["l0"] < 5 and 0 < result["concepts"] < 1 for result in kinds["results"])
    assert {row["measure"] for row in kinds["table"]} == set(MEASURES)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_the_notebooks_on_a_foreign_model(script, source, own_store, tmp_path, kind):
    if kind == "bert":
        for path in (tmp_path / "model").glob("model*"):
            path.unlink()
        tiny_model(kind).save_pretrained(tmp_path / "model")
    assert script("01_save_activations.py", *source, *SMALL)[0] == 0
    assert script("02_train_sae.py", *TRAIN)[0] == 0
    names = run_notebook(FOLDER / "03_analyze_training.ipynb")
    assert (names["recovery"] == []
            and ("ce_recovered" in {row["check"] for row in names["checks"]}) == (kind == "llama"))
    for name in ("04_name_sae_concepts.ipynb", "05_show_concepts.ipynb"):
        run_notebook(FOLDER / name)


def test_a_changed_model_is_refused(script, source, saved_model):
    script("01_save_activations.py", *source, *SMALL)
    script("02_train_sae.py", *TRAIN)
    tiny_model("llama", seed=1).save_pretrained(saved_model[0])
    with pytest.raises(InputError, match="have changed since its activations were saved"):
        run_notebook(FOLDER / "03_analyze_training.ipynb")


def test_ctrl_c_ends_with_130_and_a_word(capsys):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        run(interrupted)
    assert ended.value.code == 130 and "rerun the same command to resume" in capsys.readouterr().err


@pytest.mark.skipif(not ASSETS.exists(), reason="the shared models are not here")
@pytest.mark.parametrize("name", ["stories260K", "babyllama105"])
def test_a_real_model_gives_a_good_sae(script, own_store, name):
    source = [f"MODEL={ASSETS}/models/{name}", f"DATASET={ASSETS}/data/tinystories/train.jsonl", "DATA_LIMIT=300",
              "LAYER_SIGNATURE=resid_post:2"]
    assert script("01_save_activations.py", *source, "PREFLIGHT=False")[0] == 0
    assert script("02_train_sae.py", "EPOCHS=4")[0] == 0
    final = json.loads((sae_of(own_store) / "training_history.json").read_text())["final"]
    assert final["ev"] > 0.8 and final["dead_pct"] < 10
