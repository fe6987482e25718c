"""One training step of an SAE: its state, and the dense step that is the reference for lib.training.fast_step.

    transform = whitening(covariance)
    state = init_state(transform, n_latents, seed)
    for rows in batches:                                     # float32 [B, D], x_raw - mean
        dense_step(state, rows @ transform, k=k, lr=lr, dead_after=dead_after)
    sae = make_sae(**folded_weights(state, scale), mean=mean, scale=scale, top_k=k)

The state is a plain dict of tensors; training resumed from a saved copy ends with the same bytes.

    transform [D, D]                  maps centred activations to the rows that the step sees
    dec, enc [F, D], bias [F]         dictionary (unit rows), encoder, encoder bias
    gain [F]                          with an aligned encoder: enc_i = gain_i dec_i + u_i, u_i orthogonal to dec_i
    log_threshold [F]                 for the kinds with a threshold (lib.training.kinds)
    log_threshold_first [F]           of the first coding, for the kinds that refine it
    frequency [F]                     running mean of how often a latent fires, where it decides the latent's level
    <name>_m, <name>_v                Adam's moments (with a gain, those of enc belong to u)
    silent int64 [F]                  tokens since the latent last fired
    step int64 [], sums [7]           steps taken; what `read_stats` averages

Whole arrays are summed over the last dimension first, so the last digit does not depend on the number of threads.

Loss: squared error summed over dimensions, mean over rows, + aux_weight * AuxK. AuxK (Gao et al. 2024,
arXiv 2406.04093): dead latents, through ReLU only, decode the residual e; sum (e - e_hat)^2 / sum e^2, with e constant.
At most D / 2 dead latents take part in a step, in turns, which bounds its cost.
"""
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..environment import InputError
from .forward import forward
from .kinds import KINDS, REMEMBER, follow_smallest, frequency_levels

FROZEN = {"decoder": "dec", "encoder": "enc"}  # parts that may keep their random start, and their name in the state
GAIN_RATE = 0.3  # times the learning rate of the dictionary
BETAS, EPS = (0.9, 0.95), 1e-8  # of Adam
FOLD_ROWS = 8192  # latents folded at once, in float64
STATS = ("loss", "recon", "auxk", "l0", "dead", "grad_norm")


def whitening(covariance: Tensor, power: float = 1 / 8, floor: float = 1e-5) -> Tensor:
    """T = c C^-power [D, D], symmetric; c makes the mean squared norm 1 for rows x T, where x has covariance C.

    power 0 only scales. Eigenvalues are floored at `floor` times the largest.
    Raises InputError if the covariance is zero, too small for float32, or not finite.
    """
    C = covariance.cpu().double()
    if not torch.isfinite(C).all() or C.diagonal().sum() <= 0:
        raise InputError("the activations do not vary or are not finite; check the hook point and the saved run")
    if C.diagonal().sum() < len(C) * torch.finfo(torch.float32).tiny:
        raise InputError("the activations vary by less than 1e-19, where float32 runs out of digits; scale them up")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # LAPACK's last digits depend on their number
    try:
        values, vectors = torch.linalg.eigh((C + C.T) / 2)
    finally:
        torch.set_num_threads(threads)
    T = (vectors * values.clamp(min=float(values[-1]) * floor) ** -power) @ vectors.T
    return (T / (T @ C @ T).diagonal().sum().sqrt()).to(covariance.dtype).to(covariance.device)


def init_state(
    transform: Tensor, n_latents: int, seed: int, aligned: bool = True, kind: str = "topk"
) -> dict[str, Tensor]:
    """Random unit rows, encoder equal to the dictionary, zero bias and moments, on the transform's device.

    aligned: the encoder has a learnt gain; False: it is free.
    """
    width, device = len(transform), transform.device
    generator = torch.Generator().manual_seed(seed)
    dec = normalize(torch.randn(n_latents, width, generator=generator), dim=1).to(device)
    state = {"transform": transform.float().contiguous(), "dec": dec, "enc": dec.clone()}
    state["bias"] = torch.zeros(n_latents, device=device)
    if aligned:
        state["gain"] = torch.ones(n_latents, device=device)
    if KINDS[kind].threshold:
        state["log_threshold"] = torch.zeros(n_latents, device=device)  # set by the first step
    if KINDS[kind].refine:
        state["log_threshold_first"] = torch.zeros(n_latents, device=device)
    if KINDS[kind].levels is frequency_levels:
        state["frequency"] = torch.zeros(n_latents, device=device)
    for name in _parameters(state, kind):
        state[f"{name}_m"], state[f"{name}_v"] = torch.zeros_like(state[name]), torch.zeros_like(state[name])
    state["silent"] = torch.zeros(n_latents, dtype=torch.int64, device=device)
    state["step"] = torch.zeros((), dtype=torch.int64)
    # float64 only on the CPU: MPS has none, and the sum of a few dozen steps loses nothing in float32
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    state["sums"] = torch.zeros(len(STATS) + 1, dtype=dtype, device=device)
    return state


