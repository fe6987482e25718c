"""SAEs in the files of dictionary_learning, which SAEBench reads too: ae.pt and config.json."""
from pathlib import Path
from typing import Any

from torch import Tensor

from ..files import read_json, read_torch
from ..schemas import Number, check, check_tensors
from .folded import Folded, bias_without_centring, gated, normalised, thresholded

FILES = ("ae.pt", "config.json")
LINEAR = {"decoder.weight": "any_float D F", "encoder.weight": "any_float F D"}
PLAIN = {"W_enc": "any_float D F", "W_dec": "any_float F D", "b_enc": "any_float F", "b_dec": "any_float D"}
# dict_class -> kind, tensors. The misspelt name is that of published files.
CLASSES: dict[str, tuple[str, dict[str, str]]] = {
    "AutoEncoder": ("standard", LINEAR | {"encoder.bias": "any_float F", "bias": "any_float D"}),
    "AutoEncoderNew": ("standard", LINEAR | {"encoder.bias": "any_float F", "decoder.bias": "any_float D"}),
    "GatedAutoEncoder": ("gated", LINEAR | dict.fromkeys(("r_mag", "mag_bias", "gate_bias"), "any_float F")
                         | {"decoder_bias": "any_float D"}),
    "JumpReluAutoEncoder": ("jumprelu", PLAIN | {"threshold": "any_float F"}),
    "AutoEncoderTopK": ("topk", LINEAR | {"encoder.bias": "any_float F", "b_dec": "any_float D"}),
    "BatchTopKSAE": ("batchtopk", LINEAR | {"encoder.bias": "any_float F", "b_dec": "any_float D",
                                            "threshold": "any_float"}),
    "MatryoshkaBatchTopKSAE": ("matryoshka", PLAIN | {"threshold": "any_float"}),
}
CLASSES["MatroyshkaBatchTopKSAE"] = CLASSES["MatryoshkaBatchTopKSAE"]


def read(folder: Path, where: str) -> tuple[Folded, dict[str, Any]]:
    """The SAE, and what it says of itself. Raises Misfit or InputError for what ours can't be."""
    config = read_json(folder / FILES[1])
    check(config, {"trainer": {"dict_class": tuple(CLASSES)}})
    trainer = config["trainer"]
    kind, wanted = CLASSES[trainer["dict_class"]]
    state = read_torch(folder / FILES[0], "fetch it again")
    sizes = check_tensors(state, wanted, finite=False)
    width, n_latents = sizes["D"], sizes["F"]
    check(config, {"trainer": {"dict_size?": (n_latents, None), "activation_dim?": (width, None), "lm_name?": str,
                               "submodule_name?": (str, None), "layer?": (Number(int, 0), None)},
                   "about?": {"hook_name?": str}})
    top_k = _top_k(state, trainer, n_latents) if kind == "topk" else None
    sae = _folded(kind, {name: state[name].float() for name in wanted}, top_k)
    facts = {"kind": kind, "model_name": trainer.get("lm_name"), "hook_name": _place(config)}
    sae = normalised(folder, sae, move_norms=kind != "topk")
    return sae, {name: value for name, value in facts.items() if value}


def _top_k(state: dict[str, Any], trainer: dict[str, Any], n_latents: int) -> int:
    k = state.get("k", trainer.get("k"))
    top_k: Any = k.item() if isinstance(k, Tensor) and k.numel() == 1 else k
    check({"k": top_k}, {"k": Number(int, 1, n_latents)})
    return top_k


def _folded(kind: str, t: dict[str, Tensor], top_k: int | None) -> Folded:
    if kind == "gated":
        return gated(t["encoder.weight"], t["r_mag"], b_mag=t["mag_bias"], b_gate=t["gate_bias"],
                     W_dec=t["decoder.weight"].T, b_dec=t["decoder_bias"])
    if "W_enc" in t:
        W, b, W_dec, b_dec = t["W_enc"].T, t["b_enc"], t["W_dec"], t["b_dec"]
    else:
        W, b, W_dec = t["encoder.weight"], t["encoder.bias"], t["decoder.weight"].T
        b_dec = next(t[name] for name in ("bias", "decoder.bias", "b_dec") if name in t)
    if kind == "jumprelu" or "decoder.bias" in t:  # these two don't subtract the decoder's bias
        b = bias_without_centring(W, b, b_dec)
    if top_k is not None:
        return Folded(W, b, W_dec, b_dec, top_k=top_k)
    threshold = t["threshold"].expand(len(b)).clone() if "threshold" in t else None
    return thresholded(W, b, W_dec, b_dec, threshold=threshold)


def _place(config: dict[str, Any]) -> str | None:
    """The hook point: a submodule's path or name, or the layer's number alone; a file of ours names it in `about`."""
    trainer = config["trainer"]
    name, layer = config.get("about", {}).get("hook_name") or trainer.get("submodule_name"), trainer.get("layer")
    return name or (None if layer is None else f"resid_post_layer_{layer}")
