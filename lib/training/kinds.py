"""The kinds of SAE. Each is one row of KINDS; training, checkpoints, saved files and exports read that table.

topk        the k largest codes of each row fire (Gao et al. 2024, arXiv 2406.04093).
batchtopk   the k B largest codes of a batch of B rows fire. A trained SAE must not depend on its batch, so it uses a
            threshold: the running mean of the smallest code that fired (Bussmann et al. 2024, arXiv 2412.06410).
jumprelu    each latent fires above a threshold of its own. The threshold learns from codes inside a rectangular window
            around it, and the penalty is (L0 / k - 1)^2 (Rajamanoharan et al. 2024, arXiv 2407.14435). The error's part
            of its gradient is estimated on a quarter of the rows, because codes in the window outnumber those that fire
            by five to fifteen; the penalty's part is exact.
matryoshka  topk, but the first F/16, F/8, F/4 and F/2 latents must also reconstruct the row by themselves
            (Bussmann et al. 2025, arXiv 2503.17547).

lista       batchtopk of two codings: the first one's error, times `refine`, is added to the row, which is coded again
            with the same weights (Gregor & LeCun 2010); gradients flow through both. The latents that fire most make
            the lowest of eight levels; a level learns from the error that it and the lower ones leave, which keeps
            frequent latents whole where rarer ones could absorb them (nested prefixes, as matryoshka). `ridge`: a
            parent and children of which one always fires could share their directions in many ways at one error;
            little energy of the codes means that little is shared. `revive`: AuxK ends half way, because it takes the
            latents of rare features for dead ones.

To add a kind, write the functions in which it differs, add a row to KINDS, and add its name to KIND in
02_train_sae.py, which lists the names so that --help need not load torch (a test compares the two). lib.training.
selection has the same selection for the compiled step, lib.training.torch_step for any other. A kind whose trained SAE
is more than an encoder, a dictionary and thresholds also changes encode() in lib/sae.py.

Codes are never negative. k is the number of latents that fire: on each row, or on average where a threshold decides.
"""
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

WINDOW = 0.1  # width of the window around a threshold, in units of a row's root mean square norm
LEAST_THRESHOLD = 1e-6  # in training, where rows have mean squared norm 1
REMEMBER = 0.99  # of a latent's firing frequency, a step: what decides its level
FORGET = 0.05  # weight of the newest batch in the running mean of batchtopk's threshold


