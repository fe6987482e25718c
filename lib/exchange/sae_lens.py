"""SAEs in SAELens's files, of today's layout and of those before its version 6."""
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..environment import InputError
from ..files import read_json, read_tensors
from ..schemas import Number, check, check_tensors
from .folded import Folded, bias_without_centring, centring, gated, normalised, thresholded

FILES = ("sae_weights.safetensors", "cfg.json")
TENSORS = {"W_dec": "any_float F D", "W_enc": "any_float D F", "b_dec": "any_float D"}
# architecture -> kind, and the tensors beyond TENSORS; the last two are those of unfinished trainings
ARCHITECTURES = {
    "standard": ("standard", {"b_enc?": "any_float F"}),
    "gated": ("gated", dict.fromkeys(("b_gate", "b_mag", "r_mag"), "any_float F")),
    "topk": ("topk", {"b_enc?": "any_float F"}),
    "jumprelu": ("jumprelu", {"b_enc?": "any_float F", "threshold": "any_float F"}),
    "batchtopk": ("batchtopk", {"b_enc?": "any_float F", "topk_threshold": "any_float"}),
    "matryoshka_batchtopk": ("matryoshka", {"b_enc?": "any_float F", "topk_threshold": "any_float"}),
}
SCALED_BY_MEAN_NORM = ("expected_average_only_in", True)  # True: before its version 3
LAYER_NORMED = ("gpt2", "pythia", "opt", "gpt-neo", "gpt-j")  # models whose residual stream TransformerLens centres


def read(folder: Path, where: str) -> tuple[Folded, dict[str, Any]]:
    """The SAE, and what it says of itself. Raises Misfit or InputError for what ours can't be."""
    config = read_json(folder / FILES[1])
    check(config, {"metadata?": ({}, None)})
    about = config | (config.get("metadata") or {})
    config = _renamed(config)
    check(config, {
        "architecture": tuple(ARCHITECTURES), "reshape_activations?": "none", "hook_head_index?": None,
        "normalize_activations?": ("none", None, False, *SCALED_BY_MEAN_NORM),
        "activation_fn?": ("topk" if config["architecture"] == "topk" else "relu", None),
        "apply_b_dec_to_input?": bool, "rescale_acts_by_decoder_norm?": bool,
    })
    kind, wanted = ARCHITECTURES[config["architecture"]]
    tensors = read_tensors(folder / FILES[0])
    sizes = check_tensors(tensors, TENSORS | wanted, finite=False)
    width, n_latents = sizes["D"], sizes["F"]
    count = Number(int, 1, n_latents)
    check(config, {"d_in?": (width, None), "d_sae?": (n_latents, None)} | ({"k": count} if kind == "topk" else {}))
    check({"metadata": about}, {"metadata": {"top_k?": count, "model_name?": (str, None), "hook_name?": (str, None),
                                             "hook_point?": (str, None)}})
    if "scaling_factor" in tensors and not torch.equal(tensors["scaling_factor"],
                                                       torch.ones_like(tensors["scaling_factor"])):
        raise InputError(f"{folder}: its codes have a scaling_factor of their own (finetuning_scaling_factor), which "
                         "ours can't hold; take the SAE before its fine-tuning")
    sae = _folded(kind, {name: tensor.float() for name, tensor in tensors.items()}, config)
    # A file of ours says how many codes a row keeps at most.
    sae = sae._replace(top_k=about.get("top_k", sae.top_k)) if sae.threshold is not None else sae
    # Where SAELens ranks scaled codes, its default, the rows' norms can go into the encoder without changing which
    # latents fire; a threshold scales with its latent's code.
    sae = normalised(folder, sae, move_norms=kind != "topk" or config.get("rescale_acts_by_decoder_norm", False))
    if config.get("normalize_activations") in SCALED_BY_MEAN_NORM:
        sae = sae._replace(wants_norm=math.sqrt(width))
    facts = {"kind": kind, "model_name": about.get("model_name"),
             "hook_name": about.get("hook_name") or about.get("hook_point")}
    return (centring(sae) if _centred(about) else sae), {name: value for name, value in facts.items() if value}


def _renamed(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration in today's words; SAELens reads older ones in the same way (its handle_pre_6_0_config)."""
    activation = config.get("activation_fn_str") or config.get("activation_fn")
    if isinstance(activation, str):
        config = {**config, "activation_fn": activation}
    config = {"architecture": "standard", **config}
    kwargs = config.get("activation_fn_kwargs")
    if activation == "topk" and config["architecture"] == "standard":
        config = {**config, "architecture": "topk", "k": kwargs.get("k") if isinstance(kwargs, dict) else None}
    return config


def _centred(about: dict[str, Any]) -> bool:
    """Whether the SAE was trained on a residual stream that TransformerLens centres (center_writing_weights).

    Later files say so; those that call the hook_name hook_point are from when it always did.
    """
    kwargs = about.get("model_from_pretrained_kwargs")
    if isinstance(kwargs, dict) and "center_writing_weights" in kwargs:
        return bool(kwargs["center_writing_weights"])
    return "hook_point" in about and str(about.get("model_name")).split("/")[-1].startswith(LAYER_NORMED)


def _folded(kind: str, t: dict[str, Tensor], config: dict[str, Any]) -> Folded:
    W, W_dec, b_dec = t["W_enc"].T, t["W_dec"], t["b_dec"]
    centres = config.get("apply_b_dec_to_input", True)
    if kind == "gated":
        shift = torch.zeros(len(W)) if centres else bias_without_centring(W, torch.zeros(len(W)), b_dec)
        return gated(W, t["r_mag"], b_mag=t["b_mag"] + t["r_mag"].exp() * shift, b_gate=t["b_gate"] + shift,
                     W_dec=W_dec, b_dec=b_dec)
    b = t.get("b_enc", torch.zeros(len(W)))
    b = b if centres else bias_without_centring(W, b, b_dec)
    if kind == "topk":
        return Folded(W, b, W_dec, b_dec, top_k=config["k"])
    if "topk_threshold" not in t:
        return thresholded(W, b, W_dec, b_dec, threshold=t.get("threshold"))
    threshold = t["topk_threshold"].expand(len(b)).clone()
    if config.get("rescale_acts_by_decoder_norm", False):  # then it is compared with codes times their rows' norms
        threshold = threshold / W_dec.norm(dim=1).clamp(min=1e-8)
    return thresholded(W, b, W_dec, b_dec, threshold=threshold)
