"""Texts with coloured tokens, as pieces and as HTML for notebooks; all text is escaped. page_files.py has the page."""
import html
from collections.abc import Sequence
from typing import Any, NamedTuple

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
    """The pieces of an example of top_texts.json; without a window, only its peak is coloured.

    Marked is the token at char_start and char_end, which need not have the highest code; without them the highest.
    """
    peak = [example["char_start"], example["char_end"]] if "char_start" in example else None
    spans = example.get("spans") or ([peak] if peak else [])
    acts = example.get("acts") or [example["score"]] * len(spans)
    looked_at = [i for i, span in enumerate(spans) if list(span) == peak] or range(len(acts))
    number = max(looked_at, key=acts.__getitem__) if acts else None
    if number is None:
        return pieces(example["text"], spans, acts)
    # Silent tokens are plain text, but the first and the last say how much of the text is shown.
    last = max(range(len(spans)), key=lambda i: spans[i][1])
    kept = [i for i, act in enumerate(acts) if act or i in (0, number, last)]
    return pieces(example["text"], [spans[i] for i in kept], [acts[i] for i in kept], kept.index(number))


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
