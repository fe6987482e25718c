"""SAEs in SAELens's files, exported or written by its own training: TopK and JumpReLU."""
from pathlib import Path
from typing import Any

import torch

from exchange.folded import Folded, normalised
from lib.files import read_json, read_tensors, write_json, write_tensors
from lib.schemas import Number, check, check_tensors

FILES = ("sae_weights.safetensors", "cfg.json")
VERSION = "6.54.12"  # the SAELens whose files are written; it migrates files that claim to be older than 6
JUMPRELU_SLOTS = 512  # codes kept of a row at most, where a JumpReLU SAE's file does not say


def read(folder: Path) -> Folded:
    """Read the SAE. Raises Misfit or InputError for what ours can't be."""
    tensors, config = read_tensors(folder / FILES[0]), read_json(folder / FILES[1])
    jumps = isinstance(config, dict) and config.get("architecture") == "jumprelu"
    sizes = check_tensors(tensors, {
        "W_dec": "any_float F D", "W_enc": "any_float D F", "b_dec": "any_float D", "b_enc?": "any_float F",
    } | ({"threshold": "any_float F"} if jumps else {}), finite=False)
    width, n_latents = sizes["D"], sizes["F"]
    count = Number(int, 1, n_latents)
    check(config, {
        "architecture": ("topk", "jumprelu"), "normalize_activations?": "none", "reshape_activations?": "none",
        "d_in?": (width, None), "d_sae?": (n_latents, None),
        "apply_b_dec_to_input?": bool, "rescale_acts_by_decoder_norm?": bool,
    } | ({} if jumps else {"k": count}))
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    W, b_dec, b = tensors["W_enc"].T, tensors["b_dec"], tensors.get("b_enc", torch.zeros(n_latents))
    if not config.get("apply_b_dec_to_input", True):
        b = b + W @ b_dec  # W (x - b_dec) + b' = W x + b
    if jumps:
        metadata = config.get("metadata") or {}
        check({"metadata": metadata}, {"metadata": {"top_k?": count}})
        most = metadata.get("top_k", min(n_latents, JUMPRELU_SLOTS))
        sae = Folded(W, b, tensors["W_dec"], b_dec, top_k=most, threshold=tensors["threshold"])
    else:
        sae = Folded(W, b, tensors["W_dec"], b_dec, top_k=config["k"])
    # Where SAELens ranks scaled codes, its default, the rows' norms can go into the encoder without changing which
    # latents fire; a threshold scales with its latent's code.
    return normalised(folder, sae, move_norms=jumps or config.get("rescale_acts_by_decoder_norm", False))


def write(folder: Path, sae: Folded, about: dict[str, Any]) -> None:
    """Write what SAELens's SAE.load_from_disk(folder) reads. about: exchange.facts.facts_of."""
    tensors = {"W_enc": sae.W.T, "b_enc": sae.b, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    kind: dict[str, Any] = {"architecture": "topk", "k": sae.top_k}
    if sae.threshold is not None:
        tensors["threshold"] = sae.threshold
        kind, about = {"architecture": "jumprelu"}, {**about, "top_k": sae.top_k}
    write_tensors(folder / FILES[0], tensors)
    n_latents, width = sae.W_dec.shape
    write_json(folder / FILES[1], {
        **kind, "d_in": width, "d_sae": n_latents, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False, "metadata": {"sae_lens_version": VERSION, **about},
    })
