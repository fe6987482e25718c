"""What an arm's SAEs are worth, and how sure the differences to plain TopK are.

    found = baselines(saes, run, hook, truth, n_rows=60_000)   # what finds the concepts without training
    scores = Judge(run, hook, ...).scores(sae)          # of one SAE
    table = compare(results)                            # of all arms, paired by seed, with Holm's correction
"""
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import mean
from typing import Any

import numpy as np
import pandas
import torch

from checks.arms import REFERENCE
from checks.matching import MATCHED_AT_MOST, matched_cosine
from checks.recovery import KINDS, Searched, recover_concepts
from concepts.codes import encode_run
from concepts.names import name_latents
from concepts.patterns import Patterns
from lib.batches import rows_of_run, sample_rows
from lib.ground_truth import Truth
from lib.metrics.units import best_latents
from lib.sae import SAE
from lib.statistics import holm, interval, paired
from lib.store import Run
from lib.training.loop import score

MEASURES = {
    "ev": "EV", "loss": "loss recovered", "concepts": "concepts, F1", "context": "context concepts, F1",
    "names": "names, balanced accuracy", "names_f1": "names, F1", "coherence": "names, coherence",
    "stability": "PW-MCC over seeds", "dead": "dead, %",
}


@dataclass
class Judge:
    """What scores an SAE on the held-out texts of a run."""

    run: Run
    hook: str
    recovered: Callable[[SAE], float] | None
    """The share of the language-model loss that an SAE recovers; None: not measured."""
    parts: list[Searched]
    """The ground truth; none for a data set without."""
    context: set[str]
    """Those of its concepts that the token table does not find."""
    patterns: Patterns | None
    """Of the texts, to name latents by; None: no names."""
    n_names: int
    """Living latents to name, drawn at random."""

    def scores(self, sae: SAE) -> dict[str, float]:
        """The measures of one SAE by their names in MEASURES, those that there are, and its l0."""
        found = score(sae, sample_rows(rows_of_run(self.run, self.hook), validation=True, limit=None))
        scores = {"l0": found["l0_mean"], "ev": found["ev"], "dead": found["dead_pct"]}
        if self.recovered and not math.isnan(recovered := self.recovered(sae)):
            scores["loss"] = recovered
        if self.parts:
            f1 = [(concept.name, best["f1"]) for part in self.parts for concept, best in zip(
                part.concepts, best_latents(sae.encode(part.x), sae.n_latents, part.labels, part.is_val))]
            scores["concepts"] = mean(value for _, value in f1)
            if of_context := [value for name, value in f1 if name in self.context]:
                scores["context"] = mean(of_context)
        return scores | (self._names(sae, self.patterns) if self.patterns else {})

    def _names(self, sae: SAE, patterns: Patterns) -> dict[str, float]:
        codes = encode_run(self.run, self.hook, sae)
        fires = torch.zeros(sae.n_latents, dtype=torch.int64)
        for _, values, latents in codes:
            fires += torch.bincount(latents[values > 0], minlength=sae.n_latents)
        order = torch.randperm(sae.n_latents, generator=torch.Generator().manual_seed(0))
        chosen = [i for i in order.tolist() if fires[i] > 0][: self.n_names]
        named = name_latents(codes, patterns, self.run.is_val, chosen, W_dec=sae.W_dec).values()
        scored = [entry for entry in named if entry["score"] is not None]
        columns = {"names": "score", "names_f1": "f1", "coherence": "coherence"}
        return {name: mean(entry[column] for entry in scored) for name, column in columns.items() if scored}


def baselines(saes: dict[str, SAE], run: Run, hook: str, truth: Truth, *, n_rows: int) -> dict[str, Any]:
    """Mean F1 over the concepts of each kind of unit of checks.recovery ("all", and "context": those that the token
    table does not find; None if there are none), and the names of those of context.

    saes: as recover_concepts takes them. n_rows: rows to search.
    """
    principal = torch.linalg.eigh(rows_of_run(run, hook).covariance).eigenvectors
    rows = recover_concepts(saes, run, hook, truth, principal=principal, n_rows=n_rows)
    of_context = [row for row in rows if row["context"]]
    f1 = {kind: {name: float(np.mean([row[kind]["f1"] for row in part])) if part else None
                 for name, part in (("all", rows), ("context", of_context))}
          for kind in KINDS if rows and kind in rows[0]}
    return {"f1": f1, "context": [row["concept"] for row in of_context]}


def stabilities(saes: Sequence[SAE]) -> list[float]:
    """How alike the dictionaries of one arm's seeds are (PW-MCC, checks.matching), as one value a seed.

    The values are the jackknife's pseudo-values of the mean over pairs (Arvesen 1969): their mean is that of all pairs,
    and their spread tells its error, which the spread of each seed's own mean would tell two times too small or worse,
    because each pair is in two of them. nan for fewer than three seeds, or too many latents to match one to one.
    """
    n = len(saes)
    if n < 3 or max(sae.n_latents for sae in saes) > MATCHED_AT_MOST:
        return [float("nan")] * n
    alike = np.zeros((n, n))
    for i, j in combinations(range(n), 2):
        alike[i, j] = alike[j, i] = matched_cosine(saes[i].W_dec, saes[j].W_dec)
    of_seed, of_all = alike.sum(1) / (n - 1), alike.sum() / (n * (n - 1))
    return [float(value) for value in (2 * (n - 1) * of_seed - n * of_all) / (n - 2)]


def compare(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each arm and measure: its mean over seeds with a 95 % t interval and, but for REFERENCE, the
    difference to it over the seeds that both have, with its t interval, p and p_holm.

    results: dicts with arm, seed and measures. Holm's correction counts all differences of the table.
    """
    frame = pandas.DataFrame(results).set_index("seed")
    rows: list[dict[str, Any]] = []
    for measure in (name for name in MEASURES if name in frame):
        values = {arm: part[measure].dropna() for arm, part in frame.groupby("arm", sort=False)}
        for arm, of_arm in values.items():
            level = interval(of_arm)
            row = {"arm": arm, "measure": measure, "n": len(of_arm), "mean": level.mean, "low": level.low,
                   "high": level.high}
            if arm != REFERENCE and REFERENCE in values:
                by_seed = paired(of_arm, values[REFERENCE])
                row["minus_topk"] = {name: by_seed[name] for name in ("mean", "low", "high", "p", "n")}
            rows.append(row)
    tests = [row["minus_topk"] for row in rows if "minus_topk" in row]
    for test, p in zip(tests, holm([test["p"] for test in tests])):
        test["p_holm"] = p
    return rows
