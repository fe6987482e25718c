"""What the arms did, compared: results as one long table, paired differences over seeds, and what they show."""
import re
from pathlib import Path
from typing import Any

import pandas

from cycles import schemas
from cycles.arms import ARMS
from cycles.metrics import MATCHED, MAX_ACCURACY_LOSS, PRIMARY
from lib.environment import log
from lib.files import read_json
from lib.statistics import holm, interval, paired

COLUMNS = ("setting", "arm", "seed", "sae_seed", "cycle", "split", "metric", "value")
CONTROLS = tuple(name for name, arm in ARMS.items() if arm.must_be_beaten)
LIVE_BELOW, LIVE_RATIO = 0.99, 0.01  # a pull is live if lambda0's cosine is below the one, the gradient ratio above


def result_table(
    root: Path, arms: tuple[str, ...], *, seeds: tuple[int, ...], cycles: int,
    cosines: dict[tuple[str, int, int], float] | None = None,
) -> pandas.DataFrame:
    """results_cycle_<n>.json of these arms, seeds and cycles under `root`, one row for each number; COLUMNS.
    What is not is_measured() has none.

    cosines: (arm, seed, cycle) -> that of lambda0's model to the arm's targets (cycles.steps), kept as aux_cos_lambda0.
    Raises InputError where a file is missing.
    """
    rows = []
    for seed in seeds:
        for arm in ("baseline", *arms):
            for cycle in [0] if arm == "baseline" else range(1, cycles + 1):
                found = read_json(root / arm / f"seed_{seed}" / f"results_cycle_{cycle}.json", schemas.RESULTS)
                for result in ({"sae_seed": 0, **found}, *found.get("other_sae_seeds", [])):
                    for split in ("val", "test"):
                        place = (root.name, arm, seed, result["sae_seed"], cycle, split)
                        rows += [(*place, metric, value) for metric, value in result[split].items()
                                 if is_measured(metric, result[split])]
    rows += [(root.name, arm, seed, 0, cycle, "val", "aux_cos_lambda0", value)
             for (arm, seed, cycle), value in (cosines or {}).items()]
    return pandas.DataFrame(rows, columns=list(COLUMNS))


def is_measured(metric: str, scores: dict[str, float]) -> bool:
    """Whether a metric over units that fire often enough had any: a mean of none is written as 0, and is no score."""
    found = re.fullmatch(r"(base|sae_features)_(?:csi|u)(?:_std|_label|_adj)?(_attribute)?", metric)
    return found is None or scores.get(f"{found[1]}_u_n_supported{found[2] or ''}", 1) > 0


def by_seed(table: pandas.DataFrame, arm: str, cycle: int, metric: str, *, split: str = "test") -> pandas.Series:
    """The metric of each seed, averaged over SAE seeds. The baseline has cycle 0 only, whatever `cycle` says."""
    arm = "baseline" if cycle == 0 else arm
    cycle = 0 if arm == "baseline" else cycle
    rows = table[(table.arm == arm) & (table.cycle == cycle) & (table.metric == metric) & (table.split == split)]
    return rows.groupby("seed").value.mean()


def difference(
    table: pandas.DataFrame, arm: str, reference: str, metric: str, *, cycle: int, split: str = "test"
) -> dict[str, float]:
    """arm minus reference at one cycle, paired by seed (lib.statistics.paired)."""
    return paired(*(by_seed(table, name, cycle, metric, split=split) for name in (arm, reference)))


def compare(
    table: pandas.DataFrame, arm: str, controls: list[str], metrics: tuple[str, ...], *, cycle: int
) -> pandas.DataFrame:
    """arm minus each control on test, for each metric, with Holm's correction over all of these tests."""
    rows = [{"metric": metric, "control": control, **difference(table, arm, control, metric, cycle=cycle)}
            for metric in metrics for control in controls]
    frame = pandas.DataFrame(rows)
    frame["p_holm"] = holm(frame["p"].tolist())
    return frame


def choose_cycle(table: pandas.DataFrame, arm: str, cycles: int) -> int:
    """By validation: of the cycles whose accuracy is within 0.5 points of lambda0's, the one with the largest base_u.

    The baseline stands in for lambda0 where that was not run. If no cycle keeps the accuracy, the most accurate one.
    """
    reference = "lambda0" if (table.arm == "lambda0").any() else "baseline"
    accuracy, needed = ({n: by_seed(table, name, n, "task_accuracy", split="val").mean() for n in range(1, cycles + 1)}
                        for name in (arm, reference))
    fit = [n for n in accuracy if accuracy[n] >= needed[n] - MAX_ACCURACY_LOSS]
    u = {n: by_seed(table, arm, n, "base_u", split="val") for n in fit}
    n_seeds = table[table.arm == arm].seed.nunique()
    unknown = any(len(values) < n_seeds for values in u.values())
    if unknown:
        log.warning("base U has no value on the few validation examples, so the most accurate cycle is taken; raise "
                    "VAL_FRAC")
    if not fit or unknown:
        return max(fit or accuracy, key=lambda n: accuracy[n])
    return max(fit, key=lambda n: u[n].mean())


