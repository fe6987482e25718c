"""SAEs in the files of SAELens, dictionary_learning and sparsify: write them, and read them as if they were ours.

All three encode(x) = TopK(ReLU(W (x - b_dec) + b)) and decode(z) = z W_dec + b_dec on raw activations. Ours centres and
scales first; folded into that form (scale (W (x - mean) / scale + b_enc) = W (x - mean) + scale b_enc, scale > 0)

    W = W_enc    b = scale * b_enc    b_dec = mean    codes = scale * our codes

the same latents fire and the reconstruction is the same: mean and scale are in the files exactly. An SAE with
thresholds (batchtopk, jumprelu) goes to and comes from SAELens as its JumpReLU SAE: ReLU(...) where that exceeds scale
* threshold.
"""
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from exchange.foreign_saes import Folded, read_dictionary_learning, read_sae_lens, read_sparsify
from lib.environment import InputError
from lib.files import atomic_write, write_json, write_tensors
from lib.sae import SAE, make_sae

SAE_LENS_VERSION = "6.54.12"  # whose files are written; SAELens migrates what claims to be older than 6


def fold(sae: SAE) -> Folded:
    """Our SAE on raw activations, with the centring and the scale inside; float32 on the CPU."""
    tensors = (sae.W_enc, sae.b_enc * sae.scale, sae.W_dec, sae.mean)
    W, b, W_dec, b_dec = (tensor.detach().float().cpu().contiguous() for tensor in tensors)
    return Folded(W, b, W_dec, b_dec, sae.top_k, None if sae.threshold is None else (sae.threshold * sae.scale).cpu())


def unfold(folded: Folded, scale: float, config: dict[str, Any] | None = None) -> SAE:
    """The SAE in our form, its codes divided by `scale` (in raw activation units, above 0); the reconstruction
    stays.
    """
    threshold = None if folded.threshold is None else folded.threshold / scale
    return make_sae(folded.W, folded.b / scale, folded.W_dec, folded.b_dec, scale, folded.top_k, config,
                    threshold=threshold)


def transformer_lens_name(path: str, point: str) -> str:
    """TransformerLens's name of a hook point given by module path and "input" or "output".

    A point that has none keeps its module path, with ":input" behind it where it is an input.
    """
    place = re.fullmatch(r".*?\.(\d+)(?:\.([a-z0-9_]+))?", path)
    names = {
        ("", "input"): "hook_resid_pre", ("", "output"): "hook_resid_post",
        ("attn", "output"): "hook_attn_out", ("mlp", "output"): "hook_mlp_out", ("norm", "input"): "hook_resid_mid",
    }
    roles = {"self_attn": "attn", "attn": "attn", "attention": "attn", "mlp": "mlp", "feed_forward": "mlp", None: ""}
    roles |= dict.fromkeys(("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2"), "norm")
    name = names.get((roles.get(place[2], "?"), point)) if place else None
    return f"blocks.{place[1]}.{name}" if place and name else path + (":input" if point == "input" else "")


def write_sae_lens(folder: Path, sae: Folded, about: dict[str, Any]) -> list[Path]:
    """Write what SAELens's SAE.load_from_disk(folder) reads; return the files. about: facts_of() in exchange/hub.py."""
    tensors = {"W_enc": sae.W.T, "b_enc": sae.b, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    kind: dict[str, Any] = {"architecture": "topk", "k": sae.top_k}
    if sae.threshold is not None:
        tensors["threshold"] = sae.threshold
        kind, about = {"architecture": "jumprelu"}, {**about, "top_k": sae.top_k}
    write_tensors(folder / "sae_weights.safetensors", tensors)
    n_latents, width = sae.W_dec.shape
    write_json(folder / "cfg.json", {
        **kind, "d_in": width, "d_sae": n_latents, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
        "metadata": {"sae_lens_version": SAE_LENS_VERSION, **about},
    })
    return [folder / name for name in ("sae_weights.safetensors", "cfg.json")]


def write_dictionary_learning(folder: Path, sae: Folded, about: dict[str, Any]) -> list[Path]:
    """Write what dictionary_learning's load_dictionary(folder, device) and SAEBench read. InputError for an SAE with
    thresholds.
    """
    _only_topk(sae, "dictionary_learning")
    state = {
        "encoder.weight": sae.W, "encoder.bias": sae.b, "decoder.weight": sae.W_dec.T.contiguous(), "b_dec": sae.b_dec,
        "k": torch.tensor(sae.top_k, dtype=torch.int), "threshold": torch.tensor(-1.0),
    }
    atomic_write(folder / "ae.pt", lambda temporary: torch.save(state, temporary))
    n_latents, width = sae.W_dec.shape
    layer = re.search(r"\d+", about["hook_name"])
    write_json(folder / "config.json", {
        "trainer": {
            "trainer_class": "TopKTrainer", "dict_class": "AutoEncoderTopK", "activation_dim": width,
            "dict_size": n_latents, "k": sae.top_k,
            "layer": int(layer[0]) if layer else None, "lm_name": about["model_name"],
            "submodule_name": about["hf_module_path"],
            "lr": about["lr"], "steps": about["steps"], "seed": about["seed"],
        },
        "buffer": {"ctx_len": about["context_size"]}, "about": about,
    })
    return [folder / name for name in ("ae.pt", "config.json")]


def write_sparsify(folder: Path, sae: Folded, about: dict[str, Any]) -> list[Path]:
    """Write what sparsify's SparseCoder.load_from_disk(folder) reads; its input is flattened to [N, D]. InputError for
    an SAE with thresholds.
    """
    _only_topk(sae, "sparsify")
    tensors = {"encoder.weight": sae.W, "encoder.bias": sae.b, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    # Not write_tensors: sparsify's reader wants the header that names the framework.
    atomic_write(folder / "sae.safetensors", lambda temporary: save_file(tensors, temporary, {"format": "pt"}))
    n_latents, width = sae.W_dec.shape
    write_json(folder / "cfg.json", {
        "activation": "topk", "expansion_factor": n_latents // width, "normalize_decoder": True,
        "num_latents": n_latents, "k": sae.top_k,
        "multi_topk": False, "skip_connection": False, "transcode": False, "d_in": width, "about": about,
    })
    return [folder / name for name in ("sae.safetensors", "cfg.json")]


def _only_topk(sae: Folded, tool: str) -> None:
    if sae.threshold is not None:
        raise InputError(f"{tool} has no TopK SAE with thresholds (batchtopk, jumprelu); set FORMAT=sae_lens")


class Format(NamedTuple):
    """One tool's files."""

    file: str
    """A file that tells the format."""
    write: Callable[[Path, Folded, dict[str, Any]], list[Path]]
    """Returns the files that it wrote."""
    read: Callable[[Path], Folded]


FORMATS = {
    "sae_lens": Format("sae_weights.safetensors", write_sae_lens, read_sae_lens),
    "dictionary_learning": Format("ae.pt", write_dictionary_learning, read_dictionary_learning),
    "sparsify": Format("sae.safetensors", write_sparsify, read_sparsify),
}


def read_foreign(folder: Path) -> tuple[str, Folded]:
    """Name of the format in `folder` and the SAE. Raises InputError for an unknown one, or an SAE that ours can't
    be.
    """
    for name, known in FORMATS.items():
        if (folder / known.file).exists():
            try:
                return name, known.read(folder)
            except KeyError as error:
                raise InputError(f"{folder}: {name} files need {error}, which is missing") from None
    wanted = ", ".join(f"{known.file} ({name})" for name, known in FORMATS.items())
    raise InputError(f"{folder} holds none of {wanted}; name the folder of one SAE")
