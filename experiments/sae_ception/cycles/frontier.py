"""What a study found: scores over lambda, compared with lambda0's, at equal accuracy and at equal pull.

    scores = read_study(setting_root(c))                      # one row an arm, lambda and seed
    gains = against_lambda0(scores)                           # the same, minus lambda0 of the seed
    best = at_best_lambda(gains, "per_class", endpoints, "base_u")    # one number a seed
    gap = at_equal_pull(scores, "per_example", "random_latents", "base_u")

Scores are means over SAE seeds: "test_..." and "val_..." are those of the splits, "pull" and "shift" say how hard an
arm was pulled and how far it moved (cycles/study.py).
"""
import json
import math
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas

from cycles import schemas
from cycles.comparison import is_measured
from cycles.study import variant
from lib.environment import InputError, first_line
from lib.files import parse_json, read_bytes, read_json, write_text
from lib.schemas import Misfit, check

KEYS = ["arm", "lam", "seed"]


class Endpoints(NamedTuple):
    """What a study looks at."""

    margins: dict[str, float]
    """Metric -> the difference that is no effect worth having. The first one is the first endpoint."""
    kept: dict[str, float]
    """Metric -> what an arm's lambda may cost of it on validation."""
    seeds: tuple[int, ...] = ()
    """Of the study, finished or not; (): those that there are."""

    @property
    def first(self) -> str:
        """The endpoint by which an arm's lambda is chosen."""
        return next(iter(self.margins))

    @property
    def columns(self) -> list[str]:
        """Of the scores, those that a verdict needs."""
        needed = {f"test_{name}" for name in (*self.margins, *self.kept)}
        return sorted(needed | {f"val_{name}" for name in (self.first, *self.kept)})


def read_study(root: Path, seeds: tuple[int, ...] | None = None) -> pandas.DataFrame:
    """The results below root/study, of these seeds (None: all): KEYS and the scores, one row a result.

    Raises InputError if there is no lambda0 among them.
    """
    rows = []
    for path in sorted((root / "study").glob("seed_*/*.json")):
        found = read_json(path, schemas.STUDIED)
        if seeds is not None and found["seed"] not in seeds:
            continue
        arm, lam = variant(found["arm"])
        mean = pandas.DataFrame([{f"{split}_{name}": value for split in ("val", "test")
                                  for name, value in sae[split].items() if is_measured(name, sae[split])}
                                 for sae in found["saes"]]).mean()
        rows.append({"arm": arm, "lam": lam, "seed": found["seed"], **found["aux"], **mean})
    if not any(row["arm"] == "lambda0" for row in rows):
        raise InputError(f"{root / 'study'} holds no result of lambda0 yet; run 07_run_study.py first")
    return pandas.DataFrame(rows).sort_values(KEYS, ignore_index=True)


def write_scores(path: Path, scores: pandas.DataFrame, metrics: Sequence[str], about: dict[str, Any]) -> None:
    """Scores in these metrics as a CSV of six digits below a line that says what they are of: read_scores() reads it.
    """
    names = [*KEYS, "pull", "shift", *(f"{split}_{name}" for split in ("val", "test") for name in metrics)]
    table = scores[[name for name in names if name in scores]].to_csv(index=False, float_format="%.6g")
    write_text(path, f"# {json.dumps(about)}\n{table}")


def read_scores(path: Path, columns: Sequence[str]) -> tuple[pandas.DataFrame, dict[str, Any]]:
    """What write_scores wrote: scores, as read_study has them, and `about`.

    Raises InputError for any other file, and where one of the columns is missing.
    """
    schema = schemas.SCORES
    about, _, table = read_bytes(path, schema.limit, schema.remedy).partition(b"\n")
    found = parse_json(about.removeprefix(b"# "), path, schema.remedy)
    try:
        check(found, schema.content)
        scores = pandas.read_csv(BytesIO(table), dtype={"arm": str, "seed": int})
        if missing := {*KEYS, "pull", "shift", *columns} - set(scores):
            raise ValueError(f"it has no column {min(missing)}")
        scores = scores.astype({name: float for name in scores if name not in ("arm", "seed")})
    except (Misfit, ValueError) as error:  # ValueError: also of pandas, for what is no number
        raise InputError(f"{path} is damaged ({first_line(error)}); {schema.remedy}") from None
    return scores, found


def against_lambda0(scores: pandas.DataFrame) -> pandas.DataFrame:
    """The scores minus those of lambda0 of the same seed; pull and shift stay. Seeds without lambda0 are left out."""
    names = [name for name in scores if name.startswith(("val_", "test_"))]
    unpulled = scores[scores.arm == "lambda0"].set_index("seed")[names]
    rows = scores[(scores.arm != "lambda0") & scores.seed.isin(unpulled.index)].reset_index(drop=True)
    rows[names] = rows[names].to_numpy() - unpulled.loc[rows.seed].to_numpy()
    return rows


