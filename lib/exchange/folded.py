"""An SAE as other tools keep it: on raw activations, with centring and scale folded into its weights.

    encode(x) = act(W (x - b_dec) + b)        decode(z) = z W_dec + b_dec

act takes the k largest after ReLU, or keeps what exceeds a threshold of each latent and is 0 elsewhere. Ours centres
and scales first. Because scale (W (x - mean) / scale + b_enc) = W (x - mean) + scale b_enc for scale > 0,

    W = W_enc    b = scale * b_enc    b_dec = mean    codes = scale * our codes    threshold = scale * our threshold

make the same latents fire and give the same reconstruction. What is published in other terms comes down to this, and
keeps its reconstruction and which latents fire:

    standard (ReLU)             thresholds of 0
    gated                       code m = exp(r) u + b_mag where u + b_gate > 0, with u = W (x - b_dec): a threshold of
                                b_mag - exp(r) b_gate on m (Rajamanoharan et al. 2024, arXiv 2407.14435, appendix)
    a negative threshold        0, since codes are never negative
    rows of another norm n      W n, b n, threshold n, W_dec / n: the code is n times the published one
    inputs scaled by s          W, b / s, threshold / s, W_dec, b_dec / s: the code is that of the raw activation
"""
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..environment import InputError
from ..sae import SAE, make_sae

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
    wants_norm: float | None = None
    """Mean norm to which activations must first be scaled (`rescaled`); None: they are taken as they are."""


def fold(sae: SAE) -> Folded:
    """Our SAE on raw activations; float32 on the CPU. Raises InputError for one that refines, as no other tool does."""
    if sae.threshold_first is not None:
        raise InputError("this SAE codes each row twice (KIND=lista), which no other tool's format can hold; export it "
                         "as workbench")
    tensors = (sae.W_enc, sae.b_enc * sae.scale, sae.W_dec, sae.mean)
    W, b, W_dec, b_dec = (tensor.detach().float().cpu().contiguous() for tensor in tensors)
    threshold = None if sae.threshold is None else (sae.threshold * sae.scale).cpu()
    return Folded(W, b, W_dec, b_dec, top_k=sae.top_k, threshold=threshold)


def unfold(folded: Folded, scale: float, config: dict[str, Any] | None = None) -> SAE:
    """The SAE in our form with its codes divided by `scale` (above 0, raw activation units); it rebuilds the same."""
    threshold = None if folded.threshold is None else folded.threshold / scale
    return make_sae(folded.W, folded.b / scale, folded.W_dec, folded.b_dec, scale=scale, top_k=folded.top_k,
                    config=config, threshold=threshold)


def thresholded(W: Tensor, b: Tensor, W_dec: Tensor, b_dec: Tensor, threshold: Tensor | None = None) -> Folded:
    """An SAE whose rows may have as many codes as it has latents; threshold: None is 0, a plain ReLU."""
    threshold = torch.zeros_like(b) if threshold is None else threshold.clamp(min=0)
    return Folded(W, b, W_dec, b_dec, top_k=len(b), threshold=threshold)


def gated(W: Tensor, r_mag: Tensor, b_mag: Tensor, b_gate: Tensor, W_dec: Tensor, b_dec: Tensor) -> Folded:
    """A gated SAE, whose gate is a threshold on its code."""
    gain = r_mag.exp()
    return thresholded(W * gain[:, None], b_mag, W_dec, b_dec, threshold=b_mag - gain * b_gate)


def bias_without_centring(W: Tensor, b: Tensor, b_dec: Tensor) -> Tensor:
    """The bias b' with W (x - b_dec) + b' = W x + b, for an encoder that does not subtract b_dec."""
    return (b.double() + W.double() @ b_dec.double()).float()


def rescaled(sae: Folded, factor: float) -> Folded:
    """The SAE on raw activations x of one that takes factor * x and rebuilds factor * x; codes are those of x."""
    threshold = None if sae.threshold is None else sae.threshold / factor
    return sae._replace(b=sae.b / factor, b_dec=sae.b_dec / factor, threshold=threshold, wants_norm=None)


def centring(sae: Folded) -> Folded:
    """The SAE on x of one that takes x less the mean of its D entries: a residual stream that was centred."""
    W = (sae.W.double() - sae.W.double().mean(1, keepdim=True)).float()
    return sae._replace(W=W, b=sae.b - (sae.W.double() - W.double()).mv(sae.b_dec.double()).float())


def normalised(folder: Path, sae: Folded, move_norms: bool = False) -> Folded:
    """The SAE read from `folder` with decoder rows of unit norm; move_norms: their norms go into the encoder.

    A latent whose row is 0 adds nothing, so it never fires. Raises InputError for numbers that are not finite and,
    without move_norms, other norms.
    """
    _check_numbers(folder, sae)
    norms = sae.W_dec.double().norm(dim=1).float()
    off = float((norms - 1).abs().max())
    if off > ROUNDING and not move_norms:
        raise InputError(f"{folder}: the decoder's rows have norms from {norms.min():.3g} to {norms.max():.3g}, and "
                         "can't be made unit without changing which latents TopK takes")
    if off < 1e-6:
        return sae
    W_dec = sae.W_dec / norms.clamp(min=1e-30)[:, None]
    if silent := (norms == 0).nonzero()[:, 0].tolist():
        W_dec[silent, 0] = 1.0
    threshold = None if sae.threshold is None else sae.threshold * norms
    found = sae._replace(W=sae.W * norms[:, None], b=sae.b * norms, W_dec=W_dec, threshold=threshold)
    _check_numbers(folder, found)
    return found


def _check_numbers(folder: Path, sae: Folded) -> None:
    if not all(part.isfinite().all() for part in sae if isinstance(part, Tensor)):
        raise InputError(f"{folder}: the weights hold values that are not finite")
