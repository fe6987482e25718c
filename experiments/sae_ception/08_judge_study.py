"""What a study of step 7 says: five sentences, tables, a figure. Whatever is in is read, and it is told how much.

    python 08_judge_study.py                       # the parity study
    python 08_judge_study.py STUDY=paper RESULTS=results/paper.csv    # the published scores, without running anything

Reads  store/sae_ception/<setting>/study/
Writes store/sae_ception/<setting>/study/verdict.md, frontier.png, response.png, scores.csv, gains.csv
"""
import checkout  # noqa: F401  (first: finds lib)
from lib.constants import override
from lib.ranges import FileName, Location
from studies import ENDPOINTS, Study

STUDY: Study = "parity"                   # as in step 7
SETTING: FileName | None = None           # as in step 7; with RESULTS None is published_ and the study's name
RESULTS: Location | None = None           # a scores.csv; None: the results of step 7
CONSTANTS = override(globals())

from pathlib import Path
from typing import Any

import pandas
from matplotlib.figure import Figure

from cycles import schemas
from cycles.colours import title
from cycles.comparison_figures import frontier_figure, response_figure
from cycles.frontier import (
    Endpoints,
    against_lambda0,
    at_best_lambda,
    at_equal_pull,
    best_lambda,
    read_scores,
    read_study,
    waiting,
    write_scores,
)
from cycles.hypotheses import LABEL_FREE, METHOD, judge, sentences
from cycles.metrics import in_words
from cycles.study import done
from lib.environment import InputError, log, run
from lib.files import atomic_write, read_json, write_text
from lib.statistics import interval
from lib.store import experiment_dir

ALWAYS = ("task_accuracy", "base_u", "base_information_attribute_given_label",
          "sae_features_u_weighted_attribute_given_label", "sae_features_u_weighted", "sae_explained_variance")


def arm_table(gains: pandas.DataFrame, endpoints: Endpoints) -> str:
    """Every arm at its best lambda, minus lambda0, on test: a Markdown table, means ± half the 95 % t interval."""
    columns = [name for name in dict.fromkeys((*endpoints.margins, *ALWAYS)) if f"test_{name}" in gains]
    lines = ["| arm | best lambda | seeds | " + " | ".join(in_words(name) for name in columns) + " |",
             "|---" * (len(columns) + 3) + "|"]
    for arm in gains.arm.unique():
        if (lam := best_lambda(gains, arm, endpoints)) is None:
            why = "not run yet" if waiting(gains, arm, endpoints) else "none keeps what is to be kept"
            lines.append(f"| {title(arm)} | {why} |" + " |" * (len(columns) + 1))
            continue
        found = {name: at_best_lambda(gains, arm, endpoints, name) for name in columns}
        cells = [f"{x.mean:+.4f} ± {x.half:.4f}" for x in map(interval, found.values())]
        lines.append(f"| {title(arm)} | {lam:g} | {len(found[endpoints.first])} | " + " | ".join(cells) + " |")
    return "\n".join(lines).replace("+nan ± nan", "-")


def lambda_table(gains: pandas.DataFrame, endpoints: Endpoints) -> str:
    """Every arm at every lambda, minus lambda0, on test and over all seeds: means ± half the 95 % t interval."""
    columns = [f"test_{name}" for name in dict.fromkeys((*endpoints.margins, "task_accuracy"))]
    lines = ["| arm | lambda | pull | seeds | " + " | ".join(in_words(name[5:]) for name in columns) + " |",
             "|---" * (len(columns) + 4) + "|"]
    for (arm, lam), rows in gains.groupby(["arm", "lam"], sort=False):
        cells = [f"{x.mean:+.4f} ± {x.half:.4f}" for x in (interval(rows[name].dropna()) for name in columns)]
        lines.append(f"| {title(arm)} | {lam:g} | {rows.pull.mean():.3f} | {len(rows)} | " + " | ".join(cells) + " |")
    return "\n".join(lines).replace("+nan ± nan", "-").replace("| nan |", "| - |")


