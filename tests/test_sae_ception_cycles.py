"""Whole cycles through the scripts: small MLP, tiny transformers of four families, resume, provenance, stale
outputs.
"""
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from conftest import PROJECT, TEXTS, tiny_model, word_tokenizer

import cycles.arms
import cycles.sae_training
import cycles.steps
from cycles.acting import lambda0_cosine, make_targets
from cycles.auxiliary import probe_ids
from cycles.classifier import TextClassifier
from cycles.fitting import tune_settings
from cycles.images import read_idx
from cycles.metrics import OPTIONAL
from cycles.session import Session
from cycles.sources import load_task
from cycles.stamps import AUX_ONLY, EVAL_ONLY, SAE_ONLY, SCOPE_ONLY, stage_constants
from cycles.steps import evaluate_cycle, train_cycle_sae, train_model
from lib.constants import constants_of
from lib.environment import InputError
from lib.files import read_json, read_tensors

SCRIPTS = PROJECT / "experiments" / "sae_ception"
sys.path.insert(0, str(SCRIPTS))
from presets import PRESETS  # noqa: E402

ARMS = ("lambda0", "new_seed", "per_class", "per_example", "full_recon", "random_unit", "permuted", "random_latents",
        "shuffled_labels", "global_mask", "class_mean", "constant", "complement", "contrast", "to_zero", "mse_loss",
        "untrained_sae", "pca_targets", "l1_activation", "weight_decay", "monoloss", "nonneg_contrastive", "caft")


@pytest.fixture(scope="module")
def defaults():
    """All constants of the main script, as they stand in its source."""
    source = (SCRIPTS / "04_train_cycle.py").read_text()
    names: dict = {"__name__": "constants"}
    exec(compile(source.split("CONSTANTS = override")[0], "04_train_cycle.py", "exec"), names)
    found = {k: v for k, v in names.items() if k.isupper() and k != "KNOWN_ARMS"}
    return found, PRESETS


@pytest.fixture
def digits(defaults):
    tiny, presets = defaults
    small = {"EPOCHS_PER_CYCLE": 2, "SAE_EPOCHS": 2, "PROBE_LIMIT": 200, "EVAL_LIMIT": 200, "ROBUST_LIMIT": 20,
             "N_SAE_SEEDS": 1, "DEVICE": "cpu"}
    return tiny | presets["mlp_digits"] | {"PRESET": "mlp_digits"} | small


def cycle(session, arm, n):
    train_model(session, arm, n)
    train_cycle_sae(session, arm, n)
    return evaluate_cycle(session, arm, n)


@pytest.fixture
def script(monkeypatch, capfd):
    """Run a script in this process as the command line would; returns (exit code, output, errors)."""

    def run(name, *arguments, ok=True):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        try:
            runpy.run_path(str(SCRIPTS / name), run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code
        out, err = capfd.readouterr()
        assert code == 0 or not ok, err[-2000:]
        return code, out, err

    return run


def files(folder, but=()):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*"))
            if p.is_file() and p.suffix != ".log" and p.name not in but}


