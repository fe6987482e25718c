"""Figures from histories and tables: numbers in, matplotlib figures out. Reads no file, knows no store."""
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

BLUE, ORANGE, GREEN, GREY, RED = "#3b6ea5", "#d9822b", "#4c9a6a", "#8a8f98", "#b5484b"
# Notebooks would read formulas, which may hold links, between the dollar signs of a text; for the HTML of one.
AS_TEXT = 'class="tex2jax_ignore mathjax_ignore"'
VERDICT_COLOURS = {"PASS": GREEN, "WARN": ORANGE, "FAIL": RED}


def style() -> None:
    """One look for every figure."""
    sns.set_theme(style="whitegrid", context="notebook", font_scale=0.9)
    plt.rcParams.update({"figure.dpi": 110, "axes.titlesize": 11, "axes.titleweight": "bold", "grid.color": "#e6e8eb",
                         "axes.edgecolor": "#9aa0a8"})


def plain(text: str) -> str:
    """A text from data as a label: matplotlib would read a formula between two dollar signs."""
    return text.replace("$", r"\$").replace("\n", "↵")


def _panels(n: int, width: float = 4.6, height: float = 3.3) -> tuple[Figure, list[Any]]:
    figure, axes = plt.subplots(1, n, figsize=(width * n, height), layout="constrained", squeeze=False)
    return figure, list(axes[0])


def _label(axis: Any, title: str, x: str, y: str) -> None:
    axis.set(title=title, xlabel=x, ylabel=y)
    sns.despine(ax=axis)


def training_curves(history: dict[str, Any]) -> Figure:
    """Loss, explained variance, L0 and dead latents, learning rate over training tokens. history:
    training_history.json.
    """
    train, val, sample = history["train"], history["val"], history["train_sample"]
    tokens = np.array(train["tokens"]) / 1e6
    figure, axes = plt.subplots(2, 2, figsize=(10.5, 6.6), layout="constrained")
    figure.set_layout_engine("constrained", hspace=0.08)
    axis = axes[0, 0]
    axis.plot(tokens, train["loss"], color=BLUE)
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("")
    _label(axis, "Training loss", "training tokens (millions)", "loss (whitened units)")
    axis = axes[0, 1]
    axis.plot(np.array(sample["tokens"]) / 1e6, sample["ev"], color=BLUE, label="training texts")
    axis.plot(np.array(val["tokens"]) / 1e6, val["ev"], color=ORANGE, label="held-out texts")
    axis.axvline(val["tokens"][history["best_epoch"] - 1] / 1e6, color=GREY, linestyle=":", label="saved epoch")
    axis.legend()
    _label(axis, "Explained variance, seen and unseen texts", "training tokens (millions)", "EV (1 = perfect)")
    axis = axes[1, 0]
    axis.plot(tokens, train["dead_pct"], color=RED, label="silent for long, in training")
    axis.plot(np.array(val["tokens"]) / 1e6, val["dead_pct"], color=ORANGE, label="never fired on the held-out sample")
    axis.set_ylim(0, max(5.0, 1.1 * max(train["dead_pct"] + val["dead_pct"])))
    axis.legend()
    _label(axis, "Dead latents", "training tokens (millions)", "latents (%)")
    axis = axes[1, 1]
    axis.plot(tokens, train["l0"], color=GREEN, label="L0")
    axis.axhline(history["constants"]["TOP_K"], color=GREY, linestyle=":", label="k")
    axis.set_ylim(0, history["constants"]["TOP_K"] * 1.15)
    axis.legend(loc="lower right")
    _label(axis, "Codes per token", "training tokens (millions)", "L0 (codes per token)")
    return figure


def firing_histogram(frequency: np.ndarray, top_k: int) -> Figure:
    """Histogram of how often each latent fires. frequency: share of tokens per latent, [F]."""
    figure, (axis,) = _panels(1, 7.5, 3.4)
    alive = frequency[frequency > 0]
    axis.hist(np.log10(alive), bins=50, color=BLUE)
    axis.axvline(np.log10(top_k / len(frequency)), color=GREY, linestyle=":", label="k / F, if all fired alike")
    axis.axvline(-1, color=RED, linestyle="--", label="dense: over 10 % of tokens")
    axis.legend()
    dead = int((frequency == 0).sum())
    _label(axis, f"How often latents fire ({dead} of {len(frequency)} never do)",
           "log10 of the share of tokens on which the latent fires", "latents")
    return figure


