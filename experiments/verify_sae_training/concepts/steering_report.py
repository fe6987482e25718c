"""The results of steering in words: a table of strengths, what its columns mean, and the pairs of texts to look at."""
from collections.abc import Sequence
from typing import Any

import pandas as pd

Row = dict[str, Any]  # of concepts/steered_texts.py
MEANINGS = {
    "concept": "written tokens on which the name's pattern holds",
    "rise": "against the unsteered text of the same prompt and seed, with its 95 % interval",
    "in texts": "texts that have one",
    "truth": "written words of the stories' concept {truth}",
    "follows": "written words that follow the concept's words in the corpus",
    "fires": "written tokens on which the unsteered model shows the latent",
    "favoured": "written tokens that the latent's direction raises most",
    "perplexity": "of what was written, under the unsteered model",
    "cost": "perplexity over that of the unsteered texts",
    "repeated": "three-token sequences that occurred before in the text",
    "distinct": "different two-token sequences over all texts",
}


def strengths_table(rows: Sequence[Row]) -> pd.DataFrame:
    """One line of text cells for each strength."""
    lines = []
    for row in rows:
        line = {"strength": "none" if row["strength"] is None else f"{row['strength']:.3f}",
                "concept": percent(row["concept"]), "rise": span(row["concept_rise"], percent),
                "in texts": percent(row["shown_in"])}
        line |= {key: percent(row[key]) for key in ("truth", "follows", "fires", "favoured") if key in row}
        lines.append(line | {"perplexity": number(row["perplexity"]), "cost": span(row["cost"], number),
                             "repeated": percent(row["repeated"]), "distinct": percent(row["distinct"])})
    return pd.DataFrame(lines)


def meanings(columns: Sequence[str], truth: str) -> list[str]:
    """What each column of the table says, one line each. truth: the ground-truth concept, "" for none."""
    return [f"{key}: {MEANINGS[key].format(truth=truth)}" for key in columns if key in MEANINGS]


def verdict(unsteered: Row, steered: Row, max_cost: float, greedy: bool = False) -> list[str]:
    """What a strength does, on seeds that did not choose it, and what is wrong with it. greedy: the texts have no seed.
    """
    rise, cost = steered["concept_rise"], steered["cost"]
    chosen_on = "greedy, on the very texts that chose it" if greedy else "on other seeds than those that chose it"
    said = [f"strength {steered['strength']:.3f}, {chosen_on}: the concept is on "
            f"{percent(unsteered['concept'])} of tokens unsteered, on {percent(steered['concept'])} steered, rise "
            f"{span(rise, percent)}; in {percent(unsteered['shown_in'])} and {percent(steered['shown_in'])} of texts; "
            f"perplexity {number(unsteered['perplexity'])} and {number(steered['perplexity'])}, {span(cost, number)} "
            "times"]
    if (rise["low"] or 0) <= 0:
        said.append("the rise may be chance: this latent does not make the model write what its name says")
    if cost["mean"] is None or cost["mean"] > max_cost:
        said.append(f"these texts cost more than {max_cost:g} times the unsteered ones' perplexity")
    return said


def telling_pairs(unsteered: Row, steered: Row) -> dict[str, tuple[str, str]]:
    """The pairs of texts (unsteered, steered) in which the concept rises most and by the median; ties go to the first.

    Under what each is: "largest rise", "median rise". Empty if no pair has words in both texts.
    """
    rises = {i: after - before for i, (before, after) in enumerate(zip(unsteered["shown"], steered["shown"]))
             if before is not None and after is not None}
    order = sorted(rises, key=lambda i: (-rises[i], i))
    chosen = {"largest rise": order[0], "median rise": order[len(order) // 2]} if order else {}
    return {what: (unsteered["texts"][i], steered["texts"][i]) for what, i in chosen.items()}


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}%"


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def span(found: dict[str, float | None], show: Any) -> str:
    """A mean and its interval."""
    return f"{show(found['mean'])} [{show(found['low'])}, {show(found['high'])}]"
