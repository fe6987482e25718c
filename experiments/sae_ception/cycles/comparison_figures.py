"""Figures that compare arms: each arm in its own colour, legends beside the panels, words instead of keys."""
import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.pyplot import subplots

from cycles.colours import look, title
from cycles.metrics import MAX_ACCURACY_LOSS, in_words
from lib.plots import style


def frontier_figure(gains: pandas.DataFrame, metric: str, name: str) -> Figure:
    """What each arm gains in a metric, one curve an arm over lambda: against accuracy, and against its pull."""
    style()
    figure, (left, right) = subplots(1, 2, figsize=(13, 5.6), sharey=True)
    for arm in gains.arm.unique():
        rows = gains[gains.arm == arm]
        mean = rows.groupby("lam")[[f"test_{metric}", "test_task_accuracy", "shift"]].mean()
        pull = rows.groupby("lam").pull.mean() if "pull" in rows else mean["shift"] * float("nan")
        kept = {"markersize": 4, "linewidth": 1.2, **look(arm)}
        left.plot(100 * mean["test_task_accuracy"], mean[f"test_{metric}"], label=title(arm), **kept)
        right.plot(pull, mean[f"test_{metric}"], **kept)
    left.axvline(-100 * MAX_ACCURACY_LOSS, color="#9aa0a8", linestyle=":")
    for axis in (left, right):
        axis.axhline(0, color="#30343b", linewidth=0.8)
    _labelled(left, "Gain against accuracy; dotted: half a point lost", "Accuracy minus lambda0's (points)", metric)
    _labelled(right, "Gain against pull", "Auxiliary over task gradient, at the model before", metric)
    right.set_xscale("log")
    right.set_ylabel("")
    figure.suptitle(f"Frontier over lambda ({name}), means over {gains.seed.nunique()} seeds, test")
    figure.legend(loc="outside right center", frameon=False)
    return figure


def _labelled(axis: Axes, text: str, x: str, metric: str) -> None:
    axis.set(title=text, xlabel=x, ylabel=f"{in_words(metric)}, minus lambda0's".replace("; ", ";\n"))
