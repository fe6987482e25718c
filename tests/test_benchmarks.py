"""The benchmarks' own arithmetic: known features, scores of dictionaries with a known answer, and the notebook. Nothing
is timed.
"""
import json
import sys

import numpy as np
import pytest
import torch
from conftest import PROJECT, run_notebook
from safetensors.torch import save_file
from scipy.sparse import csr_matrix

FOLDER = PROJECT / "experiments" / "benchmarks"


@pytest.fixture
def side_by_side(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delitem(sys.modules, "side_by_side", raising=False)
    import side_by_side

    return side_by_side


def test_draws_are_centred_scaled_and_fire_as_often_as_asked(side_by_side):
    sizes = {"n_rows": 3000, "n_held_out": 500, "width": 16, "n_features": 40}
    drawn = side_by_side.sparse_features(**sizes, l0=4.0, seed=0)
    assert drawn.x.shape == (3000, 16) and drawn.held_out.shape == (500, 16) and drawn.fires.shape == (500, 40)
    assert drawn.x.mean(0).abs().max() < 1e-5 and drawn.x.square().sum(1).mean() == pytest.approx(1, abs=1e-4)
    assert drawn.fires.sum(1).mean() == pytest.approx(4, abs=0.3)
    again = side_by_side.sparse_features(**sizes, l0=4.0, seed=0)
    assert torch.equal(again.x, drawn.x) and (again.fires != drawn.fires).nnz == 0
    rebuilt = torch.linalg.lstsq(torch.from_numpy(drawn.fires.toarray()).float(), drawn.held_out).solution
    assert torch.nn.functional.cosine_similarity(rebuilt[:5], drawn.features[:5]).min() > 0.7


def test_quality_of_the_true_dictionary_and_of_a_dead_half(side_by_side, tmp_path):
    features = torch.eye(4)
    x = torch.tensor([[2.0, 0, 0, 0], [0, 3, 0, 0], [0, 0, 1, 0], [0, 0, 0, 4]])
    drawn = side_by_side.Draw(x, x, features, csr_matrix(np.eye(4, dtype=bool)))
    weights = {"W_enc": torch.eye(4), "b_enc": torch.zeros(4), "W_dec": torch.eye(4), "b_dec": torch.zeros(4)}
    save_file(weights, tmp_path / "w.safetensors")
    perfect = side_by_side.quality(tmp_path / "w.safetensors", drawn, 1)
    assert perfect == {"fvu": 0, "dead_pct": 0, "l0": 1, "cosine": 1, "found_pct": 100, "mcc": 1, "f1": 1}
    half = torch.diag(torch.tensor([1.0, 1, 0, 0]))
    save_file(weights | {"W_enc": half}, tmp_path / "w.safetensors")
    scored = side_by_side.quality(tmp_path / "w.safetensors", drawn, 1)
    total = float((x - x.mean(0)).square().sum())
    assert scored["fvu"] == pytest.approx((1 + 16) / total) and scored["dead_pct"] == 50 and scored["l0"] == 0.5
    assert scored["found_pct"] == 100 and scored["f1"] == 0.5


def test_the_notebook_shows_what_there_is(side_by_side, own_store, capsys):
    folder = own_store / "benchmarks"
    folder.mkdir(parents=True)
    made_with = {"platform": "here", "versions": {"torch": "2"}}
    steps = {"ours": {"seconds": 0.1, "cpu_seconds": 0.2}, "sparsify": {"seconds": 0.5, "cpu_seconds": 1.0}}
    timed = [{"shape": [8, f, 2, 100], "floor": 0.05, "per_step": steps} for f in (16, 32)]
    (folder / "sae_training_speed.json").write_text(json.dumps({"made_with": made_with, "timed": timed}))
    scores = {"dead_pct": 0, "l0": 2, "found_pct": 90, "cosine": 0.9, "mcc": 0.9, "f1": 0.8, "cpu_seconds": 1}
    runs = [{"trainer": "ours", "lr": None, "seed": seed, "fvu": 0.1 + seed / 10, **scores} for seed in (0, 1)]
    runs += [{"trainer": "sparsify", "lr": lr, "seed": seed, "fvu": fvu, **scores}
             for lr, seed, fvu in ((1, 9, 0.3), (2, 9, 0.2), (2, 0, 0.4), (2, 1, 0.5))]
    c = {"CHOOSE_SEED": 9, "REPORT_SEEDS": [0, 1], "TRAINERS": ["ours", "sparsify"], "LEARNING_RATES": [1, 2],
         "WIDTH": 8, "N_LATENTS": 16, "TOP_K": 2, "N_ROWS": 100, "N_FEATURES": 12}
    (folder / "known_features_small.json").write_text(json.dumps({"made_with": made_with, "constants": c,
                                                                  "runs": runs}))
    names = run_notebook(FOLDER / "04_show_benchmarks.ipynb")
    assert [run["fvu"] for run in names["chosen"]["small"]["sparsify"]] == [0.4, 0.5]
    assert list(names["table"]["over the floor"]) == [2, 10, 2, 10] and (folder / "benchmarks_step.png").exists()
    assert "activations_speed.json is missing" in capsys.readouterr().out
