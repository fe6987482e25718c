"""index.html: what was trained, what the comparison of the arms says, the pages and files, and what to do next."""
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas

from cycles import schemas
from cycles.arms import pull_of
from cycles.comparison import verdict
from cycles.metrics import PRIMARY, REPORTED
from cycles.session import recorded
from lib.files import read_json
from lib.outputs import safe_name
from lib.reports import Links, write_landing
from lib.steps import Step
from lib.store import experiment_dir

PAGES = {  # notebook -> name of its page, what it shows
    "05_compare_cycles": ("Did it help?", "Every arm against the reference arm, seed by seed, with intervals; how hard "
                          "each was pulled; what became of the latents; the verdict."),
    "06_interpret_features": ("Latents of each class", "What sharpening keeps: class profiles, the strongest examples, "
                              "absorption and robustness."),
}
FILES = {
    "results.csv": "every metric of every arm, seed and cycle",
    "summary.json": "the paired comparisons of step 4",
    "04_train_cycle.log": "what step 4 said",
}
NEXT = (
    ("python run_steps.py SEEDS=0,1,2,3,4", "More seeds: below 3 there is no verdict, and intervals shrink with each."),
    ("python run_steps.py PRESET=mlp_digits", "Images instead of texts; 04_train_cycle.py --help lists the presets."),
    ("python choose_constants.py", "Choose the constants of each arm on the validation split."),
)


def folder_of(setting: str) -> Path:
    """Where a setting's outputs lie. Raises InputError for a name that would leave the store."""
    return experiment_dir("sae_ception") / safe_name(setting)


def links(folder: Path, planned: Sequence[Step]) -> Links:
    """The pages that a page links to: those that exist, and those that are about to."""
    coming = {step.path.stem for step in planned}
    there = [name for name in PAGES if name in coming or (folder / "pages" / f"{name}.html").exists()]
    return [("Overview", "../index.html"), *((PAGES[name][0], f"{name}.html") for name in there)]


def write_overview(folder: Path) -> tuple[Path, str]:
    """Write index.html into the setting's folder; returns its path and the verdict in words."""
    table = pandas.read_csv(folder / "results.csv")
    found = read_json(folder / "summary.json", schemas.SUMMARY)
    arms = [arm for arm in table.arm.unique() if arm != "baseline"]
    said = verdicts(table, arms, found)
    path = folder / "index.html"
    write_landing(path, {
        "title": f"Cycles of {folder.name}", "lead": " ".join(said), "facts": _facts(folder, table, arms),
        "pages": [(name, f"pages/{stem}.html", what, "") for stem, (name, what) in PAGES.items()
                  if (folder / "pages" / f"{stem}.html").exists()],
        "files": [(name, f"{(folder / name).stat().st_size / 1e3:.1f} kB", what) for name, what in FILES.items()
                  if (folder / name).exists()],
        "steps": NEXT, "note": "Every page works offline and asks nothing of any host. Keep this folder together: "
                               "pages link each other.",
    })
    return path, "\n".join(said)


def verdicts(table: pandas.DataFrame, arms: list[str], found: dict[str, Any]) -> list[str]:
    """A sentence for each primary metric: what its paired differences say."""
    if "arm" not in found:
        return ["No verdict: per_class, which is compared with the other arms, was not trained."]
    return [f"{REPORTED[metric].title}: {verdict(table, found['arm'], arms, metric, cycle=found['chosen_cycle'])}."
            for metric in PRIMARY]


def _facts(folder: Path, table: pandas.DataFrame, arms: list[str]) -> list[tuple[str, str]]:
    seeds = sorted(table.seed.unique())
    constants, pulls = recorded(folder, int(seeds[0]), arms), dict[str, list[str]]()
    for arm in arms:
        pulls.setdefault(pull_of(arm, constants["ARM_CONSTANTS"][arm]), []).append(arm)
    return [("Preset", str(constants.get("PRESET"))), ("Arms", ", ".join(arms)),
            ("Seeds", ", ".join(map(str, seeds))), ("Cycles", str(int(table.cycle.max()))),
            ("Pull", "; ".join(f"{pull} ({', '.join(alike)})" for pull, alike in pulls.items()))]
