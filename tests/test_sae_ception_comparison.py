"""The choice of a cycle, the verdict, and matched latents, on cases with known answers."""
import re

import numpy as np
import pandas
import pytest
import torch

from cycles.comparison import (
    COLUMNS,
    CONTROLS,
    by_seed,
    choose_cycle,
    compare,
    pulls,
    result_table,
    summary,
    trend,
    verdict,
)
from cycles.matching import match_latents
from lib.environment import InputError
from lib.files import write_json


def make_results(root, accuracies):
    """Three seeds; base_u of per_class is 0.1, 0.3, 0.2 at cycles 1 to 3, its accuracy as given; SAE seeds differ by
    0.02.
    """
    for seed in range(3):
        for arm, cycle in [("baseline", 0)] + [(arm, n) for arm in ("lambda0", "per_class") for n in (1, 2, 3)]:
            u = 0.05 if arm != "per_class" else (0.1, 0.3, 0.2)[cycle - 1]
            accuracy = 0.9 if arm != "per_class" else accuracies[cycle - 1]
            val = {"base_u": u + 0.001 * seed, "sae_features_u": u, "sae_features_u_weighted": u,
                   "task_accuracy": accuracy}
            other = {"sae_seed": 1, "val": val,
                     "test": {"sae_features_u": u + 0.02, "sae_features_u_weighted": u + 0.02}}
            folder = root / arm / f"seed_{seed}"
            meta = {"arm": arm, "cycle": cycle, "seed": seed, "key": "0" * 16}
            found = {"meta": meta, "val": val, "test": dict(val), "other_sae_seeds": [other]}
            write_json(folder / f"results_cycle_{cycle}.json", found, sealed=True)
    return result_table(root, ("lambda0", "per_class"), seeds=(0, 1, 2), cycles=3)


def test_table_and_averages_over_sae_seeds(tmp_path):
    table = make_results(tmp_path, (0.9, 0.9, 0.9))
    assert list(table.columns) == list(COLUMNS) and set(table.sae_seed) == {0, 1}
    assert by_seed(table, "per_class", 2, "sae_features_u").tolist() == pytest.approx([0.31] * 3)
    assert by_seed(table, "anything", 0, "base_u").tolist() == pytest.approx([0.05, 0.051, 0.052])
    (tmp_path / "lambda0/seed_1/results_cycle_2.json").unlink()
    with pytest.raises(InputError, match="missing"):
        result_table(tmp_path, ("lambda0", "per_class"), seeds=(0, 1, 2), cycles=3)


def test_a_mean_over_no_unit_is_no_score(tmp_path, caplog):
    """Where no unit fires on enough examples base_u is written as 0, and a difference of 0 would be made up."""
    few = {"base_u": 0.0, "base_csi_std": 0.0, "base_u_n_supported": 0, "base_u_weighted": 0.4, "base_u_attribute": 0.2,
           "base_u_n_supported_attribute": 3, "sae_features_u": 0.1, "sae_features_u_weighted": 0.1, "task_accuracy": 1}
    for seed in range(3):
        for arm, cycle in (("baseline", 0), ("lambda0", 1), ("per_class", 1)):
            meta = {"arm": arm, "cycle": cycle, "seed": seed, "key": "0" * 16}
            write_json(tmp_path / arm / f"seed_{seed}" / f"results_cycle_{cycle}.json",
                       {"meta": meta, "val": few, "test": few}, sealed=True)
    table = result_table(tmp_path, ("lambda0", "per_class"), seeds=(0, 1, 2), cycles=1)
    assert set(few) - set(table.metric) == {"base_u", "base_csi_std"}
    assert choose_cycle(table, "per_class", 1) == 1 and "base U has no value" in caplog.text
    later = table.assign(cycle=table.cycle.replace(1, 2), value=table.value - 0.001 * (table.metric == "task_accuracy"))
    both = pandas.concat([table, later[later.arm != "baseline"]])
    known = both[both.metric == "task_accuracy"].assign(metric="base_u")[lambda rows: rows.cycle == 2]
    assert choose_cycle(pandas.concat([both, known]), "per_class", 2) == 1  # the more accurate one; U only of one
    found = compare(table, "per_class", ["lambda0"], ("base_u", "base_u_weighted"), cycle=1)
    assert found.n.tolist() == [0, 3] and np.isnan(found["mean"][0])
    assert verdict(table, "per_class", ["lambda0", "per_class"], "base_u", cycle=1).startswith("not measured")


