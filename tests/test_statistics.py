"""Intervals, paired differences and Holm's correction against scipy and closed forms."""
import math

import numpy as np
import pandas
import pytest
from scipy import stats

from lib.statistics import holm, interval, paired


def series(*values):
    return pandas.Series(values, index=range(len(values)), dtype=float)


def test_interval_in_closed_form():
    found = interval([1.0, 3.0])
    assert found.mean == 2 and found.half == pytest.approx(12.706, abs=1e-3)  # Student's t with one degree of freedom
    assert found.low == -found.high + 4 and interval([5.0]).mean == 5 and math.isnan(interval([5.0]).half)
    assert interval([2.0, 2.0]) == (2, 2, 2) and math.isnan(interval([]).mean)


def test_paired_equals_scipy():
    rng = np.random.default_rng(0)
    a, b = series(*rng.normal(1, 1, 9)), series(*rng.normal(0, 1, 9))
    found, expected = paired(a, b), stats.ttest_rel(a, b)
    low, high = expected.confidence_interval()
    assert (found["mean"], found["p"]) == pytest.approx(((a - b).mean(), expected.pvalue))
    assert (found["low"], found["high"]) == pytest.approx((low, high)) and "boot_low" not in found
    assert interval(a.to_numpy())[1:] == pytest.approx(stats.t.interval(0.95, 8, a.mean(), stats.sem(a)))


def test_paired_uses_common_seeds_only():
    a, b = pandas.Series({0: 1.0, 1: 3.0, 2: 9.0}), pandas.Series({1: 1.0, 2: 3.0, 5: 0.0})
    found = paired(a, b)
    assert found["n"] == 2 and found["mean"] == 4 and found["boot_low"] <= 4 <= found["boot_high"]


def test_degenerate_differences():
    assert paired(series(1, 2, 3), series(1, 2, 3))["p"] == 1
    assert paired(series(2, 3, 4), series(1, 2, 3))["p"] == pytest.approx(0.25)  # equal signs: 2 / 2^3
    assert math.isnan(paired(series(1), series(0))["p"]) and paired(series(), series())["n"] == 0


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    adjusted = holm([0.02, float("nan"), 0.03])
    assert adjusted[0] == pytest.approx(0.04) and adjusted[2] == pytest.approx(0.04) and math.isnan(adjusted[1])
