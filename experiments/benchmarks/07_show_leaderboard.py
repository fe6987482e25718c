"""All runs of 05 and 06 beside what others published: the table of README, who passed whom, and the learning curves.

    python 07_show_leaderboard.py                        # prints two tables and writes one figure
    python 07_show_leaderboard.py RULES=own CURVE=own    # only the SAEs as they are

Reads  results/<run>/report.json (of the README), store/benchmarks/synth_sae_bench/<run>/report.json (your own)
Writes store/benchmarks/learning_curves.png
"""
import checkout  # noqa: F401  (first: finds lib)
from lib.constants import override
from lib.ranges import Name, Positive

AT_L0: Positive = 25.0                    # mean L0 of the published scores that are compared
RULES: tuple[Name, ...] = (                # a row for each that a run was scored by: synth_rules.py
    "own", "batch 25", "threshold 25", "pruned 25", "odds 25", "even odds", "conditional 25",
    "even conditional")
CURVE: Name = "threshold 25"               # the rule of the curves, and of who passed whom
CONSTANTS = override(globals())

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from leaderboard import draw, groups_of, markdown, reached, table
from synth_reports import read_reports

from lib.environment import run
from lib.plots import style
from lib.store import experiment_dir

PUBLISHED = Path(__file__).with_name("results")


def main() -> None:
    folder = experiment_dir("benchmarks")
    groups = groups_of(read_reports(PUBLISHED, folder / "synth_sae_bench"))
    print(markdown(table(groups, RULES)), end="\n\n")
    print(markdown(reached(groups, CURVE, AT_L0)), end="\n\n")
    style()
    figure = plt.figure(figsize=(11.5, 4.8))
    draw(groups, CURVE, AT_L0, figure)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "learning_curves.png")
    print(f"written: {folder / 'learning_curves.png'}")


if __name__ == "__main__":
    run(main)
