"""Words of texts: where they stand, how they are written, and which are forms of one word.

    forms = base_forms({"play", "plays", "played", "dog"})      # {"plays": "play", "played": "play"}

A unit is a word (letters, digits, inner apostrophes) or a single punctuation mark. Without spaces between words, as in
Chinese or Japanese, a unit is the stretch between two marks.
"""
import re
from collections.abc import Iterable

UNIT = re.compile(r"[^\W_]+(?:['’][^\W_]+)*|[^\w\s]|_")
EXCEPTIONS = frozenset(  # look like forms of a shorter English word and are not
    ("darling", "evening", "news", "outing", "pants", "sling", "wedding")
)
# Thai, Lao, Burmese, Khmer, Japanese, Chinese: no spaces between words
UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
DOUBLED = re.compile("[^aeiou]*[aeiou][^aeiouwxy]")  # "star" makes "starred", so "stared" is no form of it
SHORTEST = 3  # letters of a word that has forms; "as" is no plural of "a"


def base_forms(words: Iterable[str]) -> dict[str, str]:
    """For each of these words that is a form of another of them (plural, possessive, -ed, -ing): that other word.

    By the endings of English and by what is there: "plays" belongs to "play" only where "play" occurs too, so that
    other languages are left alone but for plurals that English has as well. words: in lower case.
    """
    known = set(words)
    found = {word: base for word in known if (base := _base(word, known))}
    for word, base in found.items():
        while base in found:  # "feelings", "feeling", "feel"; every step is shorter, so this ends
            base = found[base]
        found[word] = base
    return found


def _base(word: str, known: set[str]) -> str | None:
    """The word of which this one is a form, if it is known."""
    if word in EXCEPTIONS:
        return None
    return next((base for base in _shorter(word) if len(base) >= SHORTEST and base in known), None)


def _shorter(word: str) -> Iterable[str]:
    """What the word may be a form of, the likeliest first."""
    if word.endswith(("'s", "’s")):
        yield word[:-2]
    elif word.endswith("ies"):
        yield word[:-3] + "y"
        yield word[:-1]
    elif word.endswith(("ches", "shes", "sses", "xes", "zes", "oes")):
        yield word[:-2]
        yield word[:-1]
    elif word.endswith("s") and not word.endswith(("ss", "us", "is")):
        yield word[:-1]
    elif word.endswith("ied"):
        yield word[:-3] + "y"
    for ending in ("ed", "ing"):
        if word.endswith(ending):
            yield from _verbs(word[: -len(ending)], ending)


def _verbs(stem: str, ending: str) -> Iterable[str]:
    """Verbs to which -ed or -ing was added: hope in "hoping", hop in "hopping", jump in "jumping"."""
    if not re.search("[aeiouy]", stem):
        return
    if stem[-1] not in "aeiowxy" or (stem[-1] == "e" and ending == "ed" and len(stem) > 2):
        yield stem + "e"
    if stem[-1:] == stem[-2:-1] and stem[-1] not in "aeiouslfz":
        yield stem[:-1]
    if not DOUBLED.fullmatch(stem):
        yield stem