def test_two_cycles_on_digits_with_every_arm(digits):
    session = Session(digits | {"ARM_CONSTANTS": {"to_zero": {"AUX_CENTRED": True}}, "LABEL_GROUPS": (0, 1) * 5}, 0)
    baseline = cycle(session, "baseline", 0)
    session.c["METRICS"] = ()
    for arm in ARMS:
        result = cycle(session, arm, 1)
        aux = {k: v for k, v in result["val"].items() if k.startswith("aux_")}
        if cycles.arms.ARMS[arm].acts in ("pull", "penalty"):
            assert aux["aux_grad_ratio"] > 0.01, arm
        if cycles.arms.ARMS[arm].acts == "pull":
            assert aux["aux_loss_end"] < aux["aux_loss_start"], arm
        assert ("aux_cos_end" in aux) == cycles.arms.ARMS[arm].has_targets
    again = cycle(session, "per_class", 2)
    assert set(again["test"]) < set(baseline["test"]) and again["meta"]["cycle"] == 2
    promised = """task_accuracy task_loss task_f1_macro task_f1_weighted probe_train_accuracy probe_test_accuracy
        probe_test_f1_macro k_sparse_probe_k1 k_sparse_probe_k50 sae_reconstruction_loss sae_explained_variance
        sae_explained_variance_pooled sae_mean_l0 sae_dead_features_pct sae_feature_usage_entropy base_csi
        base_csi_std base_u base_u_std base_u_label base_u_adj base_u_all base_u_n_supported sae_features_csi
        sae_features_u sae_features_u_label sae_features_u_adj clustering_ari clustering_ari_argmax
        clustering_silhouette_unsupervised clustering_silhouette_supervised clustering_davies_bouldin
        clustering_calinski_harabasz_unit clustering_ari_base sparsity_l0_mean sparsity_l0_std sparsity_l1_mean
        robust_clean robust_fgsm_eps0.05 robust_pgd_eps0.1 robust_jaccard_eps0.1""".split()
    assert not [key for key in promised if key not in baseline["test"]]
    assert baseline["test"]["sparsity_l0_mean"] <= digits["TOP_K"]
    assert baseline["test"]["robust_pgd_eps0.1"] <= baseline["test"][
        "robust_fgsm_eps0.1"
    ] <= baseline["test"]["robust_clean"]


def test_lambda0_from_scratch_is_the_baseline_and_new_seed_is_not(digits):
    session = Session(digits, 1)
    for arm, n in (("baseline", 0), ("lambda0", 1), ("new_seed", 1)):
        train_model(session, arm, n)
        if n == 0:
            train_cycle_sae(session, arm, n)
    states = [torch.load(session.folder(arm, n) / f"checkpoints/model_cycle_{n}_best.pt", weights_only=True)
              for arm, n in (("baseline", 0), ("lambda0", 1), ("new_seed", 1))]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert not torch.equal(states[0]["layers.0.weight"], states[2]["layers.0.weight"])


def test_the_optimiser_of_the_arm_weight_decay(digits):
    """lambda is added to the decay that there is; an optimiser without decay has none to add to."""
    session = Session(digits | {"ARM_CONSTANTS": {"weight_decay": {"AUX_WEIGHT": 0.3}}, "WEIGHT_DECAY": 0.01}, 0)
    aux = stage_constants(session.c, "aux", "weight_decay")
    for optimizer, expected in (("adam", 0.3), ("adamw", 0.31)):
        session.c["OPTIMIZER"] = optimizer
        found = tune_settings(session, "weight_decay", 1, aux)
        assert (found.optimizer, found.weight_decay, found.aux_weight) == ("adamw", pytest.approx(expected), 0.0)
    assert tune_settings(session, "lambda0", 1, aux).weight_decay == 0.01


def test_caft_needs_a_concept(digits):
    session = Session(digits, 0)
    train_model(session, "baseline", 0)
    train_cycle_sae(session, "baseline", 0)
    with pytest.raises(InputError, match="ATTRIBUTE_FIELD, LABEL_GROUPS or SHORTCUT"):
        train_model(session, "caft", 1)


def test_an_sae_leaves_the_number_of_threads(digits, monkeypatch):
    """Otherwise what is trained after the first SAE of a process differs in its last bits from a resumed run."""
    def train(*args, **options):
        made = real(*args, **options)
        torch.set_num_threads(before + 1)
        return made

    real, before = cycles.sae_training.train_sae, torch.get_num_threads()
    monkeypatch.setattr(cycles.sae_training, "train_sae", train)
    session = Session(digits, 0)
    train_model(session, "baseline", 0)
    train_cycle_sae(session, "baseline", 0)
    assert torch.get_num_threads() == before


def test_targets_are_stored_by_example_id(digits):
    session = Session(digits, 0)
    train_model(session, "baseline", 0)
    train_cycle_sae(session, "baseline", 0)
    train_model(session, "per_class", 1)
    stored = read_tensors(session.root / "per_class/seed_0/targets_cycle_0.safetensors")
    assert (torch.equal(stored["example_id"], session.task.splits["train"])
            and stored["t"].shape == (len(stored["example_id"]), 16))


