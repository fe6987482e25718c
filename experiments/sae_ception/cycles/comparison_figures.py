"""Figures that compare arms: each arm in its own colour, legends beside the panels, words instead of keys."""
import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.pyplot import subplots

from cycles.colours import look, title
from cycles.frontier import whole
from cycles.metrics import MAX_ACCURACY_LOSS, in_words
from lib.plots import style
from lib.statistics import interval

LOWEST = -3  # points of accuracy; arms that lose more leave the panel


def frontier_figure(gains: pandas.DataFrame, metric: str, name: str) -> Figure:
    """What each arm gains in a metric, one curve an arm over lambda: against accuracy, and against its pull.

    Left out here and in the response: an arm at a lambda that fewer seeds have than others.
    """
    style()
    gains = whole(gains)
    figure, (left, right) = subplots(1, 2, figsize=(13, 5.6), sharey=True)
    for arm in gains.arm.unique():
        rows = gains[gains.arm == arm]
        mean = rows.groupby("lam")[[f"test_{metric}", "test_task_accuracy", "shift"]].mean()
        pull = rows.groupby("lam").pull.mean() if "pull" in rows else mean["shift"] * float("nan")
        kept = {"markersize": 4, "linewidth": 1.2, **look(arm)}
        left.plot(100 * mean["test_task_accuracy"], mean[f"test_{metric}"], label=title(arm), **kept)
        right.plot(pull, mean[f"test_{metric}"], **kept)
    left.axvline(-100 * MAX_ACCURACY_LOSS, color="#9aa0a8", linestyle=":")
    left.set_xlim(left=max(left.get_xlim()[0], LOWEST))
    for axis in (left, right):
        axis.axhline(0, color="#30343b", linewidth=0.8)
    _labelled(left, f"Gain against accuracy, from {LOWEST} points; dotted: half a point lost",
              "Accuracy minus lambda0's (points)", metric)
    _labelled(right, "Gain against pull", "Auxiliary over task gradient, at the model before", metric)
    right.set_xscale("log")
    right.set_ylabel("")
    figure.suptitle(f"Frontier over lambda ({name}), means over {n_seeds(gains)} seeds, test")
    figure.legend(loc="outside right center", frameon=False)
    return figure


def n_seeds(gains: pandas.DataFrame) -> int:
    """How many seeds each arm has at each lambda, of whole() gains."""
    return int(gains.groupby(["arm", "lam"]).size().max())


def _labelled(axis: Axes, text: str, x: str, metric: str) -> None:
    axis.set(title=text, xlabel=x, ylabel=f"{in_words(metric)}, minus lambda0's".replace("; ", ";\n"))


def response_figure(gains: pandas.DataFrame, metrics: list[str], name: str) -> Figure:
    """What each arm gains in each metric over its lambda: means over seeds with 95 % t intervals, a panel a metric."""
    style()
    gains = whole(gains)
    figure, axes = subplots(1, len(metrics), figsize=(4.4 * len(metrics) + 2.4, 5.2), squeeze=False)
    for axis, metric in zip(axes.flat, metrics):
        for arm in gains.arm.unique():
            by_lambda = gains[gains.arm == arm].groupby("lam")[f"test_{metric}"]
            found = [interval(values.dropna()) for _, values in by_lambda]
            axis.errorbar(list(by_lambda.groups), [x.mean for x in found], [max(0.0, x.half) for x in found],
                          label=title(arm), markersize=4, linewidth=1.2, elinewidth=0.8, **look(arm))
        axis.axhline(0, color="#30343b", linewidth=0.8)
        axis.set(title=in_words(metric).replace("; ", ";\n"), xlabel="lambda", ylabel="", xscale="log")
    axes.flat[0].set_ylabel("minus lambda0's, test")
    figure.suptitle(f"Response to lambda ({name}); {n_seeds(gains)} seeds, bars: 95 % t intervals")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure
