"""One training step of a TopK sparse autoencoder: its state, its rules, and the dense reference of lib.fast_step.

    transform = whitening(covariance)
    state = init_state(transform, n_latents, seed)
    rate = learning_rate(n_latents, n_tokens)
    work, silence = Workspace(state), aux_after(n_latents, k, batch)
    for i, rows in enumerate(batches):                       # rows: float32 [B, D], x_raw - mean
        x, lr = rows @ state["transform"], rate * schedule(i, n_steps)
        fast_step(state, x, k=k, lr=lr, dead_after=silence, work=work)  # lib.fast_step; dense_step: without work
    W_enc, b_enc, W_dec = folded_weights(state, scale)       # an ordinary TopK SAE on (x_raw - mean) / scale

The state is a dict of tensors and nothing else: what safetensors wrote of it resumes to the same bytes.

    transform [D, D]                  rows of centred activations times this are what the step sees
    dec, enc [F, D], bias [F]         dictionary (unit rows), encoder, encoder bias
    gain [F]                          recipe R only: enc_i = gain_i dec_i + u_i with u_i orthogonal to dec_i
    log_threshold [F]                 batchtopk and jumprelu only (lib.variants)
    <name>_m, <name>_v                Adam's moments (those of enc belong to u where there is a gain)
    silent int64 [F]                  tokens since the latent last fired
    step int64 [], sums [7]           steps taken; what `read_stats` averages

Sums of whole arrays go over the last dimension first, which makes their last digit independent of the number of
threads.

Loss: mean over rows of the squared error summed over dimensions, + aux_weight * AuxK. AuxK (Gao et al. 2024,
arXiv 2406.04093): the dead latents, ReLU only, decode the residual e; sum (e - e_hat)^2 / sum e^2, with e a constant.
At most D / 2 dead latents take part in a step, in turns, so its cost is bounded.
"""
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .environment import InputError
from .variants import FORGET, WITH_THRESHOLD, codes_of, errors_of, first_threshold

FROZEN = {"decoder": "dec", "encoder": "enc"}  # what a training may leave at its random start: its rows in the state
GAIN_RATE = 0.3  # learning rate of the gain over that of the dictionary
EPS = 1e-8
FOLD_ROWS = 8192  # latents folded at one time in float64
STATS = ("loss", "recon", "auxk", "l0", "dead", "grad_norm")


def whitening(covariance: Tensor, power: float = 1 / 8, floor: float = 1e-5) -> Tensor:
    """T = c C^-power [D, D], symmetric, with c such that rows of covariance C have mean squared norm 1 after it.

    power 0 is the plain recipe (one scalar). Eigenvalues are floored at `floor` times the largest.
    Raises InputError if the covariance is zero, smaller than float32 holds in full, or not finite.
    """
    C = covariance.cpu().double()
    if not torch.isfinite(C).all() or C.diagonal().sum() <= 0:
        raise InputError("the activations do not vary or are not finite; check the hook point and the saved run")
    if C.diagonal().sum() < len(C) * torch.finfo(torch.float32).tiny:
        raise InputError("the activations vary by less than 1e-19, where float32 runs out of digits; scale them up")
    with one_thread():  # LAPACK's last digits depend on the number of threads
        values, vectors = torch.linalg.eigh((C + C.T) / 2)
    T = (vectors * values.clamp(min=float(values[-1]) * floor) ** -power) @ vectors.T
    return (T / (T @ C @ T).diagonal().sum().sqrt()).to(covariance.dtype).to(covariance.device)


