"""The file of examples of step 4, top_texts.json; the names, concepts.json, are in concepts/dictionary.py."""
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from concepts.firings import Codes, Firings, codes_at
from lib import schemas
from lib.environment import InputError
from lib.files import read_json, read_tensors, write_text

SCHEMA_VERSION = 1
WINDOW = (20, 10)  # stored tokens shown before and after the peak of an example
Examples = dict[int, list[dict[str, Any]]]


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
    }


def read_top_texts(path: Path) -> tuple[dict[str, Any], Examples, Examples]:
    """What write_top_texts wrote: meta, examples by latent, examples from the middle by latent.

    A file that has nothing but latents reads as well. Raises InputError if it is missing or damaged.
    """
    content = read_json(path, schemas.TOP_TEXTS)
    top = {int(key): value for key, value in content.items() if key not in ("meta", "middle")}
    middle = {int(key): value for key, value in content.get("middle", {}).items()}
    meta = content.get("meta", {})
    n_latents = meta.get("n_latents")
    if n_latents is not None and not top.keys() == middle.keys() == set(range(n_latents)):
        raise InputError(f"{path} is damaged: it has not the examples of {n_latents} latents; "
                         f"{schemas.TOP_TEXTS.remedy}")
    return meta, top, middle


def read_latent_stats(path: Path, n_latents: int) -> dict[str, Tensor]:
    """latent_stats.safetensors of step 4: the columns of Firings.stats(), [n_latents] each. InputError if it is damaged
    or another SAE's.
    """
    return read_tensors(path, schemas.LATENT_STATS, finite=True, F=n_latents)