def test_the_cycle_is_chosen_on_validation_within_the_accuracy_limit(tmp_path):
    assert choose_cycle(make_results(tmp_path, (0.9, 0.9, 0.9)), "per_class", 3) == 2
    assert choose_cycle(make_results(tmp_path, (0.9, 0.8, 0.896)), "per_class", 3) == 3
    # none keeps it: the most accurate
    assert choose_cycle(make_results(tmp_path, (0.7, 0.6, 0.8)), "per_class", 3) == 3


def test_comparison_and_summary(tmp_path):
    table = make_results(tmp_path, (0.9, 0.9, 0.9))
    frame = compare(table, "per_class", ["lambda0", "baseline"], ("base_u",), cycle=2)
    assert frame["mean"].tolist() == pytest.approx([0.25, 0.25]) and (frame["p_holm"] >= frame["p"]).all()
    found = summary(table, ("lambda0", "per_class"), 3)
    assert found["chosen_cycle"] == 2 and found["n_seeds"] == 3
    assert [row["control"] for row in found["primary"]] == ["lambda0", "lambda0"]
    cell = next(c for c in found["cells"] if (c["arm"], c["cycle"], c["metric"]) == ("per_class", 3, "base_u"))
    assert cell["mean"] == pytest.approx(0.201) and cell["low"] < 0.201 < cell["high"]


def test_matched_latents():
    a = torch.eye(6)[:5]
    turned = torch.nn.functional.normalize(torch.tensor([[0.0, 0.0, 1.0, 0.0, 0.0, 1.2]]))  # cosine 0.64 to latent 2
    b = torch.cat([a[[3]], turned, a[[0]], a[[0]], torch.eye(6)[[4]]])
    alive_a, alive_b = torch.tensor([1, 1, 1, 1, 0]).bool(), torch.tensor([1, 1, 1, 1, 1]).bool()
    found = match_latents(a, b, alive_a, alive_b)
    assert {(x, y) for x, y, _ in found["pairs"]} - {(0, 2), (0, 3)} == {(3, 0), (2, 1)}
    assert (found["kept"], found["moved"], found["died"], found["born"]) == (2, 1, 1, 2)
    assert (found["split"], found["merged"]) == (1, 0)  # latent 0 lives on in two
    with pytest.raises(InputError):
        match_latents(a, b, torch.zeros(5).bool(), alive_b)


def table_of(means, seeds=8, noise=0.002, cosines=None):
    """{arm: {metric: mean}} as a table of cycle 1, test, with a little noise of each seed, which pairing does not
    remove.
    """
    rng = np.random.default_rng(0)
    level = {"base_u": 0.3, "sae_features_u_weighted": 0.2, "task_accuracy": 0.9, "sae_explained_variance": 0.95,
             "sparsity_l0_mean": 8.0}
    rows = []
    for arm, other in means.items():
        for metric, value in (level | other).items():
            split = "val" if metric.startswith("aux_") else "test"
            rows += [("s", arm, seed, 0, 1, split, metric, value + noise * rng.normal()) for seed in range(seeds)]
    return pandas.DataFrame(rows, columns=list(COLUMNS))


ALL = {arm: {} for arm in CONTROLS}
ABOVE = {"base_u": 0.34, "sae_features_u_weighted": 0.24}


