"""The data of the page of all concepts: rows of a small index, details read when wanted, and the words of the texts.

A latent comes as a plain dict, of which only "latent" must be there:

    latent, name, source, frequency, max, mean_active, score, f1, coherence, interest, stability, effect_kl,
    tokens [text], map (x, y)                                                          -> the index
    fires, p99, description, notes, rating, model, judge, edited_by, precision, recall, baseline, digest, histogram,
    intervals, top, middle, token_share, promotes, demotes, effect, near, cofiring, seeds, layers  -> its detail
    entry: its entry of concepts.json, in place of the keys of the same names; the digest is made from it

page_files.py says what each holds, and writes the page.
"""
import math
import re
from array import array
from collections.abc import Sequence
from typing import Any

from concepts.coherence import interest
from concepts.formats import digest
from concepts.page import Example, example_pieces

NUMBERS = ("frequency", "max", "mean_active", "score", "f1", "coherence", "interest", "stability", "effect_kl")
INDEX = ("latent", "name", "source", *NUMBERS, "tokens", "map_x", "map_y")
OF_ENTRY = ("name", "description", "notes", "rating", "source", "model", "judge", "edited_by", "score", "precision",
            "recall", "f1", "baseline", "coherence", "interest")
DETAIL = ("fires", "p99", "description", "notes", "rating", "model", "judge", "edited_by", "precision", "recall",
          "baseline", "digest", "histogram", "token_share", "promotes", "demotes", "effect", "near", "cofiring",
          "cofiring_kind", "seeds", "layers")
KNOWN = {*INDEX, *DETAIL, "entry", "map", "intervals", "top", "middle"} - {"map_x", "map_y"}
SILENT = ("near_miss", "zero")  # kinds of intervals in which the latent does not fire
N_TOKENS = 6  # of a row of the index
# A word of the search in texts: a run of letters and digits, or one character of a script without spaces. page_parts
# has the same in JavaScript.
UNSPACED = "\u3040-\u30ff\u3400-\u9fff"
WORD = re.compile(f"[{UNSPACED}]|[^\\W_{UNSPACED}]+")
LONGEST_WORD, N_BUCKETS = 40, 512
DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
Row = dict[str, Any]
Words = dict[str, array]


def packed_latent(latent: dict[str, Any]) -> tuple[Row, Row, list[str]]:
    """A latent's row of the index, its detail, and the texts in which it fires. Raises ValueError for unknown keys."""
    if unknown := latent.keys() - KNOWN:
        raise ValueError(f"the page has no place for {', '.join(sorted(unknown))}")
    entry = latent.get("entry") or {}
    whole = {key: entry[key] for key in OF_ENTRY if key in entry} | latent
    whole["digest"] = latent.get("digest") or digest(latent["latent"], entry)
    effect = whole.get("effect") or {}
    whole.setdefault("effect_kl", effect.get("ablated", {}).get("kl"))
    if whole.get("f1") is not None:
        whole.setdefault("interest", interest(whole, whole["effect_kl"]))
    intervals = whole.get("intervals") or _intervals_of_old(whole)
    shown = [{**part, "examples": [packed_example(one) for one in part["examples"]]} for part in intervals]
    row = _rounded({key: whole.get(key) for key in INDEX})
    row["source"] = (whole.get("source") or "offline") if whole.get("name") else "none"
    row["tokens"] = list(whole.get("tokens") or _tokens(whole, intervals))[:N_TOKENS]
    row["map_x"], row["map_y"] = _rounded(whole.get("map") or (None, None))
    detail = _rounded({key: whole[key] for key in DETAIL if whole.get(key) not in (None, "", [])})
    detail["intervals"] = _rounded(shown)
    texts = [_text(one) for part in shown if part["kind"] not in SILENT for one in part["examples"]]
    return row, detail, texts


def _intervals_of_old(whole: dict[str, Any]) -> list[dict[str, Any]]:
    parts = [{"kind": kind, "examples": whole.get(kind) or []} for kind in ("top", "middle")]
    return [part for part in parts if part["examples"]]


def _tokens(whole: dict[str, Any], intervals: Sequence[dict[str, Any]]) -> list[str]:
    """The tokens that carry most of the latent's activation, else those on which its examples peak, most first."""
    if whole.get("token_share"):
        return [token for token, *_ in whole["token_share"]]
    peaks = [one["token_str"].strip() for part in intervals if part["kind"] not in SILENT
             for one in part["examples"] if one.get("token_str")]
    return sorted(set(filter(None, peaks)), key=lambda token: (-peaks.count(token), peaks.index(token)))


def packed_example(example: Example) -> list[Any]:
    """[code, piece, piece ...]: a piece is a string, [text, code] if coloured, or [text, code, 1] for the marked one.

    Where the example says what code was needed to fire, [code, needed] stands first.
    """
    needed = example.get("needed")
    packed: list[Any] = [example["score"] if needed is None else [example["score"], needed]]
    for piece in example_pieces(example):
        if piece.act or piece.peak:
            packed.append([piece.text, piece.act] + [1] * piece.peak)
        elif isinstance(packed[-1], str):
            packed[-1] += piece.text
        else:
            packed.append(piece.text)
    return packed


def _text(packed: list[Any]) -> str:
    return "".join(piece if isinstance(piece, str) else piece[0] for piece in packed[1:])


def _rounded(value: Any) -> Any:
    """Floats with four digits, as integers where they are whole; NaN and infinities become None."""
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        short = float(f"{value:.4g}")
        return int(short) if short.is_integer() and abs(short) < 1e15 else short
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list | tuple) else value


def add_words(words: Words, row: int, texts: Sequence[str]) -> None:
    """Note that the texts of this row of the index hold their words; rows come in ascending order."""
    for word in set(WORD.findall("\n".join(texts).lower())):
        words.setdefault(word[:LONGEST_WORD], array("I")).append(row)


def bucket_of(word: str) -> int:
    """The part of the word index that holds a word: told by its first two characters, so a beginning is enough."""
    return (31 * ord(word[0]) + (ord(word[1]) if len(word) > 1 else 0)) % N_BUCKETS


def word_buckets(words: Words) -> list[dict[str, str]]:
    """For each bucket, word -> rows as text: the gaps between them, five bits a character, the lowest first.

    A character below 32 in DIGITS ends a gap.
    """
    buckets: list[dict[str, str]] = [{} for _ in range(N_BUCKETS)]
    short = [_gap(size) for size in range(1 << 10)]
    for word in sorted(words):
        rows, before, parts = words[word], -1, []
        for row in rows:
            if row != before:  # two long words can have one beginning
                gap = row - before
                parts.append(short[gap] if gap < len(short) else _gap(gap))
            before = row
        buckets[bucket_of(word)][word] = "".join(parts)
    return buckets


def _gap(size: int) -> str:
    text = ""
    while size >= 32:
        text += DIGITS[32 + size % 32]
        size //= 32
    return text + DIGITS[size]