@contextmanager
def one_thread() -> Iterator[None]:
    """torch with a single thread inside the block."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def init_state(
    transform: Tensor, n_latents: int, seed: int, aligned: bool = True, kind: str = "topk"
) -> dict[str, Tensor]:
    """Random unit rows, the encoder equal to the dictionary, zero bias and moments, on the transform's device.

    aligned: recipe R's encoder with a learnt gain; False is the plain recipe's free encoder.
    """
    width, device = len(transform), transform.device
    generator = torch.Generator().manual_seed(seed)
    dec = normalize(torch.randn(n_latents, width, generator=generator), dim=1).to(device)
    state = {"transform": transform.float().contiguous(), "dec": dec, "enc": dec.clone()}
    state["bias"] = torch.zeros(n_latents, device=device)
    if aligned:
        state["gain"] = torch.ones(n_latents, device=device)
    if kind in WITH_THRESHOLD:
        state["log_threshold"] = torch.zeros(n_latents, device=device)  # set by the first step
    for name in _parameters(state, kind):
        state[f"{name}_m"], state[f"{name}_v"] = torch.zeros_like(state[name]), torch.zeros_like(state[name])
    state["silent"] = torch.zeros(n_latents, dtype=torch.int64, device=device)
    state["step"] = torch.zeros((), dtype=torch.int64)
    # float64 stays on the CPU: MPS has none, and some dozens of steps lose nothing in float32
    state["sums"] = torch.zeros(len(STATS) + 1, dtype=torch.float64 if device.type == "cpu" else torch.float32,
                                device=device)
    return state


def learning_rate(n_latents: int, n_tokens: int) -> float:
    """Learning rate of the dictionary and the encoder: 1e-2 (1024 / F)^(2/3) (600,000 / tokens)^0.4, at most 3e-2.

    Fitted to the best rates of runs of 0.1 to 2.4 million tokens with F from 256 to 4096 (width and k did not matter
    there), a little below them, because too high a rate kills latents. At 100 million tokens it meets the rule for
    long runs, 2e-4 / sqrt(F / 16384) (Gao et al. 2024).
    """
    return min(3e-2, 1e-2 * (1024 / n_latents) ** (2 / 3) * (600_000 / n_tokens) ** 0.4)


def bias_rate(n_latents: int, width: int) -> float:
    """Learning rate of the encoder bias over that of the encoder: 0.06 at F = 4 D, 0.3 at 16 D; 0.03 to 1.

    A bias that learns as fast as the encoder silences latents of a large dictionary; one that is too slow costs FVU
    there.
    """
    return min(1.0, max(0.03, 0.06 * (n_latents / width / 4) ** 1.16))


def aux_after(n_latents: int, k: int, batch: int) -> int:
    """Tokens of silence beyond which AuxK works on a latent: 10 F / k, at least 3,000 and at least two batches of
    `batch` rows.

    An average latent fires ten times in 10 F / k tokens. Silence is counted at the end of a batch, so more than two
    batches means three in a row: the weights have moved twice in between, and one odd batch calls nothing dead.
    Earlier than one would call a latent dead: waiting longer leaves more dead latents at the end, and a higher FVU.
    """
    return max(3000, 10 * n_latents // k, 2 * batch)


def schedule(step: int, n_steps: int) -> float:
    """Multiplier of the learning rate at `step` (from 0): linear warm-up over 5 %, constant, linear to 0 over the last
    half.
    """
    return min(1.0, (step + 1) / max(1.0, 0.05 * n_steps), (n_steps - step) / max(1.0, 0.5 * n_steps))


def read_stats(state: dict[str, Tensor]) -> dict[str, float]:
    """Means over the steps since the last call, and a new start; the only place that waits for the device.

    loss, recon, auxk: training-space units, where the rows' mean squared norm is 1, so recon is the FVU there; loss is
    recon and the weighted auxk, without what another kind of SAE adds.
    l0: codes per row. dead: latents silent for longer than dead_after. Empty dict if no step was taken.
    """
    *sums, count = state["sums"].tolist()
    state["sums"].zero_()
    return {name: value / count for name, value in zip(STATS, sums)} if count else {}


def folded_weights(state: dict[str, Tensor], scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """(W_enc [F, D], b_enc [F], W_dec [F, D] with unit rows) of a TopK SAE on x' = (x_raw - mean) / scale.

    With n_j = |dec_j T^-1| / scale, latent j's code becomes n_j times what it was in training, for the same
    activation, and the same set of latents gives the same reconstruction. The order of the codes moves with n_j,
    so the k largest may differ near the boundary; without whitening every n_j is the same and nothing changes.
    On the CPU, in float64 for FOLD_ROWS latents at a time, wherever the state lies.
    """
    T = state["transform"].cpu().double()
    parts = []
    for dec, enc, bias in zip(*(state[name].split(FOLD_ROWS) for name in ("dec", "enc", "bias"))):
        rows = _raw_rows(T, dec, scale)
        norms = rows.norm(dim=1, keepdim=True)
        W_enc = norms * scale * (enc.cpu().double() @ T.T)
        parts.append((W_enc.float(), (norms[:, 0] * bias.cpu().double()).float(), (rows / norms).float()))
    W_enc, b_enc, W_dec = (torch.cat(column) for column in zip(*parts))
    return W_enc, b_enc, W_dec


def _raw_rows(T: Tensor, dec: Tensor, scale: float) -> Tensor:
    """dec T^-1 / scale, float64 [n, D] on the CPU: dictionary rows for x' from those of the training space."""
    return torch.linalg.solve(T, dec.cpu().double(), left=False) / scale


