"""What a kind of SAE makes of a batch, on dense arrays that autograd can follow."""
import torch
from torch import Tensor

from .kinds import KINDS, Kind, first_threshold, follow_smallest, level_errors, set_first_threshold


def forward(state: dict[str, Tensor], leaves: dict[str, Tensor], x: Tensor, k: int, kind: str):
    """(pre-activations [B, F] that AuxK decodes, codes [B, F], x - x_hat [B, D], loss) of rows x [B, D].

    leaves: the parameters, as autograd sees them. Thresholds that are not parameters are set in the first step, and
    that of a first coding follows its codes.
    """
    rules, enc, dec = KINDS[kind], _encoder(state, leaves), leaves["dec"]
    pre, seen = torch.relu(x @ enc.T + leaves["bias"]), x
    if rules.refine:
        seen = x + rules.refine * (x - _first_codes(state, pre, k, rules) @ dec)
        pre = torch.relu(seen @ enc.T + leaves["bias"])
    if rules.threshold and int(state["step"]) == 0:
        set_first_threshold(state, first_threshold(pre.detach(), k))
        leaves["log_threshold"] = state["log_threshold"].clone().requires_grad_()
    codes, penalty = rules.codes(pre, k, leaves.get("log_threshold"))
    if rules.own is None:
        error, loss = rules.errors(x, codes, dec)
    else:
        assert rules.levels is not None
        error, loss = level_errors(x, codes, dec, rules.levels(state), own=rules.own)
    if rules.refine:
        pre = torch.relu(seen.detach() @ enc.T + leaves["bias"])
    return pre, codes, error, loss + penalty + rules.ridge * codes.square().sum(-1).sum() / len(x)


def _first_codes(state: dict[str, Tensor], pre: Tensor, k: int, rules: Kind) -> Tensor:
    codes, _ = rules.codes(pre, k, None)
    with torch.no_grad():
        set_first_threshold(state, first_threshold(pre, k), "log_threshold_first")
        follow_smallest(state["log_threshold_first"], codes.where(codes > 0, torch.inf).amin())
    return codes


def _encoder(state: dict[str, Tensor], leaves: dict[str, Tensor]) -> Tensor:
    """The encoder [F, D] as a function of the leaves: gain dec + u, where there is a gain."""
    if "gain" not in leaves:
        return leaves["enc"]
    dec, u = leaves["dec"], leaves["enc"] - (state["gain"][:, None] * state["dec"])
    return leaves["gain"][:, None] * dec + u - (u * dec).sum(1, keepdim=True) * dec
