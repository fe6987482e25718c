"""Notebooks 05 and 06, cell by cell, on small finished runs of step 4: images and texts."""
import pytest
from conftest import run_notebook
from test_sae_ception_cycles import SCRIPTS, defaults, digits, script, write_texts  # noqa: F401  (fixtures)


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
