"""The training step of every kind in torch operations, for GPUs and for CPUs without numba.

    found = torch_step(state, x, k=k, lr=lr, dead_after=dead_after, work=work, aux_weight=1 / 32, frozen=None)

No array of rows times latents is held: tiles of the encoder product propose (row, latent) pairs
(lib.training.workspace), and all that follows is about those. On a GPU no step waits for the device, but for
jumprelu's, whose number of pairs only the device knows, and for the first of a kind with a threshold.
"""
import torch
from torch import Tensor

from ..distributed import add_up
from .kinds import KINDS, REMEMBER, WINDOW, Kind, follow_smallest, most_levels, sampled_rows, set_first_threshold
from .pairs import Decoded, Pairs, Products, dots, pairs_of
from .step import Found, apply_gradients, dead_in_turn
from .workspace import MARGIN, Workspace, candidates_wanted, low_precision, scores

Chosen = tuple[Tensor, Tensor]  # rows and latents of pairs, int64 [n] each, by row

def torch_step(
    state: dict[str, Tensor], x: Tensor, *, k: int, lr: float, dead_after: int, work: Workspace, aux_weight: float,
    frozen: str | None
) -> Found:
    """One step, in place: the mathematics and the arguments of lib.training.fast_step.fast_step; x: float32 [B, D]."""
    rules, n_latents = KINDS[work.kind], len(state["dec"])
    n_rows = torch.full((), len(x), device=x.device)  # written there, where torch.tensor() would copy and wait
    if work.shared:
        add_up(n_rows)
    weights = {name: state[name].detach().requires_grad_() for name in ("dec", "enc", "bias")}
    seen = x if not rules.refine else _refined(state, x, weights, k=k, work=work)
    (row, latent), near = _chosen(state, seen.detach(), k, work)
    levels = None if rules.levels is None else rules.levels(state)
    pairs = pairs_of(row, latent, n_rows=len(x), n_latents=n_latents, levels=levels,
                     n_levels=most_levels(rules, n_latents), per_row=k if rules.threshold is None else None)
    code = Products.apply(seen, weights["enc"], weights["bias"], pairs).relu()
    error, squares = _errors(x, code, weights["dec"], pairs, rules=rules)
    loss = (squares + rules.ridge * code.square().sum()) / n_rows
    grads = dict(zip(weights, torch.autograd.grad(loss, [*weights.values()])))

    code, error, seen = code.detach(), error.detach(), seen.detach()
    if rules.threshold == "running mean":
        _follow(state, code, "log_threshold")
    total, auxk = error.square().sum(-1).sum(), torch.zeros((), device=x.device)
    if work.shared:
        add_up(total)
    found = aux_gradients(state, seen, error, total=total, dead_after=dead_after, aux_weight=aux_weight)
    if found is not None:
        auxk, dead = found[0], found[1]
        for name, part in zip(weights, found[2:]):
            grads[name].index_add_(0, dead, part)
    fires, count = code > 0, torch.zeros(n_latents, device=x.device)
    n_active = fires.sum()
    count.index_add_(0, pairs.latent, fires.float())
    if work.shared:
        add_up(*grads.values(), auxk, n_active, count)
    _tie(state, grads)
    if near is not None:
        grads["log_threshold"] = _threshold_gradient(state, x, error, near=near, n_fires=n_active, k=k, work=work)
    norm = apply_gradients(state, grads, lr=lr, frozen=frozen)
    if "frequency" in state:
        state["frequency"].lerp_(count / n_rows, 1 - REMEMBER)
    if work.low is not None:
        work.low.copy_(low_precision(state["enc"], state["bias"]))
    return Found(n_rows, recon=total / n_rows, auxk=auxk, n_active=n_active, fired=count > 0, grad_norm=norm)