def ev_profile(by_position: Sequence[tuple], by_norm: Sequence[tuple], overall: float) -> Figure:
    """EV over token position and over activation norm; each item is (lower edge, upper edge, EV, rows)."""
    figure, axes = _panels(2)
    titles = (("EV by place in the text", "position (tokens)"),
              ("EV by size of the activation", "norm of x (raw units)"))
    for axis, bins, (title, name) in zip(axes, (by_position, by_norm), titles):
        middle = [(low + high) / 2 for low, high, _, _ in bins]
        axis.plot(middle, [item[2] for item in bins], "o-", color=BLUE)
        axis.axhline(overall, color=GREY, linestyle=":", label="all held-out tokens")
        axis.legend(loc="lower right")
        _label(axis, title, name, "EV (1 = perfect)")
    return figure


WEIGHT_PANELS = {
    "moved_dictionary": ("Change of dictionary rows since the start", "|row - start|  (0 same, 1.41 unrelated)"),
    "nearest": ("Nearest other dictionary row", "cosine (over 0.95: a duplicate)"),
    "alignment": ("Encoder row against dictionary row", "cosine of the two rows of a latent"),
    "gain": ("What a latent reads of itself", "code read for one unit of code added"),
    "bias": ("How much evidence a latent needs", "pre-activation on the mean token (code units)"),
    "encoder_norm": ("Sensitivity of the encoder", "code per unit of raw activation (row norm)"),
}


def weight_histograms(columns: dict[str, np.ndarray]) -> Figure:
    """Histograms over latents of the columns of checks.weights.inspect_weights that WEIGHT_PANELS names, [F] each."""
    shown = [key for key in WEIGHT_PANELS if key in columns]
    n_rows = -(-len(shown) // 3)
    figure, axes = plt.subplots(n_rows, 3, figsize=(12, 3.2 * n_rows), layout="constrained", squeeze=False)
    figure.set_layout_engine("constrained", hspace=0.08)
    for axis in axes.flat[len(shown) :]:
        axis.axis("off")
    for axis, key in zip(axes.flat, shown):
        axis.hist(columns[key], bins=40, color=BLUE)
        _label(axis, *WEIGHT_PANELS[key], "latents")
    return figure


def bars(values: dict[str, float], title: str, unit: str, highlight: str) -> Figure:
    """One bar a name; `highlight` is the one in blue."""
    figure, (axis,) = _panels(1, 7.0, 0.5 * len(values) + 1.2)
    axis.barh(list(values), list(values.values()), color=[BLUE if name == highlight else GREY for name in values])
    axis.invert_yaxis()
    low = min(0.0, *values.values())
    axis.set_xlim(low - 0.12 * (max(values.values()) - low) * (low < 0), max(values.values()) * 1.14)
    for i, value in enumerate(values.values()):
        axis.text(value, i, f" {value:.3f}", va="center", ha="left" if value >= 0 else "right")
    _label(axis, title, unit, "")
    return figure


def recovery_boxes(rows: Sequence[dict[str, Any]], kinds: dict[str, str], highlight: str = "latent") -> Figure:
    """F1 of the best unit of each kind over concepts: word concepts left, context concepts right, kinds in the order of
    their mean on the left.

    rows: checks.recovery.recover_concepts. kinds: kind -> what it is called.
    """
    parts = [[row for row in rows if row["context"] == context] for context in (False, True)]
    order = sorted((kind for kind in kinds if kind in rows[0]), key=lambda kind: -_mean_f1(parts[0] or rows, kind))
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.42 * len(order) + 1.3), sharey=True, layout="constrained")
    colours = {kinds[kind]: BLUE if kind == highlight else "#c9ced6" for kind in order}
    for axis, part, title in zip(axes, parts, ("Word concepts", "Context concepts")):
        _label(axis, f"{title} ({len(part)})", "F1 on held-out tokens", "")
        axis.set(xlim=(-0.02, 1.02))
        if not part:
            continue
        values = [row[kind]["f1"] for kind in order for row in part]
        names = [kinds[kind] for kind in order for _ in part]
        sns.boxplot(x=values, y=names, hue=names, palette=colours, fliersize=0, width=0.62, linewidth=1, legend=False,
                    ax=axis)
        sns.stripplot(x=values, y=names, color="#30343b", size=2.4, alpha=0.45, jitter=0.2, ax=axis)
        means = [_mean_f1(part, kind) for kind in order]
        axis.plot(means, range(len(order)), "D", color=ORANGE, markersize=6, markeredgecolor="white", label="mean",
                  zorder=5)
    (axes[0] if parts[0] else axes[1]).legend(loc="lower right")
    return figure


