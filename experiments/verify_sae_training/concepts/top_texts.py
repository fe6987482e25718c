"""top_texts.json: for each latent the texts on which it fires most, for people and other programs.

Two layouts are read. The first one, of older stores, also has examples from the "middle" of a latent's range, and with
each example the character ranges ("spans") of the tokens around it; those are now in concepts/facts.py.
"""
import json
from pathlib import Path
from typing import Any

from concepts.facts import AGAIN, Corpus, Facts, read_facts
from lib.environment import InputError
from lib.files import read_json, write_text
from lib.schemas import COUNT, POSITIVE, Schema, Text

SCHEMA_VERSION = 2
LONGEST = 600  # characters kept of a text; around the peak, where it is longer
FIELDS = ("score", "token_str", "token_idx", "text_id", "char_start", "char_end", "window", "acts")
Examples = dict[int, list[dict[str, Any]]]
LATENT = Text(r"0|[1-9][0-9]{0,8}")
EXAMPLE = {"text": str, "score": float, "token_str": str, "acts?": [float], "spans?": [[COUNT]], "char_start?": COUNT,
           "char_end?": COUNT}
TOP_TEXTS = Schema({
    "meta?": {"n_tokens?": POSITIVE, "n_texts?": COUNT, "n_latents?": POSITIVE, "sae_hash?": str},
    "middle?": {LATENT: [EXAMPLE]}, LATENT: [EXAMPLE],
}, remedy="delete it and run notebook 04 again", limit=1 << 34)


def write_top_texts(path: Path, facts: Facts, corpus: Corpus, meta: dict[str, Any]) -> None:
    """Write top_texts.json: "meta", and each latent's examples, highest first; one latent per line.

    An example: text (at most LONGEST characters of it, from "text_start" on), score (the code), token_str =
    text[char_start:char_end], token_idx (position in the tokenised text, special tokens included), text_id; `window`
    [first, last], the positions of the stored tokens around the peak, and their codes `acts`.
    """
    n_latents = len(facts.tensors["fires"])
    meta = {"schema_version": SCHEMA_VERSION, **meta, "n_latents": n_latents, "top": facts.places[0].beyond}
    lines = [_line("meta", meta)]
    lines += [_line(latent, [_cut(example) for example in facts.top(latent, corpus)]) for latent in range(n_latents)]
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def _cut(example: dict[str, Any]) -> dict[str, Any]:
    text, start, end = (example[name] for name in ("text", "char_start", "char_end"))
    first = max(0, min((start + end - LONGEST) // 2, len(text) - LONGEST, start))
    kept = {name: example[name] for name in FIELDS} | {"char_start": start - first, "char_end": end - first}
    return {"text": text[first : max(first + LONGEST, end)], **kept, **({"text_start": first} if first else {})}


def _line(key: int | str, value: Any) -> str:
    return f'"{key}": {json.dumps(value, ensure_ascii=False)}'


def read_top_texts(path: Path) -> tuple[dict[str, Any], Examples, Examples]:
    """Meta, examples by latent, and in an older file examples from the middle by latent.

    A file without "meta" is read too. Raises InputError if it is missing or damaged.
    """
    content = read_json(path, TOP_TEXTS)
    top = {int(key): value for key, value in content.items() if key not in ("meta", "middle")}
    middle = {int(key): value for key, value in content.get("middle", {}).items()}
    meta = content.get("meta", {})
    n_latents = meta.get("n_latents")
    if n_latents is not None and not top.keys() == set(range(n_latents)):
        raise InputError(f"{path} is damaged: it should list {n_latents} latents; {TOP_TEXTS.remedy}")
    return meta, top, middle


def read_examples(folder: Path, n_latents: int, sae_hash: str) -> tuple[Facts | None, Examples, Examples]:
    """What the latents of the SAE in `folder` fire on: facts; of an older store None, top texts and middle ones.

    Raises InputError if neither is there, or it is about another SAE.
    """
    path = folder / "top_texts.json"
    if (facts_file := folder / "latent_facts.safetensors").exists():
        return read_facts(facts_file, n_latents, sae_hash), {}, {}
    meta, top, middle = read_top_texts(path)
    if meta.get("sae_hash") != sae_hash:
        raise InputError(f"{path.name} is about another SAE; {AGAIN}")
    if meta.get("schema_version", 1) >= SCHEMA_VERSION:
        raise InputError(f"{facts_file} is missing; {AGAIN}")
    return None, top, middle
