"""The page of all concepts: one file that opens from disk and loads nothing, or an index and a folder beside it.

    write_page(FOLDER / "concepts.html", {"title": "Concepts of m", "sae_hash": ..., ...}, latents)

latents: one dict for each living latent, read once, so it may be a generator. page_index.py lists the keys. What is not
measured is left out, and the page shows no place for it.

    source       offline, llm, human, none          frequency    share of tokens on which it fires
    score        held-out balanced accuracy          max, mean_active, p99   codes, in the SAE's units
    effect_kl    nats, its code set to 0             stability    mean over seeds of the best match's correlation
    histogram    {"edges": [n + 1], "counts": [n]}, its codes over 0
    intervals    [{"kind": top, interval, near_miss or zero, "low", "high": codes, "share": of its firings,
                 "examples": as in top_texts.json, of near misses with "needed", the code that fires}], strongest first
    token_share  [[token, share of its activation, firings, mean code, share of its occurrences]], largest first
    promotes, demotes   [[token, logit]] or [token]   effect       entry of concepts.effects.next_token_effects
    near         [[latent, cosine]]
    cofiring     [[latent, value, tokens on which both fire]], of the kind about["cofiring"]
    seeds        [{"sae", "latent", "correlation"}]  layers       [{"sae", "layer", "latent", "correlation", "name",
                 "href": relative}]

about: title, facts (lines under it), sae, sae_hash (key of what a person writes on the page), n_latents, n_tokens,
dead, and in words map, interest, units, cofiring.
"""
import base64
import hashlib
import html
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from concepts.page_index import INDEX, N_BUCKETS, UNSPACED, Row, Words, add_words, packed_latent, word_buckets
from lib.environment import InputError
from lib.files import read_bytes, write_text

PARTS = Path(__file__).with_name("page_parts")
SCRIPTS = ("data.js", "list.js", "detail.js", "map.js", "edits.js", "main.js")
INLINE_LATENTS = 4096  # beyond it, texts stand in a folder of their own
PER_PART = 64  # latents whose details are read at once
MAX_PAGE = 1 << 30
CSP = re.compile(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">')


def write_page(path: Path, about: dict[str, Any], latents: Iterable[dict[str, Any]]) -> list[Path]:
    """Write the page, and beyond INLINE_LATENTS its folder <stem>_data; returns what was written.

    A part's name holds a digest of it, so a page reads its own parts or none, and the old page works until the new one
    takes its place. Raises ValueError for a latent's unknown keys.
    """
    columns: dict[str, list[Any]] = {key: [] for key in INDEX}
    words: Words = {}
    folder = path.with_name(f"{path.stem}_data")
    inline: list[str] = []
    names: list[str] = []
    for details in _details(latents, columns, words):
        inline.append(_json(details))
        if len(columns["latent"]) > INLINE_LATENTS:
            names += [_write_part(folder, "texts", text) for text in inline]
            inline = []
    buckets = [_json(bucket) for bucket in word_buckets(words)]
    if names:
        names += [_write_part(folder, "words", text) for text in [*inline, *buckets]]
    index = {
        "about": about, "per_part": PER_PART, "n_buckets": N_BUCKETS,
        "columns": {key: column for key, column in columns.items() if any(value is not None for value in column)},
        "parts": {"folder": folder.name, "names": names} if names else None,
    }
    blocks = {f"part-{number}": text for number, text in enumerate([*inline, *buckets])} if not names else {}
    write_text(path, _assembled(about["title"], {"data": _json(index), **blocks}))
    for old in folder.glob("*_*.js"):
        if old.stem not in names:
            old.unlink()
    if not names and folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
    return [path, folder] if names else [path]


def _details(
    latents: Iterable[dict[str, Any]], columns: dict[str, list[Any]], words: Words
) -> Iterator[list[Row]]:
    """The details of PER_PART latents at a time; fills the index's columns and the words on the way."""
    details: list[Row] = []
    for number, latent in enumerate(tqdm(latents, desc="writing the page", unit="latent")):
        row, detail, texts = packed_latent(latent)
        for key, column in columns.items():
            column.append(row[key])
        add_words(words, number, texts)
        details.append(detail)
        if len(details) == PER_PART:
            yield details
            details = []
    if details:
        yield details


def _json(value: Any) -> str:
    """JSON on one line, without the characters that could end a script; the last two end lines in old scripts."""
    data = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        data = data.replace(character, f"\\u{ord(character):04x}")
    return data


def _write_part(folder: Path, kind: str, data: str) -> str:
    """Write a part that a page loads as a script, since a page on disk may fetch nothing; returns its name."""
    name = f"{kind}_{hashlib.sha256(data.encode()).hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.js").write_text(f'page.part("{name}",{data});\n', encoding="utf-8")
    return name


def _assembled(title: str, blocks: dict[str, str]) -> str:
    """The page's HTML with blocks of JSON by their ids.

    Its scripts and styles run by their digests: nothing else that gets into it can.
    """
    style = (PARTS / "page.css").read_text(encoding="utf-8")
    script = "".join((PARTS / name).read_text(encoding="utf-8") for name in SCRIPTS).replace("UNSPACED", UNSPACED)
    script = f'"use strict";\n(() => {{{script}}})();\n'  # its names are its own, but for window.page
    policy = f"default-src 'none'; img-src data:; style-src {_digest(style)}; script-src 'self' {_digest(script)}"
    data = "\n".join(f'<script type="application/json" id="{name}">{text}</script>' for name, text in blocks.items()
                     if text != "{}")
    values = {"title": html.escape(title), "policy": policy, "style": style, "script": script, "data": data}
    # In one pass, so that a title or text that looks like a placeholder stays as it is.
    template = (PARTS / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: values[found[1]], template)


def _digest(source: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"


def live_page(path: Path, scripts: Sequence[str], styles: Sequence[str] = ()) -> str:
    """The text of a written page with more scripts and styles, which may connect to the page's own server.

    scripts, styles: addresses relative to the page. Raises InputError if there is no page, or one of older code.
    """
    again = "run notebook 05 again"
    head, found, rest = read_bytes(path, MAX_PAGE, again).decode("utf-8").partition("</title>")
    policy = CSP.search(head)
    if not found or policy is None or "script-src 'self'" not in policy[1]:
        raise InputError(f"{path} was written by older code; {again}")
    wider = policy[1].replace("style-src", "connect-src 'self'; style-src 'self'")
    added = "".join(f'\n<link rel="stylesheet" href="{html.escape(style)}">' for style in styles)
    added += "".join(f'\n<script src="{html.escape(script)}" defer></script>' for script in scripts)
    return head.replace(policy[1], wider) + found + added + rest
