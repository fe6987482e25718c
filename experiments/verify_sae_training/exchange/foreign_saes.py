"""SAEs in files of SAELens, dictionary_learning and sparsify, read as data that a stranger wrote.

Sizes, k and numbers are checked, what our form can't be is refused by name, and nothing but tensors and plain values is
unpickled. exchange/formats.py says what the tensors do.
"""
import json
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lib.environment import InputError, first_line
from lib.files import read_json, read_tensors

ROUNDING = 0.01  # deviation of a decoder row's norm from 1 that low precision explains
JUMPRELU_SLOTS = 512  # codes kept of a row at most, where a JumpReLU SAE's file does not say


class Folded(NamedTuple):
    """A TopK SAE on raw activations; see exchange.formats for what the tensors do."""

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


def read_sae_lens(folder: Path) -> Folded:
    """Read a TopK or JumpReLU SAE saved by SAELens, exported or by its own training."""
    config, tensors = _config(folder / "cfg.json"), read_tensors(folder / "sae_weights.safetensors")
    jumps = config.get("architecture") == "jumprelu"
    if not jumps:
        _only(folder, "architecture", config.get("architecture"), "topk")
    _only(folder, "normalize_activations", config.get("normalize_activations", "none"), "none")
    _only(folder, "reshape_activations", config.get("reshape_activations", "none"), "none")
    W, W_dec, b_dec = _weights(folder, tensors, W_enc=2, W_dec=2, b_dec=1)
    told = {"d_sae": config.get("d_sae"), "d_in": config.get("d_in")}
    _same_sizes(folder, W_dec, {"W_enc": W.T, "b_dec": b_dec}, told)
    b = _weights(folder, tensors, b_enc=1)[0] if "b_enc" in tensors else torch.zeros(len(W_dec))
    if not _flag(folder, config, "apply_b_dec_to_input", True):
        b = b + W.T @ b_dec  # W (x - b_dec) + b' = W x + b
    most, threshold = config.get("k"), None
    if jumps:
        metadata = config.get("metadata") or {}
        most = metadata.get("top_k", min(len(W_dec), JUMPRELU_SLOTS)) if isinstance(metadata, dict) else None
        (threshold,) = _weights(folder, tensors, threshold=1)
    # SAELens ranks scaled codes by default, so that the norms of the rows can be moved into the encoder exactly; a
    # threshold moves with its latent's code.
    scaled = _flag(folder, config, "rescale_acts_by_decoder_norm", False)
    return _checked(folder, Folded(W.T, b, W_dec, b_dec, _count(folder, most, len(W_dec)), threshold), jumps or scaled)


def read_dictionary_learning(folder: Path) -> Folded:
    """Read an AutoEncoderTopK saved by dictionary_learning."""
    config = _config(folder / "config.json").get("trainer")
    if not isinstance(config, dict):
        raise InputError(f"{folder / 'config.json'} has no object trainer")
    _only(folder, "dict_class", config.get("dict_class"), "AutoEncoderTopK")
    state = _read_pt(folder / "ae.pt")
    W, b, W_dec, b_dec = _weights(
        folder, state, **{"encoder.weight": 2, "encoder.bias": 1, "decoder.weight": 2, "b_dec": 1}
    )
    told = {"dict_size": config.get("dict_size"), "activation_dim": config.get("activation_dim")}
    _same_sizes(folder, W_dec.T, {"encoder.weight": W, "b_dec": b_dec}, told)
    k = state.get("k", config.get("k"))
    k = k.item() if isinstance(k, Tensor) and k.numel() == 1 else k
    return _checked(folder, Folded(W, b, W_dec.T, b_dec, _count(folder, k, len(W))), False)


