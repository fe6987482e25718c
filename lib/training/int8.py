"""Scores from a product of 8-bit integers: compiled loops before and after it.

    rounded(rows, pieces, low=low, scale=scale)                       # rows ~ low * scale[:, None]
    sums = torch._int_mm(low_x, low.T)
    to_scores(sums, (x_scale, scale, bias), pieces, scores=scores)    # bfloat16 bits of sums * both scales + bias

Sums of integers are exact, so neither tiles nor threads change them.
"""
import numpy as np
from numba import prange

from .kernels import compiled, round_to_int8

CHUNK = 1024  # scores at once, which stay in the first cache


@compiled(parallel=True)
def rounded(rows, n_pieces, low, scale):
    """Each row of float32 [R, D] as int8, in the first D columns of `low`, times its scale [R]."""
    n = len(rows)
    for piece in prange(n_pieces):
        for r in range(n * piece // n_pieces, n * (piece + 1) // n_pieces):
            scale[r] = round_to_int8(rows[r], low[r])


@compiled(parallel=True)
def to_scores(sums, factors, n_pieces, scores):
    """int32 [R, F] -> bfloat16 bits int16 [R, F] of sums * x_scale[:, None] * scale + bias, ties to even."""
    x_scale, scale, bias = factors
    n, width = sums.shape
    for piece in prange(n_pieces):
        value = np.empty(CHUNK, np.float32)
        bits = value.view(np.uint32)
        for r in range(n * piece // n_pieces, n * (piece + 1) // n_pieces):
            up = x_scale[r]
            for start in range(0, width, CHUNK):
                end = min(start + CHUNK, width)
                row, s, b, out = sums[r, start:end], scale[start:end], bias[start:end], scores[r, start:end]
                for j in range(end - start):
                    value[j] = np.float32(row[j]) * up * s[j] + b[j]
                for j in range(end - start):
                    even = (bits[j] >> np.uint32(16)) & np.uint32(1)
                    out[j] = (bits[j] + np.uint32(0x7FFF) + even) >> np.uint32(16)
