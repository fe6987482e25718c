"""The study that settles whether SAE-ception helps: every arm at every lambda and seed, compared afterwards by step 8.

    python 07_run_study.py DATASET=path/to/mnist                      # parity: hours on two cores
    python 07_run_study.py STUDY=stories                              # a smaller one: README.md lists them
    python 07_run_study.py STUDY=parity SEEDS=5000,5001 SETTING=try   # any constant of 04_train_cycle.py, too

Interrupted? Rerun the same command; what is finished is not made again. Each result is a file of its own.
Writes store/sae_ception/<setting>/study/study.json and study/seed_<s>/<arm>.json
"""
import sys
from pathlib import Path

import checkout  # noqa: F401  (first: finds lib)
from lib.constants import constants_of, override
from lib.ranges import FileName, Seed, Threads
from presets import Weight
from studies import STUDIES, Study

STUDY: Study = "parity"                   # README.md lists them; studies.py has their constants
SETTING: FileName | None = None           # folder of the outputs; None: study_ and the study's name
SEEDS: tuple[Seed, ...] | None = None     # None: the study's own; step 8 judges those of all commands together
LAMBDAS: tuple[Weight, ...] | None = None  # lambda of every arm, times the arm's AUX_WEIGHT; None: the study's own
WORKERS: Threads = 2                      # processes, each with one thread
REGISTRATION: FileName | None = None      # commit that registers the run; the code must be that commit's
CONSTANTS = override(globals(), also=Path(__file__).with_name("04_train_cycle.py"))

from tqdm.auto import tqdm

from cycles import schemas
from cycles.seeds import as_they_end, in_processes
from cycles.session import setting_root
from cycles.stamps import Constants
from cycles.study import done, run_seed, with_grid
from lib.environment import InputError, log, log_to, run, say_next
from lib.files import read_json, write_json
from lib.outputs import is_current
from lib.store import provenance

MAIN_SCRIPT = Path(__file__).with_name("04_train_cycle.py")
OWN = ("STUDY", "SETTING", "SEEDS", "LAMBDAS", "WORKERS", "REGISTRATION")
FIXED = {"AUX_WEIGHT": "set LAMBDAS", "CYCLES": "a study has one cycle"}  # constants of step 4 that decide nothing here


def study_constants() -> Constants:
    """Those of 04_train_cycle.py: the study's, replaced by what the command line gives, with the grid of arms.

    Raises InputError for one of FIXED.
    """
    study = {name: value for name, value in STUDIES[STUDY].items() if name != "LAMBDAS"}
    study |= {"SETTING": SETTING or f"study_{STUDY}"} | ({} if SEEDS is None else {"SEEDS": SEEDS})
    given = [argument for argument in sys.argv[1:] if argument.partition("=")[0] not in OWN]
    for name in (argument.partition("=")[0] for argument in given):
        if name in FIXED:
            raise InputError(f"{name} would be ignored: {FIXED[name]}")
    values = [f"{name}={value if isinstance(value, str) else repr(value)}" for name, value in study.items()]
    return with_grid(constants_of(MAIN_SCRIPT, [*values, *given])["CONSTANTS"], LAMBDAS or STUDIES[STUDY]["LAMBDAS"])


def record(c: Constants) -> None:
    """Write study.json, or compare with the one that is there: a study keeps its constants and its code. Its seeds are
    those of all commands so far.

    Raises InputError where one of them has changed, or where the code is not that of REGISTRATION.
    """
    path = setting_root(c) / "study" / "study.json"
    revision = provenance()["git"] or ""
    if REGISTRATION is not None and not (revision and REGISTRATION.startswith(revision)):
        raise InputError(f"the code is at {revision or 'no commit'}, not at REGISTRATION={REGISTRATION}; check that "
                         "commit out, without changes")
    made_from = {"study": STUDY, "registration": REGISTRATION, "revision": revision,
                 "constants": {name: value for name, value in c.items() if name != "SEEDS"}}
    then = read_json(path, schemas.STUDY) if path.exists() else None
    is_current(path, then, made_from, "set SETTING to a new name")
    seeds = sorted({*c["SEEDS"], *(then["seeds"] if then else ())})
    if then is None or seeds != then["seeds"]:
        write_json(path, {**made_from, "seeds": seeds, "provenance": provenance()}, sealed=True)


def main():
    c = study_constants()
    record(c)
    log_to(setting_root(c) / "07_run_study.log")
    finished, total = done(c)
    with (in_processes(run_seed, c, c["SEEDS"], workers=WORKERS, threads=1) as jobs,
          tqdm(total=total, initial=finished, unit="model", desc=STUDY) as bar):
        for failed in as_they_end(jobs, lambda: bar.update(done(c)[0] - bar.n)):
            for line in failed:
                log.warning("no result: %s", line)
    log.info("%s", setting_root(c) / "study")
    say_next("08_judge_study.py", STUDY=STUDY, SETTING=SETTING)


if __name__ == "__main__":
    run(main)
