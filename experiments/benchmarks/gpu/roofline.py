"""The least time that a TopK training step can take on a device, by what it must compute and move.

    seconds = 2 B F D / P + (4 B k D 2 + 2 F D 26) / M

B rows of width D, F latents of which k fire; P: bfloat16 operations a second, M: bytes a second. Counted are the
encoder's product; four passes over the k rows of a token, in bfloat16 (decoding, the gradients of the dictionary, of
the codes and of the encoder); and one pass over the two weight matrices, which reads and writes a weight and its two
moments in float32 and writes a bfloat16 copy. A step in float32, or one that keeps B x F scores, can't reach it.
"""
from typing import NamedTuple

import torch

from .clock import time_steps

# A part of the device's name -> what a large product and a large copy reach there: 70 % of the dense bfloat16 rate of
# the data sheet, 87 % of its bandwidth. What is not listed is measured.
KNOWN = {
    "H100 80GB HBM3": (690e12, 2.9e12),
    "H200": (690e12, 4.15e12),
    "A100-SXM4-80GB": (218e12, 1.77e12),
    "A100-SXM4-40GB": (218e12, 1.35e12),
}
GATHERS, GATHER_BYTES, UPDATE_BYTES = 4, 2, 26  # of the formula above
PRODUCT, COPY_BYTES = 8192, 1 << 30  # rows of the square matrices multiplied, and bytes copied, to measure a device
SMALL_PRODUCT, SMALL_COPY_BYTES = 512, 1 << 24  # on a CPU, where this only shows that it runs


class Peaks(NamedTuple):
    """What a device reaches."""

    flops: float
    """bfloat16 operations a second."""
    bytes_per_s: float
    """Read and written together."""


def known_peaks(name: str) -> Peaks | None:
    """Of a device that is listed by its name."""
    return next((Peaks(*peaks) for part, peaks in KNOWN.items() if part in name), None)


def measured_peaks(device: torch.device, seconds: float = 0.5) -> Peaks:
    """By a large bfloat16 product and a large copy."""
    n, n_bytes = (PRODUCT, COPY_BYTES) if device.type == "cuda" else (SMALL_PRODUCT, SMALL_COPY_BYTES)
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    product = time_steps(lambda _: torch.mm(a, b, out=out), device, seconds)
    source = torch.zeros(n_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = time_steps(lambda _: target.copy_(source), device, seconds)
    return Peaks(2 * n**3 / product.seconds, 2 * n_bytes / copy.seconds)


def encoder_floor(width: int, n_latents: int, batch: int, peaks: Peaks) -> float:
    """Seconds of the encoder's product alone."""
    return 2 * batch * n_latents * width / peaks.flops


def step_floor(width: int, n_latents: int, k: int, batch: int, *, peaks: Peaks) -> float:
    """Seconds of a training step at least; the formula above."""
    moved = GATHERS * batch * k * width * GATHER_BYTES + 2 * n_latents * width * UPDATE_BYTES
    return encoder_floor(width, n_latents, batch, peaks) + moved / peaks.bytes_per_s
