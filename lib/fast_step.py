"""The training step of lib.sae_step without autograd and without an array of rows times latents.

    work = Workspace(state)                      # buffers, and the encoder product's precision
    print(work.choice)
    fast_step(state, rows @ state["transform"], k=k, lr=rate, dead_after=10_000, work=work)

The encoder product runs in tiles, in bfloat16 where that is faster, and only proposes candidates; their pre-activations
are computed again in float32, so codes, losses and gradients are those of `dense_step` for the same sets of latents.
Rows then meet only the dictionary rows that fired, and one pass over the latents does gradient, Adam and unit norm.
With numba on a CPU the loops are compiled (lib.kernels); elsewhere the same steps are made of torch operations.
"""
import math
import sys

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from .distributed import add_up
from .environment import log
from .sae_step import EPS, GAIN_RATE, apply_gradients, bias_rate, count_step, dead_in_turn

try:
    from . import kernels
    from .candidates import find_candidates
    from .compiled import is_cached, use_threads
except ImportError:  # numba is not installed, or has no build for this machine
    kernels = None  # type: ignore[assignment]

TILE_ROWS = 512  # at least so many rows to a tile: thinner products run at half the rate
TILE_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20, "mps": 256 << 20}  # of pre-activations held at once, if rows allow
GATHER_BYTES = 64 << 20  # of encoder or dictionary rows copied side by side where the loops are not compiled
ALIGNED = 32  # columns of a bfloat16 product: at D = 288 two more than a multiple of it doubled one thread's time
SMALL = 1 << 18  # weights of an encoder below which it stays in float32, on every machine: bfloat16 would gain a fifth
                 # at most
BFLOAT16_FLAGS = ("amx_bf16", "avx512_bf16")  # of x86 processors that multiply bfloat16, by torch.cpu.get_capabilities