def whole(gains: pandas.DataFrame) -> pandas.DataFrame:
    """The arms at those lambdas that have as many seeds as any: means over fewer would be means over other seeds."""
    n = gains.groupby(["arm", "lam"]).seed.transform("size")
    return gains[n == n.max()]


def waiting(gains: pandas.DataFrame, arm: str, endpoints: Endpoints) -> bool:
    """Whether a seed that has its say in the arm's lambda has no result of it yet."""
    return not set(_first_third(endpoints.seeds)) <= set(gains[gains.arm == arm].seed)


def choosers(gains: pandas.DataFrame, endpoints: Endpoints) -> list[int]:
    """The seeds that choose lambdas, and are not scored at them: the first third of the study's, at least one. Of an
    unfinished study those that there are: who is to be scored does not choose meanwhile.

    A model's U is nearly the same on validation and on test, so the luck of its training would be chosen and scored at
    once: with 30 seeds and five lambdas without effect, p < .05 upwards would come up three times too often.
    """
    there = sorted(gains.seed.unique())
    return [seed for seed in _first_third(endpoints.seeds or there) if seed in there]


def _first_third(seeds: Sequence[int]) -> Sequence[int]:
    return seeds[: max(1, len(seeds) // 3)]


def best_lambda(gains: pandas.DataFrame, arm: str, endpoints: Endpoints) -> float | None:
    """The arm's lambda with the largest mean gain in the first endpoint on validation, among those that on average keep
    there what is to be kept, with a result of every seed that chooses; None if none does.

    The seeds of choosers() alone decide, one lambda for all others; test scores play no part. Every arm gets the same
    chance, whatever its scale of lambda is.
    """
    names = list(dict.fromkeys(f"val_{name}" for name in (endpoints.first, *endpoints.kept)))
    choosing = choosers(gains, endpoints)
    by_lambda = gains[(gains.arm == arm) & gains.seed.isin(choosing)].groupby("lam")
    # A network that died has no SAE and no result, and another may have no unit to score: the others must not stand for
    # all.
    mean = by_lambda[names].mean()[by_lambda[names].count().min(axis=1) == len(choosing)]
    for name, loss in endpoints.kept.items():
        mean = mean[mean[f"val_{name}"] >= -loss]
    return float(mean[names[0]].idxmax()) if len(mean) else None


def at_best_lambda(gains: pandas.DataFrame, arm: str, endpoints: Endpoints, metric: str) -> pandas.Series:
    """Test gain over lambda0 in a metric at the arm's best_lambda(), of each seed that did not choose it; empty if the
    arm has none.
    """
    lam = best_lambda(gains, arm, endpoints)
    scored = (gains.arm == arm) & (gains.lam == lam) & ~gains.seed.isin(choosers(gains, endpoints))
    rows = gains[scored] if lam is not None else gains[:0]
    return rows.set_index("seed")[f"test_{metric}"].dropna()


def at_equal_pull(
    scores: pandas.DataFrame, arm: str, other: str, metric: str, *, along: str = "pull"
) -> pandas.Series:
    """Each seed's test score of `arm` minus that of `other` at equal pull.

    Both are curves over the logarithm of the pull (or of `along`), straight between the lambdas of the grid. The
    result is their mean distance over the range that both cover; a seed in which they share none is left out.
    """
    found = {}
    for seed, rows in scores.groupby("seed"):
        curves = [_curve(rows[rows.arm == name], along, f"test_{metric}") for name in (arm, other)]
        if all(len(x) > 1 for x, _ in curves):
            found[seed] = mean_distance(*curves)
    return pandas.Series(found, dtype=float).dropna()


def _curve(rows: pandas.DataFrame, along: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    rows = rows[rows[along] > 0].sort_values(along) if along in rows else rows[:0]
    return np.log(rows[along].to_numpy(float)) if len(rows) else np.empty(0), rows[name].to_numpy(float)


def mean_distance(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> float:
    """Mean of a - b over the x that both curves cover; each is (x ascending, y), straight between its points.

    nan where they cover no range together.
    """
    low, high = max(a[0][0], b[0][0]), min(a[0][-1], b[0][-1])
    if low >= high:
        return math.nan
    x = np.union1d(np.clip(np.concatenate([a[0], b[0]]), low, high), [low, high])
    gap = np.interp(x, *a) - np.interp(x, *b)
    return float(((gap[1:] + gap[:-1]) / 2 * np.diff(x)).sum() / (high - low))
