"""What can be said about a token in its text: the patterns that rules of latents are made of.

A text is split into units (concepts/words.py): words and single punctuation marks. Each kind of pattern gives a token
categories, at most one unless stated otherwise, in lower case unless stated otherwise:

    word     the unit that the token completes: "dog"; or "do-" where the token ends inside it
    cased    the same with its capitals
    family   the word of which the completed one is a form: "play" for played
    start    the unit up to the token's end, whether or not the token completes it
    token    the token's own characters, wherever in a word they are
    ending   the last two characters of "start", and the last three of a completed word
    after    the unit before
    phrase   the unit before, and "word"
    within   the whole word, where the token does not complete it
    before   the unit that follows, where the token completes its own
    place    any number of PLACES
"""
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from concepts.words import UNIT, base_forms

KINDS = ("word", "cased", "family", "start", "token", "ending", "after", "phrase", "within", "before", "place")
PLACES = (
    "text start", "sentence start", "in speech", "punctuation", "capital", "number", "word start", "word middle",
    "word end", "space",
)
BLANK = {" ": "[space]", "\n": "[line break]", "\t": "[tab]"}  # in brackets, as no unit can be
Rule = list[tuple[str, str]]
Pairs = tuple[array, array]  # numbers of categories, and the tokens in them
EDGE = "^"  # stands for the start or the end of a text, where there is no unit
OPEN = "-"  # ends a category of tokens that do not complete their word; a hyphen is a unit of its own


@dataclass
class Patterns:
    """The patterns of N tokens: for each kind its categories, and the tokens in each."""

    names: dict[str, dict[str, int]]
    """kind -> name of each category -> its number; numbers follow the order of the dict."""
    rows: dict[str, np.ndarray]
    """kind -> tokens ordered by category, int32."""
    starts: dict[str, np.ndarray]
    """kind -> where each category begins in `rows`, and the end, int64 [categories + 1]."""
    n: int
    piece: np.ndarray
    """A letter for each token, [N]: "w" if it is a whole unit, else its place: "s"tart, "m"iddle or "e"nd."""
    unit: np.ndarray
    """The number of each token's unit, int32 [N]; -1: white space or a piece of a character."""
    units: list[str]
    """Number of a unit -> the unit, in lower case."""
    written: dict[str, str]
    """Words that never stand in lower case -> as they are written first."""
    forms: dict[str, str]
    """Words that are forms of another -> that one."""

    def column(self, kind: str) -> np.ndarray:
        """The category of each token, for a kind that gives every token one, int64 [N]."""
        numbers = np.empty(self.n, np.int64)
        numbers[self.rows[kind]] = np.arange(len(self.names[kind])).repeat(np.diff(self.starts[kind]))
        return numbers

    def find(self, kind: str, name: str) -> np.ndarray:
        """The tokens in the category of this name, ascending; empty if there is none."""
        category = self.names[kind].get(name)
        if category is None:
            return np.empty(0, np.int32)
        return self.rows[kind][slice(*self.starts[kind][category : category + 2])]

    def only(self, keep: np.ndarray) -> "Patterns":
        """The patterns of the tokens where keep (bool [N]) holds, numbered anew; the categories stay."""
        number = np.cumsum(keep) - 1
        kept = {kind: keep[rows] for kind, rows in self.rows.items()}
        rows = {kind: number[self.rows[kind][kept[kind]]] for kind in kept}
        starts = {kind: np.append(0, kept[kind].cumsum())[self.starts[kind]] for kind in kept}
        return replace(self, rows=rows, starts=starts, n=int(keep.sum()), piece=self.piece[keep], unit=self.unit[keep])


def find_patterns(texts: list[str], rows: dict[str, Tensor]) -> Patterns:
    """Patterns of token rows: text_id, char_start, char_end ..., int32 [N]; rows of a text are adjacent."""
    text_id, start, end = (rows[name].numpy() for name in ("text_id", "char_start", "char_end"))
    pairs = {kind: (array("q"), array("i")) for kind in KINDS}
    numbers: dict[str, dict[str, int]] = {kind: {} for kind in (*KINDS, "unit")}
    written: dict[str, str] = {}
    unit = np.full(len(text_id), -1, np.int32)
    firsts = np.flatnonzero(np.diff(text_id, prepend=-1)) if len(text_id) else np.empty(0, int)
    for first, last in zip(firsts, np.append(firsts[1:], len(text_id))):
        found = _of_text(texts[text_id[first]], start[first:last].tolist(), end[first:last].tolist())
        for row, kind, name in found:
            if kind == "unit":
                lower = name.lower()
                written.setdefault(lower, name)
                if name[0] == lower[0]:
                    written[lower] = lower
                unit[first + row] = numbers["unit"].setdefault(lower, len(numbers["unit"]))
                continue
            known = numbers[kind]
            pairs[kind][0].append(known.setdefault(name, len(known)))
            pairs[kind][1].append(int(first) + row)
    forms = base_forms(word for word in numbers["unit"] if word[0].isalpha())
    units = numbers.pop("unit")
    patterns = Patterns(numbers, {}, {}, n=len(text_id), piece=np.full(len(text_id), "w"), unit=unit, units=list(units),
                        written={low: name for low, name in written.items() if low != name}, forms=forms)
    _add_families(patterns, numbers, pairs)
    for kind, (categories, places) in pairs.items():
        category = np.array(categories)
        patterns.rows[kind] = np.array(places)[np.argsort(category, kind="stable")]
        patterns.starts[kind] = np.append(0, np.bincount(category, minlength=len(numbers[kind])).cumsum())
    for place in ("word start", "word middle", "word end"):
        patterns.piece[patterns.find("place", place)] = place[5]
    return patterns