def summary(table: pandas.DataFrame, arms: tuple[str, ...], cycles: int, *, arm: str = "per_class") -> dict[str, Any]:
    """Test mean and interval of every arm, cycle and metric; `arm` against every other arm on the primary metrics."""
    cells = []
    for (name, cycle, metric), part in table[table.split == "test"].groupby(["arm", "cycle", "metric"], sort=True):
        mean, low, high = interval(part.groupby("seed").value.mean().to_numpy())
        cells.append({"arm": name, "cycle": int(cycle), "metric": metric, "mean": mean, "low": low, "high": high})
    result: dict[str, Any] = {"n_seeds": int(table.seed.nunique()), "cells": cells}
    if arm in arms:
        cycle = choose_cycle(table, arm, cycles)
        controls = [other for other in arms if other != arm] or ["baseline"]
        result |= {"arm": arm, "chosen_cycle": cycle}
        for name, metrics in (("primary", PRIMARY), ("accuracy", ("task_accuracy",))):
            result[name] = compare(table, arm, controls, metrics, cycle=cycle).to_dict("records")
    return result


def pulls(table: pandas.DataFrame, arms: list[str], cycle: int) -> pandas.DataFrame:
    """How hard each arm with targets was pulled in a cycle: means over seeds, one row an arm.

    cos_end: mean cosine to its targets at the end, about the centre it was trained with; cos_lambda0: that of lambda0's
    model to the same targets; rise [low, high]: their paired difference; loss_ratio: lambda L_aux / L_task; grad_ratio.
    verdict: PASS where the rise is shown, lambda0 did not reach the targets anyway, and the gradient is not negligible.
    """
    rows = []
    for arm in arms:
        found = {m: by_seed(table, arm, cycle, f"aux_{m}", split="val")
                 for m in ("cos_end", "cos_lambda0", "loss_ratio", "grad_ratio")}
        if not len(found["cos_end"]):
            continue
        row = {name: float(values.mean()) if len(values) else float("nan") for name, values in found.items()}
        rise = paired(found["cos_end"], found["cos_lambda0"])
        if not rise["n"]:
            verdict = "WARN: lambda0 was not run"
        elif row["cos_lambda0"] >= LIVE_BELOW:
            verdict = "WARN: lambda0 lies at the targets already"
        else:
            live = rise["low"] > 0 and row["grad_ratio"] > LIVE_RATIO
            verdict = "PASS" if live else "WARN: the pull is not shown"
        rows.append({"arm": arm, **row, "rise": rise["mean"], "low": rise["low"], "high": rise["high"],
                     "verdict": verdict})
    return pandas.DataFrame(rows)


def trend(
    table: pandas.DataFrame, arm: str, reference: str, metric: str, *, cycle: int, margin: float | None = None
) -> tuple[str, dict[str, float]]:
    """(PASS, FAIL or WARN, the paired difference to the reference on test).

    PASS: the interval lies above 0; FAIL: below. With a margin, PASS: it lies within the margin; FAIL: outside.
    WARN: neither is shown.
    """
    found = difference(table, arm, reference, metric, cycle=cycle)
    low, high = found["low"], found["high"]
    if margin is not None:
        shown, refuted = -margin < low and high < margin, high < -margin or low > margin
    else:
        shown, refuted = low > 0, high < 0
    return "PASS" if shown else "FAIL" if refuted else "WARN", found


def verdict(table: pandas.DataFrame, arm: str, arms: list[str], metric: str, *, cycle: int) -> str:
    """What the paired differences of `arm` say about one primary metric, on test.

    An effect is an interval clear of 0 with a Holm-corrected p below .05 over all arms and primary metrics. Success
    needs an effect against each of CONTROLS, an accuracy whose interval excludes a loss of half a point, and an SAE as
    good and as sparse as lambda0's (MATCHED, by intervals).
    """
    if table.seed.nunique() < 3:
        return "no verdict: fewer than 3 seeds"
    if "lambda0" not in arms or arm not in arms:
        return f"no verdict: {arm} and lambda0 must both be run"
    frame = compare(table, arm, [a for a in arms if a != arm], PRIMARY, cycle=cycle)
    rows = frame[frame.metric == metric].set_index("control")
    first = rows.loc["lambda0"]
    if not first["n"]:
        return "not measured: too few examples for any unit to count"
    against = f"{first['mean']:+.4f} [{first['low']:+.4f}, {first['high']:+.4f}] against lambda0"
    better = [a for a in rows.index if rows.loc[a, "p_holm"] < 0.05 and rows.loc[a, "low"] > 0]
    if first["high"] < 0 and first["p_holm"] < 0.05:
        return f"lower: {against}"
    if "lambda0" not in better:
        return f"no effect shown: {against}"
    accuracy = trend(table, arm, "lambda0", "task_accuracy", cycle=cycle)[1]
    mean, low, high = (100 * accuracy[key] for key in ("mean", "low", "high"))
    points = f"accuracy {mean:+.2f} points [{low:+.2f}, {high:+.2f}]"
    if accuracy["high"] < -MAX_ACCURACY_LOSS:
        return f"trade-off: {against}, {points}"
    if tied := [a for a in CONTROLS if a in rows.index and a not in better]:
        return f"an effect, not specific to the SAE: {against}; not shown against {', '.join(tied)}"
    if missing := [a for a in CONTROLS if a not in rows.index]:
        return f"an effect: {against}; no success without the controls that were not run: {', '.join(missing)}"
    if accuracy["low"] < -MAX_ACCURACY_LOSS:
        return f"an effect: {against}; that accuracy is kept is not shown: {points}"
    unlike = [m for m, margin in MATCHED.items()
              if trend(table, arm, "lambda0", m, cycle=cycle, margin=margin)[0] != "PASS"]
    if unlike:
        return f"an effect: {against}; not shown at equal {' and '.join(unlike)}"
    return f"success: {against}, every control beaten, {points}"
