"""SAEs in the files of SAELens, dictionary_learning and sparsify: write them, and read them as if they were ours.

All three encode(x) = TopK(ReLU(W (x - b_dec) + b)) and decode(z) = z W_dec + b_dec on raw activations. Ours centres and
scales first; folded into that form (scale (W (x - mean) / scale + b_enc) = W (x - mean) + scale b_enc, scale > 0)

    W = W_enc    b = scale * b_enc    b_dec = mean    codes = scale * our codes

the same latents fire and the reconstruction is the same: mean and scale are in the files exactly. An SAE with thresholds
(batchtopk, jumprelu) goes to and comes from SAELens as its JumpReLU SAE: ReLU(...) where that exceeds scale * threshold.
"""
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from lib.environment import InputError
from lib.files import atomic_write, read_json, read_tensors, write_json, write_tensors
from lib.sae import SAE, make_sae

ROUNDING = 0.01  # deviation of a decoder row's norm from 1 that low precision explains
JUMPRELU_SLOTS = 512  # codes kept of a row at most, where a JumpReLU SAE's file does not say
SAE_LENS_VERSION = "6.54.12"  # whose files are written; SAELens migrates what claims to be older than 6


class Folded(NamedTuple):
    """A TopK SAE on raw activations; see the module for what the tensors do."""

    W: Tensor
    """[F, D]."""
    b: Tensor
    """[F], raw activation units."""
    W_dec: Tensor
    """[F, D], rows of unit norm."""
    b_dec: Tensor
    """[D], raw activation units."""
    top_k: int
    threshold: Tensor | None = None
    """[F], raw activation units: what a code must exceed; top_k is then the most that one row may have."""


def fold(sae: SAE) -> Folded:
    """Our SAE on raw activations, with the centring and the scale inside; float32 on the CPU."""
    tensors = (sae.W_enc, sae.b_enc * sae.scale, sae.W_dec, sae.mean)
    W, b, W_dec, b_dec = (tensor.detach().float().cpu().contiguous() for tensor in tensors)
    return Folded(W, b, W_dec, b_dec, sae.top_k, None if sae.threshold is None else (sae.threshold * sae.scale).cpu())


def unfold(folded: Folded, scale: float, config: dict[str, Any] | None = None) -> SAE:
    """The SAE in our form, its codes divided by `scale` (in raw activation units, above 0); the reconstruction stays."""
    threshold = None if folded.threshold is None else folded.threshold / scale
    return make_sae(folded.W, folded.b / scale, folded.W_dec, folded.b_dec, scale, folded.top_k, config, threshold=threshold)


def transformer_lens_name(path: str, point: str) -> str:
    """TransformerLens's name of a hook point given by module path and "input" or "output".

    A point that has none keeps its module path, with ":input" behind it where it is an input.
    """
    place = re.fullmatch(r".*?\.(\d+)(?:\.([a-z0-9_]+))?", path)
    names = {
        ("", "input"): "hook_resid_pre", ("", "output"): "hook_resid_post",
        ("attn", "output"): "hook_attn_out", ("mlp", "output"): "hook_mlp_out", ("norm", "input"): "hook_resid_mid",
    }  # fmt: skip
    roles = {"self_attn": "attn", "attn": "attn", "attention": "attn", "mlp": "mlp", "feed_forward": "mlp", None: ""}
    roles |= dict.fromkeys(("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2"), "norm")
    name = names.get((roles.get(place[2], "?"), point)) if place else None
    return f"blocks.{place[1]}.{name}" if place and name else path + (":input" if point == "input" else "")


