"""Dashboards of all latents in the files that Neuronpedia imports in bulk."""
import gzip
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from concepts.codes import Codes
from concepts.counts import HISTOGRAM_BINS, code_histograms
from concepts.dictionary import Concepts
from concepts.directions import token_text
from exchange.facts import Facts
from lib.environment import InputError
from lib.files import atomic_write, fingerprint, write_text
from lib.outputs import safe_name
from lib.sae import SAE

CREATOR = "sae-workbench"
TOKENS_LISTED = 10  # tokens that a latent's direction raises and lowers most
BATCH = 256  # latents in one file
Record = dict[str, Any]


class Latents(NamedTuple):
    """What is known of the latents of one SAE, most of it from step 4."""

    sae: SAE
    codes: Codes
    stats: dict[str, Tensor]
    top: Callable[[int], list[Record]]
    """latent -> its top texts with their "spans"."""
    concepts: Concepts
    view: Tensor | None
    """concepts.directions.direct_view."""
    tokenizer: Any


class Place(NamedTuple):
    """Where an export stands on Neuronpedia."""

    model: str
    set_name: str
    source: str
    """<layer>-<set_name>."""
    created: str
    """Time in ISO format."""

    def stamp(self) -> Record:
        return {"creatorId": CREATOR, "createdAt": self.created}


def place_of(facts: Facts, set_name: str, created: str) -> Place:
    """The place of an SAE in the source set of this name. Raises InputError if the name can't be a file's, or the
    SAE reads in no block, whose number the place needs."""
    block = re.search(r"\.([0-9]+)(?=[.:]|$)", facts["hook_name"])
    if block is None:
        raise InputError(f"the SAE reads {facts['hook_name']}, which is in no block, and Neuronpedia names a source by "
                         "its block's number; export another one")
    model = re.sub("[^A-Za-z0-9_.-]", "-", facts["model_name"].split("/")[-1]).lstrip(".-") or "model"
    return Place(model, set_name, source=f"{block[1]}-{safe_name(set_name)}", created=created)


def write_neuronpedia(root: Path, place: Place, facts: Facts, latents: Latents) -> Path:
    """Write an export to root/<model>/<source>/ and return that folder.

    Files: release, model, source set and source, one record each; features, activations and explanations in batches.
    Codes are in raw activation units, those of an exported SAE: ours times its scale.
    """
    folder = root / place.model / place.source
    for file, record in _head_records(place, facts, len(latents.codes.texts)).items():
        write_text(folder / f"{file}.jsonl", json.dumps(record) + "\n")
    histograms = code_histograms(latents.codes, latents.stats["max"])
    for number, batch in enumerate(torch.arange(latents.sae.n_latents).split(BATCH)):
        records: dict[str, list[Record]] = {"features": [], "activations": [], "explanations": []}
        for i in batch.tolist():
            one = {"modelId": place.model, "layer": place.source, "index": str(i)}
            feature = _feature(latents, i, histograms[i])
            records["features"].append({**one, **place.stamp(), "hookName": facts["hook_name"], **feature})
            records["activations"] += [
                {**one, **place.stamp(), **_activation(example, latents.sae.scale, f"{place.source}-{i}-{n}")}
                for n, example in enumerate(latents.top(i))
            ]
            if i in latents.concepts:
                records["explanations"].append({**one, **_explanation(place, i, latents.concepts[i])})
        for kind, lines in records.items():
            _write_lines(folder / kind / f"batch-{number}.jsonl.gz", lines)
    return folder


def _head_records(place: Place, facts: Facts, n_texts: int) -> dict[str, Record]:
    """The four files of one record each: file name without its ending -> record."""
    model, name, by = place.model, place.set_name, place.stamp()
    return {
        "release": {"name": name, "description": name, "descriptionShort": name, "urls": [], "creatorNameShort": "",
                    "creatorName": "", **by},
        "model": {"id": model, "instruct": False, "displayNameShort": model, "displayName": model,
                  "updatedAt": place.created, **by},
        "sourceset": {"modelId": model, "name": name, "releaseName": name, "description": facts["hook_name"],
                      "visibility": "PUBLIC", **by},
        "source": {"modelId": model, "setName": name, "visibility": "PUBLIC", "dataset": facts["dataset_path"],
                   "id": place.source, "num_prompts": n_texts, "num_tokens_in_prompt": facts["context_size"],
                   "creatorId": CREATOR},
    }


def _feature(latents: Latents, i: int, histogram: Tensor) -> Record:
    """What latent i is: its direction, how often and how strongly it fires, which tokens it raises and lowers."""
    sae, stats, view = latents.sae, latents.stats, latents.view
    row, highest = sae.W_dec[i], sae.scale * float(stats["max"][i])
    middles = (torch.arange(HISTOGRAM_BINS) + 0.5) * highest / HISTOGRAM_BINS
    return {
        "maxActApprox": highest, "hasVector": True, "vector": row.tolist(),
        "frac_nonzero": int(stats["fires"][i]) / len(latents.codes), **_alignment(row.cpu()),
        "freq_hist_data_bar_heights": histogram.tolist(), "freq_hist_data_bar_values": middles.tolist(),
        **({} if view is None else _logits(row.to(view) @ view.T, latents.tokenizer)),
    }


def _alignment(row: Tensor) -> Record:
    """The three dimensions with the largest weights of a dictionary row, and their shares of its L1 norm."""
    at = row.abs().topk(min(3, len(row))).indices
    shares = row[at].abs() / row.abs().sum()
    return {"neuron_alignment_indices": at.tolist(), "neuron_alignment_values": row[at].tolist(),
            "neuron_alignment_l1": shares.tolist()}


def _logits(change: Tensor, tokenizer: Any) -> Record:
    """Tokens that the direction raises and lowers most, and the histogram of the change over the vocabulary [V]."""
    counts, edges = np.histogram(change.cpu().numpy(), HISTOGRAM_BINS)
    found: Record = {
        "logits_hist_data_bar_heights": counts.tolist(),
        "logits_hist_data_bar_values": ((edges[1:] + edges[:-1]) / 2).tolist(),
    }
    for sign, key in ((1, "pos"), (-1, "neg")):
        best = (sign * change).topk(min(TOKENS_LISTED, len(change)))
        found[f"{key}_str"] = [token_text(tokenizer, i) for i in best.indices.tolist()]
        found[f"{key}_values"] = (sign * best.values).tolist()
    return found


def _activation(example: Record, scale: float, key: str) -> Record:
    """One example text: the tokens around the peak as their slices of the text, codes in raw units."""
    values = [scale * act for act in example["acts"]]
    peak = max(range(len(values)), key=values.__getitem__)
    tokens = [example["text"][start:end] for start, end in example["spans"]]
    return {
        "id": fingerprint(key), "tokens": tokens, "values": values, "maxValue": values[peak],
        "maxValueTokenIndex": peak, "minValue": min(values), "dataIndex": str(example["text_id"]),
        "qualifyingTokenIndex": peak,
    }


def _explanation(place: Place, i: int, concept: Record) -> Record:
    """A latent's name and who gave it."""
    return {
        "id": fingerprint([place.source, i, concept["name"]]), "description": concept["name"], "authorId": CREATOR,
        "createdAt": place.created, "typeName": concept["source"], "explanationModelName": concept.get("model"),
    }


def _write_lines(path: Path, records: Iterable[Record]) -> None:
    text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
    atomic_write(path, lambda temporary: temporary.write_bytes(gzip.compress(text.encode(), mtime=0)))
