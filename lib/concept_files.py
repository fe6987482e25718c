"""The files of step 4: top_texts.json, and concepts.json with its table for people."""
import csv
import io
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lib.concepts import Codes, Firings, codes_at
from lib.environment import InputError, log
from lib.store import read_json, write_json, write_text

SCHEMA_VERSION = 1
SOURCES = ("offline", "llm", "human")
WINDOW = (20, 10)  # stored tokens shown before and after the peak of an example
Examples = dict[int, list[dict[str, Any]]]
Concepts = dict[int, dict[str, Any]]


def write_top_texts(
    path: Path, codes: Codes, firings: Firings, meta: dict[str, Any], window: tuple[int, int] = WINDOW
) -> None:
    """Write top_texts.json: "meta", a list of examples for each latent, best first, and under "middle" further ones.

    An example: text, score (the code), token_str = text[char_start:char_end], token_idx (position in the tokenised
    text, special tokens included), text_id, char_start, char_end; window [first, last] positions of the stored tokens
    around the peak, their codes `acts` and character ranges `spans`. One latent a line.
    """
    rows = torch.cat([firings.top_rows, firings.middle_rows], 1)
    n_latents, n_examples = rows.shape
    offsets = torch.arange(-window[0], window[1] + 1)
    peak = rows.reshape(-1, 1)
    around = peak + offsets
    inside = around.clamp(0, len(codes) - 1)
    text_id = codes.rows["text_id"]
    around[(inside != around) | (peak < 0) | (text_id[inside] != text_id[peak.clamp(min=0)])] = -1
    latent = torch.arange(n_latents).repeat_interleave(n_examples * len(offsets))
    acts = codes_at(codes, around.reshape(-1), latent).view(n_latents, n_examples, -1)
    around = around.view(n_latents, n_examples, -1)

    def examples(latent: int, first: int, last: int) -> list[dict[str, Any]]:
        there = [e for e in range(first, last) if rows[latent, e] >= 0]
        return [_example(codes, int(rows[latent, e]), around[latent, e], acts[latent, e]) for e in there]

    top = firings.top_rows.shape[1]
    meta = {"schema_version": SCHEMA_VERSION, **meta, "n_latents": n_latents, "top": top}
    best = [_line(latent, examples(latent, 0, top)) for latent in range(n_latents)]
    middle = [_line(latent, examples(latent, top, n_examples)) for latent in range(n_latents)]
    inner = ",\n".join([_line("meta", meta), *best, '"middle": {\n' + ",\n".join(middle) + "\n}"])
    write_text(path, "{\n" + inner + "\n}\n")


def _line(key: int | str, value: Any) -> str:
    return f'"{key}": {json.dumps(value, ensure_ascii=False)}'


def _example(codes: Codes, row: int, around: Tensor, acts: Tensor) -> dict[str, Any]:
    there = around >= 0
    near, columns = around[there], codes.rows
    text_id, start, end = (int(columns[name][row]) for name in ("text_id", "char_start", "char_end"))
    rounded = [float(f"{value:.6g}") if value else 0 for value in acts[there].tolist()]
    return {
        "text": codes.texts[text_id], "score": rounded[near.tolist().index(row)],
        "token_str": codes.texts[text_id][start:end],
        "token_idx": int(columns["pos"][row]), "text_id": text_id, "char_start": start, "char_end": end,
        "window": [int(columns["pos"][near[0]]), int(columns["pos"][near[-1]])], "acts": rounded,
        "spans": torch.stack([columns["char_start"][near], columns["char_end"][near]], 1).tolist(),
    }  # fmt: skip


def read_top_texts(path: Path) -> tuple[dict[str, Any], Examples, Examples]:
    """What write_top_texts wrote: meta, examples by latent, examples from the middle by latent.

    A file that has nothing but latents reads as well. Raises InputError if it is missing or damaged.
    """
    content = read_json(path)
    top = {int(key): value for key, value in content.items() if key.isdigit()}
    middle = {int(key): value for key, value in content.get("middle", {}).items()}
    return content.get("meta", {}), top, middle


