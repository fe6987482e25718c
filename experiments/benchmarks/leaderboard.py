"""The runs of SynthSAEBench compared with one another and with what was published: tables and learning curves."""
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lib.constants import constants_of
from lib.plots import GREY
from lib.statistics import interval

Report = dict[str, Any]
NOT_OF_A_GROUP = {"SEED", "MINUTES", "THREADS", "AT_L0", "PRUNE_FROM", "CONDITION_FROM", "N_SCORED",
                  "N_CURVE"}
WORDS = {"START_K": "k from {}", "LR": "rate {:g}", "N_LATENTS": "{:,} latents", "TOP_K": "k {}",
         "WHITEN": "whitening {:g}", "BATCH_SIZE": "batch {:,}"}
PROTOCOL_L0 = (15, 45)
SHOWN = ("f1", "mcc", "ev")

ON_A_GPU, UNKNOWN = {"minutes": "15 to 20", "machine": "H100"}, {"minutes": "", "machine": ""}  # as SAELens says


class Published(NamedTuple):
    """A published score at width 4,096 after 200 million samples; some are read off a plot, within .01."""

    name: str
    l0: float
    f1: float
    mcc: float | None
    source: str


PAPER, RECIPE = "arXiv 2602.14687", "chanind/claude-auto-research-synthsaebench"
PUBLISHED = tuple(Published(*row) for row in (
    ("standard (L1)", 25, 0.556, 0.604, PAPER),
    ("Matching Pursuit", 25, 0.45, 0.69, PAPER),
    ("JumpReLU", 25, 0.61, 0.73, PAPER),
    ("JumpReLU", 15, 0.715, 0.685, PAPER),
    ("BatchTopK", 25, 0.73, 0.757, PAPER),
    ("BatchTopK", 20, 0.82, 0.752, PAPER),
    ("Matryoshka", 25, 0.88, 0.793, PAPER),
    ("LISTA-Matryoshka", 25, 0.977, 0.818, RECIPE),
    ("LISTA-Matryoshka, leave-one-out pruning", 25, 0.989, None, "a comment on it"),
))


class Group(NamedTuple):
    """Runs that differ in their seed alone."""

    what: str
    command: str
    reports: list[Report]

    @property
    def curve(self) -> dict[int, list[dict[str, Any]]]:
        """samples -> the seeds' points, where every seed has one."""
        found = defaultdict(list)
        for report in self.reports:
            for point in report["points"]:
                found[point["samples"]].append(point)
        return {samples: points for samples, points in sorted(found.items()) if len(points) == len(self.reports)}


def groups_of(reports: Iterable[Report]) -> list[Group]:
    """The runs by what they have in common, and what that is beside the defaults of their script."""
    found = defaultdict(list)
    for report in reports:
        changed = {name: value for name, value in report["constants"].items() if name not in NOT_OF_A_GROUP}
        # A kind that has changed between two seeds has made two recipes of the same constants.
        shared = sorted(changed.items()), sorted(report.get("kind_numbers", {}).items())
        found[report["script"], repr(shared)].append(report)
    groups = []
    for (script, _), same in found.items():
        same = [report for report in same if is_finished(report)] or same  # one that has just begun hides no other
        defaults = constants_of(Path(__file__).with_name(script))["CONSTANTS"]
        changed = {name: value for name, value in same[0]["constants"].items()
                   if name not in NOT_OF_A_GROUP and name in defaults and value != _as_json(defaults[name])}
        seeds = sorted(report["constants"]["SEED"] for report in same)
        seed = f"SEED={seeds[0]}" if len(seeds) == 1 else f"SEED={seeds[0]} ... {seeds[-1]}"
        given = [f"{name}={value}" for name, value in changed.items()]
        groups.append(Group(_words(same[0], changed), " ".join([script, *given, seed]), same))
    return groups


def is_finished(report: Report) -> bool:
    """Whether a run has a point after its last sample; SAELens' run by the clock, and every point may be their last."""
    samples = report["points"][-1]["samples"] if report["points"] else 0
    constants = report["constants"]
    return report["script"].startswith("06") or samples + constants["BATCH_SIZE"] > constants["N_SAMPLES"]


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _words(report: Report, changed: dict[str, Any]) -> str:
    """What was trained, and what is not the default of its script."""
    constants = report["constants"]
    parts = [("SAELens' " if report["script"].startswith("06") else "") + constants["KIND"]]
    if constants.get("START_K", 0) > constants["TOP_K"]:
        parts.append(f"k {constants['START_K']} to {constants['TOP_K']}")
    parts += [WORDS.get(name, name.lower() + " {}").format(value) for name, value in changed.items()
              if name not in ("KIND", "N_SAMPLES", "START_K", "SCALED")]
    parts.append("children scaled" if constants["SCALED"] else "children not scaled")
    return ", ".join([*parts, *([] if "MINUTES" in constants else [f"{constants['N_SAMPLES'] / 1e6:.3g}M samples"])])


def value_of(point: dict[str, Any], rule: str, name: str) -> float:
    """A score of a point; MCC does not depend on the rule."""
    return point["mcc"] if name == "mcc" else point["scores"][rule][name]