def bias_rate(n_latents: int, width: int) -> float:
    """Learning rate of the encoder bias, times that of the encoder: 0.06 at F = 4 D, 0.3 at 16 D; within 0.03 to 1.

    Too high a rate silences latents of a large dictionary; too low a rate costs FVU there.
    """
    return min(1.0, max(0.03, 0.06 * (n_latents / width / 4) ** 1.16))


def read_stats(state: dict[str, Tensor]) -> dict[str, float]:
    """Means over the steps since the last call; empty if there were none. Only this waits for the device.

    loss, recon, auxk: in training space, where rows have mean squared norm 1, so recon is the FVU; loss is recon +
    aux_weight * auxk, without what some kinds add. l0: codes per row. dead: latents silent for over dead_after tokens.
    """
    *sums, count = state["sums"].tolist()
    state["sums"].zero_()
    return {name: value / count for name, value in zip(STATS, sums)} if count else {}


def folded_weights(state: dict[str, Tensor], scale: float) -> dict[str, Any]:
    """The trained SAE's tensors for make_sae, on x' = (x_raw - mean) / scale, with the transform folded in.

    Latent j's code is n_j = |dec_j T^-1| / scale times its code in training, so the same set of latents gives the same
    reconstruction, but near the boundary others may be the k largest, unless all n_j are equal (no whitening).
    Computed on the CPU, in float64, FOLD_ROWS latents at a time.
    """
    T = state["transform"].cpu().double()
    parts = []
    for dec, enc, bias in zip(*(state[name].split(FOLD_ROWS) for name in ("dec", "enc", "bias"))):
        rows = torch.linalg.solve(T, dec.cpu().double(), left=False) / scale
        norms = rows.norm(dim=1, keepdim=True)
        W_enc = norms * scale * (enc.cpu().double() @ T.T)
        parts.append((W_enc.float(), (norms[:, 0] * bias.cpu().double()).float(), (rows / norms).float(), norms[:, 0]))
    W_enc, b_enc, W_dec, n = (torch.cat(column) for column in zip(*parts))
    weights = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec}
    for name in ("threshold", "threshold_first"):
        if f"log_{name}" in state:
            weights[name] = (n * state[f"log_{name}"].cpu().double().exp()).float()
    return weights


def dense_step(
    state: dict[str, Tensor], x: Tensor, *, k: int, lr: float, dead_after: int, aux_weight: float = 1 / 32,
    kind: str = "topk", frozen: str | None = None,
) -> None:
    """One step of any kind of SAE, in place, by autograd on dense arrays. The fast step is tested against it.

    x: float32 [B, D], centred rows times state["transform"]. lr: the learning rate of this step. dead_after: tokens of
    silence after which AuxK works on a latent. frozen: "decoder" or "encoder", whose rows keep their bits; only for a
    state without a gain.
    """
    rules = KINDS[kind]
    leaves = {name: state[name].detach().clone().requires_grad_() for name in _parameters(state, kind)}
    dec = leaves["dec"]
    pre, codes, error, loss = forward(state, leaves, x, k, kind=kind)

    dead, is_dead = dead_in_turn(state, dead_after)
    residual = error.detach()
    total = residual.square().sum(-1).sum()
    rest = residual - (pre[:, dead] * is_dead) @ dec[dead]
    auxk = rest.square().sum(-1).sum() / total.clamp(min=1e-30)
    (loss + aux_weight * auxk).backward()

    grads = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    norm = apply_gradients(state, grads, lr=lr, frozen=frozen)
    with torch.no_grad():
        fires = codes > 0
        if rules.threshold == "running mean":
            follow_smallest(state["log_threshold"], codes.where(fires, torch.inf).amin())
        if "frequency" in state:
            state["frequency"].lerp_(fires.float().mean(0), 1 - REMEMBER)
        found = Found(len(x), total / len(x), auxk, fires.sum(), fired=fires.any(0), grad_norm=norm)
        count_step(state, found, aux_weight, dead_after)