@pytest.mark.parametrize("means,said", [
    (ALL | {"per_class": ABOVE}, "success: "),
    ({"lambda0": {}, "per_class": ABOVE},
     "an effect: .*were not run: random_unit, permuted, random_latents, shuffled_labels, class_mean"),
    (ALL | {"per_class": {}}, "no effect shown: "),
    (ALL | {"per_class": {"base_u": 0.26}}, "lower: "),
    (ALL | {"per_class": ABOVE, "class_mean": ABOVE}, "not specific to the SAE: .*; not shown against class_mean$"),
    (ALL | {"per_class": ABOVE | {"task_accuracy": 0.87}}, "trade-off: .*accuracy -3"),
    (ALL | {"per_class": {"base_u": 0.26, "task_accuracy": 0.87}}, "lower: "),
    (ALL | {"per_class": ABOVE | {"task_accuracy": 0.8945}}, "an effect: .*accuracy is kept is not shown"),
    (ALL | {"per_class": ABOVE | {"sae_explained_variance": 0.9}}, "not shown at equal sae_explained_variance$"),
    (ALL | {"per_class": ABOVE | {"sparsity_l0_mean": 5.0}}, "not shown at equal sparsity_l0_mean$"),
    ({"class_mean": {}, "per_class": ABOVE}, "no verdict: per_class and lambda0"),
])
def test_the_verdict(means, said):
    assert re.search(said, verdict(table_of(means), "per_class", list(means), "base_u", cycle=1))


def test_no_verdict_from_two_seeds_nor_from_a_point_estimate():
    assert verdict(table_of(ALL | {"per_class": ABOVE}, seeds=2), "per_class", [*ALL, "per_class"], "base_u",
                   cycle=1) == "no verdict: fewer than 3 seeds"
    noisy = table_of(ALL | {"per_class": {"base_u": 0.31, "task_accuracy": 0.88}}, noise=0.03)
    assert verdict(noisy, "per_class", [*ALL, "per_class"], "base_u", cycle=1).startswith("no effect shown")


def test_trends_are_judged_by_intervals():
    table = table_of({"lambda0": {},
                      "per_class": {"base_u": 0.34, "sae_features_u_weighted": 0.15, "task_accuracy": 0.905}})
    assert trend(table, "per_class", "lambda0", "base_u", cycle=1)[0] == "PASS"
    assert trend(table, "per_class", "lambda0", "sae_features_u_weighted", cycle=1)[0] == "FAIL"
    assert trend(table, "per_class", "lambda0", "sae_explained_variance", cycle=1)[0] == "WARN"
    assert [trend(table, "per_class", "lambda0", "task_accuracy", cycle=1, margin=margin)[0]
            for margin in (0.02, 0.005, 0.001)] == ["PASS", "WARN", "FAIL"]
    assert trend(table, "per_class", "lambda0", "nothing", cycle=1)[0] == "WARN"


def test_a_pull_is_judged_against_lambda0():
    """A cosine that rises from an untrained network's to lambda0's shows no pull; one above lambda0's does."""
    def aux(end, of_lambda0, ratio=0.5):
        return {"aux_cos_end": end, "aux_cos_lambda0": of_lambda0, "aux_loss_ratio": ratio, "aux_grad_ratio": ratio}

    means = {"lambda0": {}, "per_class": aux(0.9, 0.7), "class_mean": aux(0.7, 0.7), "random_unit": aux(1.0, 1.0),
             "constant": aux(0.9, 0.7, 0.001)}
    found = pulls(table_of(means, noise=0.0005), list(means), 1).set_index("arm")
    assert found.verdict.tolist() == ["PASS", "WARN: the pull is not shown",
                                      "WARN: lambda0 lies at the targets already", "WARN: the pull is not shown"]
    assert (found.loc["per_class", "rise"] == pytest.approx(0.2, abs=0.001)
            and found.loc["per_class", "low"] < 0.2 < found.loc["per_class", "high"] + 0.001)
    alone = table_of({"per_class": {k: v for k, v in aux(0.9, 0.7).items() if k != "aux_cos_lambda0"}})
    assert pulls(alone, ["per_class"], 1).verdict.tolist() == ["WARN: lambda0 was not run"]
