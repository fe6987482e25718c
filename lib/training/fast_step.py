"""The training step of lib.training.step without autograd and without an array of rows times latents.

    work = Workspace(state)
    fast_step(state, rows @ state["transform"], k=k, lr=lr, dead_after=10_000, work=work)

The encoder product runs in tiles and only proposes candidates (lib.training.workspace). Their pre-activations are
computed again in float32, so codes, losses and gradients are those of `dense_step` for the same sets of latents. Rows
then meet only the dictionary rows that fired, and one pass over the latents does gradient, Adam and unit norm. On a CPU
with numba the loops are compiled (lib.training.selection, and the files named kernels); elsewhere torch operations take
the same steps (lib.training.torch_step).
"""
import numpy as np
import torch
from torch import Tensor

from .kinds import KINDS, REMEMBER
from .step import BETAS, EPS, GAIN_RATE, Found, adam, bias_rate, count_step
from .torch_step import aux_gradients, torch_step
from .workspace import Workspace, kernels

if kernels is not None:
    from .code_kernels import pull_back, refine_rows, row_errors
    from .selection import SELECT, batchtopk, threshold_gradient


def fast_step(
    state: dict[str, Tensor], x: Tensor, *, k: int, lr: float, dead_after: int, work: Workspace,
    aux_weight: float = 1 / 32, frozen: str | None = None,
) -> None:
    """One step, in place: the mathematics and the arguments of `dense_step`; work: this state's workspace.

    On a CPU the result depends on the number of threads only as far as torch's products do.
    """
    step = _compiled_step if work.compiled else torch_step
    found = step(state, x.float().contiguous(), k=k, lr=lr, dead_after=dead_after, work=work, aux_weight=aux_weight,
                 frozen=frozen)
    count_step(state, found, aux_weight, dead_after)


def _compiled_step(state, x, *, k, lr, dead_after, work, aux_weight, frozen) -> Found:
    (rows, width), n_latents = x.shape, len(state["dec"])
    arrays = {name: value.numpy() for name, value in state.items()}
    pieces = kernels.use_threads(torch.get_num_threads())
    rules, earlier, seen = KINDS[work.kind], None, x
    if rules.refine:
        earlier, _ = batchtopk(state, x, k=k, work=work, pieces=pieces, name="log_threshold_first")
        both = work.buffer("both", (2 * rows, width), x)  # rows of the second coding, then of the first
        both[rows:] = x
        seen = both[:rows]
        refine_rows(x.numpy(), arrays["dec"], earlier, np.float32(rules.refine), n_pieces=pieces, out=seen.numpy())
    selected, near = SELECT[work.kind](state, seen, k=k, work=work, pieces=pieces)
    codes, n = _with_slopes(selected), int(selected[1].sum())
    levels = np.zeros(n_latents, np.uint8) if rules.levels is None else rules.levels(state).numpy()
    n_levels = int(levels.max()) + 1
    scale = np.float32(-2 / (rows * (n_levels if rules.own is None else 1)))
    error, loss = work.buffer("error", (n_levels, rows, width), x), torch.empty(rows)
    training = levels, scale, np.float32(-1 if rules.own is None else rules.own), np.float32(rules.ridge)
    row_errors(x.numpy(), arrays["dec"], codes, training, n_pieces=pieces, error=error.numpy(), loss=loss.numpy())

    total = loss.sum()
    found = aux_gradients(state, seen, error[-1], total=total, dead_after=dead_after, aux_weight=aux_weight)
    auxk, aux = _aux_arrays(found, n_latents, width)
    first, pull = np.empty(n_latents + 1, np.int64), np.empty((0, width), np.float32)
    pairs = _pairs(codes, first)
    fired = first[1:] > first[:-1]
    if "frequency" in state:
        state["frequency"].lerp_(torch.from_numpy(np.diff(first) / np.float32(rows)).float(), 1 - REMEMBER)
    if earlier is not None:
        pull, early = work.buffer("pull", (rows, width), x).numpy(), _with_slopes(earlier)
        pull_back((arrays["enc"], arrays["dec"]), codes, early, (np.float32(rules.refine), scale), n_pieces=pieces,
                  pull=pull)
        places = np.concatenate([codes[0], early[0] + len(codes[2])])
        pairs = _pairs((places, *(np.concatenate(two) for two in zip(codes[1:], early[1:]))), first)
        seen = both
    state["step"] += 1
    weights = (arrays["dec"], arrays["enc"], arrays.get("gain", np.empty(0, np.float32)), arrays["bias"])
    batch = (seen.numpy(), error.numpy(), pull, levels, scale, *pairs, *aux)
    if near is not None:
        grad = threshold_gradient(near, state["dec"], error[-1], n_fires=n, k=k, work=work, pieces=pieces)
    norm = _update(batch, arrays, weights, work=work, lr=lr, pieces=pieces, frozen=frozen)
    if near is not None:
        adam(state, "log_threshold", grad, lr)
        norm = torch.hypot(norm, grad.norm())
    return Found(rows, recon=total / rows, auxk=auxk, n_active=torch.tensor(float(n)),
                 fired=torch.from_numpy(fired), grad_norm=norm)


