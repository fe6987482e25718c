"""The weights of an SAE on the language model's own activations, and the angles between its latents."""
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from lib.sae import SAE


class RawWeights(NamedTuple):
    """code = TopK(ReLU(encoder @ x + bias)), xhat = code @ decoder + offset, on raw activations x [D]."""

    encoder: Tensor
    """[F, D]: code units for each unit of raw activation."""
    bias: Tensor
    """[F]: the pre-activation at x = 0, in code units."""
    decoder: Tensor
    """[F, D]: raw activation units for each unit of code."""
    offset: Tensor
    """[D]: the reconstruction of an empty code, raw activation units."""


def raw_weights(sae: SAE) -> RawWeights:
    """The SAE's weights with the centring and scale of its inputs folded in; the codes stay the same."""
    encoder = sae.W_enc / sae.scale
    return RawWeights(encoder, sae.b_enc - encoder @ sae.mean, sae.scale * sae.W_dec, sae.mean)


def nearest_rows(W: Tensor, chunk: int = 1024) -> tuple[Tensor, Tensor]:
    """For each unit row of W [F, D] its largest cosine with another row and that row's number; never holds F x F."""
    cosines, numbers = [], []
    for start in range(0, len(W), chunk):
        here = W[start : start + chunk] @ W.T
        here[torch.arange(len(here)), torch.arange(start, start + len(here))] = -2
        best = here.max(1)
        cosines.append(best.values)
        numbers.append(best.indices)
    return torch.cat(cosines), torch.cat(numbers)


def inspect_weights(sae: SAE, start: SAE | None = None) -> dict[str, Tensor]:
    """One number for each latent, [F] each:

        encoder_norm         of the raw encoder row: code units for each unit of raw activation
        bias                 pre-activation on the mean activation, code units; below 0 firing takes evidence
        alignment            cosine of encoder and dictionary row
        gain                 what the latent reads when one unit of its own code is added to the activation
        nearest, neighbour   largest cosine of the dictionary row with another one, and that latent
        moved_dictionary     distance of the unit row from `start`, where training began (0 same, 1.41 unrelated)
        moved_encoder        distance of the encoder row from `start`, relative to its length there
    """
    nearest, neighbour = nearest_rows(sae.W_dec)
    found = {
        "encoder_norm": raw_weights(sae).encoder.norm(dim=1), "bias": sae.b_enc,
        "alignment": functional.cosine_similarity(sae.W_enc, sae.W_dec),
        "gain": (sae.W_enc * sae.W_dec).sum(1), "nearest": nearest, "neighbour": neighbour,
    }
    if start is not None:
        found["moved_dictionary"] = (sae.W_dec - start.W_dec).norm(dim=1)
        found["moved_encoder"] = (sae.W_enc - start.W_enc).norm(dim=1) / start.W_enc.norm(dim=1).clamp(min=1e-12)
    return found
