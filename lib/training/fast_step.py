"""The training step of lib.training.step without autograd and without an array of rows times latents.

    work = Workspace(state)
    fast_step(state, rows @ state["transform"], k=k, lr=lr, dead_after=10_000, work=work)

The encoder product runs in tiles and only proposes candidates (lib.training.workspace). Their pre-activations are
computed again in float32, so codes, losses and gradients are those of `dense_step` for the same sets of latents. Rows
then meet only the dictionary rows that fired, and one pass over the latents does gradient, Adam and unit norm. On a CPU
with numba the loops are compiled (lib.training.selection, and the files named kernels); elsewhere torch operations take
the same steps for TopK, and the dense step trains the other kinds.
"""
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from ..distributed import add_up
from .kinds import KINDS, REMEMBER
from .step import BETAS, EPS, GAIN_RATE, Found, adam, apply_gradients, bias_rate, count_step, dead_in_turn, dense_step
from .workspace import Workspace, candidates_wanted, kernels, low_precision, scores

if kernels is not None:
    from .code_kernels import pull_back, refine_rows, row_errors
    from .selection import SELECT, batchtopk, threshold_gradient

GATHER_BYTES = 64 << 20  # of encoder or dictionary rows copied side by side where the loops are not compiled


def fast_step(
    state: dict[str, Tensor], x: Tensor, *, k: int, lr: float, dead_after: int, work: Workspace,
    aux_weight: float = 1 / 32, frozen: str | None = None,
) -> None:
    """One step, in place: the mathematics and the arguments of `dense_step`; work: this state's workspace.

    On a CPU the result depends on the number of threads only as far as torch's products do. Where the kind of `work`
    has no fast step (lib.training.kinds) this is the dense one.
    """
    if not work.fast:
        dense_step(state, x, k=k, lr=lr, dead_after=dead_after, aux_weight=aux_weight, kind=work.kind, frozen=frozen)
        return
    step = _compiled_step if work.compiled else _torch_step
    found = step(state, x.float().contiguous(), k=k, lr=lr, dead_after=dead_after, work=work, aux_weight=aux_weight,
                 frozen=frozen)
    count_step(state, found, aux_weight, dead_after)


def aux_gradients(
    state: dict[str, Tensor], x: Tensor, error: Tensor, *, total: Tensor, dead_after: int, aux_weight: float
):
    """AuxK and its gradients: (value, latents [A], of dec, of enc [A, D], of bias [A]); None if nothing is dead, which
    is only looked up on a CPU.

    total: sum of squares of the step's errors, over all ranks.
    """
    if x.device.type == "cpu" and not (state["silent"] > dead_after).any():
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


def _torch_step(state, x, *, k, lr, dead_after, work, aux_weight, frozen) -> Found:
    n_latents = len(state["dec"])
    n_rows = torch.full((), len(x), device=x.device)  # written there, where torch.tensor() would copy and wait
    wanted = candidates_wanted(k, n_latents, work)
    proposed = torch.cat([out.topk(wanted, dim=1, sorted=False).indices for _, out in scores(state, x, work)])
    pre = state["bias"][proposed] + _dots(x, state["enc"], proposed)
    code, place = pre.relu().topk(k, dim=1)
    index = proposed.gather(1, place)
    error = x - embedding_bag(index, state["dec"], per_sample_weights=code, mode="sum")
    total = error.square().sum(-1).sum()
    if work.shared:
        add_up(n_rows, total)
    grads = _sums_by_latent(state, x, error, index=index, code=code, n_rows=n_rows)
    auxk = torch.zeros((), device=x.device)
    found = aux_gradients(state, x, error, total=total, dead_after=dead_after, aux_weight=aux_weight)
    if found is not None:
        auxk, latents = found[0], found[1]
        for name, part in zip(("dec", "enc", "bias"), found[2:]):
            grads[name].index_add_(0, latents, part)
    # the last place takes what did not fire
    n_active, fired = (code > 0).sum(), torch.zeros(n_latents + 1, device=x.device)
    fired.index_fill_(0, index.where(code > 0, n_latents).flatten(), 1)
    if work.shared:
        add_up(*grads.values(), auxk, n_active, fired)
    if "gain" in state:
        along = (grads["enc"] * state["dec"]).sum(1)
        u = state["enc"] - state["gain"][:, None] * state["dec"]
        grads["dec"] += state["gain"][:, None] * grads["enc"] - along[:, None] * u
        grads["enc"] -= along[:, None] * state["dec"]
        grads["gain"] = along
    norm = apply_gradients(state, grads, lr=lr, frozen=frozen)
    if work.low is not None:
        work.low.copy_(low_precision(state["enc"], state["bias"]))
    return Found(n_rows, recon=total / n_rows, auxk=auxk, n_active=n_active, fired=fired[:-1] > 0, grad_norm=norm)


def _sums_by_latent(state, x, error, *, index, code, n_rows) -> dict[str, Tensor]:
    """Gradients of dec, enc [F, D] and bias [F] of the squared error, without AuxK and as if there were no gain."""
    slope = _dots(error, state["dec"], index).mul_(code > 0).mul_(-2 / n_rows)
    order = index.flatten().argsort(stable=True)
    ones = torch.ones_like(order)
    count = torch.zeros(len(state["dec"]), dtype=order.dtype, device=x.device).index_add_(0, index.flatten(), ones)
    first = count.cumsum(0) - count

    def by_latent(weight, values):
        return embedding_bag(order // index.shape[1], values, first, per_sample_weights=weight.flatten()[order],
                             mode="sum")

    return {"dec": by_latent(code, error).mul_(-2 / n_rows), "enc": by_latent(slope, x),
            "bias": by_latent(slope, torch.ones_like(x[:, :1]))[:, 0]}


def _dots(rows: Tensor, table: Tensor, index: Tensor) -> Tensor:
    """[B, C]: row b times table[index[b, c]], in chunks that bound the copy of the table's rows."""
    chunk = max(1, GATHER_BYTES // (4 * index.shape[1] * rows.shape[1]))
    parts = zip(rows.split(chunk), index.split(chunk))
    return torch.cat([torch.bmm(table[which], row[:, :, None])[:, :, 0] for row, which in parts])