def test_lambda0s_cosine_and_the_saes_seeds(digits):
    """lambda0's model is measured against the arm's own targets about the arm's centre; SAEs of successive cycles start
    apart.
    """
    session = Session(digits | {"AUX_CENTRED": True}, 0)
    for arm, n in (("baseline", 0), ("lambda0", 1), ("class_mean", 1)):
        train_model(session, arm, n)
        train_cycle_sae(session, arm, n)
    stored = read_tensors(session.root / "class_mean/seed_0/targets_cycle_0.safetensors")
    assert torch.equal(stored["centre"], session.sae("baseline", 0).mean)
    session.load("lambda0", 1)
    ids = probe_ids(session.task)
    h, _ = session.outputs(ids)
    t = stored["t"][torch.isin(stored["example_id"], ids)]
    expected = torch.nn.functional.cosine_similarity(h - stored["centre"], t - stored["centre"], dim=1).mean().item()
    found = lambda0_cosine(session, "class_mean", 1)
    assert found == pytest.approx(expected, abs=1e-6)
    aux = read_json(session.folder("class_mean", 1) / "history_cycle_1.json")["aux"]
    # from scratch lambda0 is the source
    assert aux["cos_end"] > found > aux["cos_start"] and abs(aux["cos_source"] - found) < 0.1
    seeds = {(arm, n): session.sae(arm, n).config["seed"]
             for arm, n in (("baseline", 0), ("lambda0", 1), ("class_mean", 1))}
    assert seeds["lambda0", 1] == seeds["class_mean", 1] != seeds["baseline", 0]


def test_the_centre_is_the_mean_of_the_position_that_is_pulled(defaults, tmp_path):
    """An SAE over all tokens knows the mean of all tokens, which is another."""
    c = defaults[0] | write_texts(tmp_path, "llama") | {"AUX_CENTRED": True, "TARGET_LAYER": "1"}
    session = Session(c, 0)
    for arm, n in (("baseline", 0), ("per_class", 1)):
        train_model(session, arm, n)
        if n == 0:
            train_cycle_sae(session, arm, n)
    centre = read_tensors(session.root / "per_class/seed_0/targets_cycle_0.safetensors")["centre"]
    session.load("baseline", 0)
    h, _ = session.outputs(session.task.splits["train"])
    assert torch.allclose(centre, h.mean(0), atol=1e-5)
    assert (centre - session.sae("baseline", 0).mean).norm() > 0.1 * h.std(0).norm()


def test_a_class_mean_about_either_origin(digits):
    """The targets are the same; only what their cosine is taken about is another."""
    session = Session(digits | {"ARM_CONSTANTS": {"class_mean@mean": {"AUX_CENTRED": True}},
                                "ARMS": ("class_mean", "class_mean@mean")}, 0)
    train_model(session, "baseline", 0)
    train_cycle_sae(session, "baseline", 0)
    made = {arm: make_targets(session, arm, 0, stage_constants(session.c, "aux", arm))[0]
            for arm in ("class_mean", "class_mean@mean")}
    h, y = session.outputs(session.task.splits["train"])[0], session.task.y[session.task.splits["train"]]
    means = torch.stack([h[y == c].mean(0) for c in range(10)])
    assert torch.equal(made["class_mean"].t, made["class_mean@mean"].t)
    assert torch.allclose(made["class_mean"].t, means[y], atol=1e-4) and made["class_mean"].centre is None
    assert torch.allclose(made["class_mean@mean"].centre, h.mean(0), atol=1e-4)
    ids, centre = session.task.splits["train"], made["class_mean@mean"].centre
    for arm, about in (("class_mean", torch.zeros(16)), ("class_mean@mean", centre)):
        expected = torch.nn.functional.cosine_similarity(h - about, means[y] - about)
        assert torch.allclose(1 - made[arm].loss(h, ids), expected, atol=1e-4)


def test_matched_k(digits):
    """Every arm's and cycle's SAE has the same number of codes and latents."""
    session = Session(digits, 0)
    for arm, n in (("baseline", 0), ("per_class", 1), ("random_unit", 1)):
        train_model(session, arm, n)
        train_cycle_sae(session, arm, n)
        sae = session.sae(arm, n)
        assert (sae.top_k, sae.n_latents) == (8, 256)
        assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(256), atol=1e-5)


