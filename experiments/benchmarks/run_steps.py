"""Measure this project and the other libraries in turns, some hours on two cores, and show the tables as a page.

    python run_steps.py                              # 01 to 04; finished rounds of 03 are kept
    python run_steps.py 04_show_benchmarks.ipynb     # only this one; any script or notebook beside this one

Each NAME=value goes to the steps that have this constant; all are checked before the first step starts.

Writes store/benchmarks/04_show_benchmarks.html, besides what the steps write.
"""
import sys
from pathlib import Path

import checkout  # noqa: F401  (first: finds lib)
from lib.environment import guard_imports, run
from lib.steps import Step, plan, run_script

HERE = Path(__file__).resolve().parent
STEPS = ("01_time_activations.py", "02_time_sae_training.py", "03_recover_known_features.py",
         "04_show_benchmarks.ipynb")
WORLDS = ("small", "wide", "synth_sae_bench")  # presets of 03, one after the other


def each_world(step: Step) -> list[Step]:
    """Step 3 once for each world, unless one was chosen; any other step as it is."""
    if step.path.name != STEPS[2] or any(given.startswith("PRESET=") for given in step.arguments):
        return [step]
    return [Step(step.path, [f"PRESET={world}", *step.arguments]) for world in WORLDS]


def main() -> None:
    from lib.reports import render
    from lib.store import experiment_dir

    for step in (each for wanted in planned for each in each_world(wanted)):
        if step.path.suffix == ".py":
            run_script(step)
        else:
            page = experiment_dir("benchmarks") / f"{step.path.stem}.html"
            render(step.path, page, step.arguments)
            print(f"the page: {page}")


if __name__ == "__main__":
    guard_imports()
    planned = plan(HERE, STEPS, sys.argv[1:], __doc__ or "")
    run(main)
