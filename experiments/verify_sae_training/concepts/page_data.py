"""What the page shows of each latent, put together from the files of step 4 and what notebook 05 measured.

    write_page(path, about, page_latents(known))           # known: Known; write_page: concepts/page_files.py

One latent at a time, so that any number of latents fits into memory. What is not known is left out.
"""
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from concepts.coherence import interest
from concepts.counts import HISTOGRAM_BINS
from concepts.facts import Corpus, Facts
from lib.environment import InputError
from lib.files import read_json
from lib.schemas import COUNT, Number, Schema, Text

SEVERAL = ("stability", "seeds", "layers")  # what only several SAEs can say
SHARE = Number(float, -1, 1)
PAGE = Text(r"\.\./[A-Za-z0-9_%][\w.\-%]*/concepts\.html#[0-9]+")
# Written by the notebook that compares SAEs; "layers" may name the page of the other SAE.
MATCH = {"sae": str, "latent": COUNT, "correlation": SHARE}
STABILITY = Schema({"sae_hash": str, "latents": {Text(r"0|[1-9][0-9]{0,8}"): {
    "stability?": SHARE, "seeds?": [MATCH],
    "layers?": [MATCH | {"layer": str, "name?": (str, None), "href?": PAGE}],
}}}, remedy="delete it and run the notebook that compares SAEs again")


class Known(NamedTuple):
    """All that is known of the latents of one SAE."""

    stats: dict[str, Tensor]
    """The columns of latent_stats.safetensors, [F]."""
    corpus: Corpus
    """Of the run that the statistics are of."""
    concepts: Mapping[int, dict[str, Any]]
    """Entries of concepts.json."""
    facts: Facts | None = None
    """None: an older store, without latent_facts.safetensors."""
    older: tuple[Mapping[int, list[Any]], Mapping[int, list[Any]]] = ({}, {})
    """Then: top texts, and examples from the middle, by latent."""
    token: Callable[[int], str] | None = None
    """The text of a token id; None: the piece of a text where it first stands."""
    logits: tuple[Tensor, Tensor] | None = None
    """Of concepts.directions.logit_effects; None without a direct view."""
    effects: Mapping[int, dict[str, Any]] = {}
    """Entries of concepts.effects.next_token_effects."""
    near: Mapping[int, Sequence[tuple[int, float]]] = {}
    """The closest dictionary rows and their cosines."""
    positions: Tensor | None = None
    """Places on the map, [F, 2]."""
    stability: Mapping[int, dict[str, Any]] = {}
    """Of read_stability."""


def page_latents(known: Known) -> Iterator[dict[str, Any]]:
    """The data of each living latent for write_page of concepts/page_files.py, ascending."""
    n_tokens = len(known.corpus.spans)
    for latent in known.stats["fires"].nonzero()[:, 0].tolist():
        numbers = {name: float(column[latent]) for name, column in known.stats.items() if name != "fires"}
        fires = int(known.stats["fires"][latent])
        entry, effect = known.concepts.get(latent), known.effects.get(latent)
        data = {"latent": latent, "fires": fires, "frequency": fires / n_tokens, **numbers, "entry": entry,
                "near": [list(pair) for pair in known.near.get(latent, ())], "effect": effect,
                **{key: value for key, value in known.stability.get(latent, {}).items() if key in SEVERAL}}
        if entry and entry.get("f1") is not None:
            data["interest"] = interest(entry, effect["ablated"]["kl"] if effect else None)
        if known.positions is not None:
            data["map"] = tuple(known.positions[latent].tolist())
        if known.logits is not None and known.token is not None:
            data |= dict(zip(("promotes", "demotes"), logit_lists(known.logits, latent, known.token)))
        if known.facts is None:
            data |= {"top": known.older[0].get(latent, []), "middle": known.older[1].get(latent, [])}
        else:
            data |= _from_facts(known, known.facts, latent)
        yield data


def _from_facts(known: Known, facts: Facts, latent: int) -> dict[str, Any]:
    shares = token_table(facts, latent, known.corpus, known.token)
    edges = torch.linspace(0, float(facts.tensors["max"][latent]), HISTOGRAM_BINS + 1, dtype=torch.double)
    return {
        "histogram": {"edges": edges.tolist(), "counts": facts.tensors["histogram"][latent].tolist()},
        "intervals": facts.groups(latent, known.corpus),
        "token_share": shares, "tokens": [line[0] for line in shares[:6]],
        "cofiring": [list(line) for line in facts.beside(latent)],
    }


def token_table(
    facts: Facts, latent: int, corpus: Corpus, token: Callable[[int], str] | None = None
) -> list[list[Any]]:
    """[token, share of the latent's activation, firings, mean code, share of its occurrences that fire], most first."""
    ids = corpus.rows["token_id"]
    return [[token(int(ids[row])) if token else corpus.slice(row), *rest] for row, *rest in facts.tokens(latent)]


def logit_lists(
    logits: tuple[Tensor, Tensor], latent: int, token: Callable[[int], str]
) -> list[list[tuple[str, float]]]:
    """The tokens that a latent raises, and those that it lowers, with the change of their logits."""
    return [[(token(i), change) for i, change in zip(*side)]
            for side in zip(logits[0][latent].tolist(), logits[1][latent].tolist())]


def read_stability(path: Path, sae_hash: str) -> dict[int, dict[str, Any]]:
    """Entries of stability.json by latent: "stability", the mean correlation with its match over other seeds, the
    matches themselves ("seeds"), and those in other layers ("layers"). Empty if there is no such file.

    Raises InputError if it is damaged or about another SAE.
    """
    if not path.exists():
        return {}
    content = read_json(path, STABILITY)
    if content["sae_hash"] != sae_hash:
        raise InputError(f"{path} is about another SAE; {STABILITY.remedy}")
    return {int(latent): entry for latent, entry in content["latents"].items()}
