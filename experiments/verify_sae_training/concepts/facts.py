"""What is shown of each latent besides its name: collected once into latent_facts.safetensors, read latent by latent.

    misses = near_misses(sae, run.shards(hook), run.rows["text_id"])
    write_facts(path, collect_facts(codes, firings, misses), sae_hash=sae_hash(sae), run_id=run.run_id)
    facts = read_facts(path, sae.n_latents, sae_hash(sae))
    groups = facts.groups(latent, corpus)                  # corpus: Corpus(texts, rows) of the run

The file keeps rows, not texts: it is read together with the texts and rows of the run that it was made on.
"""
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from concepts.codes import Codes
from concepts.counts import code_histograms, cofiring, token_shares
from concepts.examples import (
    INTERVALS,
    NEAR,
    PER_INTERVAL,
    SHORT_WINDOW,
    WINDOW,
    ZERO,
    Misses,
    codes_around,
    over_range,
    silent_rows,
)
from concepts.firings import Firings
from lib.environment import InputError
from lib.files import read_note, read_tensors, write_tensors
from lib.schemas import COUNT, POSITIVE

FACTS = {
    "fires": "int64 F", "max": "float32 F", "histogram": "int64 F H", "rows": "int32 F E",
    "near_scores": "float32 F N", "near_needed": "float32 F N",
    "act_starts": "int64 S", "act_offsets": "int32 A", "act_values": "float32 A",
    "share_rows": "int32 F T", "share": "float32 F T", "share_fires": "int64 F T", "share_mean": "float32 F T",
    "share_fired": "float32 F T", "cofiring": "int32 F C", "cofiring_phi": "float32 F C", "together": "int64 F C",
}
KIND = ("top", "interval", "near_miss", "zero")
NOTE = {"schema_version": 1, "sae_hash": str, "run_id": str, "n_rows": POSITIVE,
        "groups": [[KIND, COUNT, COUNT, COUNT]], "share_rows": COUNT, "cofiring_rows": COUNT, "near_rows": COUNT}
AGAIN = "run 04_name_sae_concepts.ipynb again"
Example = dict[str, Any]


class Corpus:
    """Texts and their tokens, for reading examples."""

    def __init__(self, texts: list[str], rows: dict[str, Tensor]):
        """texts: text_id -> text; rows: text_id, pos, token_id, char_start, char_end, int32 [N], texts adjacent."""
        self.texts = texts
        self.rows = {name: column.numpy() for name, column in rows.items()}
        text_id = self.rows["text_id"]
        starts = np.flatnonzero(np.diff(text_id, prepend=-1))
        ends = np.append(starts[1:], len(text_id))
        self.bounds = dict(zip(text_id[starts].tolist(), zip(starts.tolist(), ends.tolist())))
        self.spans = np.stack([self.rows["char_start"], self.rows["char_end"]], 1)

    def slice(self, row: int) -> str:
        """The row's text."""
        start, end = self.spans[row]
        return self.texts[self.rows["text_id"][row]][start:end]


class Group(NamedTuple):
    """Places of examples of one kind in "rows"."""

    kind: str
    first: int
    beyond: int
    before: int
    """Stored tokens shown before the example's own, and after it."""
    after: int