def folded_threshold(state: dict[str, Tensor], scale: float) -> Tensor | None:
    """Thresholds [F] for the codes of `folded_weights`, or None where the k largest of a row fire."""
    if "log_threshold" not in state:
        return None
    T = state["transform"].cpu().double()
    norms = torch.cat([_raw_rows(T, dec, scale).norm(dim=1) for dec in state["dec"].split(FOLD_ROWS)])
    return (norms * state["log_threshold"].cpu().double().exp()).float()


def dense_step(
    state: dict[str, Tensor], x: Tensor, *, k: int, lr: float, dead_after: int, bias_lr_ratio: float | None = None,
    aux_weight: float = 1 / 32, betas: tuple[float, float] = (0.9, 0.95), clip: float | None = None, kind: str = "topk",
    frozen: str | None = None,
) -> None:
    """One step by autograd on dense arrays, in place: of any kind of SAE, and the reference that the fast step is
    tested against.

    x: float32 [B, D], centred rows times state["transform"]. lr: of this step. dead_after: tokens
    of silence after which AuxK works on a latent.
    bias_lr_ratio: None is `bias_rate`'s rule. clip: bound on the norm of the gradient over all parameters, or None.
    frozen: "decoder" or "encoder" (a state without a gain only): its rows stay as they are, to the last bit.
    """
    leaves = {name: state[name].detach().clone().requires_grad_() for name in _parameters(state, kind)}
    dec, enc = leaves["dec"], leaves["enc"]
    if "gain" in leaves:
        u = enc - (state["gain"][:, None] * state["dec"])
        enc = leaves["gain"][:, None] * dec + u - (u * dec).sum(1, keepdim=True) * dec
    pre = torch.relu(x @ enc.T + leaves["bias"])
    if kind in WITH_THRESHOLD and int(state["step"]) == 0:
        state["log_threshold"].fill_(first_threshold(pre.detach(), k).log())
        leaves |= {"log_threshold": state["log_threshold"].clone().requires_grad_()} if kind == "jumprelu" else {}
    codes, penalty = codes_of(kind, pre, k, leaves.get("log_threshold"))
    error, objective = errors_of(kind, x, codes, dec)

    dead, is_dead = dead_in_turn(state, dead_after)
    residual = error.detach()
    total = residual.square().sum(-1).sum()
    rest = residual - (pre[:, dead] * is_dead) @ dec[dead]
    auxk = rest.square().sum(-1).sum() / total.clamp(min=1e-30)
    (objective + penalty + aux_weight * auxk).backward()

    grads = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    grad_norm = apply_gradients(state, grads, lr=lr, bias_lr_ratio=bias_lr_ratio, betas=betas, clip=clip, frozen=frozen)
    with torch.no_grad():
        fires = codes > 0
        if kind == "batchtopk":
            smallest = codes.where(fires, torch.inf).amin()
            threshold = state["log_threshold"].exp()
            state["log_threshold"].copy_((threshold + FORGET * (smallest - threshold)).log())
        count_step(state, len(x), fires.any(0), total / len(x), aux_weight, auxk, fires.sum() / len(x), dead_after,
                   grad_norm)


