"""The figures of step 0 and of notebook 03: numbers in, matplotlib figures out."""
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from lib.plots import BLUE, GREEN, GREY, ORANGE, RED, plain

VERDICT_COLOURS = {"PASS": GREEN, "WARN": ORANGE, "FAIL": RED}
WEIGHT_PANELS = {  # column of checks.weights.inspect_weights: title and unit
    "moved_dictionary": ("Change of dictionary rows since the start", "|row - start|  (0 same, 1.41 unrelated)"),
    "nearest": ("Nearest other dictionary row", "cosine (over 0.95: a duplicate)"),
    "alignment": ("Encoder row against dictionary row", "cosine of the two rows of a latent"),
    "gain": ("What a latent reads of itself", "code read for one unit of code added"),
    "bias": ("How much evidence a latent needs", "pre-activation on the mean token (code units)"),
    "encoder_norm": ("Sensitivity of the encoder", "code per unit of raw activation (row norm)"),
}
LAYER_PANELS = {  # column of checks.layers.probe_layers: title and unit
    "median_norm": ("Size of activations", "median norm"),
    "gamma": ("Mean over spread", "gamma"),
    "participation": ("Effective dimensions", "dimensions"),
    "probe_accuracy": ("Linear probe on the labels", "held-out accuracy"),
}
EXAMPLE_MARKERS = {"latent": (BLUE, "o", 9), "frozen_decoder": ("#7c8794", "^", 7), "neuron": (ORANGE, "D", 6),
                   "table": (GREEN, "|", 14)}


def layers(table: list[dict[str, Any]], recommended: str) -> Figure:
    """Size, spread, effective dimensions and, with labels, probe accuracy over depth, from checks.layers.probe_layers.
    """
    shown = {name: text for name, text in LAYER_PANELS.items() if name in table[0]}
    figure, axes = plt.subplots(1, len(shown), figsize=(3.6 * len(shown), 3.3))
    at = [row["signature"] for row in table].index(recommended)
    for axis, (name, (title, unit)) in zip(axes, shown.items()):
        axis.plot([row[name] for row in table], marker="o", color=BLUE)
        axis.axvline(at, color=ORANGE, linestyle=":", label="recommended")
        if name == "probe_accuracy":
            axis.axhline(table[0]["majority"], color=GREY, linestyle="--", label="most frequent class")
            axis.legend()
        axis.set_ylim(bottom=0)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set(title=title, xlabel="hook point, in order of depth", ylabel=unit)
    return figure


def training_curves(history: dict[str, Any]) -> Figure:
    """Loss, explained variance, dead latents and L0 over training tokens, from training_history.json."""
    train, val, sample = history["train"], history["val"], history["train_sample"]
    top_k = history["constants"]["TOP_K"]
    tokens, val_tokens, sample_tokens = (np.array(part["tokens"]) / 1e6 for part in (train, val, sample))
    figure, ((loss, ev), (dead, l0)) = plt.subplots(2, 2, figsize=(10.5, 6.6))
    loss.plot(tokens, train["loss"], color=BLUE)
    loss.set(title="Training loss", ylabel="loss (whitened units)", yscale="log")
    loss.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    loss.yaxis.set_major_formatter("{x:g}")
    loss.yaxis.set_minor_formatter("")
    ev.plot(sample_tokens, sample["ev"], color=BLUE, label="training texts")
    ev.plot(val_tokens, val["ev"], color=ORANGE, label="held-out texts")
    ev.axvline(val_tokens[history["best_epoch"] - 1], color=GREY, linestyle=":", label="saved epoch")
    ev.set(title="Explained variance, seen and unseen texts", ylabel="EV (1 = perfect)")
    dead.plot(tokens, train["dead_pct"], color=RED, label="silent for long, in training")
    dead.plot(val_tokens, val["dead_pct"], color=ORANGE, label="never fired on the held-out sample")
    dead.set(title="Dead latents", ylabel="latents (%)",
             ylim=(0, max(5, 1.1 * max(train["dead_pct"] + val["dead_pct"]))))
    l0.plot(tokens, train["l0"], color=GREEN, label="L0")
    l0.axhline(top_k, color=GREY, linestyle=":", label="k")
    l0.set(title="Codes per token", ylabel="L0 (codes per token)", ylim=(0, 1.15 * top_k))
    for axis in (loss, ev, dead, l0):
        axis.set_xlabel("training tokens (millions)")
        if axis is not loss:
            axis.legend()
    return figure


def firing_histogram(frequency: np.ndarray, top_k: int) -> Figure:
    """How often latents fire. frequency: share of tokens per latent, [F]."""
    figure, axis = plt.subplots(figsize=(7.5, 3.4))
    sns.histplot(frequency[frequency > 0], bins=50, log_scale=True, color=BLUE, ax=axis)
    axis.axvline(top_k / len(frequency), color=GREY, linestyle=":", label="k / F, if all fired alike")
    axis.axvline(0.1, color=RED, linestyle="--", label="dense: over 10 % of tokens")
    axis.legend()
    axis.set(title=f"How often latents fire ({int((frequency == 0).sum())} of {len(frequency)} never do)",
             xlabel="share of the tokens on which the latent fires", ylabel="latents")
    return figure


