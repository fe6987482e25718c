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
        "figure.dpi": 110, "savefig.dpi": 110, "figure.constrained_layout.use": True,
        "figure.constrained_layout.hspace": 0.08, "axes.titlesize": 11, "axes.titleweight": "bold",
        "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#9aa0a8", "grid.color": "#e6e8eb",
    })
    pandas.set_option("styler.html.mathjax", False, "display.html.use_mathjax", False)


def plain(text: str) -> str:
    """A text from data as a label: matplotlib would read a formula between two dollar signs."""
    return text.replace("$", r"\$").replace("\n", "↵")


def show(figure: Figure, path: Path) -> None:
    """Save a notebook's figure as a PNG and display it."""
    from IPython.display import display  # scripts draw without it

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    display(figure)
    plt.close(figure)