def test_split_disjoint(defaults, digits):
    for seed in (0, 1):
        splits = load_task(digits, seed).splits
        joined = torch.cat(list(splits.values()))
        assert len(joined) == len(joined.unique()) == 1797
        sizes = [len(part) for part in splits.values()]
        assert sizes == [1077, 360, 360]
    assert torch.equal(load_task(digits, 0).splits["test"], load_task(digits, 1).splits["test"])
    assert not torch.equal(load_task(digits, 0).splits["val"], load_task(digits, 1).splits["val"])


def test_label_groups_keep_the_classes_as_an_attribute(digits):
    task = load_task(digits | {"LABEL_GROUPS": (0, 1) * 5}, 0)
    assert task.n_classes == 2 and torch.equal(task.y, task.attribute % 2) and int(task.attribute.max()) == 9
    with pytest.raises(InputError, match="LABEL_GROUPS"):
        load_task(digits | {"LABEL_GROUPS": (0, 1)}, 0)


def test_provenance(defaults):
    """Every constant of the main script is part of some stage's hash, or listed as choosing only what is run."""
    constants, _ = defaults
    covered = set().union(*(stage_constants(constants | {"LABEL_GROUPS": None}, stage, "per_class")
                            for stage in ("model", "sae", "aux", "eval")))
    assert covered | SCOPE_ONLY | {"ARM_CONSTANTS"} >= set(constants) and not covered & SCOPE_ONLY
    assert (SAE_ONLY | AUX_ONLY | EVAL_ONLY) - {"ARM_CONSTANTS"} <= covered
    for arm, expected in (("per_class", 1.0), ("class_mean@weak", 0.3)):
        aux = stage_constants(constants | {"ARM_CONSTANTS": {"class_mean@weak": {"AUX_WEIGHT": 0.3}}}, "aux", arm)
        assert aux["AUX_WEIGHT"] == expected


def test_readme_lists_every_constant_with_its_default(defaults):
    source, readme = (SCRIPTS / "04_train_cycle.py").read_text(), (SCRIPTS / "README.md").read_text()
    for name in defaults[0]:
        default = next(line for line in source.splitlines()
                       if line.startswith((f"{name} =", f"{name}:"))).split(" = ", 1)[1].split("  #")[0].strip()
        assert f"| `{name}` | `{default.replace('|', chr(92) + '|')}` |" in readme, name


def test_the_steps_and_the_main_script_have_the_same_defaults(defaults):
    """Their blocks of constants are written out four times, so that each can be edited where it is used."""
    for path in sorted(SCRIPTS.glob("0[123]_*.py")):
        own = constants_of(path)["CONSTANTS"]
        assert {name: value for name, value in own.items() if name in defaults[0]}.items() <= defaults[0].items(), path


def test_readme_lists_every_arm():
    readme = (SCRIPTS / "README.md").read_text()
    for name, arm in cycles.arms.ARMS.items():
        assert f"| `{name}` | {arm.target} | {arm.asks} |" in readme, name


@pytest.mark.parametrize("name,value,stage", [("LR", 0.5, "model"), ("TOP_K", 4, "sae"), ("AUX_WEIGHT", 9.0, "aux"),
                                              ("EVAL_LIMIT", 50, "eval")])
def test_outputs_made_with_other_constants_are_refused(digits, name, value, stage):
    session = Session(digits, 0)
    cycle(session, "baseline", 0)
    cycle(session, "per_class", 1)
    other = Session(digits | {name: value}, 0)
    with pytest.raises(InputError, match=f"{name} was"):
        cycle(other, "baseline", 0)
        cycle(other, "per_class", 1)
    assert other.key("model", "baseline", 0) == session.key("model", "baseline", 0) or stage == "model"