def rows_of(group: Group, rules: Iterable[str]) -> list[dict[str, Any]]:
    """A row for each rule within the protocol's L0, after the most samples that all seeds have reached.

    Codes that fire nearly always have a high F1 with the most frequent features: an untrained SAE may reach .2.
    """
    if not (curve := group.curve):
        return []
    samples, points = list(curve.items())[-1]
    wanted = group.reports[0]["constants"].get("N_SAMPLES", 0)
    of_all = "" if all(map(is_finished, group.reports)) else f" of {wanted / 1e6:.3g}M"
    rows = []
    for rule in rules:
        if any(rule not in point["scores"] for point in points):
            continue
        if not PROTOCOL_L0[0] - 0.5 <= _mean(points, rule, "l0") <= PROTOCOL_L0[1] + 0.5:
            continue
        scores = {name: _with_interval([value_of(point, rule, name) for point in points]) for name in SHOWN}
        rows.append({
            "date": max(each["date"] for each in group.reports),
            "commit": ", ".join(sorted({commit for each in group.reports for commit in each["commits"]})),
            "what": group.what, "codes": rule, "L0": f"{_mean(points, rule, 'l0'):.1f}",
            "F1": scores["f1"], "MCC": scores["mcc"], "EV": scores["ev"], "seeds": len(points),
            "samples": f"{samples / 1e6:.3g}M{of_all}",
            "minutes": f"{sum(point['seconds'] for point in points) / len(points) / 60:.0f}",
            "machine": ", ".join(sorted({each["machine"] for each in group.reports})), "command": f"`{group.command}`",
            "order": _mean(points, rule, "f1")})
    return rows


def _mean(points: list[dict[str, Any]], rule: str, name: str) -> float:
    return sum(value_of(point, rule, name) for point in points) / len(points)


def _with_interval(values: list[float]) -> str:
    """The mean, with half its 95 % t interval where there are several seeds."""
    found = interval(values)
    return _number(found.mean) + (f" ± {_number(found.half)}" if len(values) > 1 else "")


def _number(value: float) -> str:
    return f"{value:.3f}".replace("0.", ".", 1)


def table(groups: list[Group], rules: Iterable[str]) -> pandas.DataFrame:
    """All runs and the published ones, by falling F1."""
    rows = [row for group in groups for row in rows_of(group, rules)]
    rows += [{"date": "published", "commit": "", "what": f"{p.name} ({p.source})", "codes": "", "L0": f"{p.l0:g}",
              "F1": _number(p.f1), "MCC": "" if p.mcc is None else _number(p.mcc), "EV": "", "seeds": "",
              "samples": "200M", **(ON_A_GPU if p.source == PAPER else UNKNOWN), "command": "", "order": p.f1}
             for p in PUBLISHED]
    return pandas.DataFrame(sorted(rows, key=lambda row: -row["order"])).drop(columns="order")


def reached(groups: list[Group], rule: str, l0: float) -> pandas.DataFrame:
    """For each published row at that L0 the runs that pass both its scores, on the seeds' mean, and from where on."""
    rows = []
    for goal in (p for p in PUBLISHED if p.l0 == l0 and p.mcc is not None):
        for group in groups:
            passed = [(samples, points) for samples, points in group.curve.items()
                      if all(rule in point["scores"] for point in points)
                      and _mean(points, rule, "f1") >= goal.f1 and _mean(points, rule, "mcc") >= (goal.mcc or 0)]
            if passed:
                samples, points = passed[0]
                minutes = sum(point["seconds"] for point in points) / len(points) / 60
                rows.append({"published": f"{goal.name}: F1 {_number(goal.f1)}, MCC {_number(goal.mcc or 0)}",
                             "passed by": group.what, "after": f"{samples / 1e6:.3g}M samples",
                             "minutes": f"{minutes:.0f}"})
    return pandas.DataFrame(rows, columns=["published", "passed by", "after", "minutes"])


def markdown(found: pandas.DataFrame) -> str:
    """The table as README shows it."""
    lines = [list(found.columns), ["---"] * len(found.columns), *found.astype(str).values.tolist()]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def draw(groups: list[Group], rule: str, l0: float, figure: Figure) -> None:
    """F1 and MCC over samples, thin lines for seeds and a thick one for their mean, and the published scores."""
    axes = figure.subplots(1, 2)
    for axis, name in zip(axes, ("f1", "mcc")):
        for number, group in enumerate(groups):
            curves = {samples: [value_of(point, rule, name) for point in points]
                      for samples, points in group.curve.items() if all(rule in point["scores"] for point in points)}
            colour = f"C{number}"
            axis.plot(list(curves), [sum(values) / len(values) for values in curves.values()], "o-", markersize=4,
                      color=colour, label=f"{group.what} ({len(group.reports)})")
            if len(group.reports) > 1:
                axis.plot(list(curves), list(curves.values()), linewidth=0.6, alpha=0.5, color=colour)
        _published(axis, name, l0)
        title = f"F1 at L0 {l0:g}" if name == "f1" else "MCC"
        axis.set(title=title, xlabel="training samples", ylabel=title, xscale="log")
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside lower center", ncols=2)
    figure.suptitle(f"SynthSAEBench-16k; dashed: published after 200 million samples; ours by the rule {rule}")


def _published(axis: Axes, name: str, l0: float) -> None:
    """A dashed line for each published score, with its name beside it; names keep a line's height from one another."""
    goals = sorted((value, p.name) for p in PUBLISHED if p.l0 == l0 and (value := getattr(p, name)) is not None)
    for value, _ in goals:
        axis.axhline(value, color=GREY, linewidth=0.8, linestyle="--", zorder=0)
    low, high = axis.get_ylim()
    at = low
    for value, label in goals:
        at = max(value, at + 0.035 * (high - low))
        axis.annotate(label, (1.01, at), xycoords=("axes fraction", "data"), fontsize=7, color="#555",
                      verticalalignment="center", annotation_clip=False)