def dead_in_turn(state: dict[str, Tensor], dead_after: int) -> tuple[Tensor, Tensor]:
    """(int64 [A], float [A]): A = min(F, D // 2) latents, the dead ones first, and 1.0 for dead, 0.0 for not.

    Where more are dead than take part, the choice rotates from step to step. No wait for the device.
    """
    n_latents, width = state["dec"].shape
    size = max(1, min(n_latents, width // 2))
    start = int(state["step"]) * size % n_latents
    turn = (torch.arange(n_latents, device=state["silent"].device) - start) % n_latents
    order = torch.where(state["silent"] > dead_after, turn, turn + n_latents)
    first = order.topk(size, largest=False, sorted=True)
    return first.indices, (first.values < n_latents).float()


def apply_gradients(
    state: dict[str, Tensor], grads: dict[str, Tensor], *, lr: float, bias_lr_ratio: float | None,
    betas: tuple[float, float], clip: float | None, frozen: str | None = None,
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
    factor = 1.0 if clip is None else (clip / norm.clamp(min=clip))
    bias_lr_ratio = bias_rate(*dec.shape) if bias_lr_ratio is None else bias_lr_ratio
    ratios = {"dec": 1.0, "enc": 1.0, "gain": GAIN_RATE, "bias": bias_lr_ratio, "log_threshold": 1.0}
    if "gain" in state:
        state["enc"] -= state["gain"][:, None] * dec
    for name, grad in grads.items():
        _adam(state, name, grad * factor, lr * ratios[name], betas)
    if frozen != "decoder":
        dec.copy_(normalize(dec, dim=1))
    if "gain" in state:
        u = state["enc"]
        u += (state["gain"] - (u * dec).sum(1))[:, None] * dec
    return norm


def count_step(
    state: dict[str, Tensor], n_rows: int | Tensor, fired: Tensor, recon: Tensor, aux_weight: float, auxk: Tensor,
    l0: Tensor,
    dead_after: int, grad_norm: Tensor,
) -> None:
    """Bring `silent` and the sums of `read_stats` up to date. fired: bool [F]. AuxK counts as 0 where nothing is
    dead.
    """
    n_dead = (state["silent"] > dead_after).sum()
    auxk = auxk * (n_dead > 0)
    state["silent"] += n_rows
    state["silent"].masked_fill_(fired, 0)
    values = [recon + aux_weight * auxk, recon, auxk, l0, n_dead.float(), grad_norm, torch.ones_like(recon)]
    state["sums"] += torch.stack(values).to(state["sums"].dtype)


def _adam(state: dict[str, Tensor], name: str, grad: Tensor, lr: float, betas: tuple[float, float]) -> None:
    step = int(state["step"])
    m, v = state[f"{name}_m"], state[f"{name}_v"]
    m.lerp_(grad, 1 - betas[0])
    v.lerp_(grad.square(), 1 - betas[1])
    state[name].addcdiv_(m, (v / (1 - betas[1] ** step)).sqrt_().add_(EPS), value=-lr / (1 - betas[0] ** step))


def _parameters(state: dict[str, Tensor], kind: str) -> list[str]:
    """The tensors that Adam moves; batchtopk's threshold is a running mean."""
    return [name for name in ("dec", "enc", "gain", "bias", "log_threshold")
            if name in state and (name != "log_threshold" or kind == "jumprelu")]
