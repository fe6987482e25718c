"""Notebooks 05 and 06, cell by cell, on small finished runs of step 4: images and texts."""
import importlib.util
import json

import pandas
import pytest
from conftest import run_notebook
from test_sae_ception_cycles import SCRIPTS, defaults, digits, script, write_texts  # noqa: F401  (fixtures)

from lib.environment import InputError
from lib.steps import plan


@pytest.mark.parametrize("kind", ["images", "texts"])
def test_notebooks_on_a_small_run(kind, tmp_path, monkeypatch, script, capfd):  # noqa: F811
    common = ["SETTING=small", "CYCLES=1", "SEEDS=0,1,2", "ARMS=('lambda0','per_class','class_mean')",
              "EPOCHS_PER_CYCLE=1", "SAE_EPOCHS=1", "PROBE_LIMIT=100", "EVAL_LIMIT=100"]
    if kind == "images":
        script("04_train_cycle.py", "PRESET=mlp_digits", "N_SAE_SEEDS=2", "METRICS=('clustering',)", *common)
    else:
        c = write_texts(tmp_path, "llama")
        files = [f"{name}={c[name]}" for name in ("MODEL", "DATASET", "VAL_DATASET", "TEST_DATASET")]
        script("04_train_cycle.py", *files, "TOP_K=4", "KEEP_PCT=5.0", "DATA_LIMIT=None", "BATCH_SIZE=16",
               "SAE_BATCH_SIZE=64", "ROBUST_LIMIT=4",
               "ABSORPTION_TOKENS=100", "METRICS=('robustness','language')", *common)
    monkeypatch.setenv("SETTING", "small")
    names = run_notebook(SCRIPTS / "05_compare_cycles.ipynb")
    assert (set(names["frame"].control) == {"lambda0", "class_mean"}
            and set(names["won"]) == {"base_u", "sae_features_u_weighted"})
    assert sum(names["result"][k] for k in ("kept", "moved", "died")) > 0
    assert names["pulled"].arm.tolist() == ["per_class", "class_mean"] and names["pulled"].cos_lambda0.notna().all()
    assert not any("success" in said for said in names["won"].values())  # with two controls of six there is none
    assert names["names"] == names["session"].task.class_names
    assert (names["pictured"], names["reference"]) == ("per_class", "lambda0")  # whatever arm stands first
    names = run_notebook(SCRIPTS / "06_interpret_features.ipynb")
    assert names["masks"].sum(1).tolist() == [names["keep"]] * names["task"].n_classes
    if kind == "texts":
        text = names["coloured"](0, int(names["order"][0]), 1.0)
        assert text.count("border-bottom") == 1 and text.count("<span") == sum(names["task"].tokens[0].keep)
    printed = capfd.readouterr().out
    assert "lambda0" in printed


def own(name):
    """A module of sae_ception; verify_sae_training has one of that name too."""
    spec = importlib.util.spec_from_file_location(f"{name}_of_cycles", SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    module.__dict__["__arguments__"] = []  # instead of the command line's
    spec.loader.exec_module(module)
    return module


def test_only_the_steps_that_compare_have_a_setting_to_show():
    """Of a study, or of its judge, the comparison of an older setting would be shown."""
    steps = own("run_steps")
    for name in ("07_run_study.py", "08_judge_study.py", "01_train_baseline.py", "self_test.py"):
        assert steps.setting_of(plan(SCRIPTS, steps.STEPS, [name], "")) is None
    assert steps.setting_of(plan(SCRIPTS, steps.STEPS, ["PRESET=mlp_digits"], "")) == "mlp_digits"
    assert steps.setting_of(plan(SCRIPTS, steps.STEPS, ["05_compare_cycles.ipynb", "SETTING=small"], "")) == "small"


def test_pages_show_the_sizes_of_the_arm_and_not_those_of_the_setting(monkeypatch, script, own_store):  # noqa: F811
    """Also of an arm that a second command added, of which the baseline's folder knows nothing."""
    of_arms = {"lambda0": {}, "per_class": {"KEEP_PCT": 10.0, "AUX_WEIGHT": 0.3}, "per_class@two": {"KEEP_PCT": 5.0}}
    for arms in (("lambda0", "per_class"), tuple(of_arms)):
        constants = {arm: of_arms[arm] for arm in arms if of_arms[arm]}
        script("04_train_cycle.py", "PRESET=mlp_digits", "SETTING=small", "CYCLES=1", "SEEDS=0,", f"ARMS={arms}",
               f"ARM_CONSTANTS={constants}", "EPOCHS_PER_CYCLE=1", "SAE_EPOCHS=1", "METRICS=()")
    monkeypatch.setenv("SETTING", "small")
    for arm, pct in (("per_class", 10.0), ("per_class@two", 5.0)):
        names = run_notebook(SCRIPTS / "06_interpret_features.ipynb", ARM=arm, SHOW_LATENTS=1, SHOW_EXAMPLES=1)
        assert names["keep"] == int(names["sae"].n_latents * pct / 100)
    folder = own_store / "sae_ception" / "small"
    facts = dict(own("overview")._facts(folder, pandas.read_csv(folder / "results.csv"), list(of_arms)))
    assert facts["Pull"] == ("none (lambda0); lambda 0.3, keeps 10.0 % of the latents (per_class); "
                             "lambda 1.0, keeps 5.0 % of the latents (per_class@two)")


def test_without_per_class_there_is_no_verdict():
    table = pandas.DataFrame(columns=["arm", "split", "metric", "cycle", "seed", "value"])
    (said,) = own("overview").verdicts(table, ["lambda0", "class_mean"], {})
    assert said.startswith("No verdict: per_class")


def test_the_grid_keeps_an_arms_own_constants(script, own_store):  # noqa: F811
    common = ["PRESET=mlp_digits", "GRID_ARMS=('per_class',)", "GRID_KEEP_PCT=2,", "GRID_AUX_WEIGHT=1,",
              "SELECT_SEEDS=100,", "EPOCHS_PER_CYCLE=1", "SAE_EPOCHS=1", "SETTING=small"]
    script("choose_constants.py", *common, "ARM_CONSTANTS={'per_class':{'AUX_CENTRED':True}}")
    (found,) = own_store.glob("sae_ception/small_choice*/choice.json")
    assert json.loads(found.read_text())["ARM_CONSTANTS"]["per_class"] == {
        "AUX_CENTRED": True, "AUX_WEIGHT": 1.0, "KEEP_PCT": 2.0}


def test_a_point_is_not_chosen_by_a_base_u_that_no_unit_has():
    module, nan = own("choose_constants"), float("nan")
    grid = {f"{arm}@l{i}": {"AUX_WEIGHT": float(i)} for arm in ("per_class", "class_mean") for i in (1, 2)}
    found = {point: {"task_accuracy": 0.9, "base_u": 0.1 * of["AUX_WEIGHT"]} for point, of in grid.items()}
    found["lambda0"] = {"task_accuracy": 0.9, "base_u": nan}
    found["per_class@l2"] = {"task_accuracy": 0.8, "base_u": nan}  # it loses accuracy, so nothing asks for its U
    assert module.choose(found, grid) == {"per_class": {"AUX_WEIGHT": 1.0}, "class_mean": {"AUX_WEIGHT": 2.0}}
    found["class_mean@l1"]["base_u"] = nan
    with pytest.raises(InputError, match="has no value at class_mean@l1"):
        module.choose(found, grid)