class Facts:
    """The tensors of FACTS, and the note of NOTE that says what they were made on."""

    def __init__(self, tensors: dict[str, Tensor], note: dict[str, Any]):
        self.tensors, self.note = tensors, note
        self.arrays = {name: tensor.numpy() for name, tensor in tensors.items()}

    @cached_property
    def places(self) -> list[Group]:
        ends = np.cumsum([size for _, size, *_ in self.note["groups"]]).tolist()
        return [Group(kind, first=end - size, beyond=end, before=before, after=after)
                for end, (kind, size, before, after) in zip(ends, self.note["groups"])]

    def groups(self, latent: int, corpus: Corpus) -> list[dict[str, Any]]:
        """A latent's examples by kind: {"kind", "low", "high", "share", "examples"}, strongest first.

        low, high: the range of the codes, of near misses the pre-activations. share: of the latent's firings that lie
        in the range; only of intervals. A group without examples is left out.
        """
        found, highest = [], float(self.arrays["max"][latent])
        n = number = sum(group.kind == "interval" for group in self.places)
        for group in self.places:
            examples = self.examples(latent, group, corpus)
            scores = [example["score"] for example in examples]
            low, high, share = min(scores, default=0.0), max(scores, default=0.0), None
            if group.kind == "interval":
                number -= 1
                counts = np.split(self.arrays["histogram"][latent], n)[number]
                low, high = highest * number / n, highest * (number + 1) / n
                share = float(counts.sum()) / max(1, int(self.arrays["fires"][latent]))
            if examples:
                found.append({"kind": group.kind, "low": low, "high": high, "share": share, "examples": examples})
        return found

    def top(self, latent: int, corpus: Corpus) -> list[Example]:
        """A latent's top texts as in top_texts.json, with the character ranges of the tokens around."""
        return self.examples(latent, self.places[0], corpus, whole=True)

    def examples(self, latent: int, group: Group, corpus: Corpus, whole: bool = False) -> list[Example]:
        """A latent's examples of one group.

        whole: with "acts" and "spans" of all tokens of the window; otherwise of its first and last, the example's own,
        and those that fire, which is all that there is to colour.
        """
        found, rows, arrays = [], corpus.rows, self.arrays
        n_places = arrays["rows"].shape[1]
        for place in range(group.first, group.beyond):
            row = int(arrays["rows"][latent, place])
            if row < 0:
                continue
            text_id, start, end = (int(rows[name][row]) for name in ("text_id", "char_start", "char_end"))
            text, (first, beyond) = corpus.texts[text_id], corpus.bounds[text_id]
            first, beyond = max(first, row - group.before), min(beyond, row + group.after + 1)
            kept = slice(*arrays["act_starts"][latent * n_places + place :][:2])
            offsets, values = arrays["act_offsets"][kept].tolist(), arrays["act_values"][kept].tolist()
            acts = {row + offset: short(act) for offset, act in zip(offsets, values) if first <= row + offset < beyond}
            near = range(first, beyond) if whole else sorted({first, row, beyond - 1, *acts})
            example = {
                "text": text, "score": acts.get(row, 0), "token_str": text[start:end],
                "token_idx": int(rows["pos"][row]), "text_id": text_id, "char_start": start, "char_end": end,
                "window": [int(rows["pos"][first]), int(rows["pos"][beyond - 1])],
                "acts": [acts.get(other, 0) for other in near], "spans": corpus.spans[near].tolist(),
            }
            if group.kind == "near_miss":
                score, needed = (arrays[name][latent, place - group.first] for name in ("near_scores", "near_needed"))
                example |= {"score": short(score), "needed": short(needed)}
            found.append(example)
        return found

    def tokens(self, latent: int) -> list[tuple[int, float, int, float, float]]:
        """The tokens with most of the latent's activation.

        For each: a row that holds it, share of the total activation, firings, mean code, share of the token's
        occurrences that fire the latent.
        """
        names = ("share_rows", "share", "share_fires", "share_mean", "share_fired")
        return [line for line in zip(*(self.arrays[name][latent].tolist() for name in names)) if line[0] >= 0]

    def on_word(self, word: str, corpus: Corpus) -> np.ndarray:
        """The share of each latent's activation on tokens that read `word`, whatever their case, [F]."""
        rows, place = np.unique(self.arrays["share_rows"], return_inverse=True)
        texts = [corpus.slice(row).strip().lower() if row >= 0 else None for row in rows.tolist()]
        same = np.array([text == word.strip().lower() for text in texts])
        return (self.arrays["share"] * same[place.reshape(self.arrays["share"].shape)]).sum(1)

    def beside(self, latent: int) -> list[tuple[int, float, int]]:
        """The latents that fire with it most above chance: number, phi, tokens on which both fire."""
        columns = (self.arrays[name][latent].tolist() for name in ("cofiring", "cofiring_phi", "together"))
        return [line for line in zip(*columns) if line[0] >= 0]