def _add_families(patterns: Patterns, numbers: dict[str, dict[str, int]], pairs: dict[str, Pairs]) -> None:
    """The kind "family", from the kind "word": a word that has forms, and its forms."""
    bases = set(patterns.forms.values())
    words = list(numbers["word"])
    families = [patterns.forms.get(word, word if word in bases else "") for word in words]
    for base in families:
        if base:
            numbers["family"].setdefault(base, len(numbers["family"]))
    of_word = np.array([numbers["family"].get(base, -1) for base in families], np.int64)
    categories, rows = (np.frombuffer(part, part.typecode) for part in pairs["word"])
    family = of_word[categories] if len(words) else categories
    pairs["family"] = array("q", family[family >= 0].tolist()), array("i", rows[family >= 0].tolist())


def _of_text(text: str, starts: list[int], ends: list[int]) -> Iterator[tuple[int, str, str]]:
    """(row, kind, category) of the tokens of one text; the kind "unit" has the whole unit as it is written."""
    units = [(m.start(), m.end()) for m in UNIT.finditer(text)]
    lower = [text[a:b].lower() for a, b in units]
    speech = _in_speech(lower)
    u = -1
    for row, (start, end) in enumerate(zip(starts, ends)):
        token = text[start:end]
        core = token.strip()
        while u + 1 < len(units) and units[u + 1][0] < end:
            u += 1
        left = lower[u - 1] if u > 0 else EDGE
        following = lower[u + 1] if u + 1 < len(units) else EDGE
        if row == 0:
            yield row, "place", "text start"
        if not core or u < 0:
            left = lower[u] if u >= 0 else EDGE
            yield from ((row, kind, name) for kind, name in _of_blank(token, left, following))
            continue
        unit_start, unit_end = units[u]
        so_far, whole = text[unit_start : min(end, unit_end)], end >= unit_end
        name = so_far.lower() + OPEN * (not whole)
        yield row, "unit", text[unit_start:unit_end]
        yield row, "token", core.lower()
        yield row, "word", name
        yield row, "after", left
        yield row, "phrase", f"{left} {name}"
        if so_far[0].isalnum():
            yield row, "cased", so_far + OPEN * (not whole)
            yield row, "start", so_far.lower()
            if len(so_far) > 2:
                yield row, "ending", so_far[-2:].lower()
            if whole and len(so_far) > 3:
                yield row, "ending", so_far[-3:].lower()
        yield (row, "before", following) if whole else (row, "within", lower[u])
        new_line = u > 0 and "\n" in text[units[u - 1][1] : unit_start]
        begins = start + len(token) - len(token.lstrip()) <= unit_start
        yield from ((row, "place", place) for place, here in (
            ("in speech", speech[u]),
            ("sentence start", so_far[0].isalnum() and (left in (EDGE, ".", "!", "?") or new_line)),
            ("capital", so_far[0].isupper()),
            ("number", so_far[0].isdigit()),
            (_piece(so_far, begins, whole), True),
        ) if here and place)


def _of_blank(token: str, left: str, following: str) -> Iterator[tuple[str, str]]:
    """(kind, category) of white space or a piece of a character: only what surrounds it says anything."""
    name = BLANK.get(token[:1], "[space]") if token else "[empty]"
    yield from (("token", name), ("word", name), ("place", "space"), ("after", left), ("before", following))


def _in_speech(units: list[str]) -> list[bool]:
    """Whether each unit is inside quotation marks; the opening one is, the closing one is not."""
    found, is_open = [], False
    for unit in units:
        is_open = unit == "“" or (unit != "”" and is_open != (unit == '"'))
        found.append(is_open)
    return found


def _piece(so_far: str, begins: bool, whole: bool) -> str:
    """The place of a token in its unit; empty if it is a whole word."""
    if not so_far[0].isalnum():
        return "punctuation"
    if begins and whole:
        return ""
    return "word start" if begins else "word end" if whole else "word middle"
