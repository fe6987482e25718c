"""Train the cycles of all arms, compare them, and show what came out as pages, which index.html links.

    python run_steps.py                                   # 04, 05 and 06 on a small model and labelled sentences
    python run_steps.py PRESET=mlp_digits SEEDS=0,1,2
    python run_steps.py 05_compare_cycles.ipynb SETTING=mlp_digits     # only this one; any script or notebook here

Each NAME=value goes to the steps that have this constant; all are checked before the first step starts. What is
finished is not made again, so the same command continues after an interruption.

Writes store/sae_ception/<setting>/pages/ and index.html, besides what the steps write.
"""
import sys
from pathlib import Path

import checkout  # noqa: F401  (first: finds lib)
from lib.constants import constants_of
from lib.environment import guard_imports, run
from lib.steps import Step, plan, run_script
from presets import setting_name

HERE = Path(__file__).resolve().parent
STEPS = ("04_train_cycle.py", "05_compare_cycles.ipynb", "06_interpret_features.ipynb")


def setting_of(steps: list[Step]) -> str | None:
    """The setting that step 4 makes and the notebooks show, the one given or its default; None without any of them."""
    for step in steps:
        if step.path.name in STEPS:
            constants = constants_of(step.path, step.arguments)["CONSTANTS"]
            if "PRESET" in constants or constants.get("SETTING"):
                return setting_name(constants)
    return None


def main() -> None:
    from overview import folder_of, links, write_overview

    from lib.reports import render

    folder = folder_of(setting or "")
    for step in planned:
        if step.path.suffix == ".py":
            run_script(step)
        else:
            arguments = [*(given for given in step.arguments if not given.startswith("SETTING=")), f"SETTING={setting}"]
            render(step.path, folder / "pages" / f"{step.path.stem}.html", arguments, links(folder, planned))
    if setting is None:  # other scripts leave no comparison
        return
    path, verdict = write_overview(folder)
    print(verdict)
    print(f"all of it: {path}")


if __name__ == "__main__":
    guard_imports()
    planned = plan(HERE, STEPS, sys.argv[1:], __doc__ or "")
    setting = setting_of(planned)
    run(main)
