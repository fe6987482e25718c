"""A study: every arm at every lambda and seed, each in one small file, computed by several processes.

    constants = with_grid(constants, (0.1, 0.3, 1.0))      # the arms of a study: per_class@l0.1, per_class@l0.3, ...
    run_seed(constants, 1000)                              # all arms of one seed; what is finished is not made again
    done(constants)                                        # how many files there are, and how many there will be

store/sae_ception/<setting>/study/seed_<s>/<arm>.json holds all scores of an arm and how far it was pulled. Models and
SAEs are removed once they are scored, but for those that targets are made from.
"""
import re
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from cycles import schemas
from cycles.acting import act
from cycles.arms import definition
from cycles.auxiliary import probe
from cycles.fitting import tune_settings
from cycles.session import Session, setting_root
from cycles.stamps import Constants, stage_constants
from cycles.steps import drop_undefined, evaluate_cycle, train_cycle_sae, train_model
from lib.environment import InputError
from lib.files import fingerprint, read_json, write_json
from lib.outputs import in_use


def with_grid(c: Constants, lambdas: tuple[float, ...]) -> Constants:
    """The constants with each arm that has a lambda at each of `lambdas`, times the arm's own AUX_WEIGHT if it has one.

    "per_class@25" at .3 becomes "per_class@25_l0.3". The arms of a seed run in this order: all of them at the middle
    lambda first, so that an unfinished seed tells most.
    """
    arms, of_arms = [arm for arm in c["ARMS"] if not has_lambda(arm)], {}
    middle = sorted(lambdas)[len(lambdas) // 2]
    for weight in sorted(lambdas, key=lambda weight: abs(weight - middle)):
        for arm in filter(has_lambda, c["ARMS"]):
            own = c["ARM_CONSTANTS"].get(arm, {})
            if isinstance(own.get("AUX_WEIGHT", 1.0), (tuple, list)):
                raise InputError(f"AUX_WEIGHT of {arm} in ARM_CONSTANTS has a value for each cycle; give one number, a "
                                 "study has one cycle")
            label = f"{arm}{'_' if '@' in arm else '@'}l{weight:g}"
            of_arms[label] = own | {"AUX_WEIGHT": float(f"{weight * own.get('AUX_WEIGHT', 1.0):.6g}")}
            arms.append(label)
    return c | {"ARMS": tuple(arms), "ARM_CONSTANTS": of_arms, "CYCLES": 1}


def has_lambda(arm: str) -> bool:
    """Whether lambda decides what the arm does."""
    return "AUX_WEIGHT" in definition(arm).takes


def variant(arm: str) -> tuple[str, float]:
    """("per_class@25", .3) of "per_class@25_l0.3"; an arm without lambda has 0."""
    found = re.fullmatch(r"(.+)[@_]l([0-9.e+-]+)", arm)
    return (found[1], float(found[2])) if found else (arm, 0.0)


def result_path(c: Constants, seed: int, arm: str) -> Path:
    """Where the scores of an arm and seed lie."""
    return setting_root(c) / "study" / f"seed_{seed}" / f"{arm}.json"


def done(c: Constants) -> tuple[int, int]:
    """How many results there are, and how many there will be."""
    paths = [result_path(c, seed, arm) for seed in c["SEEDS"] for arm in c["ARMS"]]
    return sum(path.exists() for path in paths), len(paths)


def run_seed(c: Constants, seed: int) -> list[str]:
    """All arms of one seed. What is finished is not made again.

    Returns a line for each arm that could not be trained: it has no result, and the others go on.
    """
    failed: list[str] = []
    if all(result_path(c, seed, arm).exists() for arm in c["ARMS"]):
        return failed
    session = Session(c, seed)
    with in_use(session.folder("baseline", 0)):
        train_model(session, "baseline", 0)
        for sae_seed in range(c["N_SAE_SEEDS"]):
            train_cycle_sae(session, "baseline", 0, sae_seed)
        train_model(session, "lambda0", 1)
        session.load("lambda0", 1)
        unpulled = session.outputs(session.task.splits["val"])[0]
        for arm in c["ARMS"]:
            if is_finished(session, arm):
                continue
            scores = None
            try:
                scores = _scored(session, arm, unpulled)
            except InputError as error:
                failed.append(f"seed {seed}, {arm}: {error}")
            if arm != "lambda0":
                shutil.rmtree(session.folder(arm, 1), ignore_errors=True)
            if scores is not None:
                write_json(result_path(c, seed, arm), scores, sealed=True)  # last: it marks the arm finished
    return failed


def is_finished(session: Session, arm: str) -> bool:
    """Whether the arm's result is there. Raises InputError if it was made with other constants or data."""
    path = result_path(session.c, session.seed, arm)
    if not path.exists():
        return False
    if read_json(path, schemas.STUDIED)["key"] != _key(session, arm):
        raise InputError(f"{path} was made with other constants or data; set SETTING to a new name")
    return True


def _key(session: Session, arm: str) -> str:
    of_saes = [session.key("sae", arm, 1, sae_seed) for sae_seed in range(session.c["N_SAE_SEEDS"])]
    return fingerprint([of_saes, stage_constants(session.c, "eval", arm)])


def _scored(session: Session, arm: str, unpulled: Tensor) -> dict[str, Any]:
    """Train and score an arm: {"arm", "seed", "key", "aux", "saes": one dict of val and test scores an SAE seed}."""
    train_model(session, arm, 1)
    for sae_seed in range(session.c["N_SAE_SEEDS"]):
        train_cycle_sae(session, arm, 1, sae_seed)
    found = evaluate_cycle(session, arm, 1)
    session.load(arm, 1)
    h = session.outputs(session.task.splits["val"])[0]
    aux = {"shift": shift(h, unpulled)} | pull(session, arm)
    saes = [{"sae_seed": 0, "val": found["val"], "test": found["test"]}, *found.get("other_sae_seeds", [])]
    return drop_undefined({"arm": arm, "seed": session.seed, "key": _key(session, arm), "aux": aux, "saes": saes})


def pull(session: Session, arm: str) -> dict[str, float]:
    """{"pull": |lambda grad L_aux| / |grad L_task|} at the model that the arm is made from; {} where no loss pulls.

    That model is where the arm starts or, from scratch, what it would become without its pull. So arms of a seed are
    compared at one place, before any of them has moved.
    """
    if definition(arm).acts not in ("pull", "penalty"):
        return {}
    settings = tune_settings(session, arm, 1, constants := stage_constants(session.c, "aux", arm))
    made, _ = act(session, arm, 0, constants, weight=settings.aux_weight)
    assert made is not None
    session.load("baseline", 0)
    found = probe(session.model, session.task, made, settings, entries=session.entries)
    return {"pull": found["grad_ratio"]}


def shift(h: Tensor, unpulled: Tensor) -> float:
    """How far activations h [N, D] lie from those of lambda0's model: mean squared distance over the latter's variance.
    """
    about = unpulled.double() - unpulled.double().mean(0)
    return float((h.double() - unpulled.double()).square().sum() / about.square().sum())
