"""Whether an SAE's codes are those that its file holds, but for rounding."""
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


@torch.no_grad()
def reload_error(sae: Any, probe: dict[str, Tensor]) -> float:
    """How far the codes of the probe's rows are from the stored ones, over what rounding explains; at most 1 is fine.

    probe: x [N, D], values and indices [N, k], as save_sae writes them; inf if this SAE has another k. A float32 sum of
    n products, taken in any order, errs by at most n u / (1 - n u) times the sum of their absolute values, u = 2^-24
    (Higham 2002, Accuracy and Stability of Numerical Algorithms, section 3.1), so two devices differ by at most twice
    that. n is D, plus 1 for the bias, plus 2 for a GPU that divides by multiplying with the inverse. Latents equal to
    rounding may swap places: each stored code must be right, and no other latent may exceed the least of them by more.
    """
    x, values, indices = (probe[name].to(sae.mean.device) for name in ("x", "values", "indices"))
    whole = values.shape[1] == sae.top_k
    if values.shape != indices.shape or not whole and (sae.threshold is None or values.shape[1] > sae.top_k):
        return float("inf")
    raw = (x - sae.mean) / sae.scale
    scaled = sae.refined(raw)
    pre = functional.linear(scaled, sae.W_enc, sae.b_enc)
    n_terms = (len(sae.mean) + 3) * 2.0**-24
    magnitude = functional.linear(scaled.abs(), sae.W_enc.abs(), sae.b_enc.abs()).amax(1, keepdim=True)
    allowed = 2 * n_terms / (1 - n_terms) * magnitude
    sure = torch.ones_like(allowed[:, 0])
    if sae.threshold_first is not None:  # what the first coding errs by, and rows where rounding decides what it has
        first = functional.linear(raw, sae.W_enc, sae.b_enc)
        of_first = functional.linear(raw.abs(), sae.W_enc.abs(), sae.b_enc.abs()).amax(1, keepdim=True)
        of_first = 2 * n_terms / (1 - n_terms) * of_first
        sure = ((first - sae.threshold_first).abs() > of_first).all(1).to(sure)
        count = (first > sae.threshold_first).sum(1, keepdim=True)
        allowed = allowed + sae.refine * count * of_first * sae.W_enc.norm(dim=1).amax()
    fired = values > 0
    wrong = ((pre.gather(1, indices) - values).abs() * fired).amax(1)
    # What did not fire is below the least code of a row with k, its threshold, or 0.
    floor = torch.zeros_like(sae.b_enc) if sae.threshold is None else sae.threshold
    limit = torch.maximum(values.amin(1, keepdim=True), floor) if whole else floor
    others = torch.ones_like(pre).scatter_reduce(1, indices, (~fired).to(pre), "amin")
    over = ((pre - limit).clamp(min=0) * others).amax(1)
    under = ((floor[indices] - values).clamp(min=0) * fired).amax(1)
    worst = torch.stack([wrong, over, under]).amax(0) * sure
    return float((worst / allowed[:, 0].clamp(min=torch.finfo(torch.float32).tiny)).max())