def write_concepts(path: Path, header: dict[str, Any], named: Concepts) -> Concepts:
    """Write concepts.json and return what it now holds. header: sae_hash, run_id, model_id, hook, n_latents.

    Entries with source "human" in the file that is there are kept, unless `named` has a person's own for the same
    latent. If that file is about another SAE, it is moved
    aside to concepts_<its sae_hash>.json, so that nothing a person wrote is lost.
    """
    kept: Concepts = {}
    if path.exists():
        old = read_concepts(path)
        if old["sae_hash"] == header["sae_hash"]:
            newer = {latent for latent, entry in named.items() if entry["source"] == "human"}
            kept = {i: entry for i, entry in old["concepts"].items() if entry["source"] == "human" and i not in newer}
        else:
            aside = path.with_name(f"{path.stem}_{old['sae_hash']}.json")
            os.replace(path, aside)
            log.info("%s was about another SAE and is now %s", path.name, aside.name)
    concepts = dict(sorted((named | kept).items()))
    by_key = {str(latent): entry for latent, entry in concepts.items()}
    write_json(path, {"schema_version": SCHEMA_VERSION, **header, "concepts": by_key})
    return concepts


def read_concepts(path: Path, sae_hash: str | None = None, dead: Iterable[int] = ()) -> dict[str, Any]:
    """Read and check concepts.json; the keys of "concepts" become int.

    Raises InputError for a missing or damaged file, another schema, a latent the SAE does not have, an entry without a
    name or of unknown source, a file about another SAE than `sae_hash`, and a name for a latent in `dead`.
    """
    content = read_json(path)
    if not isinstance(content, dict) or content.get("schema_version") != SCHEMA_VERSION:
        raise InputError(f"{path} is no concepts.json of schema {SCHEMA_VERSION}; run 04_name_sae_concepts.ipynb again")
    lacking = [key for key in ("sae_hash", "n_latents", "concepts") if key not in content]
    if lacking:
        raise InputError(f"{path} lacks {', '.join(lacking)}; run 04_name_sae_concepts.ipynb again")
    if sae_hash is not None and content["sae_hash"] != sae_hash:
        other = f"names the latents of another SAE ({content['sae_hash']}, not {sae_hash})"
        raise InputError(f"{path} {other}; run 04_name_sae_concepts.ipynb again")
    dead = set(dead)
    concepts = {}
    for key, entry in content["concepts"].items():
        if not key.isdigit() or int(key) >= content["n_latents"]:
            raise InputError(f"{path} names latent {key}, but the SAE has latents 0 to {content['n_latents'] - 1}")
        if int(key) in dead:
            raise InputError(f"{path} names latent {key}, which never fires; delete that entry")
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str) or entry.get("source") not in SOURCES:
            raise InputError(f"{path}: latent {key} needs a name and a source ({', '.join(SOURCES)})")
        concepts[int(key)] = entry
    return content | {"concepts": concepts}


CSV_COLUMNS = ("latent", "name", "description", "notes", "edited_by", "source", "backend", "model", "judge", "score")


def concepts_to_csv(concepts: Concepts, path: Path) -> None:
    """Write a table that a person can edit: one concept a line."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, CSV_COLUMNS, extrasaction="ignore")
    writer.writeheader()
    writer.writerows({"latent": latent, **entry} for latent, entry in concepts.items())
    write_text(path, buffer.getvalue())


def concepts_from_csv(path: Path, concepts: Concepts) -> Concepts:
    """The concepts with the table's changes: where name, description or notes differ, the source becomes "human"."""
    changed = dict(concepts)
    with open(path, encoding="utf-8-sig", newline="") as file:
        for line in csv.DictReader(file):
            if not (line.get("latent") or "").isdigit() or not line.get("name"):
                raise InputError(f"{path}: every line needs a latent's number and a name")
            entry = changed.get(int(line["latent"]), {})
            new = {key: line[key] for key in ("name", "description", "notes", "edited_by") if line.get(key) is not None}
            if any((entry.get(key) or "") != value for key, value in new.items()):
                changed[int(line["latent"])] = entry | new | {"source": "human"}
    return changed
