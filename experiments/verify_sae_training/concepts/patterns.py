"""What can be said about a token in its text: the patterns that names of latents are made of.

A text is split into units: words (letters, digits, inner apostrophes) and single punctuation marks. Each kind of
pattern gives every token at most one category, in lower case unless stated otherwise:

    word     the unit up to the token's end: "dog", or "do" where the rest is still to come
    cased    the same with its capitals
    token    the token's own characters, wherever in a word they are
    ending   the last two characters of "word"
    after    the unit before
    phrase   the unit before, and "word"
    within   the whole word, where the token does not complete it
    before   the unit that follows, where the token completes its own
    place    any number of PLACES
"""
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

KINDS = ("word", "cased", "token", "ending", "after", "phrase", "within", "before", "place")
PLACES = {
    "text start": "the start of a text",
    "sentence start": "the first word of a sentence",
    "in speech": "a quotation",
    "punctuation": "punctuation",
    "capital": "capitalised words",
    "number": "numbers",
    "word start": "the first piece of a longer word",
    "word middle": "the middle of a word",
    "word end": "the last piece of a longer word",
    "space": "white space",
}
UNIT = re.compile(r"[^\W_]+(?:['’][^\W_]+)*|[^\w\s]|_")
BLANK = {" ": "[space]", "\n": "[line break]", "\t": "[tab]"}  # in brackets, as no unit can be
EDGE = "^"  # stands for the start or the end of a text, where there is no unit
MARKS = {
    ".": "full stop", ",": "comma", "!": "exclamation mark", "?": "question mark", ":": "colon", ";": "semicolon",
    '"': "quotation mark", "“": "opening quote", "”": "closing quote", "-": "hyphen",
    "'": "apostrophe", "’": "curly apostrophe",
    "[space]": "white space", "[line break]": "line break", "[tab]": "tab", "[empty]": "piece of a character",
}
LONGEST = 60  # characters shown of one pattern; a "word" may be a page of letters without a space


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


def find_patterns(texts: list[str], rows: dict[str, Tensor]) -> Patterns:
    """Patterns of token rows: text_id, char_start, char_end ..., int32 [N]; rows of a text are adjacent."""
    text_id, start, end = (rows[name].numpy() for name in ("text_id", "char_start", "char_end"))
    pairs = {kind: (array("q"), array("i")) for kind in KINDS}
    numbers: dict[str, dict[str, int]] = {kind: {} for kind in KINDS}
    firsts = np.flatnonzero(np.diff(text_id, prepend=-1)) if len(text_id) else np.empty(0, int)
    for first, last in zip(firsts, np.append(firsts[1:], len(text_id))):
        found = _of_text(texts[text_id[first]], start[first:last].tolist(), end[first:last].tolist())
        for row, kind, name in found:
            known = numbers[kind]
            pairs[kind][0].append(known.setdefault(name, len(known)))
            pairs[kind][1].append(int(first) + row)
    patterns = Patterns(numbers, {}, {}, n=len(text_id), piece=np.full(len(text_id), "w"))
    for kind, (categories, places) in pairs.items():
        category = np.array(categories)
        patterns.rows[kind] = np.array(places)[np.argsort(category, kind="stable")]
        patterns.starts[kind] = np.append(0, np.bincount(category, minlength=len(numbers[kind])).cumsum())
    for place in ("word start", "word middle", "word end"):
        patterns.piece[patterns.find("place", place)] = place[5]
    return patterns


def _of_text(text: str, starts: list[int], ends: list[int]) -> Iterator[tuple[int, str, str]]:
    """(row, kind, category) of the tokens of one text."""
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
        name = so_far.lower()
        yield row, "token", core.lower()
        yield row, "word", name
        yield row, "after", left
        yield row, "phrase", f"{left} {name}"
        if so_far[0].isalnum():
            yield row, "cased", so_far
            if len(so_far) > 2:
                yield row, "ending", name[-2:]
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


def describe(patterns: Patterns, kind: str, name: str, fires: np.ndarray) -> str:
    """One pattern in words, such as: dog, do…, …ing, after “said”. fires: bool [N], where the latent fires."""
    rows = patterns.find(kind, name)
    name = name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"
    pieces = patterns.piece[rows[fires[rows]]]
    open_end = kind in ("word", "cased", "token", "phrase") and np.isin(pieces, ["s", "m"]).sum() > len(pieces) / 2
    to_come = "…" if open_end else ""
    before = "…" if kind == "token" and np.isin(pieces, ["m", "e"]).sum() > len(pieces) / 2 else ""
    if kind == "place":
        return PLACES[name]
    if name == EDGE and kind in ("after", "before"):
        return f"{kind} the {'start' if kind == 'after' else 'end'} of a text"
    if kind in ("after", "before"):
        return f"{kind} {MARKS.get(name) or f'“{name}”'}"
    if kind == "within":
        return f"pieces of “{name}”"
    if kind == "ending":
        return f"…{name}"
    if kind == "phrase":
        first = name.startswith(EDGE + " ")
        return f"{name[len(EDGE) + 1 :]}{to_come} at the start of a text" if first else f"“{name}{to_come}”"
    return MARKS.get(name) or (f"{before}{name}{to_come}" if name[0].isalnum() else f"“{name}”")
