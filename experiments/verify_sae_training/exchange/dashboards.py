"""What latents fire on, in the files of the tools that explain and show them: delphi's latent cache, Neuronpedia's bulk
import.

Both take codes in raw activation units, those of an exported SAE: ours times its scale.
"""
import gzip
import json
import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from torch import Tensor

from concepts.codes import Codes
from concepts.dictionary import Concepts
from concepts.directions import token_text
from concepts.firings import Examples
from exchange.hub import public_name
from lib.environment import InputError
from lib.files import atomic_write, fingerprint, safe_name, write_json, write_text
from lib.sae import SAE
from lib.store import Run
from lib.texts import filler_id, tokenise

SPLITS = 4  # files of a delphi cache, each with a range of latents
HISTOGRAM_BINS = 30
TOKENS_LISTED = 10  # tokens that a latent's direction raises and lowers most
BATCH = 256  # latents in one file of a Neuronpedia export


def write_delphi(folder: Path, run: Run, codes: Codes, scale: float, tokenizer: Any) -> None:
    """Write delphi's cache of one hook point: locations [nnz, 3] (text, position, latent - first), activations, tokens
    [texts, ctx].

    Positions are those of the tokenised text, special tokens included; short texts are padded, and padding holds no
    code.
    Raises InputError if the tokenizer gives other ids than those stored.
    """
    tokens = _tokens(run, tokenizer)
    parts = []
    for start, values, indices in codes:
        row, slot = values.gt(0).nonzero(as_tuple=True)
        text, pos = (run.rows[name][start + row].long() for name in ("text_id", "pos"))
        parts.append((torch.stack([text, pos, indices[row, slot].long()], 1), scale * values[row, slot]))
    locations, activations = (torch.cat(column).numpy() for column in zip(*parts))
    edges = np.linspace(0, codes.n_latents, SPLITS + 1).astype(int)
    for first, beyond in zip(edges[:-1], edges[1:]):
        here = (locations[:, 2] >= first) & (locations[:, 2] < beyond)
        local = locations[here] - np.array([0, 0, first])
        small = local.max(initial=0) < 2**16
        arrays = {"locations": local.astype(np.uint16 if small else np.uint32),
                  "activations": activations[here].astype(np.float16), "tokens": tokens}
        atomic_write(folder / f"{first}_{beyond - 1}.safetensors", partial(safetensors.numpy.save_file, arrays))
    dataset = run.meta["dataset"]
    write_json(folder / "config.json", {
        "dataset_repo": public_name(dataset["name"]), "dataset_split": dataset["split"],
        "dataset_name": "", "dataset_column": dataset["field"], "batch_size": 1,
        "ctx_len": tokens.shape[1], "cache_ctx_len": tokens.shape[1], "n_tokens": tokens.size, "n_splits": SPLITS,
        "model_name": public_name(run.meta["model"]["name"]),
    })


def _tokens(run: Run, tokenizer: Any) -> np.ndarray:
    """Token ids of all texts, int64 [texts, ctx], padded on the right."""
    texts = tokenise(tokenizer, [text["text"] for text in run.texts], 0, run.meta["settings"]["max_length"])
    tokens = np.full((len(texts), max(len(text.ids) for text in texts)), filler_id(tokenizer))
    for row, text in zip(tokens, texts):
        row[: len(text.ids)] = text.ids
    text_id, pos = (run.rows[name].numpy() for name in ("text_id", "pos"))
    if pos.max() >= tokens.shape[1] or (tokens[text_id, pos] != run.rows["token_id"].numpy()).any():
        raise InputError(f"the tokenizer cuts texts in another way than when run {run.run_id} was saved; use the same "
                         "one")
    return tokens


def code_histograms(codes: Codes, maxima: Tensor) -> Tensor:
    """How often each latent's code falls into HISTOGRAM_BINS equal bins from 0 to its highest, int64 [F,
    HISTOGRAM_BINS].
    """
    counts = torch.zeros(codes.n_latents * HISTOGRAM_BINS, dtype=torch.long)
    for _, values, indices in codes:
        fired = values > 0
        latent = indices[fired].long()
        at = (values[fired] / maxima[latent] * HISTOGRAM_BINS).long().clamp(max=HISTOGRAM_BINS - 1)
        counts += torch.bincount(latent * HISTOGRAM_BINS + at, minlength=len(counts))
    return counts.view(codes.n_latents, HISTOGRAM_BINS)