def _with_slopes(codes):
    return *codes, np.empty(len(codes[3]), np.float32)


def _pairs(codes, first):
    """The active (row, latent) pairs by latent (`kernels.sort_by_latent`)."""
    n = int(codes[1].sum())
    pairs = first, np.empty(n, np.int32), np.empty(n, np.float32), np.empty(n, np.float32)
    kernels.sort_by_latent(codes, pairs)
    return pairs


def _aux_arrays(found, n_latents, width):
    slot = np.full(n_latents, -1, np.int32)
    if found is None:
        empty = np.empty((0, width), np.float32)
        return torch.zeros(()), (slot, empty, empty, np.empty(0, np.float32))
    value, latents, g_dec, g_enc, g_bias = found
    slot[latents.numpy()] = np.arange(len(latents), dtype=np.int32)
    return value, (slot, g_dec.numpy(), g_enc.numpy(), g_bias.numpy())


def _update(batch, arrays, weights, *, work, lr, pieces, frozen) -> Tensor:
    """One pass over the latents; returns the gradient's norm. batch, weights: see `kernels.update_latents`."""
    step, n_latents = int(arrays["step"]), len(weights[0])
    none = np.empty(0, np.float32)
    moments = tuple(arrays.get(f"{name}_{m}", none) for name in ("dec", "enc", "gain", "bias") for m in "mv")
    first = batch[5]
    cost = first[1:] + 4 * np.arange(1, n_latents + 1)  # a latent's Adam costs about what four pairs do
    bounds = np.searchsorted(cost, cost[-1] * np.arange(pieces + 1) / pieces)
    bounds[-1] = n_latents
    rate = lr / (1 - BETAS[0] ** step)
    rates = tuple(np.float32(value) for value in (1 - BETAS[0], 1 - BETAS[1], 1 / (1 - BETAS[1] ** step), EPS))
    lrs = tuple(np.float32(value) for value in (rate, rate * GAIN_RATE, rate * bias_rate(*weights[0].shape)))
    norms = np.empty(n_latents, np.float32)
    kernels.update_latents(batch, weights, moments, _low_arrays(work), bounds=bounds, rates=(lrs, rates),
                           norms=norms, frozen=kernels.FROZEN[frozen])
    return torch.tensor(float(np.sqrt(norms.sum(dtype=np.float64))))


def _low_arrays(work):
    """The copies of the encoder that the update keeps: bfloat16 bits, int8 and its scales; without rows if unused."""
    low16 = np.empty((0, 0), np.uint16) if work.precision != "bfloat16" else work.low.view(torch.uint16).numpy()
    low8 = np.empty((0, 0), np.int8) if work.precision != "int8" else work.low.numpy()
    return low16, low8, work.scale.numpy()
