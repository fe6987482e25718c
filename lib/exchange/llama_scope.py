"""SAEs of Llama Scope (OpenMOSS's Language-Model-SAEs): hyperparams.json and checkpoints/final.safetensors.

They scale their input by s = sqrt(D) / (mean norm of the activations); the threshold is in units of the raw code.
"""
import math
from pathlib import Path
from typing import Any

import torch

from ..environment import InputError
from ..files import read_json, read_tensors
from ..schemas import POSITIVE_NUMBER, Number, check, check_tensors
from .folded import Folded, bias_without_centring, normalised, rescaled, thresholded

FILES = ("checkpoints/final.safetensors", "hyperparams.json")


def read(folder: Path, where: str) -> tuple[Folded, dict[str, Any]]:
    """The SAE, and what it says of itself. Raises Misfit or InputError for what ours can't be."""
    config = read_json(folder / FILES[1])
    check(config, {
        "act_fn": ("jumprelu", "topk"), "norm_activation": ("dataset-wise", "inference"), "use_glu_encoder?": False,
        "jump_relu_threshold?": (Number(float, 0), None), "hook_point_in": str, "hook_point_out?": (str, None),
        "model_name?": (str, None),
        "apply_decoder_bias_to_pre_encoder?": bool, "sparsity_include_decoder_norm?": bool,
    })
    if config.get("hook_point_out") not in (None, config["hook_point_in"]):
        raise InputError(f"{folder}: it reads {config['hook_point_in']!r} and writes {config['hook_point_out']!r}, "
                         "so it is a transcoder, which is no SAE")
    tensors = read_tensors(folder / FILES[0])
    sizes = check_tensors(tensors, {"encoder.weight": "any_float F D", "encoder.bias": "any_float F",
                                    "decoder.weight": "any_float D F", "decoder.bias?": "any_float D"}, finite=False)
    width, n_latents = sizes["D"], sizes["F"]
    check(config, {"d_model?": width, "d_sae?": n_latents, "top_k?": (Number(int, 1, n_latents), None)})
    factor = 1.0
    if config["norm_activation"] == "dataset-wise":
        check(config, {"dataset_average_activation_norm": {"in": POSITIVE_NUMBER, "out": POSITIVE_NUMBER}})
        norms = config["dataset_average_activation_norm"]
        if not math.isclose(norms["in"], norms["out"], rel_tol=1e-3):
            raise InputError(f"{folder}: its input and output have other norms ({norms['in']:g}, {norms['out']:g}), so "
                             "it is a transcoder, which is no SAE")
        factor = math.sqrt(width) / norms["in"]
    W, b, W_dec = (tensors[name].float() for name in ("encoder.weight", "encoder.bias", "decoder.weight"))
    b_dec = tensors["decoder.bias"].float() if "decoder.bias" in tensors else torch.zeros(width)
    if not config.get("apply_decoder_bias_to_pre_encoder", False):
        b = bias_without_centring(W, b, b_dec)
    limit = config.get("jump_relu_threshold") or 0.0
    if config["act_fn"] == "topk" and not limit:
        sae, kind = Folded(W, b, W_dec.T, b_dec, top_k=config["top_k"]), "topk"
    else:  # one trained with TopK is used with the threshold that was found for it
        threshold = torch.full((n_latents,), limit * factor)
        if config.get("sparsity_include_decoder_norm", True):  # it holds for codes times their rows' norms
            threshold = threshold / W_dec.norm(dim=0).clamp(min=1e-8)
        sae, kind = thresholded(W, b, W_dec.T, b_dec, threshold=threshold), "jumprelu"
    model = config.get("model_name") or _model(where)
    facts = {"kind": kind, "model_name": model, "hook_name": config["hook_point_in"]}
    sae = normalised(folder, rescaled(sae, factor), move_norms=kind == "jumprelu")
    return sae, {name: value for name, value in facts.items() if value}


def _model(where: str) -> str | None:
    """The model that the repository's name tells of."""
    return "meta-llama/Llama-3.1-8B" if "Llama3_1-8B" in where else None
