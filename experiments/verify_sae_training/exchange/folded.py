"""An SAE as other tools keep it: on raw activations, with centring and scale folded into its weights.

    encode(x) = TopK(ReLU(W (x - b_dec) + b))        decode(z) = z W_dec + b_dec

Ours centres and scales first. Because scale (W (x - mean) / scale + b_enc) = W (x - mean) + scale b_enc for scale > 0,

    W = W_enc    b = scale * b_enc    b_dec = mean    codes = scale * our codes

make the same latents fire and give the same reconstruction. In a kind with thresholds (batchtopk, jumprelu) a code is
ReLU(...) where that exceeds scale * threshold, and 0 elsewhere.
"""
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from lib.environment import InputError
from lib.sae import SAE, make_sae

ROUNDING = 0.01  # deviation of a decoder row's norm from 1 that low precision explains


class Folded(NamedTuple):
    """A TopK SAE on raw activations, or one with thresholds."""

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
    """[F], raw activation units: a code must exceed it; top_k then bounds the codes of a row."""


def fold(sae: SAE) -> Folded:
    """Our SAE on raw activations; float32 on the CPU."""
    tensors = (sae.W_enc, sae.b_enc * sae.scale, sae.W_dec, sae.mean)
    W, b, W_dec, b_dec = (tensor.detach().float().cpu().contiguous() for tensor in tensors)
    threshold = None if sae.threshold is None else (sae.threshold * sae.scale).cpu()
    return Folded(W, b, W_dec, b_dec, top_k=sae.top_k, threshold=threshold)


def unfold(folded: Folded, scale: float, config: dict[str, Any] | None = None) -> SAE:
    """The SAE in our form with its codes divided by `scale` (above 0, raw activation units); it rebuilds the same."""
    threshold = None if folded.threshold is None else folded.threshold / scale
    return make_sae(folded.W, folded.b / scale, folded.W_dec, folded.b_dec, scale=scale, top_k=folded.top_k,
                    config=config, threshold=threshold)


def normalised(folder: Path, sae: Folded, move_norms: bool = False) -> Folded:
    """The SAE read from `folder` with decoder rows of unit norm; move_norms: their norms go into the encoder.

    Raises InputError for numbers that are not finite, negative thresholds and, without move_norms, other norms.
    """
    _check_numbers(folder, sae)
    norms = sae.W_dec.double().norm(dim=1).float().clamp(min=1e-8)
    off = float((norms - 1).abs().max())
    if off > ROUNDING and not move_norms:
        raise InputError(f"{folder}: the decoder's rows have norms from {norms.min():.3g} to {norms.max():.3g}, and "
                         "can't be made unit without changing which latents TopK takes")
    if off < 1e-6:
        return sae
    threshold = None if sae.threshold is None else sae.threshold * norms
    W_dec = sae.W_dec / norms[:, None]
    found = sae._replace(W=sae.W * norms[:, None], b=sae.b * norms, W_dec=W_dec, threshold=threshold)
    _check_numbers(folder, found)
    return found


def _check_numbers(folder: Path, sae: Folded) -> None:
    if not all(part.isfinite().all() for part in sae if isinstance(part, Tensor)):
        raise InputError(f"{folder}: the weights hold values that are not finite")
    if sae.threshold is not None and (sae.threshold < 0).any():
        raise InputError(f"{folder}: thresholds must not be negative")
