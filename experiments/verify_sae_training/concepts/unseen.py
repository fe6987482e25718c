"""A line for the latents that no token names are made from shows: they fire on held-out texts only, or so rarely that
in a large corpus, of which every n-th text is used, no such text has them.

    named |= name_unseen(codes, latents)       # after name_latents, for those that it left out
"""
from collections.abc import Collection
from typing import Any

import numpy as np
import torch

from concepts.codes import Codes
from concepts.patterns import Patterns, find_patterns
from concepts.wording import describe, words_of

FIRINGS = 16  # of a latent, the strongest, that its line is made from


def name_unseen(codes: Codes, latents: Collection[int]) -> dict[int, dict[str, Any]]:
    """An entry of concepts.json without a score for each of these latents that fires at all: the words it fires in."""
    row, latent, value = _strongest(codes, latents)
    texts = np.unique(codes.rows["text_id"].numpy()[row])
    keep = np.isin(codes.rows["text_id"].numpy(), texts)
    patterns = find_patterns(codes.texts, {name: column[keep] for name, column in codes.rows.items()})
    place = (np.cumsum(keep) - 1)[row]
    entries = {}
    for one in dict.fromkeys(latent.tolist()):
        code = np.zeros(patterns.n, np.float32)
        code[place[latent == one]] = value[latent == one]
        entries[one] = _line(patterns, code)
    return entries


def _strongest(codes: Codes, latents: Collection[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, latents and codes of the FIRINGS strongest firings of each, by latent."""
    wanted = torch.zeros(codes.n_latents, dtype=torch.bool)
    wanted[list(latents)] = True
    parts = [(np.empty(0, int), np.empty(0, int), np.empty(0, np.float32))]
    for start, values, indices in codes:
        where, slot = ((values > 0) & wanted[indices.long()]).nonzero(as_tuple=True)
        new = (start + where).numpy(), indices[where, slot].numpy(), values[where, slot].numpy()
        row, latent, value = (np.concatenate(pair) for pair in zip(*parts, new))
        order = np.lexsort((row, -value, latent))
        rank = np.arange(len(order)) - np.searchsorted(latent[order], latent[order])
        order = order[rank < FIRINGS]
        parts = [(row[order], latent[order], value[order])]
    return parts[0]


def _line(patterns: Patterns, code: np.ndarray) -> dict[str, Any]:
    fires = np.flatnonzero(code)
    words, _ = words_of(patterns, fires, code)
    if not words:  # white space, or a piece of a character
        token = list(patterns.names["token"])[patterns.column("token")[fires[0]]]
        words, _ = describe(patterns, "token", token, code)
    name = ", ".join(words)
    return {
        "name": name, "scored_name": name,
        "description": f"Fires on no token that names are made from; elsewhere on {name}",
        "score": None, "score_kind": None, "judge": None, "rule": None, "coherence": None, "n_examples": 0,
        "backend": "offline", "model": None, "prompt_hash": None, "source": "offline", "edited_by": None, "notes": "",
    }