def dead_in_turn(state: dict[str, Tensor], dead_after: int) -> tuple[Tensor, Tensor]:
    """A = min(F, D // 2) latents, dead ones first: (int64 [A], float [A] that is 1 for dead and 0 for alive).

    If more are dead, they take turns from step to step. Does not wait for the device.
    """
    n_latents, width = state["dec"].shape
    size = max(1, min(n_latents, width // 2))
    start = int(state["step"]) * size % n_latents
    turn = (torch.arange(n_latents, device=state["silent"].device) - start) % n_latents
    order = torch.where(state["silent"] > dead_after, turn, turn + n_latents)
    first = order.topk(size, largest=False, sorted=True)
    return first.indices, (first.values < n_latents).float()


def apply_gradients(
    state: dict[str, Tensor], grads: dict[str, Tensor], *, lr: float, frozen: str | None = None
) -> Tensor:
    """Adam on every parameter, in place, with the dictionary kept at unit norm; returns the gradient's norm, 0-dim.

    The dictionary's gradient loses its component along each row; `enc`'s is that of u where there is a gain.
    """
    state["step"] += 1
    dec = state["dec"]
    grads = grads | {"dec": grads["dec"] - (grads["dec"] * dec).sum(1, keepdim=True) * dec}
    if frozen:
        grads.pop(FROZEN[frozen])
    norm = torch.stack([grad.square().sum(-1).sum() for grad in grads.values()]).sum().sqrt()
    ratios = {"gain": GAIN_RATE, "bias": bias_rate(*dec.shape)}
    if "gain" in state:
        state["enc"] -= state["gain"][:, None] * dec
    for name, grad in grads.items():
        adam(state, name, grad, lr * ratios.get(name, 1.0))
    if frozen != "decoder":
        dec.copy_(normalize(dec, dim=1))
    if "gain" in state:
        u = state["enc"]
        u += (state["gain"] - (u * dec).sum(1))[:, None] * dec
    return norm


class Found(NamedTuple):
    """What one step found, over all ranks. Tensors are 0-dim unless stated."""

    n_rows: int | Tensor
    recon: Tensor
    """Squared error summed over dimensions, mean over rows."""
    auxk: Tensor
    n_active: Tensor
    """Codes above 0."""
    fired: Tensor
    """Which latents fired, bool [F]."""
    grad_norm: Tensor


def count_step(state: dict[str, Tensor], found: Found, aux_weight: float, dead_after: int) -> None:
    """Bring `silent` and the sums of `read_stats` up to date. AuxK counts as 0 without a weight or a dead latent."""
    n_dead = (state["silent"] > dead_after).sum()
    auxk, recon = found.auxk * (n_dead > 0) * bool(aux_weight), found.recon
    state["silent"] += found.n_rows
    state["silent"].masked_fill_(found.fired, 0)
    values = [recon + aux_weight * auxk, recon, auxk, found.n_active / found.n_rows, n_dead.float(), found.grad_norm,
              torch.ones_like(recon)]
    state["sums"] += torch.stack(values).to(state["sums"].dtype)


def adam(state: dict[str, Tensor], name: str, grad: Tensor, lr: float) -> None:
    """Move one parameter and its moments, in place; the state counts this step already."""
    step = int(state["step"])
    m, v = state[f"{name}_m"], state[f"{name}_v"]
    m.lerp_(grad, 1 - BETAS[0])
    v.lerp_(grad.square(), 1 - BETAS[1])
    state[name].addcdiv_(m, (v / (1 - BETAS[1] ** step)).sqrt_().add_(EPS), value=-lr / (1 - BETAS[0] ** step))


def _parameters(state: dict[str, Tensor], kind: str) -> list[str]:
    """The tensors that Adam moves."""
    names = ("dec", "enc", "gain", "bias", *(["log_threshold"] if KINDS[kind].threshold == "learnt" else []))
    return [name for name in names if name in state]
