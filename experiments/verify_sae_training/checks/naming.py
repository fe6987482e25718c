"""How well the names of latents read and hold: fragments of words, coherence, scores on held-out texts.

    print(naming_report(concepts, codes.texts))
"""
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np

from concepts.coherence import MIXED
from concepts.wording import MARKS, PLACES
from concepts.words import UNIT, UNSPACED

# What a name says beside the words of the texts.
SAID = sorted([*PLACES.values(), *MARKS.values(), "the start of a text", "the end of a text", "at the start of a text",
               "pieces of", "after", "before"], key=len, reverse=True)
PIECE = re.compile(r"[-…]?[^\W_]+(?:['’][^\W_]+)*[-…]?")


def naming_report(concepts: Mapping[int, dict[str, Any]], texts: Iterable[str]) -> dict[str, float]:
    """Shares in percent, and means, over the names that a rule stands for.

    A fragment is an element of a name that is neither a word of the texts nor declared to be an affix ("-ing").
    """
    made = [entry for entry in concepts.values() if entry.get("rule")]
    scored = [entry for entry in made if entry.get("score") is not None]
    coherence = [entry["coherence"] for entry in made if entry.get("coherence") is not None]
    known = {unit.lower() for text in texts for unit in UNIT.findall(text)}

    def share(found: list[bool]) -> float:
        return round(100 * float(np.mean(found)), 1) if found else float("nan")

    quartiles = np.percentile(coherence, [25, 50, 75]) if coherence else [float("nan")] * 3
    return {
        "names": len(made),
        "with a fragment (%)": share([bool(fragments(entry["name"], known)) for entry in made]),
        "with an affix (%)": share([bool(affixes(entry["name"])) for entry in made]),
        **{f"coherence, {what}": round(float(value), 3) for what, value in zip(("25 %", "median", "75 %"), quartiles)},
        f"coherence under {MIXED} (%)": share([value < MIXED for value in coherence]),
        "balanced accuracy": round(float(np.mean([entry["score"] for entry in scored])), 4) if scored else float("nan"),
        "F1": round(float(np.mean([entry["f1"] for entry in scored])), 4) if scored else float("nan"),
        "F1 >= 0.8 (%)": share([entry["f1"] >= 0.8 for entry in scored]),
        "of these, coherence under 0.5 (%)": share([entry["coherence"] < MIXED for entry in scored
                                                    if entry["f1"] >= 0.8 and entry.get("coherence") is not None]),
    }


def _pieces(name: str) -> list[str]:
    name = re.sub(r" \(\+\d+\)$", "", name)
    for said in SAID:
        name = re.sub(rf"(?<![\w“…-]){re.escape(said)}(?![\w”…-])", " ", name)
    return PIECE.findall(name)


def fragments(name: str, units: Collection[str]) -> list[str]:
    """The elements of a name that are neither words nor affixes, such as "mar…"."""
    return [piece for piece in _pieces(name)
            if "…" in piece or not (_is_affix(piece) or piece.lower() in units or UNSPACED.search(piece))]


def affixes(name: str) -> list[str]:
    """The affixes that a name declares: "un-", "-ing", "-a-"."""
    return [piece for piece in _pieces(name) if _is_affix(piece)]


def _is_affix(piece: str) -> bool:
    return piece.startswith("-") or piece.endswith("-")
