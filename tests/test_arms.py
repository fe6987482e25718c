"""Kinds at equal L0: the factor on thresholds, stability over seeds with its error, paired tests, the script."""
import json
from dataclasses import replace
from itertools import combinations

import numpy as np
import pandas
import pytest
import torch
from test_verify_scripts import SMALL, files, script, source  # noqa: F401  (two fixtures)

from checks.arm_scores import MEASURES, compare, stabilities
from checks.arms import ARMS, REFERENCE, arm_settings, at_mean_l0
from checks.matching import matched_cosine
from lib.batches import rows_of_tensor
from lib.environment import InputError
from lib.sae import make_sae
from lib.statistics import holm, paired
from lib.training.loop import TrainSettings
from lib.training.settings import check_settings

KINDS = ["ARMS=batchtopk,falling_k", "N_LATENTS_MULTIPLIER=2", "EPOCHS=1", "BATCH_SIZE_TRAIN=64", "LOSS_TEXTS=4",
         "N_NAMES=4", "TOP_K=3"]


def rows_and_sae():
    """Uniform rows; latents that are their dimensions, each with a threshold of its own."""
    x = torch.rand(4000, 8, generator=torch.Generator().manual_seed(0))
    rows, eye = rows_of_tensor(x, torch.arange(4000) % 10 == 0), torch.eye(8)
    return rows, make_sae(eye, torch.zeros(8), eye, mean=torch.zeros(8), scale=1.0, top_k=8,
                          threshold=torch.linspace(0.2, 0.4, 8))


def test_one_factor_on_all_thresholds_gives_the_l0_on_training_rows():
    rows, sae = rows_and_sae()
    found = at_mean_l0(sae, rows, 3)
    factor = found.threshold / sae.threshold
    torch.testing.assert_close(factor, factor[:1].expand(8))
    train = rows.shards[0][~rows.is_val]
    assert float((found.encode(train)[0] > 0).sum(1).double().mean()) == pytest.approx(3, abs=0.002)
    assert float(factor[0]) == pytest.approx(5 / 2.4, rel=0.03)  # uniform: 8 - factor * sum of thresholds = 3 codes
    without = replace(sae, threshold=None, top_k=3)
    assert at_mean_l0(without, rows, 3) is without
    with pytest.raises(InputError, match="no factor on the thresholds"):
        at_mean_l0(replace(sae, b_enc=torch.full((8,), -9.0)), rows, 3)


def test_a_first_coding_stays_as_it_was_trained():
    rows, sae = rows_and_sae()
    twice = replace(sae, threshold_first=sae.threshold, refine=0.5)
    train = rows.shards[0][~rows.is_val]

    def l0(sae):
        return float((sae.encode(train)[0] > 0).sum(1).double().mean())

    found = at_mean_l0(twice, rows, 0.9 * l0(twice))
    assert torch.equal(found.threshold_first, twice.threshold_first) and l0(found) < l0(twice)
    assert l0(found) == pytest.approx(0.9 * l0(twice), abs=0.002)


def test_every_arm_can_be_trained_and_only_plain_topk_changes_nothing():
    rows, settings = rows_and_sae()[0], TrainSettings(16, 4)
    arms = {arm: arm_settings(arm, settings, seed=3) for arm in ARMS}
    for found in arms.values():
        check_settings(found, rows)
        assert found.seed == 3 and found.top_k == 4
    assert [arm for arm, found in arms.items() if found == replace(settings, seed=3)] == [REFERENCE]
    assert arms["falling_k"].start_k == 10
    with pytest.raises(InputError, match="ARMS holds gated, which is unknown; choose from topk, "):
        arm_settings("gated", settings, seed=0)


def test_stability_is_the_mean_over_pairs_with_the_error_of_the_jackknife():
    saes = [replace(rows_and_sae()[1], W_dec=torch.nn.functional.normalize(torch.randn(
        8, 8, generator=torch.Generator().manual_seed(seed)), dim=1)) for seed in range(5)]
    values = np.array(stabilities(saes))

    def over_pairs(chosen):
        return np.mean([matched_cosine(a.W_dec, b.W_dec) for a, b in combinations(chosen, 2)])

    left_out = [over_pairs(saes[:i] + saes[i + 1 :]) for i in range(5)]
    assert values.mean() == pytest.approx(over_pairs(saes))
    assert values == pytest.approx(5 * over_pairs(saes) - 4 * np.array(left_out))
    assert stabilities([saes[0]] * 3) == pytest.approx([1, 1, 1]) and np.isnan(stabilities(saes[:2])).all()


def test_differences_are_paired_by_seed_and_holm_counts_all_of_them():
    results = [{"arm": arm, "seed": seed, "ev": level + 0.1 * seed + 0.001 * seed * (arm != "topk"), "dead": seed**2}
               for seed in range(4) for arm, level in (("topk", 0.5), ("jumprelu", 0.4), ("batchtopk", 0.5))]
    results.append({"arm": "jumprelu", "seed": 9, "ev": 0.9, "dead": 0.0})  # plain TopK lacks this seed
    table = compare(results)
    assert {row["measure"] for row in table} == {"ev", "dead"} <= set(MEASURES) and len(table) == 6
    assert all(("minus_topk" in row) == (row["arm"] != "topk") for row in table)
    jump = next(row for row in table if (row["arm"], row["measure"]) == ("jumprelu", "ev"))
    assert jump["n"] == 5 and jump["minus_topk"]["n"] == 4
    assert jump["minus_topk"]["mean"] == pytest.approx(-0.1 + 0.0015)
    tests = [row["minus_topk"] for row in table if "minus_topk" in row]
    assert [test["p_holm"] for test in tests] == pytest.approx(holm([test["p"] for test in tests]))
    series = {arm: pandas.Series({r["seed"]: r["ev"] for r in results if r["arm"] == arm})
              for arm in ("topk", "jumprelu")}
    assert jump["minus_topk"]["p"] == pytest.approx(paired(series["jumprelu"], series["topk"])["p"])


def test_the_script_keeps_what_is_finished(script, source, own_store):  # noqa: F811
    assert script("01_save_activations.py", *source, *SMALL)[0] == 0
    assert script("08_compare_kinds.py", *KINDS, "SEEDS=0,1")[0] == 0
    folder = own_store / "verify_sae_training"
    before = files(folder / "kinds")
    code, out, _ = script("08_compare_kinds.py", *KINDS, "SEEDS=0,1,2")
    after = files(folder / "kinds")
    assert code == 0 and "PW-MCC" in out and "concepts, F1" not in out  # these texts have no ground truth
    assert "L0 on held-out tokens, mean over seeds: topk " in out
    assert {name: after[name] for name in before} == before and len(after) > len(before)
    kinds = json.loads((folder / "kinds.json").read_text())
    assert len(kinds["results"]) == 9 and all(abs(result["l0"] - 3) <= 1 for result in kinds["results"])
    code, _, err = script("08_compare_kinds.py", *KINDS[1:], "ARMS=gated")
    assert code == 2 and err.count("\n") == 1 and "ARMS holds gated" in err