class Workspace:
    """What the fast step keeps between steps beside the state: buffers and a bfloat16 copy of the encoder.

    precision: "bfloat16" or "float32" for the encoder product, or "auto": `choose_precision` decides
    by shape and device. Make a new workspace whenever `state` was changed by anything but fast_step;
    for a resume to the same bytes give it the `precision` that the run began with.
    shared: every rank has a part of the step's rows and the whole state; the loops that add up a latent's gradient and
    apply it at once are then no use, because the other ranks' parts come between.
    """

    def __init__(
        self, state: dict[str, Tensor], precision: str = "auto", compiled: bool | None = None, shared: bool = False
    ):
        device = state["dec"].device
        self.shared = shared
        self.compiled = kernels is not None and device.type == "cpu" and not shared if compiled is None else compiled
        self.precision, self.choice = precision, f"encoder product in {precision}"
        if precision == "auto":
            self.precision, self.choice = choose_precision(state["dec"].shape[0], state["dec"].shape[1], device)
        self.tile_rows, self.tile_bytes = TILE_ROWS, TILE_BYTES.get(device.type, TILE_BYTES["cpu"])
        self._buffers: dict[str, Tensor] = {}
        if self.compiled:
            threads = torch.get_num_threads()
            use_threads(threads)
            torch.set_num_threads(threads)  # numba's first launch replaces torch's number by its own
            if not is_cached(kernels.update_latents):
                log.info("compiling the training step: some seconds, once on this machine")
        self.low = low_precision(state["enc"], state["bias"]) if self.precision == "bfloat16" else None

    def buffer(self, name: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """An uninitialised tensor that is the same memory at every call: new memory costs as much as filling it."""
        size = math.prod(shape)
        if name not in self._buffers or self._buffers[name].numel() < size:
            self._buffers[name] = torch.empty(size, dtype=dtype, device=like.device)
        return self._buffers[name][:size].view(shape)


def choose_precision(n_latents: int, width: int, device: torch.device) -> tuple[str, str]:
    """(precision of the encoder product, a line that says why), decided by its shape and what the device can do.

    No clock takes part, so one seed gives one result on one machine.
    """
    if n_latents * width < SMALL:
        return "float32", "encoder product in float32 (too small for the precision to matter)"
    if multiplies_bfloat16(device):
        return "bfloat16", (f"encoder product in bfloat16 (the {device.type} has instructions for it); "
                            "its candidates are computed again in float32")
    return "float32", (f"encoder product in float32 (the {device.type} has no instructions for bfloat16 "
                       "that are known to be faster)")


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device has bfloat16 products that are faster than float32's: a GPU from compute capability 8.0, a
    processor with AMX or AVX-512 BF16, an Arm processor with BF16 under Linux. MPS is not known to be, so it is False.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    found = torch.cpu.get_capabilities()
    # macOS multiplies float32 in a unit of its own, which its bfloat16 products don't reach.
    return any(found.get(name) for name in BFLOAT16_FLAGS) or bool(found.get("bf16") and sys.platform == "linux")


def low_precision(weight: Tensor, bias: Tensor) -> Tensor:
    """bfloat16 [F, D + 2, filled up to a multiple of ALIGNED]: the rows, the bias as the sum of two columns, zeros.

    Times [x, 1, 1, 0 ...] this is x W^T + bias.
    """
    width, high = weight.shape[1], bias.bfloat16()
    low = torch.zeros(len(weight), -(-(width + 2) // ALIGNED) * ALIGNED, dtype=torch.bfloat16, device=weight.device)
    low[:, :width], low[:, width], low[:, width + 1] = weight, high, bias - high.float()
    return low


def fast_step(
    state: dict[str, Tensor], x: Tensor, *, k: int, lr: float, dead_after: int, bias_lr_ratio: float | None = None,
    aux_weight: float = 1 / 32, betas: tuple[float, float] = (0.9, 0.95), clip: float | None = None,
    work: Workspace | None = None, frozen: str | None = None,
) -> None:
    """One step, in place: the mathematics and the arguments of `dense_step`.

    work: this state's workspace; None makes one for this step, which is slow. On a CPU the result does not depend on
    the number of threads beyond what torch's products do.
    """
    work = work or Workspace(state)
    x = x.float().contiguous()
    step = _compiled_step if work.compiled else _torch_step
    n_rows, n_active, recon, auxk, fired, grad_norm = step(state, x, k, work, dead_after, aux_weight, lr, bias_lr_ratio,
                                                           betas, clip, frozen)
    count_step(state, n_rows, fired, recon, aux_weight, auxk, n_active / n_rows, dead_after, grad_norm)


def scores(state: dict[str, Tensor], x: Tensor, work: Workspace):
    """Yield (first row, pre-activations [<= tile, F]) in the chosen precision; the next tile overwrites them."""
    n_latents, width = state["enc"].shape
    size = 2 if work.low is not None else 4
    tile = max(work.tile_rows, work.tile_bytes // (n_latents * size))
    dtype = torch.float32 if work.low is None else torch.bfloat16
    for start in range(0, len(x), tile):
        part = x[start : start + tile]
        out = work.buffer("scores", (len(part), n_latents), x, dtype)
        if work.low is None:
            torch.addmm(state["bias"], part, state["enc"].T, out=out)
        else:
            low_x = work.buffer("low_x", (len(part), work.low.shape[1]), x, dtype)
            low_x[:, :width], low_x[:, width : width + 2], low_x[:, width + 2 :] = part, 1, 0
            torch.mm(low_x, work.low.T, out=out)
        yield start, out


def candidates_wanted(k: int, n_latents: int, work: Workspace) -> int:
    """How many latents to compute again: k, and in bfloat16 a margin that its rounding rarely exceeds."""
    return min(n_latents, k if work.low is None else k + max(4, k // 4))


def aux_gradients(
    state: dict[str, Tensor], x: Tensor, error: Tensor, total: Tensor, dead_after: int, aux_weight: float
):
    """AuxK and its gradients: (value, latents [A], of dec, of enc [A, D], of bias [A]); None on a CPU where none is
    dead.

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


def _compiled_step(state, x, k, work, dead_after, aux_weight, lr, bias_lr_ratio, betas, clip, frozen):
    rows, width = x.shape
    n_latents = len(state["dec"])
    arrays = {name: value.numpy() for name, value in state.items()}
    pieces = use_threads(torch.get_num_threads())
    wanted = candidates_wanted(k, n_latents, work)
    proposed, count = np.empty((rows, wanted), np.int32), np.empty(rows, np.int32)
    n_blocks = min(n_latents, 1 << max(3 * wanted, int(1.3 * n_latents**0.5)).bit_length())
    for start, out in scores(state, x, work):
        bits = out.view(torch.int32 if work.low is None else torch.int16).numpy()
        end = start + len(bits)
        find_candidates(bits, wanted, n_blocks, pieces, proposed[start:end], count[start:end])
    index, code = np.empty((rows, k), np.int32), np.empty((rows, k), np.float32)
    slope, loss = np.empty((rows, k), np.float32), torch.empty(rows)
    error = work.buffer("error", (rows, width), x)
    rows_in, e = x.numpy(), error.numpy()
    weights = (arrays["dec"], arrays["enc"], arrays.get("gain", np.empty(0, np.float32)), arrays["bias"])
    kernels.code_rows(rows_in, weights, proposed, count, k, pieces, index, code, slope, e, loss.numpy())

    first = np.empty(n_latents + 1, np.int64)
    pairs = (first, np.empty(rows * k, np.int32), np.empty(rows * k, np.float32), np.empty(rows * k, np.float32))
    kernels.sort_by_latent(index, code, slope, *pairs)
    total = loss.sum()
    found = aux_gradients(state, x, error, total, dead_after, aux_weight)
    auxk, aux = _aux_arrays(found, n_latents, width)
    norm = _update(state, arrays, rows_in, e, pairs, aux, weights, work, lr, bias_lr_ratio, betas, clip, pieces, frozen)
    fired = torch.from_numpy(first[1:] > first[:-1])
    return rows, torch.tensor(float(first[-1])), total / rows, auxk, fired, norm


def _aux_arrays(found, n_latents, width):
    slot = np.full(n_latents, -1, np.int32)
    if found is None:
        empty = np.empty((0, width), np.float32)
        return torch.zeros(()), (slot, empty, empty, np.empty(0, np.float32))
    value, latents, g_dec, g_enc, g_bias = found
    slot[latents.numpy()] = np.arange(len(latents), dtype=np.int32)
    return value, (slot, g_dec.numpy(), g_enc.numpy(), g_bias.numpy())


def _update(state, arrays, x, error, pairs, aux, weights, work, lr, bias_lr_ratio, betas, clip, pieces, frozen):
    """One pass over the latents; with a clip one before it that only measures. Returns the gradient's norm."""
    state["step"] += 1
    step, n_latents = int(state["step"]), len(weights[0])
    none = np.empty(0, np.float32)
    moments = tuple(arrays.get(f"{name}_{m}", none) for name in ("dec", "enc", "gain", "bias") for m in "mv")
    cost = pairs[0][1:] + 4 * np.arange(1, n_latents + 1)  # a latent's Adam costs about what four pairs do
    bounds = np.searchsorted(cost, cost[-1] * np.arange(pieces + 1) / pieces)
    bounds[-1] = n_latents
    norms, factor = np.empty(n_latents, np.float32), 1.0
    still = {None: 0, "decoder": kernels.DECODER, "encoder": kernels.ENCODER}[frozen]
    if clip is not None:
        kernels.gradient_norms(x, error, pairs, aux, *weights[:3], still, bounds, norms)
        factor = clip / max(clip, float(np.sqrt(norms.sum(dtype=np.float64))))
    ratio = bias_rate(*weights[0].shape) if bias_lr_ratio is None else bias_lr_ratio
    rate = lr / (1 - betas[0] ** step)
    rates = tuple(np.float32(value) for value in (1 - betas[0], 1 - betas[1], 1 / (1 - betas[1] ** step), EPS))
    lrs = tuple(np.float32(value) for value in (rate, rate * GAIN_RATE, rate * ratio))
    low = np.empty((0, 0), np.uint16) if work.low is None else work.low.view(torch.uint16).numpy()
    kernels.update_latents(x, error, pairs, aux, weights, moments, low, bounds, np.float32(factor), lrs, rates, norms,
                           still)
    return torch.tensor(float(np.sqrt(norms.sum(dtype=np.float64))))


def _torch_step(state, x, k, work, dead_after, aux_weight, lr, bias_lr_ratio, betas, clip, frozen):
    n_latents = len(state["dec"])
    n_rows = torch.tensor(len(x), device=x.device)
    wanted = candidates_wanted(k, n_latents, work)
    proposed = torch.cat([out.topk(wanted, dim=1, sorted=False).indices for _, out in scores(state, x, work)])
    pre = state["bias"][proposed] + _dots(x, state["enc"], proposed)
    code, place = pre.relu().topk(k, dim=1)
    index = proposed.gather(1, place)
    error = x - embedding_bag(index, state["dec"], per_sample_weights=code, mode="sum")
    total = error.square().sum(-1).sum()
    if work.shared:
        add_up(n_rows, total)
    slope = _dots(error, state["dec"], index).mul_(code > 0).mul_(-2 / n_rows)

    order = index.flatten().argsort(stable=True)
    ones = torch.ones_like(order)
    count = torch.zeros(n_latents, dtype=order.dtype, device=x.device).index_add_(0, index.flatten(), ones)
    first = count.cumsum(0) - count

    def by_latent(weight, values):
        return embedding_bag(order // k, values, first, per_sample_weights=weight.flatten()[order], mode="sum")

    g_enc, g_dec = by_latent(slope, x), by_latent(code, error).mul_(-2 / n_rows)
    g_bias = by_latent(slope, torch.ones_like(x[:, :1]))[:, 0]
    auxk = torch.zeros((), device=x.device)
    if (found := aux_gradients(state, x, error, total, dead_after, aux_weight)) is not None:
        auxk, latents = found[0], found[1]
        for whole, part in zip((g_dec, g_enc, g_bias), found[2:]):
            whole.index_add_(0, latents, part)
    # the last place takes what did not fire
    n_active, fired = (code > 0).sum(), torch.zeros(n_latents + 1, device=x.device)
    fired.index_fill_(0, index.where(code > 0, n_latents).flatten(), 1)
    if work.shared:
        add_up(g_dec, g_enc, g_bias, auxk, n_active, fired)
    grads = {"dec": g_dec, "enc": g_enc, "bias": g_bias}
    if "gain" in state:
        along = (g_enc * state["dec"]).sum(1)
        u = state["enc"] - state["gain"][:, None] * state["dec"]
        g_dec += state["gain"][:, None] * g_enc - along[:, None] * u
        g_enc -= along[:, None] * state["dec"]
        grads["gain"] = along
    norm = apply_gradients(state, grads, lr=lr, bias_lr_ratio=bias_lr_ratio, betas=betas, clip=clip, frozen=frozen)
    if work.low is not None:
        work.low.copy_(low_precision(state["enc"], state["bias"]))
    return n_rows, n_active, total / n_rows, auxk, fired[:-1] > 0, norm


def _dots(rows: Tensor, table: Tensor, index: Tensor) -> Tensor:
    """[B, C]: row b times table[index[b, c]], in chunks that bound the copy of the table's rows."""
    chunk = max(1, GATHER_BYTES // (4 * index.shape[1] * rows.shape[1]))
    parts = zip(rows.split(chunk), index.split(chunk))
    return torch.cat([torch.bmm(table[which], row[:, :, None])[:, :, 0] for row, which in parts])