def test_resume_ends_with_the_same_bytes(digits, monkeypatch, tmp_path):
    def everything(root):
        monkeypatch.setenv("STORE_DIR", str(root))
        session = Session(digits, 0)
        for arm, n in (("baseline", 0), ("per_class", 1), ("per_class", 2)):
            cycle(session, arm, n)
        return files(root)

    whole = everything(tmp_path / "whole")
    monkeypatch.setattr("cycles.steps.save_sae", interrupt_second_call(cycles.steps.save_sae))
    with pytest.raises(KeyboardInterrupt):
        everything(tmp_path / "cut")
    monkeypatch.undo()
    monkeypatch.setattr("cycles.auxiliary.PROBE_EXAMPLES", 256)
    assert everything(tmp_path / "cut") == whole


def interrupt_second_call(function):
    calls = []

    def wrapped(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    return wrapped


def write_texts(folder, kind):
    """A tiny model and data sets whose label is told by a word; returns the constants that name them."""
    tiny_model(kind).save_pretrained(folder / kind)
    word_tokenizer().save_pretrained(folder / kind)
    lines = [{"text": f"{TEXTS[i % 6]} {('happy', 'sad')[i % 2]}", "mood": i % 2, "topic": i % 4} for i in range(60)]
    for name, part in (("train", lines), ("val", lines[:20]), ("test", lines[20:50])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in part))
    return {
        "MODEL": str(folder / kind), "DATASET": str(folder / "train.jsonl"), "VAL_DATASET": str(folder / "val.jsonl"),
        "TEST_DATASET": str(folder / "test.jsonl"),
        "EPOCHS_PER_CYCLE": 1, "SAE_EPOCHS": 1, "BATCH_SIZE": 16, "SAE_BATCH_SIZE": 64, "ROBUST_LIMIT": 4,
        "METRICS": OPTIONAL, "ABSORPTION_TOKENS": 200, "TOP_K": 4, "KEEP_PCT": 5.0,
        "DEVICE": "cpu", "DATA_LIMIT": None,
    }


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox", "bert"])
@pytest.mark.parametrize("cached", [True, False])
def test_one_whole_cycle_of_each_architecture(defaults, tmp_path, kind, cached):
    c = defaults[0] | write_texts(tmp_path, kind) | {"CACHE_ENTRIES": cached, "TARGET_LAYER": "1"}
    session = Session(c, 0)
    cycle(session, "baseline", 0)
    result = cycle(session, "per_class", 1)
    test = result["test"]
    assert ("task_perplexity" in test) == (kind != "bert")
    assert 0 <= test["task_accuracy"] <= 1 and 0 < test["sparsity_l0_mean"] <= 4 and "base_u_attribute" in test
    assert test["robust_pgd_eps0.1"] <= test["robust_clean"] and "absorption_n_tokens" in test
    assert ("sae_features_u_weighted_attribute_given_label" in test
            and "base_u_adj_weighted_attribute_given_label" in test)
    assert result["val"]["aux_cos_end"] > result["val"]["aux_cos_start"] or result["val"]["aux_grad_ratio"] > 0
    assert session.model.target.path.endswith(".1") and not list(session.folder("per_class", 1).glob("activations*"))


def test_seed_commands_step_by_step_equal_the_main_script(tmp_path, monkeypatch, script):
    """01, 02, 03 by hand leave the files that 04 finds finished, and that it makes itself in another store."""
    common = ["PRESET=mlp_digits", "EPOCHS_PER_CYCLE=2"]
    sae = ["SAE_EPOCHS=2"]
    rest = ["SEEDS=0,", "CYCLES=1", "ARMS=('per_class',)", "N_SAE_SEEDS=1", "METRICS=()", "PROBE_LIMIT=200"]
    monkeypatch.setenv("STORE_DIR", str(tmp_path / "a"))
    assert "01_train_baseline.py" in script("03_train_auxiliary.py", "PRESET=mlp_digits", ok=False)[2]
    script("01_train_baseline.py", *common)
    script("02_train_sae.py", "PRESET=mlp_digits", *sae)
    script("03_train_auxiliary.py", "PRESET=mlp_digits")
    script("02_train_sae.py", "PRESET=mlp_digits", *sae, "CYCLE=1")
    by_hand = files(tmp_path / "a")
    printed = script("04_train_cycle.py", *common, *sae, *rest)[1]
    assert "per_class" in printed and "fewer than 3 seeds" in printed
    changed = {p for p, content in files(tmp_path / "a").items() if by_hand.get(p, content) != content}
    assert not {p for p in changed if p.suffix in (".pt", ".safetensors")}
    monkeypatch.setenv("STORE_DIR", str(tmp_path / "b"))
    script("04_train_cycle.py", *common, *sae, *rest)
    a, b = files(tmp_path / "a"), files(tmp_path / "b")
    assert {p for p in a if p.suffix in (".pt", ".safetensors")} <= set(b)
    differing = {p.name for p in a if a[p] != b.get(p)}
    assert {name for name in differing
            if name not in ("constants.json", "meta.json") and not name.endswith("stamp.json")} == set()
    table = (tmp_path / "b/sae_ception/mlp_digits/results.csv").read_text().splitlines()
    assert table[0] == "setting,arm,seed,sae_seed,cycle,split,metric,value" and len(table) > 100
    assert read_json(tmp_path / "b/sae_ception/mlp_digits/summary.json")["chosen_cycle"] == 1


