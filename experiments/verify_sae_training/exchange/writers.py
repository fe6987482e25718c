"""An SAE in the files of SAELens, dictionary_learning (which SAEBench reads too) and sparsify.

Each takes the folder, the SAE, and what it says about itself (exchange.facts.facts_of).
"""
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lib.exchange import dictionary_learning, sae_lens, sparsify
from lib.exchange.folded import Folded
from lib.files import atomic_write, write_json, write_tensors

VERSION = "6.54.12"  # the SAELens whose files are written; it migrates files that claim to be older than 6


def write_sae_lens(folder: Path, sae: Folded, about: dict[str, Any]) -> None:
    """Write what SAELens's SAE.load_from_disk(folder) reads."""
    weights, config = sae_lens.FILES
    tensors = {"W_enc": sae.W.T, "b_enc": sae.b, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    kind: dict[str, Any] = {"architecture": "topk", "k": sae.top_k, "rescale_acts_by_decoder_norm": False}
    if sae.threshold is not None:
        tensors["threshold"] = sae.threshold
        kind, about = {"architecture": "jumprelu"}, {**about, "top_k": sae.top_k}
    write_tensors(folder / weights, tensors)
    n_latents, width = sae.W_dec.shape
    write_json(folder / config, {
        **kind, "d_in": width, "d_sae": n_latents, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none",
        "metadata": {"sae_lens_version": VERSION, **about},
    })


def write_dictionary_learning(folder: Path, sae: Folded, about: dict[str, Any]) -> None:
    """Write what dictionary_learning's load_dictionary(folder, device) reads."""
    weights, config = dictionary_learning.FILES
    if sae.threshold is None:
        names = {"trainer_class": "TopKTrainer", "dict_class": "AutoEncoderTopK"}
        state = {"encoder.weight": sae.W, "encoder.bias": sae.b, "decoder.weight": sae.W_dec.T.contiguous(),
                 "b_dec": sae.b_dec, "k": torch.tensor(sae.top_k, dtype=torch.int), "threshold": torch.tensor(-1.0)}
    else:  # its JumpReLU does not subtract b_dec: W (x - b_dec) + b = W x + b'
        names = {"trainer_class": "JumpReluTrainer", "dict_class": "JumpReluAutoEncoder"}
        b = (sae.b.double() - sae.W.double() @ sae.b_dec.double()).float()
        state = {"W_enc": sae.W.T.contiguous(), "b_enc": b, "W_dec": sae.W_dec, "b_dec": sae.b_dec,
                 "threshold": sae.threshold}
    atomic_write(folder / weights, lambda temporary: torch.save(state, temporary))
    n_latents, width = sae.W_dec.shape
    layer = re.search(r"\d+", about["hook_name"])
    trainer = {
        **names, "activation_dim": width, "dict_size": n_latents, "k": sae.top_k,
        "layer": int(layer[0]) if layer else None, "lm_name": about["model_name"],
        "submodule_name": about["hf_module_path"], "lr": about["lr"], "steps": about["steps"], "seed": about["seed"],
    }
    write_json(folder / config, {"trainer": trainer, "buffer": {"ctx_len": about["context_size"]}, "about": about})


def write_sparsify(folder: Path, sae: Folded, about: dict[str, Any]) -> None:
    """Write what sparsify's SparseCoder.load_from_disk(folder) reads; its input is flattened to [N, D]."""
    weights, config = sparsify.FILES
    tensors = {"encoder.weight": sae.W, "encoder.bias": sae.b, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    # Not write_tensors: sparsify's reader wants the header that names the framework.
    atomic_write(folder / weights, lambda temporary: save_file(tensors, temporary, {"format": "pt"}))
    n_latents, width = sae.W_dec.shape
    write_json(folder / config, {
        "activation": "topk", "expansion_factor": n_latents // width, "normalize_decoder": True,
        "num_latents": n_latents, "k": sae.top_k, "multi_topk": False, "skip_connection": False, "transcode": False,
        "d_in": width, "about": about,
    })
