"""How sure a mean is: t intervals of means and of paired differences, and Holm's correction."""
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas
from scipy import stats

BOOTSTRAP_BELOW = 6  # pairs under which a bootstrap interval stands beside the t interval


class Interval(NamedTuple):
    """A mean and its two-sided 95 % t interval; nan where there are too few values: two for bounds, one for a mean."""

    mean: float
    low: float
    high: float

    @property
    def half(self) -> float:
        """Half its width, as in mean ± half."""
        return self.high - self.mean


def interval(values: Sequence[float] | np.ndarray | pandas.Series) -> Interval:
    """The mean of independent values with its interval; nan if one of them is (pandas would leave it out uncounted)."""
    values = np.asarray(values, dtype=float)
    n = len(values)
    mean = float(np.mean(values)) if n else float("nan")
    half = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5) if n > 1 else float("nan")
    return Interval(mean, mean - half, mean + half)


def paired(a: pandas.Series, b: pandas.Series) -> dict[str, float]:
    """The mean difference a - b over the index entries that both have: mean, t interval [low, high], two-sided p, n.

    Below 6 pairs also the percentile bootstrap interval [boot_low, boot_high] of 10,000 draws. p is 1 where the mean is
    0, that of the sign test where all differences are equal, and nan for fewer than two pairs.
    """
    difference = (a - b).dropna().to_numpy()
    n, found = len(difference), interval(difference)
    result = {**found._asdict(), "p": float("nan"), "n": n}
    if n < 2:
        return result
    if found.mean == 0:
        result["p"] = 1.0
    elif np.std(difference, ddof=1) <= 1e-12 * abs(found.mean):  # no spread to test against
        result["p"] = 2.0 ** (1 - n)
    else:
        result["p"] = float(stats.ttest_1samp(difference, 0).pvalue)
    if n < BOOTSTRAP_BELOW:
        means = np.random.default_rng(0).choice(difference, (10_000, n)).mean(1)
        result |= dict(zip(("boot_low", "boot_high"), np.quantile(means, [0.025, 0.975]).tolist()))
    return result


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p values; nan stays nan and does not count as a test."""
    values = np.asarray(p, dtype=float)
    order = np.argsort(values)[: np.count_nonzero(~np.isnan(values))]  # nan sorts last
    steps = values[order] * np.arange(len(order), 0, -1)
    adjusted = np.full(len(values), np.nan)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return adjusted.tolist()
