"""What the fast step keeps between steps, and the encoder product that proposes its candidates.

    work = Workspace(state)                      # buffers, and the encoder in the product's precision
    for start, tile in scores(state, x, work):   # pre-activations of a tile of rows

The product runs in bfloat16 or in 8-bit integers where that is faster. It only proposes latents: their codes are
computed again in float32.
"""
import math
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from ..distributed import agree, world_size
from ..environment import InputError, log

try:
    from . import kernels
    from .int8 import rounded, to_scores
except ImportError:  # numba is not installed, or has no build for this machine
    kernels = None  # type: ignore[assignment]

TILE_ROWS = 512  # at least, in a tile: thinner products run at half the rate
TILE_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20, "mps": 256 << 20}  # of pre-activations held at once, if rows allow
ALIGNED = 32  # columns of a bfloat16 product: at D = 288 two more than a multiple of it doubled one thread's time
SMALL = 1 << 18  # encoder weights below which float32 is used on every machine: bfloat16 would gain a fifth at most
BFLOAT16_FLAGS = ("amx_bf16", "avx512_bf16")  # x86 processors that multiply bfloat16, in torch.cpu.get_capabilities
MARGIN = 1 / 16  # below its threshold by which a low-precision score is still computed again: 4 deviations of int8
INT8_COLUMNS = 2  # at least: torch 2.13 gets the integer product of a single column wrong
INT8_FLAG = "avx512_vnni"  # multiplies integers at twice the rate of avx512_bf16; with AMX this was not measured