def write_sae_lens(folder: Path, sae: Folded, about: dict[str, Any]) -> None:
    """Write what SAELens's SAE.load_from_disk(folder) reads. about: facts_of() in lib/hub.py."""
    tensors = {"W_enc": sae.W.T, "b_enc": sae.b, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    kind: dict[str, Any] = {"architecture": "topk", "k": sae.top_k}
    if sae.threshold is not None:
        tensors["threshold"] = sae.threshold
        kind, about = {"architecture": "jumprelu"}, {**about, "top_k": sae.top_k}
    write_tensors(folder / "sae_weights.safetensors", tensors)
    n_latents, width = sae.W_dec.shape
    write_json(folder / "cfg.json", {
        **kind, "d_in": width, "d_sae": n_latents, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none", "rescale_acts_by_decoder_norm": False,
        "metadata": {"sae_lens_version": SAE_LENS_VERSION, **about},
    })  # fmt: skip


def write_dictionary_learning(folder: Path, sae: Folded, about: dict[str, Any]) -> None:
    """Write what dictionary_learning's load_dictionary(folder, device) and SAEBench read. InputError for an SAE with thresholds."""
    _only_topk(sae, "dictionary_learning")
    state = {
        "encoder.weight": sae.W, "encoder.bias": sae.b, "decoder.weight": sae.W_dec.T.contiguous(), "b_dec": sae.b_dec,
        "k": torch.tensor(sae.top_k, dtype=torch.int), "threshold": torch.tensor(-1.0),
    }  # fmt: skip
    atomic_write(folder / "ae.pt", lambda temporary: torch.save(state, temporary))
    n_latents, width = sae.W_dec.shape
    layer = re.search(r"\d+", about["hook_name"])
    write_json(folder / "config.json", {
        "trainer": {
            "trainer_class": "TopKTrainer", "dict_class": "AutoEncoderTopK", "activation_dim": width, "dict_size": n_latents, "k": sae.top_k,
            "layer": int(layer[0]) if layer else None, "lm_name": about["model_name"], "submodule_name": about["hf_module_path"],
            "lr": about["lr"], "steps": about["steps"], "seed": about["seed"],
        },
        "buffer": {"ctx_len": about["context_size"]}, "about": about,
    })  # fmt: skip


def write_sparsify(folder: Path, sae: Folded, about: dict[str, Any]) -> None:
    """Write what sparsify's SparseCoder.load_from_disk(folder) reads; its input is flattened to [N, D]. InputError for an SAE with thresholds."""
    _only_topk(sae, "sparsify")
    tensors = {"encoder.weight": sae.W, "encoder.bias": sae.b, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    # Not write_tensors: sparsify's reader wants the header that names the framework.
    atomic_write(folder / "sae.safetensors", lambda temporary: save_file(tensors, temporary, {"format": "pt"}))
    n_latents, width = sae.W_dec.shape
    write_json(folder / "cfg.json", {
        "activation": "topk", "expansion_factor": n_latents // width, "normalize_decoder": True, "num_latents": n_latents, "k": sae.top_k,
        "multi_topk": False, "skip_connection": False, "transcode": False, "d_in": width, "about": about,
    })  # fmt: skip


def read_sae_lens(folder: Path) -> Folded:
    """Read a TopK or JumpReLU SAE saved by SAELens, exported or by its own training."""
    config, tensors = read_json(folder / "cfg.json"), read_tensors(folder / "sae_weights.safetensors")
    jumps = config.get("architecture") == "jumprelu"
    if not jumps:
        _only(folder, "architecture", config.get("architecture"), "topk")
    _only(folder, "normalize_activations", config.get("normalize_activations", "none"), "none")
    _only(folder, "reshape_activations", config.get("reshape_activations", "none"), "none")
    if config.get("dtype", "float32") != "float32":
        tensors = {name: tensor.float() for name, tensor in tensors.items()}
    W, W_dec, b_dec = tensors["W_enc"].T, tensors["W_dec"], tensors["b_dec"]
    b = tensors.get("b_enc", torch.zeros(len(W_dec)))
    if not config.get("apply_b_dec_to_input", True):
        b = b + W @ b_dec  # W (x - b_dec) + b' = W x + b
    # SAELens ranks scaled codes by default, so that the norms of the rows can be moved into the encoder exactly.
    most = config.get("metadata", {}).get("top_k", min(len(W_dec), JUMPRELU_SLOTS)) if jumps else config["k"]
    threshold = tensors["threshold"] if jumps else None
    # A threshold moves with its latent's code, so that the norms can be moved here too.
    return _checked(folder, Folded(W, b, W_dec, b_dec, most, threshold), jumps or bool(config.get("rescale_acts_by_decoder_norm")))


def read_dictionary_learning(folder: Path) -> Folded:
    """Read an AutoEncoderTopK saved by dictionary_learning."""
    config = read_json(folder / "config.json")["trainer"]
    _only(folder, "dict_class", config.get("dict_class"), "AutoEncoderTopK")
    try:
        state = torch.load(folder / "ae.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged archive
        raise InputError(f"{folder / 'ae.pt'} can't be read ({str(error).splitlines()[0][:120]})") from None
    top_k = int(state["k"]) if "k" in state else config["k"]
    return _checked(folder, Folded(state["encoder.weight"], state["encoder.bias"], state["decoder.weight"].T, state["b_dec"], top_k), False)


def read_sparsify(folder: Path) -> Folded:
    """Read a TopK sparse coder saved by sparsify. Its config may say num_latents 0: the tensors know."""
    config, tensors = read_json(folder / "cfg.json"), read_tensors(folder / "sae.safetensors")
    _only(folder, "activation", config.get("activation", "topk"), "topk")
    _only(folder, "transcode", config.get("transcode", False), False)
    _only(folder, "skip_connection", "W_skip" in tensors, False)
    return _checked(folder, Folded(tensors["encoder.weight"], tensors["encoder.bias"], tensors["W_dec"], tensors["b_dec"], config["k"]), False)


def _only_topk(sae: Folded, tool: str) -> None:
    if sae.threshold is not None:
        raise InputError(f"{tool} has no TopK SAE with thresholds (batchtopk, jumprelu); set FORMAT=sae_lens")


def _only(folder: Path, key: str, found: Any, wanted: Any) -> None:
    if found != wanted:
        raise InputError(f"{folder}: {key} is {json.dumps(found)}; only {json.dumps(wanted)} can be read")


def _checked(folder: Path, sae: Folded, move_norms: bool) -> Folded:
    """float32, shapes that agree, finite, rows of W_dec of unit norm; move_norms: put their norms into the encoder."""
    threshold = None if sae.threshold is None else sae.threshold.float()
    sae = Folded(sae.W.float(), sae.b.float(), sae.W_dec.float(), sae.b_dec.float(), int(sae.top_k), threshold)
    n_latents, width = sae.W_dec.shape
    if sae.W.shape != sae.W_dec.shape or sae.b.shape != (n_latents,) or sae.b_dec.shape != (width,):
        raise InputError(f"{folder}: the shapes of encoder {tuple(sae.W.shape)} and decoder {tuple(sae.W_dec.shape)} disagree")
    if not all(tensor.isfinite().all() for tensor in sae[:4]):
        raise InputError(f"{folder}: the weights hold values that are not finite")
    norms = sae.W_dec.norm(dim=1).clamp(min=1e-8)
    off = float((norms - 1).abs().max())
    if off > ROUNDING and not move_norms:
        size = f"norms from {norms.min():.3g} to {norms.max():.3g}"
        raise InputError(f"{folder}: rows of the decoder have {size}; TopK ranks by the codes as they are, so they can't be made unit")
    if off < 1e-6:
        return sae
    threshold = None if sae.threshold is None else sae.threshold * norms
    return sae._replace(W=sae.W * norms[:, None], b=sae.b * norms, W_dec=sae.W_dec / norms[:, None], threshold=threshold)


class Format(NamedTuple):
    """One tool's files."""

    file: str
    """A file that tells the format."""
    write: Callable[[Path, Folded, dict[str, Any]], None]
    read: Callable[[Path], Folded]


FORMATS = {
    "sae_lens": Format("sae_weights.safetensors", write_sae_lens, read_sae_lens),
    "dictionary_learning": Format("ae.pt", write_dictionary_learning, read_dictionary_learning),
    "sparsify": Format("sae.safetensors", write_sparsify, read_sparsify),
}


def read_foreign(folder: Path) -> tuple[str, Folded]:
    """Name of the format in `folder` and the SAE. Raises InputError for an unknown one, or an SAE that ours can't be."""
    for name, known in FORMATS.items():
        if (folder / known.file).exists():
            try:
                return name, known.read(folder)
            except KeyError as error:
                raise InputError(f"{folder}: {name} files need {error}, which is missing") from None
    wanted = ", ".join(f"{known.file} ({name})" for name, known in FORMATS.items())
    raise InputError(f"{folder} holds none of {wanted}; name the folder of one SAE")
