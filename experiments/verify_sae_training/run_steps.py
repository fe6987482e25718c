"""Run the steps one after the other and show what came out as pages, which index.html links.

    python run_steps.py                                        # 00 to 05, on the model and stories of the project
    python run_steps.py MODEL=gpt2 DATASET=texts.jsonl LAYER_SIGNATURE=resid_post:6 TOP_K=32
    python run_steps.py 03_analyze_training.ipynb LOSS_TEXTS=0 # only this one; any script or notebook beside this one

Each NAME=value goes to the steps that have this constant; all are checked before the first step starts. What is
finished is not made again, so the same command continues after an interruption.

Writes pages/ and index.html into store/verify_sae_training/saes/<name>/, besides what the steps write.
"""
import sys
from pathlib import Path

import checkout  # noqa: F401  (first: finds lib)
from lib.constants import constants_of
from lib.environment import guard_imports, run
from lib.steps import plan, run_script

HERE = Path(__file__).resolve().parent
STEPS = ("00_probe_layers.py", "01_save_activations.py", "02_train_sae.py", "03_analyze_training.ipynb",
         "04_name_sae_concepts.ipynb", "05_show_concepts.ipynb")


def main() -> None:
    from overview import links, place_of, write_overview

    from lib.reports import render

    place = None
    for step in planned:
        if step.path.suffix == ".py":
            run_script(step)
        else:
            constants = constants_of(step.path, step.arguments)["CONSTANTS"]
            place = place_of(constants.get("SAE"), constants.get("RUN_ID"))  # after step 2, which trains the SAE
            page = place.pages / f"{step.path.stem}.html"
            render(step.path, page, step.arguments, links(place, planned))
    if place:
        path, verdict = write_overview(place)
        print(verdict)
        print(f"all of it: {path}")


if __name__ == "__main__":
    guard_imports()
    planned = plan(HERE, STEPS, sys.argv[1:], __doc__ or "")
    run(main)