def pull_table(scores: pandas.DataFrame, endpoints: Endpoints) -> str:
    """Every variant of the method minus every other arm at equal pull: means and 95 % t intervals over the seeds."""
    lines = ["| arm | minus | seeds | " + " | ".join(map(in_words, endpoints.margins)) + " |",
             "|---" * (len(endpoints.margins) + 3) + "|"]
    arms = [arm for arm in scores.arm.unique() if arm != "lambda0"]
    for arm, other in [(a, b) for a in METHOD + LABEL_FREE if a in arms for b in arms if a != b]:
        found = [at_equal_pull(scores, arm, other, name) for name in endpoints.margins]
        cells = [f"{x.mean:+.4f} [{x.low:+.4f}, {x.high:+.4f}]" if len(values) > 1 else "-"
                 for values, x in zip(found, map(interval, found))]
        lines.append(f"| {title(arm)} | {title(other)} | {len(found[0])} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def test_table(tests: pandas.DataFrame) -> str:
    """The registered hypotheses with their answers."""
    how = {"best": "at its best lambda", "pull": "at equal pull"}
    lines = ["| arm | minus | how | in | mean | 95 % interval | p | Holm p | seeds | answer |", "|---" * 10 + "|"]
    lines += [f"| {title(row['arm'])} | {title(row['against'])} | {how[row['how']]} | {in_words(row['metric'])} | "
              f"{row['mean']:+.4f} | {row['low']:+.4f} to {row['high']:+.4f} | {row['p']:.4f} | {row['p_holm']:.4f} | "
              f"{row['n']:.0f} | {row['answer']} |" for _, row in tests.iterrows()]
    return "\n".join(lines).replace("+nan to +nan", "-").replace("+nan", "-").replace("nan", "-")


def results(root: Path, columns: list[str]) -> tuple[pandas.DataFrame, dict[str, Any]]:
    """The scores of RESULTS or of step 7's folder, and what they are of: schemas.SCORES.

    Raises InputError if there are none, or those of another study.
    """
    if RESULTS is not None:
        scores, about = read_scores(Path(RESULTS).expanduser(), columns)
        if about["study"] != STUDY:
            raise InputError(f"{RESULTS} holds scores of the study {about['study']}; set STUDY={about['study']}")
        return scores, about
    if not (path := root / "study.json").exists():
        raise InputError(f"{path} is missing; run 07_run_study.py STUDY={STUDY} first")
    made = read_json(path, schemas.STUDY)
    finished, total = done(made["constants"] | {"SETTING": root.parent.name, "SEEDS": made["seeds"]})
    about = {"study": STUDY, "registration": made["registration"], "seeds": made["seeds"], "finished": finished,
             "total": total}
    return read_study(root.parent, tuple(made["seeds"])), about


def main():
    setting = SETTING or ("study_" if RESULTS is None else "published_") + STUDY
    root = experiment_dir("sae_ception") / setting / "study"
    endpoints = Endpoints(*ENDPOINTS[STUDY])
    scores, about = results(root, endpoints.columns)
    endpoints = endpoints._replace(seeds=tuple(about["seeds"]))
    registered = f"registered at commit {about['registration']}" if about["registration"] else "exploratory"
    state = "complete" if about["finished"] == about["total"] else "INCOMPLETE"
    tests = judge(scores, endpoints)
    come = f"{STUDY}: {state}, {about['finished']:,} of {about['total']:,} results, {registered}"
    lines = sentences(scores, tests, endpoints, come)
    gains = against_lambda0(scores)
    words = ", ".join(f"{margin:g} in {in_words(name)}" for name, margin in endpoints.margins.items())
    text = "\n".join([f"# {STUDY}", "", *(f"{i}. {line}" for i, line in enumerate(lines, 1)), "",
                      f"Margins: {words}.", "", test_table(tests), "", "Every arm at its best lambda, minus lambda0:",
                      "", arm_table(gains, endpoints), "", "Exploratory, at equal pull:", "",
                      pull_table(scores, endpoints), "", "Exploratory, every lambda and all seeds, minus lambda0:", "",
                      lambda_table(gains, endpoints), "", "![frontier](frontier.png)", "",
                      "![response to lambda](response.png)", ""])
    metrics = list(dict.fromkeys((*endpoints.margins, *endpoints.kept, *ALWAYS)))
    write_text(root / "verdict.md", text)
    write_scores(root / "scores.csv", scores, metrics, about)
    write_text(root / "gains.csv", gains.to_csv(index=False))
    save(root / "frontier.png", frontier_figure(gains, endpoints.first, f"{STUDY}, {state}"))
    save(root / "response.png", response_figure(gains, list(endpoints.margins), f"{STUDY}, {state}"))
    print(text)
    log.info("%s", root / "verdict.md")


def save(path: Path, figure: Figure) -> None:
    atomic_write(path, lambda part: figure.savefig(part, format="png"))


if __name__ == "__main__":
    run(main)
