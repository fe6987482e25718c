"""What latents fire on, as delphi's cache, from which it explains them."""
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch

from concepts.codes import Codes
from exchange.facts import public_name
from lib.environment import InputError
from lib.files import atomic_write, write_json
from lib.store import Run
from lib.texts import filler_id, tokenise

SPLITS = 4  # files of a cache, each with a range of latents


def write_delphi(folder: Path, run: Run, codes: Codes, scale: float, tokenizer: Any) -> None:
    """Write the cache of one hook point: locations [nnz, 3] (text, position, latent - first), activations, tokens
    [texts, ctx].

    scale: turns codes into raw activation units, those of an exported SAE. Positions are those of the tokenised text,
    special tokens included; short texts are padded, and padding holds no code.
    Raises InputError if the tokenizer gives other ids than those stored, or float16, delphi's precision, is too narrow.
    """
    tokens = _tokens(run, tokenizer)
    parts = []
    for start, values, indices in codes:
        row, slot = values.gt(0).nonzero(as_tuple=True)
        text, pos = (run.rows[name][start + row].long() for name in ("text_id", "pos"))
        parts.append((torch.stack([text, pos, indices[row, slot].long()], 1), scale * values[row, slot]))
    locations, activations = (torch.cat(column).numpy() for column in zip(*parts))
    if activations.max(initial=0) > np.finfo(np.float16).max:
        raise InputError(f"the highest code is {activations.max():.0f}, beyond float16, in which delphi keeps codes; "
                         "this SAE can't be exported to it")
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
        raise InputError(f"the tokenizer cuts texts differently than when run {run.run_id} was saved; use the one of "
                         "that time")
    return tokens