class Workspace:
    """Buffers of the fast step, and a copy of the encoder in bfloat16 or int8, beside the state.

    precision: of the encoder product, "int8", "bfloat16", "float32" or "auto" (`choose_precision`). To resume to the
    same bytes, give the `precision` that the training began with. Make a new workspace whenever anything but fast_step
    has changed the state. compiled: run the numba loops; None: where they can run.
    shared: every rank has a part of the step's rows and the whole state. The compiled loops apply a latent's gradient
    as soon as it is summed, before the other ranks' parts can be added, so they don't run.
    kind: of SAE (lib.training.kinds).
    """

    def __init__(
        self, state: dict[str, Tensor], precision: str = "auto", compiled: bool | None = None, shared: bool = False,
        kind: str = "topk",
    ):
        (n_latents, width), device = state["dec"].shape, state["dec"].device
        self.shared, self.kind = shared, kind
        self.compiled = runs_compiled(device, shared) if compiled is None else compiled
        self.precision, self.choice = precision, f"encoder product in {precision}"
        if precision == "auto":
            self.precision, self.choice = choose_precision(n_latents, width, device, self.compiled)
        if self.precision == "int8" and not self.compiled:
            raise InputError("PRECISION=int8 needs numba, a CPU and one process; use auto, bfloat16 or float32")
        self.tile_rows, self.tile_bytes = TILE_ROWS, TILE_BYTES.get(device.type, TILE_BYTES["cpu"])
        self.batch_bounds: dict[str, float] = {}  # by threshold: about the smallest score that the last step looked at
        self._buffers: dict[str, Tensor] = {}
        if self.compiled:
            threads = torch.get_num_threads()
            kernels.use_threads(threads)
            torch.set_num_threads(threads)  # numba's first launch replaces torch's number by its own
            if not kernels.is_cached(kernels.update_latents):
                log.info("compiling the training step: some seconds, once on this machine")
        self.low, self.scale = None, torch.empty(0)  # the scale of each row of int8
        if self.precision == "bfloat16":
            self.low = low_precision(state["enc"], state["bias"])
        elif self.precision == "int8":
            self.low = torch.zeros(n_latents, max(width, INT8_COLUMNS), dtype=torch.int8)
            self.scale = torch.empty(n_latents)
            rounded(state["enc"].numpy(), torch.get_num_threads(), low=self.low.numpy(), scale=self.scale.numpy())

    def buffer(self, name: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """An uninitialised tensor in the same memory at every call: new memory costs as much as filling it."""
        size = math.prod(shape)
        if name not in self._buffers or self._buffers[name].numel() < size:
            self._buffers[name] = torch.empty(size, dtype=dtype, device=like.device)
        return self._buffers[name][:size].view(shape)


def runs_compiled(device: torch.device, shared: bool = False) -> bool:
    """Whether the fast step's loops are compiled: on a CPU with numba, in one process."""
    return kernels is not None and device.type == "cpu" and not shared


def choose_precision(
    n_latents: int, width: int, device: torch.device, compiled: bool | None = None
) -> tuple[str, str]:
    """(precision of the encoder product, a line that says why), from its shape and what the device can do.

    compiled: whether the fast step's loops are, without which there is no int8; None: as in one process. Nothing is
    timed, so one seed gives one result on one machine.
    """
    if n_latents * width < SMALL:
        return "float32", "encoder product in float32 (too small for the precision to matter)"
    if (runs_compiled(device) if compiled is None else compiled) and multiplies_int8():
        return "int8", ("encoder product in int8 (the cpu has instructions for it); its candidates are computed again "
                        "in float32")
    if multiplies_bfloat16(device):
        return "bfloat16", (f"encoder product in bfloat16 (the {device.type} has instructions for it); "
                            "its candidates are computed again in float32")
    return "float32", (f"encoder product in float32 (the {device.type} has no instructions for bfloat16 "
                       "that are known to be faster)")


def precision_of(wanted: str, state: dict[str, Tensor]) -> str:
    """Of the encoder product in a training: the same on all ranks, and logged. wanted: of TrainSettings."""
    (n_latents, width), device = state["dec"].shape, state["dec"].device
    compiled = runs_compiled(device, shared=world_size() > 1)
    precision, choice = wanted, f"encoder product in {wanted}"
    if wanted == "auto":
        precision, choice = choose_precision(n_latents, width, device, compiled)
    log.info(choice)
    return precision if agree(precision == "bfloat16") else "float32"


def multiplies_int8() -> bool:
    """Whether the processor is known to multiply int8 faster than bfloat16: AVX-512 VNNI without AMX."""
    found = torch.cpu.get_capabilities()
    return torch.backends.mkldnn.is_available() and bool(found.get(INT8_FLAG)) and not found.get("amx_bf16")


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device is known to multiply bfloat16 faster than float32: a GPU from compute capability 8.0, a
    processor with AMX or AVX-512 BF16, an Arm processor with BF16 under Linux. MPS is not.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    found = torch.cpu.get_capabilities()
    # macOS multiplies float32 in a unit of its own, faster than its bfloat16 products.
    return any(found.get(name) for name in BFLOAT16_FLAGS) or bool(found.get("bf16") and sys.platform == "linux")


def low_precision(weight: Tensor, bias: Tensor) -> Tensor:
    """bfloat16 [F, D + 2, padded to a multiple of ALIGNED]: the rows, the bias as the sum of two columns, zeros.

    Times [x, 1, 1, 0 ...] this is x W^T + bias.
    """
    width, high = weight.shape[1], bias.bfloat16()
    low = torch.zeros(len(weight), -(-(width + 2) // ALIGNED) * ALIGNED, dtype=torch.bfloat16, device=weight.device)
    low[:, :width], low[:, width], low[:, width + 1] = weight, high, bias - high.float()
    return low


def scores(state: dict[str, Tensor], x: Tensor, work: Workspace) -> Iterator[tuple[int, Tensor]]:
    """Yield (first row, pre-activations [<= tile, F]), float32 or, if the product is in less than that, bfloat16; the
    next tile overwrites them.
    """
    n_latents, width = state["enc"].shape
    size = 2 if work.low is not None else 4
    tile = max(work.tile_rows, work.tile_bytes // (n_latents * size))
    dtype = torch.float32 if work.low is None else torch.bfloat16
    for start in range(0, len(x), tile):
        part = x[start : start + tile]
        out = work.buffer("scores", (len(part), n_latents), x, dtype)
        if work.low is None:
            torch.addmm(state["bias"], part, state["enc"].T, out=out)
        elif work.precision == "int8":
            _int8_scores(part, state["bias"], work, out=out)
        else:
            low_x = work.buffer("low_x", (len(part), work.low.shape[1]), x, dtype)
            low_x[:, :width], low_x[:, width : width + 2], low_x[:, width + 2 :] = part, 1, 0
            torch.mm(low_x, work.low.T, out=out)
        yield start, out


def _int8_scores(x: Tensor, bias: Tensor, work: Workspace, out: Tensor) -> None:
    """Fill `out` [B, F], bfloat16, by a product of integers, which is exact."""
    assert work.low is not None
    pieces = torch.get_num_threads()
    low_x, scale = work.buffer("low_x", (len(x), work.low.shape[1]), x, torch.int8), work.buffer("scale", (len(x),), x)
    low_x[:, x.shape[1] :] = 0
    rounded(x.numpy(), pieces, low=low_x.numpy(), scale=scale.numpy())
    sums = work.buffer("sums", tuple(out.shape), x, torch.int32)
    torch._int_mm(low_x, work.low.T, out=sums)
    factors = tuple(factor.numpy() for factor in (scale, work.scale, bias))
    to_scores(sums.numpy(), factors, pieces, scores=out.view(torch.int16).numpy())


def candidates_wanted(k: int, n_latents: int, work: Workspace) -> int:
    """How many latents to compute again: k, and below float32 a margin that rounding rarely exceeds."""
    return min(n_latents, k if work.low is None else k + max(4, k // 4))
