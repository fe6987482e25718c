"""Before step 4: choose each arm's sharpening size and lambda on validation, by one rule and with one budget.

    python choose_constants.py PRESET=mlp_digits
    python choose_constants.py PRESET=gpt2_sst2 GRID_KEEP_PCT=0.05,0.2,1.0 GRID_AUX_WEIGHT=0.01,0.1,0.3,1.0,3.0

Trains one auxiliary cycle at every point of the grid, on seeds that the report does not use. Of the points whose
validation accuracy is within 0.5 points of lambda0's, takes the one with the largest validation base U. Every constant
of 04_train_cycle.py can be set here too; ARMS, CYCLES, SEEDS, METRICS and N_SAE_SEEDS are only handed on to it.
Writes store/sae_ception/<setting>_choice/choice.json: the whole grid, and ARM_CONSTANTS for 04_train_cycle.py
"""
import math
import sys
from pathlib import Path

import checkout  # noqa: F401  (first: finds lib)
from lib.constants import override
from lib.ranges import Percent, Seed
from presets import Arm, Weight, setting_name

GRID_ARMS: tuple[Arm, ...] = ("per_class", "class_mean")  # every arm that competes gets the same grid of lambda
GRID_KEEP_PCT: tuple[Percent, ...] = (1.0, 2.0, 4.0, 10.0)  # latents a class keeps; arms that mask nothing skip it
GRID_AUX_WEIGHT: tuple[Weight, ...] = (0.1, 0.3, 1.0, 3.0)  # lambda
SELECT_SEEDS: tuple[Seed, ...] = (100, 101, 102)  # disjoint from the SEEDS of the report
CONSTANTS = override(globals(), also=Path(__file__).with_name("04_train_cycle.py"))

from tqdm.auto import tqdm

from cycles.arms import definition, unlabelled
from cycles.comparison import is_measured
from cycles.metrics import MAX_ACCURACY_LOSS
from cycles.session import Session
from cycles.steps import evaluate_cycle, train_cycle_sae, train_model
from lib.environment import InputError, log, log_to, run, say_next
from lib.files import write_json
from lib.outputs import in_use

GRID = ("GRID_ARMS", "GRID_KEEP_PCT", "GRID_AUX_WEIGHT", "SELECT_SEEDS")


def points() -> dict[str, dict[str, float]]:
    """Arm with label -> its constants, over the grid."""
    found = {}
    for arm in GRID_ARMS:
        if "@" in arm or "AUX_WEIGHT" not in definition(arm).takes:
            raise InputError(f"GRID_ARMS has {arm}; it needs arms with a lambda, without a label")
        for pct in GRID_KEEP_PCT if "KEEP_PCT" in definition(arm).takes else (None,):
            for weight in GRID_AUX_WEIGHT:
                label = f"l{weight:g}" if pct is None else f"l{weight:g}_k{pct:g}"
                keep = {} if pct is None else {"KEEP_PCT": float(pct)}
                own = CONSTANTS["ARM_CONSTANTS"].get(arm, {})
                found[f"{arm}@{label}"] = own | {"AUX_WEIGHT": float(weight), **keep}
    return found


def measure(grid: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean validation accuracy and base U over the selection seeds, of every point and of lambda0."""
    arms = ["lambda0", *grid]
    sums = {arm: {"task_accuracy": 0.0, "base_u": 0.0, "sae_features_u": 0.0} for arm in arms}
    constants = {name: value for name, value in CONSTANTS.items() if name not in GRID}  # those of 04_train_cycle.py
    setting = f"{setting_name(constants)}_choice"
    constants |= {"ARMS": tuple(arms), "ARM_CONSTANTS": grid, "METRICS": (), "N_SAE_SEEDS": 1, "SETTING": setting}
    with tqdm(total=len(SELECT_SEEDS) * len(arms), unit="model", desc="grid") as bar:
        for seed in SELECT_SEEDS:
            session = Session(constants, seed)
            log_to(session.root / "choose_constants.log")
            with in_use(session.folder("baseline", 0)):
                for arm, cycle in [("baseline", 0), *((arm, 1) for arm in arms)]:
                    train_model(session, arm, cycle)
                    train_cycle_sae(session, arm, cycle)
                    found = evaluate_cycle(session, arm, cycle)["val"]
                    found |= {} if is_measured("base_u", found) else {"base_u": math.nan}
                    if cycle:
                        sums[arm] = {k: v + found[k] / len(SELECT_SEEDS) for k, v in sums[arm].items()}
                        bar.update()
    scores = {arm: {k: None if math.isnan(v) else v for k, v in of.items()} for arm, of in sums.items()}
    write_json(session.root / "choice.json", {"validation": scores, "ARM_CONSTANTS": choose(sums, grid)}, sealed=True)
    log.info("%s", session.root / "choice.json")
    return sums


def choose(found: dict[str, dict[str, float]], grid: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """The constants of each arm's best point; if no point of an arm keeps the accuracy, its most accurate one."""
    chosen = {}
    for arm in GRID_ARMS:
        mine = [p for p in grid if unlabelled(p) == arm]
        fit = [p for p in mine if found[p]["task_accuracy"] >= found["lambda0"]["task_accuracy"] - MAX_ACCURACY_LOSS]
        if unknown := [p for p in fit if math.isnan(found[p]["base_u"])]:
            raise InputError(f"base U, by which a point is chosen, has no value at {unknown[0]}: no unit fires often "
                             "enough on the validation examples; raise VAL_FRAC, or leave the point out")
        best = max(fit, key=lambda p: found[p]["base_u"]) if fit else max(mine, key=lambda p: found[p]["task_accuracy"])
        chosen[arm] = grid[best]
    return chosen


def main():
    grid = points()
    found = measure(grid)
    for arm, scores in found.items():
        print(f"{arm:<28}" + "  ".join(f"{name} {value:.4f}" for name, value in scores.items()))
    chosen = CONSTANTS["ARM_CONSTANTS"] | choose(found, grid)
    print(f"ARM_CONSTANTS={chosen!r}".replace(" ", ""))
    given = dict(argument.split("=", 1) for argument in sys.argv[1:] if argument.partition("=")[0] not in GRID)
    say_next("04_train_cycle.py", **(given | {"ARM_CONSTANTS": chosen}))


if __name__ == "__main__":
    run(main)
