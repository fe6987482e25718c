"""A training that continues from a trained SAE, ours or an imported one.

    rows = rows_about(rows, sae.mean)                # its centre stays the centre: a decoder bias is not trained
    state |= state_of(sae, state["transform"])       # lib.training.step.init_state's, with the SAE's weights

With the SAE's codes z and dictionary W_dec on raw activations, and rows (x - mean) T in training, latent j's code there
is g_j z_j, with g_j = |W_dec_j T|: lib.training.step.folded_weights gives the SAE back.
"""
from copy import copy

import torch
from torch import Tensor

from ..batches import Source
from ..environment import InputError
from ..sae import SAE
from .kinds import KINDS, LEAST_THRESHOLD, WITH_THRESHOLD
from .settings import TrainSettings


def kind_of(sae: SAE) -> str:
    """The kind of a trained or imported SAE: one of KINDS, or standard or gated."""
    known = sae.config.get("imported", {}).get("kind") or sae.config.get("constants", {}).get("KIND")
    return known or ("topk" if sae.threshold is None else "jumprelu")


def check_start(sae: SAE, settings: TrainSettings, width: int) -> None:
    """Raise InputError if these settings can't continue the SAE's training on activations of that width."""
    kind = kind_of(sae)
    able = [name for name, rules in KINDS.items() if (name in WITH_THRESHOLD) == (sae.threshold is not None)
            and bool(rules.refine) == (sae.threshold_first is not None)]
    faults = [
        (len(sae.mean) != width, f"START_FROM is for activations of width {len(sae.mean)}, not {width}"),
        (kind not in KINDS, f"START_FROM is a {kind} SAE, which no KIND trains; KIND is {', '.join(KINDS)}"),
        (settings.kind not in able,
         f"START_FROM is a {kind} SAE, which KIND={settings.kind} does not continue; set KIND={' or '.join(able)}"),
        (settings.n_latents != sae.n_latents, f"START_FROM has {sae.n_latents} latents, not {settings.n_latents}; set "
                                              f"N_LATENTS_MULTIPLIER={sae.n_latents / width:g}"),
        (sae.threshold is None and settings.top_k != sae.top_k, f"START_FROM has k = {sae.top_k}; set "
                                                                f"TOP_K={sae.top_k}"),
    ]
    for wrong, message in faults:
        if wrong:
            raise InputError(message)


def rows_about(source: Source, mean: Tensor) -> Source:
    """The same rows with another centre than their mean: `covariance` is their second moment about it."""
    if torch.equal(source.mean, mean.cpu()):
        return source
    shift, moved = (source.mean - mean.cpu()).double(), copy(source)
    moved.mean, moved.covariance = mean.cpu(), (source.covariance.double() + shift.outer(shift)).float()
    return moved


def state_of(sae: SAE, transform: Tensor, aligned: bool) -> dict[str, Tensor]:
    """The SAE's tensors of a training state: dec, enc, bias and, where it has them, gain and log_threshold."""
    T = transform.cpu().double()
    W_enc, b_enc, W_dec = (t.cpu().double() for t in (sae.W_enc, sae.b_enc, sae.W_dec))
    rows = W_dec @ T
    g = rows.norm(dim=1)
    found = {"dec": rows / g[:, None], "enc": g[:, None] * torch.linalg.solve(T, W_enc, left=False),
             "bias": g * sae.scale * b_enc}
    if aligned:
        found["gain"] = (found["enc"] * found["dec"]).sum(1)
    for name, threshold in (("log_threshold", sae.threshold), ("log_threshold_first", sae.threshold_first)):
        if threshold is not None:
            found[name] = (g * sae.scale * threshold.cpu()).clamp(min=LEAST_THRESHOLD).log()
    return {name: value.float().to(transform.device) for name, value in found.items()}
