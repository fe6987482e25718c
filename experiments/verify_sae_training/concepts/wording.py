"""Patterns in words that a person reads: a short form for a latent's name, a long one for its description.

Nothing is named by a fragment of a word. A pattern of pieces ("tokens that begin a word with mar") is shown as the
words in which the latent fires there (Mary, marble), if a few make up nearly all of it. Where it is truly spread over
many words, it is an affix and says so: "-ing (playing, going)". In languages without spaces, the piece itself is shown.
"""
import numpy as np

from concepts.patterns import EDGE, OPEN, Patterns
from concepts.words import UNSPACED

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
MARKS = {
    ".": "full stop", ",": "comma", "!": "exclamation mark", "?": "question mark", ":": "colon", ";": "semicolon",
    '"': "quotation mark", "“": "opening quote", "”": "closing quote", "-": "hyphen",
    "'": "apostrophe", "’": "curly apostrophe",
    "[space]": "white space", "[line break]": "line break", "[tab]": "tab", "[empty]": "piece of a character",
}
LONGEST = 60  # characters shown of one pattern; a "word" may be a page of letters without a space
FEW, NEARLY_ALL = 3, 0.8  # so many words with this share of a pattern's activation stand for it
SHOWN = 4  # words or patterns in a name; the description has all
GROUPS = {"after": "after ", "before": "before "}


def describe(patterns: Patterns, kind: str, name: str, code: np.ndarray) -> tuple[list[str], str]:
    """One pattern as what a name lists of it, such as ["dog"] or ["-ing (playing, going)"], and in full.

    code: the latent's code on each token, [N]; where it is 0, the token does not count.
    """
    written = _cut(patterns.written.get(name, name))
    if kind == "place":
        return [PLACES[name]], PLACES[name]
    if kind in GROUPS:
        end = f"the {'start' if kind == 'after' else 'end'} of a text"
        text = f"{kind} {end if name == EDGE else MARKS.get(name) or f'“{written}”'}"
        return [text], text
    if kind == "within":
        return [written], f"pieces of “{written}”"
    if kind == "phrase":
        return _phrase(patterns, name, code)
    if kind in ("word", "cased") and not _is_open(name):
        text = MARKS.get(name) or (written if name[0].isalnum() else f"“{written}”")
        return [text], text
    return _affix(patterns, kind, name, code)


def _affix(patterns: Patterns, kind: str, name: str, code: np.ndarray) -> tuple[list[str], str]:
    """A pattern that many words may have: the words where the latent fires there, or what they share."""
    if name in MARKS or not any(character.isalnum() for character in name):
        text = MARKS.get(name) or f"“{_cut(name)}”"
        return [text], text
    piece = _cut(name.removesuffix(OPEN))
    if UNSPACED.search(name):  # where words end is not known, so the piece itself is the best that can be said
        return [piece], f"“{piece}”"
    rows = patterns.find(kind, name)
    words, share = words_of(patterns, rows, code)
    such_as = f"({', '.join(words[:2])})"
    if kind == "family":
        return words[:1], f"{piece} in any form ({', '.join(words[:FEW])})"
    place = _place(patterns, kind, rows, code)
    long, short = {
        "w": (f"“{piece}”, or words that begin with it", piece), "s": (f"words that begin with “{piece}”", piece + "-"),
        "m": (f"the piece “{piece}” inside words", f"-{piece}-"), "e": (f"words that end in “{piece}”", "-" + piece),
    }[place]
    if share >= NEARLY_ALL:
        return words, f"{long} ({', '.join(words)})"
    return [short if place == "w" else f"{short} {such_as}"], f"{long} {such_as}"


def _place(patterns: Patterns, kind: str, rows: np.ndarray, code: np.ndarray) -> str:
    """Where in their words the characters of a pattern mostly are: a letter as in Patterns.piece."""
    mass = {place: float(code[rows[patterns.piece[rows] == place]].sum()) for place in "wsme"}
    if kind == "token":
        return max(mass, key=lambda place: mass[place])
    inside = mass["s"] + mass["m"] > mass["w"] + mass["e"]
    if kind == "ending":
        return "m" if inside else "e"
    return "s" if inside or kind != "start" else "w"


def _phrase(patterns: Patterns, name: str, code: np.ndarray) -> tuple[list[str], str]:
    """Two units in a row; the second may have been read in part."""
    left, second = name.split(" ", 1)
    seconds = [patterns.written.get(second, second)]
    text = seconds[0]
    if _is_open(second):
        words, share = words_of(patterns, patterns.find("phrase", name), code)
        seconds = words if share >= NEARLY_ALL else [f"{second} ({', '.join(words[:2])})"]
        text = f"{second} ({', '.join(words[:2])})"
    if left == EDGE:
        return [f"{_cut(one)} at the start of a text" for one in seconds], f"{_cut(text)} at the start of a text"
    left = patterns.written.get(left, left)
    return [f"“{_cut(f'{left} {one}')}”" for one in seconds], f"“{_cut(f'{left} {text}')}”"


def words_of(patterns: Patterns, rows: np.ndarray, code: np.ndarray) -> tuple[list[str], float]:
    """The at most FEW words that make up NEARLY_ALL of a latent's activation on these rows, and their share.

    Forms of one word count as one, shown in the form with most activation. code: [N].
    """
    rows = rows[(code[rows] > 0) & (patterns.unit[rows] >= 0)]
    numbers, inverse = np.unique(patterns.unit[rows], return_inverse=True)
    mass = np.bincount(inverse, code[rows], len(numbers))
    families: dict[str, list[tuple[float, str]]] = {}
    for number, value in zip(numbers, mass.tolist()):
        word = patterns.units[number]
        families.setdefault(patterns.forms.get(word, word), []).append((-value, word))
    ranked = sorted((sum(value for value, _ in forms), min(forms)[1]) for forms in families.values())
    total, share, words = float(mass.sum()) or 1.0, 0.0, []
    for value, word in ranked[:FEW]:
        words.append(_cut(patterns.written.get(word, word)))
        share -= value / total
        if share >= NEARLY_ALL:
            break
    return words, share


def short_name(patterns: Patterns, kinds: list[str], elements: list[list[str]]) -> str:
    """What the patterns list, each word in one form only, such as: dog, cat; after “said”, “asked” (+3)."""
    groups: dict[str, list[str]] = {}
    seen: set[str] = set()
    for kind, one in ((kind, one) for kind, listed in zip(kinds, elements) for one in listed):
        key = patterns.forms.get(one.lower(), one.lower())
        if key not in seen and len(seen) < SHOWN:
            group = kind if kind in GROUPS or kind in ("phrase", "place") else "word"
            groups.setdefault(group, []).append(one.removeprefix(GROUPS.get(group, "")))
        seen.add(key)
    more = f" (+{len(seen) - SHOWN})" if len(seen) > SHOWN else ""
    return "; ".join(GROUPS.get(group, "") + ", ".join(texts) for group, texts in groups.items()) + more


def _is_open(name: str) -> bool:
    return len(name) > 1 and name.endswith(OPEN)


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