def test_constants_are_chosen_on_validation(script, own_store):
    small = ["PRESET=mlp_digits", "EPOCHS_PER_CYCLE=2", "SAE_EPOCHS=2", "PROBE_LIMIT=200", "SETTING=small"]
    grid = ["GRID_KEEP_PCT=2.0,", "GRID_AUX_WEIGHT=0.3,3.0", "SELECT_SEEDS=100,"]
    printed = script("choose_constants.py", *small, *grid)[1]
    choice = read_json(own_store / "sae_ception/small_choice/choice.json")
    points, chosen = choice["validation"], choice["ARM_CONSTANTS"]
    assert set(points) == {"lambda0", "per_class@l0.3_k2", "per_class@l3_k2", "class_mean@l0.3", "class_mean@l3"}
    fit = {p: v["base_u"] for p, v in points.items()
           if p.startswith("per_class") and v["task_accuracy"] >= points["lambda0"]["task_accuracy"] - 0.005}
    if fit:
        assert chosen["per_class"] == {"AUX_WEIGHT": float(max(fit, key=fit.get)[11:-3]), "KEEP_PCT": 2.0}
    assert set(chosen["class_mean"]) == {"AUX_WEIGHT"} and "ARM_CONSTANTS={" in printed
    following = printed.splitlines()[-1]  # on the same data, with the same constants
    assert "04_train_cycle.py PRESET=mlp_digits EPOCHS_PER_CYCLE=2" in following and "SETTING=small" in following
    assert "ARM_CONSTANTS=" in following and "GRID_" not in following
    for arm in ("per_class@mine", "lambda0"):
        assert f"GRID_ARMS has {arm}" in script("choose_constants.py", *small, f"GRID_ARMS=('{arm}',)", ok=False)[2]


@pytest.mark.parametrize("arguments,said", [
    (["ARMS=('nonsense',)"], "holds nonsense, which must be one of"), (["SEEDS=()"], "at least one value"),
    (["PRESET=huge"], "PRESET"),
    (["DATASET=missing.jsonl"], "missing.jsonl"), (["TRACKER=nothing"], "TRACKER"),
    (["TOP_K=1", "ARMS=('lambda0','per_example')"], "TOP_K=1 leaves one"),
    (["KEEP_PCT=100", "SAE_EPOCHS=1", "EPOCHS_PER_CYCLE=1"], "keeps every code"),
])
def test_wrong_input_is_one_line(arguments, said, script):
    preset = [] if arguments[0].startswith(("PRESET", "DATASET")) else ["PRESET=mlp_digits"]
    code, _, err = script("04_train_cycle.py", *preset, "METRICS=()", *arguments, ok=False)
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert code == 2 and len(errors) == 1 and said in errors[0], err[-500:]


