"""Which k? Cosines in closed form, recommendations, a planted dictionary, the script."""
import json

import pytest
import torch
from test_verify_scripts import script, source  # noqa: F401  (two fixtures)

from checks.sparsity import agreement, mean_cosine, recommend_k, sweep_k
from lib.batches import rows_of_tensor
from lib.training.loop import TrainSettings


def test_cosines_in_closed_form():
    W = torch.eye(3)[[0, 1, 2, 0]]
    assert mean_cosine(W) == pytest.approx(2 / 12) and mean_cosine(W, chunk=1) == pytest.approx(2 / 12)
    assert agreement(W, W, chunk=2) == 1 and agreement(torch.eye(4)[:2], torch.eye(4)[1:]) == pytest.approx(0.5)


def test_recommended_k():
    def rows(*columns):
        return [{"k": k, "ev": 0.5, "loss_recovered": recovered, "seeds": seeds} for k, recovered, seeds in columns]

    assert recommend_k(rows((2, 0.95, 0.80), (4, 0.97, 0.795), (8, 0.99, 0.6)))[0] == 4
    assert recommend_k(rows((2, 0.80, 0.80), (4, 0.97, 0.5), (8, 0.99, 0.6)))[0] == 8
    k, reason = recommend_k(rows((2, 0.1, 0.8), (4, 0.2, 0.7)))
    assert k == 4 and "no k reaches a loss recovered of 0.9" in reason
    assert "EV" in recommend_k([{"k": 2, "ev": 0.1, "seeds": 1.0}])[1]


def test_a_planted_dictionary_is_found_by_two_seeds_at_its_own_k():
    g = torch.Generator().manual_seed(0)
    truth = torch.nn.functional.normalize(torch.randn(24, 16, generator=g), dim=1)
    chosen = torch.rand(12_000, 24, generator=g).topk(2, dim=1).indices
    codes = torch.zeros(12_000, 24).scatter_(1, chosen, 1 + torch.rand(12_000, 2, generator=g))
    rows = rows_of_tensor(codes @ truth, torch.arange(12_000) % 10 == 0)
    table = sweep_k(rows, TrainSettings(24, 1, epochs=8, batch_size=256, precision="float32"), (2, 8), lambda sae: 1.0)
    assert [row["k"] for row in table] == [2, 8] and table[0]["ev"] > 0.9 and table[0]["l0_mean"] <= 2
    assert table[0]["seeds"] > table[1]["seeds"] and recommend_k(table)[0] == 2


def test_the_script(script, source, own_store):  # noqa: F811
    layers = ["LAYER_SIGNATURE=resid_post:1,resid_post:0", "SHARD_ROWS=100"]
    assert script("01_save_activations.py", *source, *layers, "MAX_LENGTH=9", "PREFLIGHT=False")[0] == 0
    run_id = (own_store / "verify_sae_training" / "run_id.txt").read_text().strip()
    assert script("01_save_activations.py", *source, *layers)[0] == 0
    given = ["N_LATENTS_MULTIPLIER=2", "EPOCHS=1", "BATCH_SIZE_TRAIN=64", "N_TEXTS=5"]
    code, out, _ = script("choose_k.py", "KS=1,3", f"RUN_ID={run_id}", "LAYER=resid_post:0", *given)
    following = out.splitlines()[-1]
    assert following.endswith(f" N_LATENTS_MULTIPLIER=2 RUN_ID={run_id} LAYER=resid_post:0 BATCH_SIZE_TRAIN=64")
    code, out, _ = script("choose_k.py", "KS=1,3", *given, "BATCH_SIZE_TRAIN=1024")
    assert out.splitlines()[-1].endswith(" N_LATENTS_MULTIPLIER=2")
    assert (code == 0 and "loss_recovered" in out
            and json.loads((own_store / "verify_sae_training" / "choose_k.json").read_text())["recommended"] in (1, 3))
    code, _, err = script("choose_k.py", "KS=4,9999")
    assert code == 2 and "KS=(4, 9999) must be at most the number of latents" in err