def short(value: float) -> float:
    """Six significant digits."""
    return float(f"{value:.6g}")


def collect_facts(codes: Codes, firings: Firings, misses: Misses | None = None) -> Facts:
    """All facts of the latents, in six passes over the codes. misses: None where there are no activations."""
    shares, together = token_shares(codes, firings.fires), cofiring(codes, firings.fires)
    if misses is None:
        misses = Misses.none(codes.n_latents)
    groups: list[list[Any]] = [
        ["top", firings.top_rows.shape[1], *WINDOW], *[["interval", PER_INTERVAL, *SHORT_WINDOW]] * INTERVALS,
        ["near_miss", NEAR, *SHORT_WINDOW], ["zero", ZERO, *SHORT_WINDOW],
    ]
    rows = torch.cat([firings.top_rows, over_range(codes, firings), misses.rows, silent_rows(codes, shares)], 1)
    sizes = torch.tensor([window for _, size, *window in groups for _ in range(size)])
    windows = codes_around(codes, rows, sizes)
    note = {"schema_version": 1, "n_rows": len(codes), "groups": groups, "share_rows": shares.n_rows,
            "cofiring_rows": together.n_rows, "near_rows": misses.n_rows}
    return Facts({
        "fires": firings.fires, "max": firings.max, "histogram": code_histograms(codes, firings.max),
        "rows": rows.int(), "near_scores": misses.scores, "near_needed": misses.needed, "act_starts": windows.starts,
        "act_offsets": windows.offsets, "act_values": windows.values, "share_rows": shares.rows.int(),
        "share": shares.share, "share_fires": shares.fires, "share_mean": shares.mean, "share_fired": shares.fired,
        "cofiring": together.latents.int(), "cofiring_phi": together.phi, "together": together.together,
    }, note)


def write_facts(path: Path, facts: Facts, sae_hash: str, run_id: str) -> None:
    """Write latent_facts.safetensors."""
    write_tensors(path, facts.tensors, facts.note | {"sae_hash": sae_hash, "run_id": run_id})


def read_facts(path: Path, n_latents: int, sae_hash: str) -> Facts:
    """What write_facts wrote. Raises InputError if it is missing, damaged or about another SAE."""
    note, tensors = read_note(path, NOTE), read_tensors(path, FACTS, finite=True, F=n_latents)
    if note["sae_hash"] != sae_hash:
        raise InputError(f"{path} is about another SAE; {AGAIN}")
    starts, (n_cells, n_near) = tensors["act_starts"], (tensors["rows"].numel(), tensors["near_scores"].shape[1])
    sizes = [size for _, size, *_ in note["groups"]]
    near = sum(size for kind, size, *_ in note["groups"] if kind == "near_miss")
    n_intervals = sum(kind == "interval" for kind, *_ in note["groups"])
    sound = (
        len(starts) == n_cells + 1 and starts[0] == 0 and starts[-1] == len(tensors["act_values"])
        and (starts.diff() >= 0).all() and sum(sizes) == tensors["rows"].shape[1] and near == n_near
        and tensors["histogram"].shape[1] % max(1, n_intervals) == 0
        and all(_within(tensors[name], note["n_rows"]) for name in ("rows", "share_rows"))
        and _within(tensors["cofiring"], n_latents)
    )
    if not sound:
        raise InputError(f"{path} is damaged: its tables do not fit together; {AGAIN}")
    return Facts(tensors, note)


def _within(numbers: Tensor, n: int) -> bool:
    return not numbers.numel() or bool((numbers >= -1).all() and (numbers < n).all())