@pytest.mark.parametrize("given,said", [
    ({"SAE_POSITIONS": "token"}, "did you mean tokens"),
    ({"INIT": "Scratch"}, "INIT: 'Scratch' must be one of continue, scratch"),
    ({"METRICS": ("nonsense",)}, "METRICS: 'nonsense'"),
    ({"ARMS": ("class_men",)}, "did you mean class_mean"), ({"ARM": "per_clas"}, "did you mean per_class"),
    ({"ARM_CONSTANTS": {"class_men": {}}}, "did you mean class_mean"),
    ({"ARM_CONSTANTS": {"class_mean": {"AUX_WEIGTH": 1.0}}}, "did you mean AUX_WEIGHT"),
    ({"ARM_CONSTANTS": {"class_mean": {"LR": 1.0}}}, "'LR' must be one of"),
    ({"ARM_CONSTANTS": {"per_class": {"INIT": "zero"}}}, "INIT of per_class"),
    ({"SELECT_EPOCH": "first"}, "must be one of last, best"),
    ({"ARMS": ("per_class@weka",), "ARM_CONSTANTS": {"per_class@weak": {"AUX_WEIGHT": 0.1}}},
     "nothing for it .did you mean per_class@weak"),
    ({"ARMS": ("lambda0",), "ARM_CONSTANTS": {"per_class@weak": {"AUX_WEIGHT": 0.1}}}, "which is not in ARMS"),
    ({"TARGET_LAYER": "layers.9"}, "layers.9"),
])
def test_typing_errors_are_refused_before_anything_is_loaded(digits, monkeypatch, given, said):
    monkeypatch.setattr("cycles.session.load_task", lambda *_: pytest.fail("the data were read"))
    with pytest.raises(InputError, match=said) as error:
        Session(digits | given, 0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("number", ["99", "-99", "3", "-4", "99999999999999999999"])
def test_a_target_layer_out_of_range_is_refused(defaults, tmp_path, monkeypatch, number):
    """Not wrapped round to another block; and before data and weights are read."""
    c = defaults[0] | write_texts(tmp_path, "llama") | {"TARGET_LAYER": number}
    monkeypatch.setattr("cycles.session.load_task", lambda *_: pytest.fail("the data were read"))
    with pytest.raises(InputError, match="the model has 3 blocks, 0 to 2 or -3 to -1"):
        Session(c, 0)
    with pytest.raises(InputError, match="out of range"):
        TextClassifier(tiny_model("llama"), 2, number, 0)


def test_hidden_test_labels_are_refused(defaults, tmp_path):
    c = defaults[0] | write_texts(tmp_path, "llama")
    (tmp_path / "test.jsonl").write_text('{"text": "the cat", "mood": -1, "topic": 0}\n')
    with pytest.raises(InputError, match="hidden test labels"):
        Session(c, 0)


def test_idx_files(tmp_path):
    import gzip

    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(bytes([0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3, 1, 2, 3, 4, 5, 6])))
    assert read_idx(path, 2).tolist() == [[1, 2, 3], [4, 5, 6]]
    good = path.read_bytes()
    broken = bytearray(good)
    broken[12] ^= 0xFF  # a deflate error
    for content in (b"nothing", good[:-6], bytes(broken), gzip.compress(b""),
                    gzip.compress(gzip.decompress(good)[:-2])):
        path.write_bytes(content)
        with pytest.raises(InputError, match="damaged or not an idx.gz"):
            read_idx(path, 2)
    path.write_bytes(good)
    with pytest.raises(InputError, match="1 dimension"):
        read_idx(path, 1)
    with pytest.raises(InputError, match="missing"):
        read_idx(Path(tmp_path / "y.gz"), 2)


def test_quantised_loading_skips_what_is_trained(defaults, tmp_path, monkeypatch):
    """LOAD_BITS hands the library the device map and leaves the trained blocks out of the quantisation."""
    import transformers

    from cycles.classifier import load_base

    seen = {}

    def load(source, config, **options):
        seen.update(options)
        return tiny_model("neox"), {"missing_keys": [], "mismatched_keys": [], "unexpected_keys": []}

    c = defaults[0] | write_texts(tmp_path, "neox") | {"LOAD_BITS": 4, "DEVICE_MAP": "auto"}
    monkeypatch.setattr(transformers.GPTNeoXForCausalLM, "from_pretrained", load)
    load_base(c, torch.device("cpu"))
    assert seen["device_map"] == "auto" and seen["quantization_config"].load_in_4bit
    assert seen["quantization_config"].llm_int8_skip_modules[0] == "gpt_neox.layers.2"
