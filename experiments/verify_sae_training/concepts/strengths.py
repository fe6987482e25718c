"""How strongly to steer: the strength that shows most of a concept in texts that still read well.

    best, trials = find_strength(measure, "add", limit=1.5)      # measure: of concepts/steered_texts.py

Choose on some seeds and report on others: the best of many noisy numbers looks better than it is.
"""
from typing import Any

from concepts.steered_texts import Measure

COARSE = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4)  # distances from no change that are tried first, up to the first too costly
BISECTIONS = 4  # between the last that reads well and the first that does not
START = {"add": (0.0, 1.0), "clamp": (0.0, 1.0), "scale": (1.0, 4.0)}  # mode -> strength at distance 0, and of one
MAX_REPEATED = 0.1  # rise of the repeated share: the perplexity of a text that goes in circles is low


def reads_well(row: dict[str, Any], unsteered: dict[str, Any], limit: float) -> bool:
    """Whether texts cost at most `limit` times the unsteered ones' perplexity and repeat little more than these."""
    cost = row["cost"]["mean"]
    return cost is not None and cost <= limit and row["repeated"] <= unsteered["repeated"] + MAX_REPEATED


def find_strength(
    measure: Measure, mode: str, limit: float
) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """The trial with the largest rise of the concept among those that read well (None: none does), and all of them.

    Doubles the distance from no change until the texts no longer read well, halves the interval in between BISECTIONS
    times, then tries halfway to both neighbours of the best: at most 12 trials. The first row is the unsteered texts.
    """
    origin, unit = START[mode]
    unsteered = measure(None)
    trials: dict[float, dict[str, Any]] = {}

    def fits(distance: float) -> bool:
        if distance not in trials:
            trials[distance] = measure(origin + unit * distance)
        return reads_well(trials[distance], unsteered, limit)

    def best() -> float | None:
        fluent = [distance for distance in sorted(trials) if fits(distance)]
        return max(fluent, key=lambda distance: trials[distance]["concept_rise"]["mean"], default=None)

    high = next((distance for distance in COARSE if not fits(distance)), None)
    if high is not None:
        low = max((distance for distance in trials if distance < high), default=0.0)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            low, high = (middle, high) if fits(middle) else (low, middle)
    if (found := best()) is not None:
        tried = [0.0, *sorted(trials)]
        at = tried.index(found)
        for neighbour in tried[at - 1 : at + 2 : 2]:
            fits((found + neighbour) / 2)
        found = best()
    rows = [unsteered, *(trials[distance] for distance in sorted(trials))]
    return (None if found is None else trials[found]), rows
