"""What can be said about a token in its text: the patterns that names of latents are made of.

A text is cut into units: words (letters, digits, inner apostrophes) and single punctuation marks. Each kind of pattern
gives every token at most one category, lower-cased unless said otherwise:

    word     the unit as far as the token reaches: "dog", or "do" where the rest is still to come
    cased    the same with its capitals
    token    the token's own characters, wherever in a word they stand
    ending   the last two characters of the unit as far as the token reaches
    after    the unit before
    phrase   the unit before and the unit as far as the token reaches
    within   the whole word, where the token does not yet complete it
    before   the unit that follows, where the token completes its own
    place    several at once: see PLACES
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
BLANK = {" ": "[space]", "\n": "[line break]", "\t": "[tab]"}  # brackets: no unit has more than one mark
EDGE = "^"  # stands for "nothing": before the first unit, after the last


@dataclass
class Patterns:
    """The patterns of N tokens: kind -> category of each token, and the tokens of each category."""

    names: dict[str, dict[str, int]]
    """kind -> name of each category -> its number; numbers count up in the order of the dict."""
    rows: dict[str, np.ndarray]
    """kind -> the tokens ordered by category, int32."""
    starts: dict[str, np.ndarray]
    """kind -> where each category begins in `rows`, and its end, int64 [categories + 1]."""
    n: int
    piece: np.ndarray
    """One letter each [N]: "w" for a token that is a whole unit, else its place in it: "s"tart, "m"iddle, "e"nd."""

    def members(self, kind: str, category: int) -> np.ndarray:
        """The tokens that have this category, ascending."""
        start, end = self.starts[kind][category : category + 2]
        return self.rows[kind][start:end]

    def column(self, kind: str) -> np.ndarray:
        """The category of each token of a kind that gives every token one, int64 [N]."""
        numbers = np.empty(self.n, np.int64)
        numbers[self.rows[kind]] = np.arange(len(self.names[kind])).repeat(np.diff(self.starts[kind]))
        return numbers

    def find(self, kind: str, name: str) -> np.ndarray:
        """The tokens whose category of this kind is called `name`, ascending; none if no token has it."""
        category = self.names[kind].get(name)
        return np.empty(0, np.int32) if category is None else self.members(kind, category)


def find_patterns(texts: list[str], rows: dict[str, Tensor]) -> Patterns:
    """Patterns of the token rows (text_id, char_start, char_end ... int32 [N]; rows of a text stand together)."""
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
    patterns = Patterns(numbers, {}, {}, len(text_id), np.full(len(text_id), "w"))
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
    speech, open_quote = [], False
    for name in lower:
        open_quote = name == "“" or (name != "”" and open_quote != (name == '"'))
        speech.append(open_quote)
    u = -1
    for row, (start, end) in enumerate(zip(starts, ends)):
        token = text[start:end]
        core = token.strip()
        while u + 1 < len(units) and units[u + 1][0] < end:
            u += 1
        left = lower[u - 1] if u > 0 else EDGE
        if row == 0:
            yield row, "place", "text start"
        if not core or u < 0:
            # White space, or a piece without a slice of its own: only its surroundings tell something.
            name = BLANK.get(token[:1], "[space]") if token else "[empty]"
            yield row, "token", name
            yield row, "word", name
            yield row, "place", "space"
            yield row, "after", lower[u] if u >= 0 else EDGE
            yield row, "before", lower[u + 1] if u + 1 < len(units) else EDGE
            continue
        unit_start, unit_end = units[u]
        so_far = text[unit_start : min(end, unit_end)]
        whole, is_word = end >= unit_end, so_far[0].isalnum()
        begins = start + len(token) - len(token.lstrip()) <= unit_start
        name = so_far.lower()
        yield row, "token", core.lower()
        yield row, "word", name
        yield row, "after", left
        yield row, "phrase", f"{left} {name}"
        if is_word:
            yield row, "cased", so_far
            if len(so_far) > 2:
                yield row, "ending", name[-2:]
        if whole:
            yield row, "before", lower[u + 1] if u + 1 < len(units) else EDGE
        else:
            yield row, "within", lower[u]
        if speech[u]:
            yield row, "place", "in speech"
        if is_word and (left in (EDGE, ".", "!", "?") or "\n" in text[units[u - 1][1] : unit_start]):
            yield row, "place", "sentence start"
        if so_far[0].isupper():
            yield row, "place", "capital"
        if so_far[0].isdigit():
            yield row, "place", "number"
        if not is_word:
            yield row, "place", "punctuation"
        elif not (begins and whole):
            yield row, "place", "word start" if begins else "word end" if whole else "word middle"
