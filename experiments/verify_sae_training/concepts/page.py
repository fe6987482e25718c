"""Texts with coloured tokens, and a page of all concepts that opens offline. All text is escaped."""
import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lib.files import write_text

TEMPLATE = Path(__file__).with_name("page.html")
MARGIN = 60  # characters of plain text shown before and after the coloured tokens
Example = dict[str, Any]  # of top_texts.json
Concept = dict[str, Any]  # of concepts.json
# For an HTML tag: notebooks read a formula, which may hold a link, between two dollar signs.
AS_TEXT = 'class="tex2jax_ignore mathjax_ignore"'
COLOUR = "224, 123, 24"  # red, green, blue of a full code


class Piece(NamedTuple):
    """A piece of text as shown, with its code."""

    text: str
    act: float
    """0 where the latent does not fire."""
    peak: bool = False


def pieces(
    text: str, spans: Sequence[Sequence[int]], acts: Sequence[float], peak: int | None = None, margin: int = MARGIN
) -> list[Piece]:
    """Cut a text into coloured tokens, and the plain text between and around them.

    spans: character range of each token, in order; tokens that share characters become one piece with the highest
    code, and an empty one is shown as a dot. acts: their codes. peak: number of the token to mark.
    """
    if not spans:
        return [Piece(_visible(text), 0.0)] if text else []
    first, last = spans[0][0], max(end for _, end in spans)
    start, stop = max(0, first - margin), min(len(text), last + margin)
    if start:  # not in the middle of a word
        start = text.find(" ", start, first) + 1 or first
    if stop < len(text):
        stop = max(text.rfind(" ", last, stop), last)
    found = [Piece(("… " if start else "") + _visible(text[start:first]), 0.0)]
    at = first
    for number, ((begin, end), act) in enumerate(zip(spans, acts)):
        if begin > at:
            found.append(Piece(_visible(text[at:begin]), 0.0))
        piece = Piece(_visible(text[max(begin, at) : end]), float(act), number == peak)
        if not piece.text and end > begin:  # the token before has shown all its characters
            old = found.pop()
            found.append(Piece(old.text, max(old.act, piece.act), old.peak or piece.peak))
        elif piece.text or piece.act:
            core = piece.text.lstrip(" ") or piece.text  # the space before a word stays uncoloured
            found.append(Piece(piece.text[: len(piece.text) - len(core)], 0.0))
            found.append(piece._replace(text=core or "·"))
        at = max(at, end)
    found.append(Piece(_visible(text[at:stop]) + (" …" if stop < len(text) else ""), 0.0))
    return [piece for piece in found if piece.text]


def _visible(text: str) -> str:
    return text.replace("\r", "").replace("\n", "↵")


def example_pieces(example: dict[str, Any]) -> list[Piece]:
    """The pieces of an example of top_texts.json; without a window, only its peak is coloured."""
    peak = [example["char_start"], example["char_end"]] if "char_start" in example else None
    spans = example.get("spans") or ([peak] if peak else [])
    acts = example.get("acts") or [example["score"]] * len(spans)
    number = max(range(len(acts)), key=acts.__getitem__) if acts else None
    return pieces(example["text"], spans, acts, number)


def coloured(shown: Sequence[Piece], scale: float) -> str:
    """HTML of pieces; the higher the code, the deeper the colour. scale: the code of the full colour."""
    parts = []
    for piece in shown:
        text = html.escape(piece.text)
        if not piece.act:
            parts.append(text)
            continue
        alpha = 0.12 + 0.78 * min(1.0, piece.act / scale) if scale > 0 else 0.12
        mark = "outline:1.5px solid currentColor;font-weight:600;" if piece.peak else ""
        style = f"background:rgba({COLOUR},{alpha:.2f});border-radius:3px;{mark}"
        parts.append(f'<span style="{style}" title="{piece.act:.3g}">{text}</span>')
    return f'<span {AS_TEXT} style="white-space:pre-wrap;line-height:1.75">{"".join(parts)}</span>'


def concept_card(
    latent: int, entry: Concept | None, examples: Sequence[Example], middle: Sequence[Example] = ()
) -> str:
    """HTML of one concept for a notebook: name, score, and examples with coloured tokens, each after its code."""
    title = html.escape(entry["name"]) if entry else "no name"
    if not examples:
        return f"<h4>Latent {latent}: dead, it never fires</h4>"
    scale = examples[0]["score"]
    score = "" if not entry or entry.get("score") is None else f" · held-out balanced accuracy {entry['score']:.2f}"
    if score and entry and entry.get("judge", "rule") != "rule":
        score += f", judged by {html.escape(str(entry['judge']))}"
    rows = []
    for heading, part in (("", examples), ("from the middle of its range", middle)):
        if heading and part:
            rows.append(f'<tr><td></td><td style="text-align:left;opacity:.65">{heading}</td></tr>')
        cell = 'style="text-align:right;opacity:.7;vertical-align:top;padding-top:.55em"'
        for example in part:
            shown = coloured(example_pieces(example), scale)
            number = f"{example['score']:.2f}"
            rows.append(f'<tr><td {cell}>{number}</td><td style="text-align:left">{shown}</td></tr>')
    heading = f'<h4 style="margin-bottom:.3em">Latent {latent}: {title}<small>{score}</small></h4>'
    return f"<div {AS_TEXT}>{heading}<table>{''.join(rows)}</table></div>"


def page_concept(
    latent: int, entry: Concept | None, stats: dict[str, float], examples: Sequence[Example], middle: Sequence[Example],
    promotes: Sequence[str] = (), near: Sequence[tuple[int, float]] = (), effect: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The data of one concept on the page.

    stats: fires, max, mean_active, p99, and frequency (share of tokens). promotes: tokens whose logits the latent's
    direction raises. near: (latent, cosine) of the dictionary rows closest to its own. effect: an entry of
    concepts.effects.next_token_effects.
    """
    entry = entry or {"name": "", "description": "", "source": "none"}
    keys = ("name", "description", "notes", "score", "precision", "recall", "f1", "baseline", "source", "model",
            "judge")
    return {
        "latent": latent, **{key: entry.get(key) for key in keys},
        **{key: _short(value) for key, value in stats.items()},
        "top": [_packed(example) for example in examples], "middle": [_packed(example) for example in middle],
        "promotes": list(promotes), "near": [[other, _short(cosine)] for other, cosine in near], "effect": effect,
    }


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _packed(example: dict[str, Any]) -> list[Any]:
    """[code, piece, piece ...]: a piece is a string, [text, code] if coloured, or [text, code, 1] for the peak."""
    packed: list[Any] = [_short(example["score"])]
    for piece in example_pieces(example):
        if piece.act:
            packed.append([piece.text, _short(piece.act)] + [1] * piece.peak)
        elif isinstance(packed[-1], str):
            packed[-1] += piece.text
        else:
            packed.append(piece.text)
    return packed


def write_page(path: Path, title: str, facts: Sequence[str], concepts: Sequence[dict[str, Any]]) -> None:
    """Write the page of all concepts: one file that loads nothing. facts: short lines under the title."""
    content = {"facts": list(facts), "concepts": list(concepts)}
    data = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # Inside <script>, only "<" could end the data; the other two are escaped for old parsers.
    for character in "<>&":
        data = data.replace(character, f"\\u{ord(character):04x}")
    values = {"title": html.escape(title), "colour": COLOUR, "data": data}
    # In one pass, so that a title or text that looks like a placeholder stays as it is.
    write_text(path, re.sub(r"\{\{(\w+)\}\}", lambda found: values[found[1]], TEMPLATE.read_text(encoding="utf-8")))
