"""Which latents fire and what is minimised, for each kind of SAE; lib.sae_step makes the step around it.

topk        the k largest of each row fire (Gao et al. 2024, arXiv 2406.04093).
batchtopk   the k B largest of a batch of B rows fire; later, where no batch should matter, those above a threshold, the
            running mean of the smallest code that fired (Bussmann et al. 2024, arXiv 2412.06410).
jumprelu    a latent fires above a threshold of its own, learnt through a rectangular window around it, with the penalty
            (L0 / k - 1)^2 (Rajamanoharan et al. 2024, arXiv 2407.14435).
matryoshka  topk whose first F/16, F/8, F/4 and F/2 latents have to reconstruct by themselves too
            (Bussmann et al. 2025, arXiv 2503.17547).

Every code is positive. k is the number of latents that fire on a row: of each row, or on average.
"""
import torch
from torch import Tensor

KINDS = ("topk", "batchtopk", "jumprelu", "matryoshka")
WITH_THRESHOLD = ("batchtopk", "jumprelu")
SLOTS = 4  # times k: latents of one row that are kept at most where a threshold decides how many fire
RATES = {"topk": 1.0, "batchtopk": 0.7, "jumprelu": 0.5, "matryoshka": 1.0}  # times lib.sae_step.learning_rate: more
                                                                             # kills latents
WINDOW = 0.1  # width of the window around a threshold, in units of a row's root mean square norm
FORGET = 0.05  # weight of the newest batch in the running mean of batchtopk's threshold
L0_WEIGHT = 1.0  # of jumprelu's penalty beside the squared error, whose scale is 1


def codes_of(kind: str, pre: Tensor, k: int, log_threshold: Tensor | None) -> tuple[Tensor, Tensor]:
    """(codes [B, F], penalty 0-dim) from pre-activations [B, F] after ReLU. log_threshold [F]: jumprelu's."""
    nothing = pre.new_zeros(())
    if kind == "jumprelu":
        assert log_threshold is not None
        codes, fires = _Jump.apply(pre, log_threshold.exp())
        return codes, L0_WEIGHT * (fires.sum() / len(pre) / k - 1).square()
    if kind == "batchtopk":
        values, chosen = pre.flatten().topk(min(k * len(pre), pre.numel()))
        return torch.zeros_like(pre.flatten()).scatter(0, chosen, values).view_as(pre), nothing
    values, chosen = pre.topk(k, dim=1)
    return torch.zeros_like(pre).scatter(1, chosen, values), nothing


def errors_of(kind: str, x: Tensor, codes: Tensor, dec: Tensor) -> tuple[Tensor, Tensor]:
    """(x - x_hat [B, D], the mean over rows of the squared error; for matryoshka that over its prefixes too)."""
    if kind != "matryoshka":
        error = x - codes @ dec
        return error, error.square().sum(-1).sum() / len(x)
    error, total, prefixes = x, x.new_zeros(()), prefix_sizes(len(dec))
    for start, end in zip([0, *prefixes], prefixes):
        error = error - codes[:, start:end] @ dec[start:end]
        total = total + error.square().sum(-1).sum() / len(x)
    return error, total / len(prefixes)


def prefix_sizes(n_latents: int) -> list[int]:
    """Latents in each nested part of a matryoshka SAE, the whole last: F/16, F/8, F/4, F/2, F, at least 1, without
    repeats.
    """
    return sorted({max(1, n_latents >> shift) for shift in range(5)})


def first_threshold(pre: Tensor, k: int) -> Tensor:
    """What lets k codes a row fire on average: 0-dim, from pre-activations [B, F]."""
    return pre.flatten().topk(min(k * len(pre), pre.numel())).values[-1].clamp(min=1e-6)


class _Jump(torch.autograd.Function):
    """pre * H(pre - threshold) and H(pre - threshold), H the step; the threshold's gradient as in arXiv 2407.14435, eq.
    11-12.
    """

    @staticmethod
    def forward(ctx, pre, threshold):
        fires = (pre > threshold).to(pre)
        ctx.save_for_backward(pre, threshold, fires)
        return pre * fires, fires

    @staticmethod
    def backward(ctx, g_codes, g_fires):
        pre, threshold, fires = ctx.saved_tensors
        near = ((pre - threshold).abs() < WINDOW / 2).to(pre) / WINDOW
        return g_codes * fires, -((g_codes * threshold + g_fires) * near).sum(0)