def _mean_f1(rows: Sequence[dict[str, Any]], kind: str) -> float:
    return float(np.mean([row[kind]["f1"] for row in rows]))


def recovery_examples(rows: Sequence[dict[str, Any]], kinds: dict[str, str], n: int = 6) -> Figure:
    """F1 of a few kinds of unit for n word and n context concepts, evenly spaced by the F1 of the SAE's latent."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.36 * n + 1.7), layout="constrained")
    styles = {"latent": (BLUE, "o", 9), "frozen_decoder": ("#7c8794", "^", 7), "neuron": (ORANGE, "D", 6),
              "table": (GREEN, "|", 14)}
    for axis, context, title in zip(axes, (False, True), ("Word concepts", "Context concepts")):
        part = sorted((row for row in rows if row["context"] == context), key=lambda row: row["latent"]["f1"])
        shown = [part[i] for i in np.linspace(0, len(part) - 1, min(n, len(part))).round().astype(int)]
        for kind in (kind for kind in styles if part and kind in part[0]):
            colour, marker, size = styles[kind]
            scores = [row[kind]["f1"] for row in shown]
            axis.plot(scores, range(len(shown)), marker, color=colour, markersize=size,
                      markeredgewidth=2.5 if marker == "|" else 0.5, label=kinds[kind])
        axis.set_yticks(range(len(shown)), [plain(row["concept"]) for row in shown])
        axis.set(xlim=(-0.02, 1.05), ylim=(-0.6, len(shown) - 0.4))
        _label(axis, f"{title}: {len(shown)} of {len(part)}", "F1 on held-out tokens", "")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4)
    return figure


def verdict_strip(checks: Sequence[dict[str, Any]]) -> Figure:
    """The verification at a glance: one coloured cell a check, what is evidence first, sanity checks behind a gap."""
    figure, (axis,) = _panels(1, 12.0, 1.75)
    parts = [[row for row in checks if row["kind"] == kind] for kind in ("evidence", "sanity")]
    at = 0.0
    for part, title in zip(parts, ("evidence", "sanity")):
        axis.text(at, 1.08, title, ha="left", va="bottom", fontsize=8, color=GREY)
        for row in part:
            axis.add_patch(plt.Rectangle((at, 0), 0.92, 1, color=VERDICT_COLOURS[row["verdict"]]))
            value = "-" if row["value"] is None else f"{row['value']:.2f}"
            axis.text(at + 0.46, 0.5, f"{row['verdict']}\n{value}", ha="center", va="center", color="white", fontsize=8,
                      fontweight="bold")
            axis.text(at + 0.46, -0.12, row["check"], ha="right", va="top", rotation=30, fontsize=8)
            at += 1
        at += 0.5
    axis.set(xlim=(0, at), ylim=(-0.1, 1.3), title="Verification")
    axis.axis("off")
    return figure


def layers(table: list[dict[str, Any]], recommended: str) -> Figure:
    """Size, spread, effective dimensions and, with labels, probe accuracy over depth. table:
    checks.layers.probe_layers.
    """
    shown = {
        "median_norm": ("Size of activations", "median norm"),
        "gamma": ("Mean over spread", "gamma"),
        "participation": ("Effective dimensions", "dimensions"),
        "probe_accuracy": ("Linear probe on the labels", "held-out accuracy"),
    }
    shown = {name: text for name, text in shown.items() if name in table[0]}
    figure, axes = _panels(len(shown), width=3.6)
    at = [row["signature"] for row in table].index(recommended)
    for axis, (name, (title, unit)) in zip(axes, shown.items()):
        axis.plot([row[name] for row in table], marker="o", color=BLUE)
        axis.axvline(at, color=ORANGE, linestyle=":", label="recommended")
        if name == "probe_accuracy":
            axis.axhline(table[0]["majority"], color=GREY, linestyle="--", label="most frequent class")
            axis.legend()
        axis.set_ylim(bottom=0)
        axis.xaxis.get_major_locator().set_params(integer=True)
        _label(axis, title, "hook point, in order of depth", unit)
    return figure