def _tie(state: dict[str, Tensor], grads: dict[str, Tensor]) -> None:
    """Turn the gradients of encoder and dictionary into those of gain, u and dictionary, where there is a gain."""
    if "gain" in state:
        along = (grads["enc"] * state["dec"]).sum(1)
        u = state["enc"] - state["gain"][:, None] * state["dec"]
        grads["dec"] += state["gain"][:, None] * grads["enc"] - along[:, None] * u
        grads["enc"] -= along[:, None] * state["dec"]
        grads["gain"] = along


def _refined(state: dict[str, Tensor], x: Tensor, weights: dict[str, Tensor], *, k: int, work: Workspace) -> Tensor:
    """The rows of the second coding, as a function of the weights."""
    row, latent = _largest_of_batch(state, x, k, work)
    pairs = pairs_of(row, latent, n_rows=len(x), n_latents=len(state["dec"]))
    code = Products.apply(x, weights["enc"], weights["bias"], pairs).relu()
    _follow(state, code.detach(), "log_threshold_first")
    return x + KINDS[work.kind].refine * (x - Decoded.apply(code, weights["dec"], pairs))


def _chosen(state: dict[str, Tensor], x: Tensor, k: int, work: Workspace) -> tuple[Chosen, Tensor | None]:
    """The pairs that may fire, and, for thresholds that learn, how many rows lie near each."""
    rules = KINDS[work.kind]
    if rules.threshold is None:
        return _largest_of_rows(state, x, k, work), None
    if rules.threshold == "running mean":
        return _largest_of_batch(state, x, k, work), None
    if int(state["step"]) == 0:
        row, latent = _largest_of_batch(state, x, k, work)
        exact = dots(x, row, state["enc"], latent, per_row=None) + state["bias"][latent]
        set_first_threshold(state, exact.relu().min())
    return _above_thresholds(state, x, work)


def _follow(state: dict[str, Tensor], code: Tensor, name: str) -> None:
    """Move a threshold that follows the smallest code that fires; set it in the first step."""
    set_first_threshold(state, code.min(), name)
    follow_smallest(state[name], code.where(code > 0, torch.inf).amin())


def _largest_of_rows(state: dict[str, Tensor], x: Tensor, k: int, work: Workspace) -> Chosen:
    """The k largest of each row: (rows, latents), [B k]."""
    wanted = candidates_wanted(k, len(state["dec"]), work)
    latent = torch.cat([out.topk(wanted, dim=1, sorted=False).indices for _, out in scores(state, x, work)])
    row = torch.arange(len(x), device=x.device)[:, None]
    if wanted > k:
        exact = dots(x, row.expand_as(latent).flatten(), state["enc"], latent.flatten(), per_row=wanted)
        latent = latent.gather(1, (exact.view_as(latent) + state["bias"][latent]).topk(k, dim=1).indices)
    return row.expand_as(latent).flatten(), latent.flatten()


def _largest_of_batch(state: dict[str, Tensor], x: Tensor, k: int, work: Workspace) -> Chosen:
    """The k B largest of the batch, by row: (rows, latents), [k B]."""
    n_latents = len(state["dec"])
    keep = min(k * len(x), len(x) * n_latents)
    wanted = min(candidates_wanted(k, n_latents, work) * len(x), len(x) * n_latents)
    best: Chosen | None = None
    for start, out in scores(state, x, work):
        score, place = out.flatten().topk(min(wanted, out.numel()), sorted=False)
        place += start * n_latents
        if best is not None:
            score, place = torch.cat([best[0], score]), torch.cat([best[1], place])
        if len(score) > wanted:
            score, chosen = score.topk(wanted, sorted=False)
            place = place[chosen]
        best = score, place
    assert best is not None
    place = best[1]
    if wanted > keep:
        row, latent = place // n_latents, place % n_latents
        exact = dots(x, row, state["enc"], latent, per_row=None) + state["bias"][latent]
        place = place[exact.topk(keep, sorted=False).indices]
    place = place.sort().values
    return place // n_latents, place % n_latents