def write_neuronpedia(
    root: Path, name: str, created: str, facts: dict[str, Any], sae: SAE, codes: Codes, stats: dict[str, Tensor],
    top: Examples,
    concepts: Concepts, view: Tensor | None, tokenizer: Any,
) -> Path:
    """Write a Neuronpedia export to root/<model>/<layer>-<name>/ and return that folder. InputError for an odd `name`.

    Files: release, model, source set and source, one record each, and in batches features, activations and
    explanations.
    name: of the source set; created: a time in ISO format. stats, top, concepts: of step 4. view:
    concepts.directions.direct_view, or None.
    """
    block = re.match(r"blocks\.([0-9]+)\.", facts["hook_name"])
    source = f"{block[1] if block else 0}-{safe_name(name)}"
    model = re.sub("[^A-Za-z0-9_.-]", "-", facts["model_name"].split("/")[-1]).lstrip(".-") or "model"
    folder = root / model / source
    by = {"creatorId": "sae-workbench", "createdAt": created}
    whose = {"modelId": model, "layer": source}
    for file, record in _head_records(name, model, source, facts, len(codes.texts), by).items():
        write_text(folder / f"{file}.jsonl", json.dumps(record) + "\n")
    histograms = code_histograms(codes, stats["max"])
    for number, latents in enumerate(torch.arange(sae.n_latents).split(BATCH)):
        features, activations, explanations = [], [], []
        for i in latents.tolist():
            one = {**whose, "index": str(i)}
            highest = sae.scale * float(stats["max"][i])
            features.append({
                **one, **by, "maxActApprox": highest, "hasVector": True, "vector": sae.W_dec[i].tolist(),
                "hookName": facts["hook_name"],
                "frac_nonzero": int(stats["fires"][i]) / len(codes), **_alignment(sae.W_dec[i].cpu()),
                **_histogram(histograms[i], highest),
                **(_logits(sae.W_dec[i].to(view) @ view.T, tokenizer) if view is not None else {}),
            })
            activations += [{**one, **by, **_activation(example, sae.scale, f"{source}-{i}-{n}")}
                            for n, example in enumerate(top.get(i, []))]
            if i in concepts:
                entry = concepts[i]
                explanations.append({
                    **one, "id": fingerprint([source, i, entry["name"]]), "description": entry["name"],
                    "authorId": by["creatorId"], "createdAt": created,
                    "typeName": entry["source"], "explanationModelName": entry.get("model"),
                })
        for kind, records in (("features", features), ("activations", activations), ("explanations", explanations)):
            _write_lines(folder / kind / f"batch-{number}.jsonl.gz", records)
    return folder


def _head_records(
    name: str, model: str, source: str, facts: dict[str, Any], n_texts: int, by: dict[str, str]
) -> dict[str, dict[str, Any]]:
    """The four files of one record each: file name without its ending -> record."""
    return {
        "release": {"name": name, "description": name, "descriptionShort": name, "urls": [], "creatorNameShort": "",
                    "creatorName": "", **by},
        "model": {"id": model, "instruct": False, "displayNameShort": model, "displayName": model,
                  "updatedAt": by["createdAt"], **by},
        "sourceset": {"modelId": model, "name": name, "releaseName": name, "description": facts["hook_name"],
                      "visibility": "PUBLIC", **by},
        "source": {
            "modelId": model, "setName": name, "visibility": "PUBLIC", "dataset": facts["dataset_path"], "id": source,
            "num_prompts": n_texts,
            "num_tokens_in_prompt": facts["context_size"], "creatorId": by["creatorId"],
        },
    }


def _write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
    atomic_write(path, lambda temporary: temporary.write_bytes(gzip.compress(text.encode(), mtime=0)))


def _activation(example: dict[str, Any], scale: float, key: str) -> dict[str, Any]:
    """One example text: the tokens around the peak as their slices of the text, codes in raw units."""
    values = [scale * act for act in example["acts"]]
    peak = max(range(len(values)), key=values.__getitem__)
    tokens = [example["text"][start:end] for start, end in example["spans"]]
    return {
        "id": fingerprint(key), "tokens": tokens, "values": values, "maxValue": values[peak],
        "maxValueTokenIndex": peak, "minValue": min(values),
        "dataIndex": str(example["text_id"]), "qualifyingTokenIndex": peak,
    }


def _alignment(row: Tensor) -> dict[str, list]:
    """The three dimensions with the largest weights of a dictionary row, and their shares of its L1 norm."""
    at = row.abs().topk(min(3, len(row))).indices
    shares = row[at].abs() / row.abs().sum()
    return {"neuron_alignment_indices": at.tolist(), "neuron_alignment_values": row[at].tolist(),
            "neuron_alignment_l1": shares.tolist()}


def _histogram(counts: Tensor, highest: float) -> dict[str, list]:
    middles = (torch.arange(HISTOGRAM_BINS) + 0.5) * highest / HISTOGRAM_BINS
    return {"freq_hist_data_bar_heights": counts.tolist(), "freq_hist_data_bar_values": middles.tolist()}


def _logits(change: Tensor, tokenizer: Any) -> dict[str, list]:
    """Tokens that the direction raises and lowers most, and the histogram of the change over the vocabulary [V]."""
    counts, edges = np.histogram(change.cpu().numpy(), HISTOGRAM_BINS)
    found: dict[str, list] = {
        "logits_hist_data_bar_heights": counts.tolist(),
        "logits_hist_data_bar_values": ((edges[1:] + edges[:-1]) / 2).tolist(),
    }
    for sign, key in ((1, "pos"), (-1, "neg")):
        best = (sign * change).topk(min(TOKENS_LISTED, len(change)))
        found[f"{key}_str"] = [token_text(tokenizer, i) for i in best.indices.tolist()]
        found[f"{key}_values"] = (sign * best.values).tolist()
    return found