def _read_pt(path: Path) -> Any:
    """A torch archive's tensors and plain values; nothing else is unpickled, and nothing unpacks to more than it is."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise ValueError("it is compressed")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged archive
        raise InputError(f"{path} can't be read ({first_line(error)})") from None
    if not isinstance(state, dict):
        raise InputError(f"{path} holds no weights by name")
    return state


def read_sparsify(folder: Path) -> Folded:
    """Read a TopK sparse coder saved by sparsify. Its config may say num_latents 0: the tensors know."""
    config, tensors = _config(folder / "cfg.json"), read_tensors(folder / "sae.safetensors")
    _only(folder, "activation", config.get("activation", "topk"), "topk")
    _only(folder, "transcode", config.get("transcode", False), False)
    _only(folder, "signed", config.get("signed", False), False)
    _only(folder, "skip_connection", "W_skip" in tensors, False)
    W, b, W_dec, b_dec = _weights(folder, tensors, **{"encoder.weight": 2, "encoder.bias": 1, "W_dec": 2, "b_dec": 1})
    told = {"num_latents": config.get("num_latents") or None, "d_in": config.get("d_in")}
    _same_sizes(folder, W_dec, {"encoder.weight": W, "b_dec": b_dec}, told)
    return _checked(folder, Folded(W, b, W_dec, b_dec, _count(folder, config.get("k"), len(W))), False)


def _config(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except RecursionError:
        content = None
    if not isinstance(content, dict):
        raise InputError(f"{path} is no configuration of an SAE; it must hold a JSON object")
    return content


def _weights(folder: Path, tensors: dict[str, Any], **wanted: int) -> list[Tensor]:
    """The tensors of these names, which must have so many dimensions and hold floating-point numbers, as float32."""
    found = []
    for name, dimensions in wanted.items():
        tensor = tensors[name]
        usual = isinstance(tensor, Tensor) and tensor.layout is torch.strided and tensor.is_floating_point()
        if not usual or tensor.dim() != dimensions or not tensor.numel():
            shape = f" of shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else ""
            kind = f"{getattr(tensor, 'dtype', type(tensor).__name__)}{shape}"
            raise InputError(f"{folder}: {name} is {kind}; it must hold floating-point numbers, "
                             f"{dimensions}-dimensional")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise InputError(f"{folder}: {name} claims more numbers than its file holds")
        found.append(tensor.float())
    return found


def _same_sizes(folder: Path, W_dec: Tensor, tensors: dict[str, Tensor], told: dict[str, Any]) -> None:
    """The sizes of a decoder [F, D] against other tensors, [F, D] or [D], and (F, D) as a configuration tells them."""
    for name, tensor in tensors.items():
        if tensor.shape != (W_dec.shape if tensor.dim() == 2 else W_dec.shape[1:]):
            sizes = f"{tuple(tensor.shape)} and decoder {tuple(W_dec.shape)}"
            raise InputError(f"{folder}: the shapes of {name} {sizes} disagree")
    for (name, size), there in zip(told.items(), W_dec.shape):
        if size is not None and size != there:
            raise InputError(f"{folder}: {name} is {_short(size)}, but the weights have {there}")


def _flag(folder: Path, config: dict[str, Any], key: str, default: bool) -> bool:
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise InputError(f"{folder}: {key} is {_short(value)}; it must be true or false")
    return value


def _count(folder: Path, k: Any, n_latents: int) -> int:
    if type(k) is not int or not 1 <= k <= n_latents:
        raise InputError(f"{folder}: k is {_short(k)}; it must be a whole number from 1 to {n_latents}, the latents")
    return k


def _short(value: Any) -> str:
    return json.dumps(value, default=str)[:60]


def _only(folder: Path, key: str, found: Any, wanted: Any) -> None:
    if found != wanted:
        raise InputError(f"{folder}: {key} is {_short(found)}; only {json.dumps(wanted)} can be read")


def _checked(folder: Path, sae: Folded, move_norms: bool) -> Folded:
    """Finite numbers, rows of W_dec of unit norm; move_norms: put their norms into the encoder."""
    if sae.b.shape != sae.W_dec.shape[:1] or (sae.threshold is not None and sae.threshold.shape != sae.b.shape):
        shapes = f"{tuple(sae.b.shape)} and decoder {tuple(sae.W_dec.shape)}"
        raise InputError(f"{folder}: the shapes of encoder {shapes} disagree")
    _finite(folder, sae)
    norms = sae.W_dec.double().norm(dim=1).float().clamp(min=1e-8)
    off = float((norms - 1).abs().max())
    if off > ROUNDING and not move_norms:
        size = f"norms from {norms.min():.3g} to {norms.max():.3g}"
        reason = "TopK ranks by the codes as they are, so they can't be made unit"
        raise InputError(f"{folder}: rows of the decoder have {size}; {reason}")
    if off < 1e-6:
        return sae
    threshold = None if sae.threshold is None else sae.threshold * norms
    W_dec = sae.W_dec / norms[:, None]
    return _finite(folder, sae._replace(W=sae.W * norms[:, None], b=sae.b * norms, W_dec=W_dec, threshold=threshold))


def _finite(folder: Path, sae: Folded) -> Folded:
    if not all(tensor.isfinite().all() for tensor in (*sae[:4], *([] if sae.threshold is None else [sae.threshold]))):
        raise InputError(f"{folder}: the weights hold values that are not finite")
    if sae.threshold is not None and (sae.threshold < 0).any():
        raise InputError(f"{folder}: thresholds must be numbers from 0 up")
    return sae
