"""How the project's figures look, and how a notebook shows one."""
from pathlib import Path

import matplotlib.pyplot as plt
import pandas
import seaborn as sns
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GREY, RED = "#3b6ea5", "#d9822b", "#4c9a6a", "#8a8f98", "#b5484b"


def style() -> None:
    """One look for every figure and table. Tables are shown without formulas: texts from data may hold dollar signs."""
    sns.set_theme(style="whitegrid", context="notebook", font_scale=0.9, rc={
        "figure.dpi": 88, "savefig.dpi": 176,  # on screen half as large as in the file: sharp
        "figure.constrained_layout.use": True,
        "figure.constrained_layout.hspace": 0.08, "axes.titlesize": 11, "axes.titleweight": "bold",
        "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#9aa0a8", "grid.color": "#e6e8eb",
    })
    pandas.set_option("styler.html.mathjax", False, "display.html.use_mathjax", False)


def plain(text: str) -> str:
    """A text from data as a label: matplotlib would read a formula between two dollar signs."""
    return text.replace("$", r"\$").replace("\n", "↵")


def described(figure: Figure) -> str:
    """What a figure shows, in words, for who can't see it: its panels' titles and axes."""
    parts = [] if figure.get_suptitle() == "" else [figure.get_suptitle()]
    for axis in figure.axes:
        if (title := axis.get_title()) or axis.get_label() != "<colorbar>":
            over = " over ".join(filter(None, (axis.get_ylabel(), axis.get_xlabel())))
            parts.append(": ".join(filter(None, (title, over))))
    return "; ".join(filter(None, parts)).replace("\n", " ").replace(r"\$", "$")


def show(figure: Figure, path: Path, alt: str | None = None) -> None:
    """Save a notebook's figure as a PNG and display it; alt: what it shows, in words; None: its titles and axes."""
    from IPython.display import Image, display  # scripts draw without it

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    width = round(figure.get_figwidth() * figure.dpi)
    display(Image(path.read_bytes(), format="png", width=width, alt=alt or described(figure)))
    plt.close(figure)