def _above_thresholds(state: dict[str, Tensor], x: Tensor, work: Workspace) -> tuple[Chosen, Tensor]:
    """All that exceed their latent's threshold: (rows, latents), by row, and how many rows of each latent lie in the
    window around it, [F].
    """
    threshold = state["log_threshold"].exp()
    bound = threshold if work.low is None else (1 - MARGIN) * threshold
    near, found = torch.zeros_like(threshold), []
    for start, out in scores(state, x, work):
        near += _in_window(out, threshold).sum(0)
        here = (out > bound).nonzero()
        found.append(torch.stack([here[:, 0] + start, here[:, 1]]))
    row, latent = torch.cat(found, 1)
    if work.low is not None:
        exact = dots(x, row, state["enc"], latent, per_row=None) + state["bias"][latent]
        row, latent = row[exact > threshold[latent]], latent[exact > threshold[latent]]
    return (row, latent), near


def _in_window(out: Tensor, threshold: Tensor) -> Tensor:
    """Which scores, negative ones as 0, lie in the window around their latent's threshold, bool [R, F]."""
    return (out.float().relu_() - threshold).abs_() < WINDOW / 2


def _threshold_gradient(
    state: dict[str, Tensor], x: Tensor, error: Tensor, *, near: Tensor, n_fires: Tensor, k: int, work: Workspace
) -> Tensor:
    """Of the loss and of the penalty (L0 / k - 1)^2 by the logarithm of each threshold, [F]; see lib.training.kinds."""
    threshold, n = state["log_threshold"].exp(), sampled_rows(len(x))
    of_codes = torch.zeros_like(threshold)
    for start, out in scores(state, x[:n], work):
        inside = _in_window(out, threshold)
        of_codes += (error[start : start + len(out)] @ state["dec"].T).mul_(inside).sum(0)
    of_codes *= threshold * (-2 / n)
    of_count = near * (2 * (n_fires / len(x) / k - 1) / (k * len(x)))
    return -(of_codes + of_count) / WINDOW * threshold


def _errors(x: Tensor, code: Tensor, dec: Tensor, pairs: Pairs, *, rules: Kind) -> tuple[Tensor, Tensor]:
    """x - x_hat [B, D], and the squared error that trains, summed over rows (lib.training.kinds has both)."""
    parts = Decoded.apply(code, dec, pairs).view(len(x), pairs.n_levels, -1)
    if rules.own is None:
        errors = x[:, None] - parts.cumsum(1)
        return errors[:, -1], errors.square().sum(-1).sum() / pairs.n_levels
    known = parts.detach()
    own = x[:, None] - (known.cumsum(1) - known) - parts
    error = x - parts.sum(1)
    return error, rules.own * own.square().sum(-1).sum() + (1 - rules.own) * error.square().sum(-1).sum()


def aux_gradients(
    state: dict[str, Tensor], x: Tensor, error: Tensor, *, total: Tensor, dead_after: int, aux_weight: float
):
    """AuxK and its gradients: (value, latents [A], of dec, of enc [A, D], of bias [A]); None if it has no weight, or
    nothing is dead, which is only looked up on a CPU.

    total: sum of squares of the step's errors, over all ranks.
    """
    if not aux_weight or x.device.type == "cpu" and not (state["silent"] > dead_after).any():
        return None
    latents, is_dead = dead_in_turn(state, dead_after)
    if x.device.type == "cpu":
        latents = latents[is_dead > 0]
        is_dead = is_dead[: len(latents)]
    enc, dec = state["enc"][latents], state["dec"][latents]
    codes = torch.addmm(state["bias"][latents], x, enc.T).relu_().mul_(is_dead)
    rest = torch.addmm(error, codes, dec, alpha=-1)
    total = total.clamp(min=1e-30)
    value = rest.square().sum(-1).sum() / total
    slope = rest.mul_(-2 * aux_weight / total)
    g_code = (slope @ dec.T).mul_(codes > 0)
    return value, latents, codes.T @ slope, g_code.T @ x, g_code.sum(0)