def weight_histograms(columns: dict[str, np.ndarray]) -> Figure:
    """One histogram over latents for each column that WEIGHT_PANELS names, [F] each."""
    shown = [key for key in WEIGHT_PANELS if key in columns]
    figure, axes = plt.subplots(-(-len(shown) // 3), 3, figsize=(12, 3.2 * -(-len(shown) // 3)), squeeze=False)
    for axis, key in zip(axes.flat, shown):
        axis.hist(columns[key], bins=40, color=BLUE)
        axis.set(title=WEIGHT_PANELS[key][0], xlabel=WEIGHT_PANELS[key][1], ylabel="latents")
    for axis in axes.flat[len(shown) :]:
        axis.axis("off")
    return figure


def ev_profile(by_position: Sequence[tuple], by_norm: Sequence[tuple], overall: float) -> Figure:
    """EV over token position and over activation norm; each item is (lower edge, upper edge, EV, rows)."""
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 3.3))
    for axis, bins in zip(axes, (by_position, by_norm)):
        axis.plot([(low + high) / 2 for low, high, _, _ in bins], [ev for _, _, ev, _ in bins], "o-", color=BLUE)
        axis.axhline(overall, color=GREY, linestyle=":", label="all held-out tokens")
        axis.legend(loc="lower right")
    axes[0].set(title="EV by place in the text", xlabel="position (tokens)", ylabel="EV (1 = perfect)")
    axes[1].set(title="EV by size of the activation", xlabel="norm of x (raw units)", ylabel="EV (1 = perfect)")
    return figure


def bars(values: dict[str, float], title: str, unit: str, highlight: str) -> Figure:
    """One bar per name; `highlight` is the one in blue."""
    figure, axis = plt.subplots(figsize=(7, 0.5 * len(values) + 1.2))
    colours = [BLUE if name == highlight else GREY for name in values]
    axis.bar_label(axis.barh(list(values), list(values.values()), color=colours), fmt="%.3f", padding=3)
    axis.margins(x=0.14)
    axis.invert_yaxis()
    axis.set(title=title, xlabel=unit)
    return figure


def recovery_boxes(rows: Sequence[dict[str, Any]], kinds: dict[str, str]) -> Figure:
    """F1 of the best unit of each kind: over word concepts, under them context concepts; kinds by their mean above.

    rows: checks.recovery.recover_concepts. kinds: kind -> what it is called.
    """
    frame = pandas.DataFrame([{"context": bool(row["context"]), "kind": kinds[kind], "f1": row[kind]["f1"]}
                              for row in rows for kind in kinds if kind in row])
    parts = {"Word concepts": frame[~frame["context"]], "Context concepts": frame[frame["context"]]}
    first = frame if parts["Word concepts"].empty else parts["Word concepts"]
    order = first.groupby("kind")["f1"].mean().sort_values(ascending=False).index
    figure, axes = plt.subplots(2, 1, figsize=(6, 0.7 * len(order) + 1.6), sharex=True, layout="constrained")
    colours = {kind: BLUE if kind == kinds["latent"] else "#c9ced6" for kind in order}
    mean = {"marker": "D", "markerfacecolor": ORANGE, "markeredgecolor": "white", "zorder": 5}
    for axis, (title, part) in zip(axes, parts.items()):
        if not part.empty:
            sns.boxplot(part, x="f1", y="kind", order=order, hue="kind", palette=colours, fliersize=0, width=0.62,
                        showmeans=True, meanprops=mean, ax=axis)
            sns.stripplot(part, x="f1", y="kind", order=order, color="#30343b", size=2.4, alpha=0.45, ax=axis)
        axis.set(title=f"{title} ({part.groupby('kind').size().max() if len(part) else 0})",
                 xlabel="F1 on held-out tokens (diamond: mean)", ylabel="", xlim=(-0.02, 1.02))
    return figure


def recovery_examples(rows: Sequence[dict[str, Any]], kinds: dict[str, str], n: int = 6) -> Figure:
    """F1 of a few kinds of unit for n word and n context concepts, evenly spaced by the F1 of the SAE's latent."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.36 * n + 1.7), layout="constrained")  # for the legend
    for axis, context, title in zip(axes, (False, True), ("Word concepts", "Context concepts")):
        part = sorted((row for row in rows if row["context"] == context), key=lambda row: row["latent"]["f1"])
        shown = [part[i] for i in np.linspace(0, len(part) - 1, min(n, len(part))).round().astype(int)]
        for kind in (kind for kind in EXAMPLE_MARKERS if part and kind in part[0]):
            colour, marker, size = EXAMPLE_MARKERS[kind]
            axis.plot([row[kind]["f1"] for row in shown], range(len(shown)), marker, color=colour, markersize=size,
                      markeredgewidth=2.5 if marker == "|" else 0.5, label=kinds[kind])
        axis.set_yticks(range(len(shown)), [plain(row["concept"]) for row in shown])
        axis.set(title=f"{title}: {len(shown)} of {len(part)}", xlabel="F1 on held-out tokens",
                 xlim=(-0.02, 1.05), ylim=(-0.6, len(shown) - 0.4))
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4)
    return figure


def verdict_strip(checks: Sequence[dict[str, Any]]) -> Figure:
    """The verification at a glance: one coloured cell per check, evidence first, sanity checks after a gap."""
    figure, axis = plt.subplots(figsize=(12, 1.75))
    at = 0.0
    for kind in ("evidence", "sanity"):
        axis.text(at, 1.08, kind, va="bottom", fontsize=8, color=GREY)
        for row in (row for row in checks if row["kind"] == kind):
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