def topk_codes(pre: Tensor, k: int, log_threshold: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes [B, F]: of each row of pre [B, F], which are at least 0, the k largest; and no penalty."""
    values, chosen = pre.topk(k, dim=1)
    return torch.zeros_like(pre).scatter(1, chosen, values), pre.new_zeros(())


def batchtopk_codes(pre: Tensor, k: int, log_threshold: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes [B, F]: the k B largest of all of pre [B, F], however they fall on the rows; and no penalty."""
    values, chosen = pre.flatten().topk(min(k * len(pre), pre.numel()))
    return torch.zeros_like(pre.flatten()).scatter(0, chosen, values).view_as(pre), pre.new_zeros(())


def jumprelu_codes(pre: Tensor, k: int, log_threshold: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes [B, F]: those of pre [B, F] above their latent's threshold; and the penalty (L0 / k - 1)^2."""
    assert log_threshold is not None
    codes, fires = _Jump.apply(pre, log_threshold.exp())
    return codes, (fires.sum() / len(pre) / k - 1).square()


def one_error(x: Tensor, codes: Tensor, dec: Tensor) -> tuple[Tensor, Tensor]:
    """x - x_hat [B, D] and its squared norm, mean over rows."""
    error = x - codes @ dec
    return error, error.square().sum(-1).sum() / len(x)


def nested_errors(x: Tensor, codes: Tensor, dec: Tensor) -> tuple[Tensor, Tensor]:
    """x - x_hat [B, D] of all latents, and the squared error of the first n, mean over rows and prefix_sizes."""
    error, total, prefixes = x, x.new_zeros(()), prefix_sizes(len(dec))
    for start, end in zip([0, *prefixes], prefixes):
        error = error - codes[:, start:end] @ dec[start:end]
        total = total + error.square().sum(-1).sum() / len(x)
    return error, total / len(prefixes)


def prefix_sizes(n_latents: int) -> list[int]:
    """Latents in each nested part of a matryoshka SAE, the whole last: F/16, F/8, F/4, F/2, F; distinct, at least 1."""
    return sorted({max(1, n_latents >> shift) for shift in range(5)})


def prefix_levels(state: dict[str, Tensor]) -> Tensor:
    """Level of each latent, uint8 [F]: the first F/16 make level 0; the next ones end at F/8, F/4, F/2 and F."""
    dec = state["dec"]
    return _levels(torch.arange(len(dec), device=dec.device), prefix_sizes(len(dec))[:-1])


def frequency_levels(state: dict[str, Tensor]) -> Tensor:
    """Level of each latent: the F/64 that fire most often make level 0; the next ones end at the F/32, F/16, F/8, F/4,
    F/2, 3F/4 and F that fire most often.
    """
    n = len(state["frequency"])
    rank = torch.empty(n, dtype=torch.int64, device=state["frequency"].device)
    rank[state["frequency"].argsort(descending=True, stable=True)] = torch.arange(n, device=rank.device)
    return _levels(rank, frequency_ends(n))


def frequency_ends(n_latents: int) -> list[int]:
    """How many of the latents that fire most lie below each level but the lowest."""
    return sorted({max(1, n_latents * part // 64) for part in (1, 2, 4, 8, 16, 32, 48)})


def _levels(number: Tensor, ends: list[int]) -> Tensor:
    """How many of the ends each number has reached, uint8; without a table, which a GPU would have to wait for."""
    level = torch.zeros_like(number, dtype=torch.uint8)
    for end in ends:
        level += number >= end
    return level


def level_errors(x: Tensor, codes: Tensor, dec: Tensor, levels: Tensor, own: float) -> tuple[Tensor, Tensor]:
    """x - x_hat, and a loss whose gradient by the codes and rows of a level is that of `own` times the squared error
    after this level, with the lower ones constant, + (1 - own) times that of all.
    """
    error, total = x, x.new_zeros(())
    for level in range(int(levels.max()) + 1):
        inside = levels == level
        error = error.detach() - codes[:, inside] @ dec[inside]
        total = total + own * error.square().sum(-1).sum() / len(x)
    error = x - codes @ dec
    return error, total + (1 - own) * error.square().sum(-1).sum() / len(x)


class Kind(NamedTuple):
    """How one kind of SAE differs from the others."""

    codes: Callable[[Tensor, int, Tensor | None], tuple[Tensor, Tensor]]
    """(pre-activations [B, F] after ReLU, k, log_threshold [F]) -> codes [B, F], and a penalty (0-dim) on them."""
    errors: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = one_error
    """(x [B, D], codes [B, F], dictionary [F, D]) -> x - x_hat [B, D], and the loss: mean squared error over rows."""
    threshold: Literal["learnt", "running mean"] | None = None
    """Of the trained SAE: how training finds it; None: the k largest codes of a row fire."""
    rate: float = 1.0
    """Times the rule for the learning rate (lib.training.settings); a higher one kills latents."""
    levels: Callable[[dict[str, Tensor]], Tensor] | None = None
    """A state -> the level of each latent, uint8 [F], where the loss of `errors` is the mean over levels of the error
    after this level and the ones before; None: all latents are of one level.
    """
    refine: float = 0.0
    """Share of the first coding's error that is added to the row before the second; 0: there is one coding."""
    own: float | None = None
    """Share of a level's own error in what trains it, the rest is the error of all levels (`level_errors`); None: the
    mean over this and later levels' errors.
    """
    ridge: float = 0.0
    """Weight of the codes' squared norm, mean over rows."""
    revive: float = 1.0
    """Share of the steps, from the first, in which AuxK works."""
    ranks: bool = False
    """Whether several ranks may train it together: no rule of it looks at the batch as a whole."""


KINDS = {
    "topk": Kind(topk_codes, ranks=True),
    "batchtopk": Kind(batchtopk_codes, threshold="running mean", rate=0.7),
    "jumprelu": Kind(jumprelu_codes, threshold="learnt", rate=0.5),
    "matryoshka": Kind(topk_codes, nested_errors, levels=prefix_levels),
    "lista": Kind(batchtopk_codes, threshold="running mean", levels=frequency_levels, refine=0.5, own=0.7,
                  ridge=0.05, revive=0.5),
}
WITH_THRESHOLD = tuple(name for name, kind in KINDS.items() if kind.threshold)


def most_levels(rules: Kind, n_latents: int) -> int:
    """How many levels its latents may have."""
    if rules.levels is None:
        return 1
    return len(prefix_sizes(n_latents)) if rules.levels is prefix_levels else len(frequency_ends(n_latents)) + 1


def most_codes(kind: str, k: int, n_latents: int) -> int:
    """The most codes that a row of a trained SAE may have: all, where a threshold decides."""
    return n_latents if KINDS[kind].threshold else k


def first_threshold(pre: Tensor, k: int) -> Tensor:
    """The threshold above which k codes a row fire on average: 0-dim, from pre-activations [B, F]."""
    return pre.flatten().topk(min(k * len(pre), pre.numel())).values[-1]


def set_first_threshold(state: dict[str, Tensor], first: Tensor, name: str = "log_threshold") -> None:
    """Let all thresholds of a state start at `first`, 0-dim, in its first step, unless a start has set them."""
    if int(state["step"]) == 0 and not state[name].any():
        state[name].fill_(first.clamp(min=LEAST_THRESHOLD).log())


def follow_smallest(log_threshold: Tensor, smallest: Tensor) -> None:
    """Move batchtopk's threshold, in place, towards the smallest code that fired, 0-dim; it stays if that is inf."""
    moved = torch.logaddexp(log_threshold + math.log(1 - FORGET), (FORGET * smallest).log())
    log_threshold.copy_(moved.where(smallest < torch.inf, log_threshold))


def sampled_rows(n_rows: int) -> int:
    """The first rows of a batch, whose errors move jumprelu's thresholds: a quarter, at least 256."""
    return min(n_rows, max(256, n_rows // 4))


class _Jump(torch.autograd.Function):
    """pre * H(pre - threshold) and H(pre - threshold), H the unit step; gradients as in arXiv 2407.14435, eq. 11-12."""

    @staticmethod
    def forward(ctx, pre, threshold):
        fires = (pre > threshold).to(pre)
        ctx.save_for_backward(pre, threshold, fires)
        return pre * fires, fires

    @staticmethod
    def backward(ctx, g_codes, g_fires):
        pre, threshold, fires = ctx.saved_tensors
        near, n = ((pre - threshold).abs() < WINDOW / 2).to(pre) / WINDOW, sampled_rows(len(pre))
        of_error = (g_codes[:n] * near[:n]).sum(0) * (len(pre) / n)
        return g_codes * fires, -(of_error * threshold + (g_fires * near).sum(0))
