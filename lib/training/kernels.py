"""Compiled loops of the fast step on CPUs (numba): gradient and update of each latent. Those by row: row_kernels.py.

Functions write into the arrays they are given. Rows and latents are split into contiguous pieces, one thread each, and
nothing is summed across pieces, so the result does not depend on the number of threads.

    weights   dec, enc [F, D], gain [F or 0], bias [F]
    codes     where each row's begin, int64 [B], how many they are, int32 [B], then of all: latents int32 [N], values
              [N], and the loss's gradient at each value [N]
    pairs     the active (row, latent) pairs by latent: start [F + 1], row, value and gradient of each pair
    aux       slot of each latent [F] or -1, and AuxK's gradients of dec, enc [A, D], bias [A] by slot

Compiled code is cached in NUMBA_CACHE_DIR if set, else beside the source, else in the user's cache folder; if none can
be written, every process compiles anew.
"""
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numba import config, njit, prange, set_num_threads

from .dots import dot64

config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]  # tbb costs 30 %, workqueue 45 % of the speed at F = 1152
DECODER, ENCODER = 1, 2
FROZEN = {None: 0, "decoder": DECODER, "encoder": ENCODER}
TINY = np.float32(1e-30)  # moments below it become 0: arithmetic on subnormal numbers is a hundred times slower


def compiled(parallel: bool = False) -> Callable:
    """Decorator: compile a function; with `parallel` its prange loops run on all threads.

    Without fastmath: where the compiler may reorder or fuse, code that was just compiled and the same code from the
    cache differ in the last digits, and one seed has two results.
    """
    options = {"parallel": parallel, "nogil": True, "error_model": "numpy"}

    def decorate(function: Callable) -> Callable:
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:  # no folder to cache in can be written
            return njit(**options)(function)

    return decorate


def is_cached(function) -> bool:
    """Whether an earlier process has compiled `function`, so that its first call starts at once."""
    folder = function.stats.cache_path
    return folder is not None and any(Path(folder).glob(f"*.{function.__name__}-*.nbi"))


def use_threads(n: int) -> int:
    """Run the loops on n threads, or as many as numba has; returns how many that is."""
    n = min(n, config.NUMBA_NUM_THREADS)
    set_num_threads(n)
    return n


@compiled()
def sort_by_latent(codes, pairs):
    """Group the active (row, latent) pairs by latent: those of latent i stand at start[i] : start[i + 1]."""
    first, count, index, code, slope = codes
    start, row, weight, slope_sorted = pairs
    rows = len(first)
    start[:] = 0
    for r in range(rows):
        for c in range(first[r], first[r] + count[r]):
            start[index[c] + 1] += 1
    for i in range(1, len(start)):
        start[i] += start[i - 1]
    for r in range(rows):
        for c in range(first[r], first[r] + count[r]):
            p = start[index[c]]
            row[p], weight[p], slope_sorted[p] = r, code[c], slope[c]
            start[index[c]] += 1
    for i in range(len(start) - 1, 0, -1):
        start[i] = start[i - 1]
    start[0] = 0


@compiled()
def _gradient(i, batch, weights, rows, frozen):
    """Gradient of latent i into the two rows, [D]; returns those of gain and bias, and the squared norm of all."""
    x, errors, pull, levels, scale, start, row, weight, slope, aux_slot, aux_dec, aux_enc, aux_bias = batch
    g_dec, g_enc = rows
    dec, enc, gain, _ = weights
    width = len(g_dec)
    zero, error, n_rows = np.float32(0), errors[levels[i]], errors.shape[1]
    g_gain, g_bias = zero, zero
    slot = aux_slot[i]
    if start[i] == start[i + 1] and slot < 0:
        g_dec[:] = zero
        g_enc[:] = zero
        return g_gain, g_bias, zero
    if slot >= 0:
        g_dec[:], g_enc[:], g_bias = aux_dec[slot], aux_enc[slot], aux_bias[slot]
    else:
        g_dec[:] = zero
        g_enc[:] = zero
    for p in range(start[i], start[i + 1]):
        x_row, z, s = x[row[p]], scale * weight[p], slope[p]
        e_row = error[row[p]] if row[p] < n_rows else pull[row[p] - n_rows]
        g_bias += s
        for d in range(width):
            g_dec[d] += z * e_row[d]
            g_enc[d] += s * x_row[d]
    d_row, e_row = dec[i], enc[i]
    if len(gain):
        g_gain, s = dot64(d_row, g_enc), gain[i]
        for d in range(width):
            u = e_row[d] - s * d_row[d]
            g_dec[d] += s * g_enc[d] - g_gain * u
            g_enc[d] -= g_gain * d_row[d]
    if frozen == DECODER:
        g_dec[:] = zero
    elif frozen == ENCODER:
        g_enc[:] = zero
    along = dot64(d_row, g_dec)
    for d in range(width):
        g_dec[d] -= along * d_row[d]
    total = dot64(g_dec, g_dec) + dot64(g_enc, g_enc) + g_gain * g_gain + g_bias * g_bias
    return g_gain, g_bias, total


@compiled()
def _adam(w, g, m, v, rate, rates):
    """Adam on a row, in place. rate: lr / (1 - beta1^t); rates: 1 - beta1, 1 - beta2, 1 / (1 - beta2^t) and eps."""
    new1, new2, correction, eps = rates
    for d in range(len(w)):
        m_d = m[d] + new1 * (g[d] - m[d])
        v_d = v[d] + new2 * (g[d] * g[d] - v[d])
        m_d = m_d if abs(m_d) > TINY else np.float32(0)
        v_d = v_d if v_d > TINY else np.float32(0)
        m[d], v[d] = m_d, v_d
        w[d] -= rate * m_d / (np.sqrt(v_d * correction) + eps)


@compiled(parallel=True)
def update_latents(batch, weights, moments, low, bounds, rates, norms, frozen):
    """Gradient, Adam, unit norm and constraint of every latent in one pass over its row.

    batch: x [B, D] (of two codings [2 B, D]), errors [L, B, D], pull (code_kernels.pull_back), levels uint8 [F], scale
    (code_kernels.row_errors), *pairs, *aux (numba takes no tuples of tuples here). moments: m and v of each of the
    weights, in order. low: bfloat16 bits of the encoder and of the bias in two columns, uint16 [F, D + 2 or more], and
    the encoder as int8 [F, D or more] with scales [F] (`round_to_int8`); what is not used has no rows. bounds:
    piece p has latents bounds[p] : bounds[p + 1]. rates: (lr of
    dec and enc, of gain, of bias, each over 1 - beta1^t), and `_adam`'s. norms [F]: squared norm of each gradient.
    frozen: see FROZEN; a frozen row gets a gradient of 0, with which Adam moves nothing, not even the last bit.
    """
    dec, enc, gain, bias = weights
    dec_m, dec_v, enc_m, enc_v, gain_m, gain_v, bias_m, bias_v = moments
    (lr_rows, lr_gain, lr_bias), adam = rates
    low16, low8, scale8 = low
    width = dec.shape[1]
    for piece in prange(len(bounds) - 1):
        g_dec, g_enc = np.empty(width, np.float32), np.empty(width, np.float32)
        one = np.empty(1, np.float32)
        for i in range(bounds[piece], bounds[piece + 1]):
            g_gain, g_bias, norms[i] = _gradient(i, batch, weights, rows=(g_dec, g_enc), frozen=frozen)
            d_row, e_row = dec[i], enc[i]
            if len(gain):
                for d in range(width):
                    e_row[d] -= gain[i] * d_row[d]
                one[0] = g_gain
                _adam(gain[i : i + 1], one, m=gain_m[i : i + 1], v=gain_v[i : i + 1], rate=lr_gain, rates=adam)
            _adam(d_row, g_dec, m=dec_m[i], v=dec_v[i], rate=lr_rows, rates=adam)
            _adam(e_row, g_enc, m=enc_m[i], v=enc_v[i], rate=lr_rows, rates=adam)
            one[0] = g_bias
            _adam(bias[i : i + 1], one, m=bias_m[i : i + 1], v=bias_v[i : i + 1], rate=lr_bias, rates=adam)
            if frozen != DECODER:
                shrink = np.float32(1) / np.sqrt(dot64(d_row, d_row))
                for d in range(width):
                    d_row[d] *= shrink
            if len(gain):
                along = gain[i] - dot64(e_row, d_row)
                for d in range(width):
                    e_row[d] += along * d_row[d]
            if len(low16):
                _to_bfloat16(e_row, bias[i], low16[i])
            if len(low8):
                scale8[i] = round_to_int8(e_row, low8[i])


@compiled()
def _to_bfloat16(row, bias, low):
    """Bits of `row` rounded to the nearest bfloat16, ties to even, then the bias as a bfloat16 and what it leaves."""
    width = len(row)
    for d in range(width):
        bits = row[d : d + 1].view(np.uint32)[0]
        low[d] = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    pair = np.empty(1, np.float32)
    rest = bias
    for column in range(width, width + 2):
        pair[0] = rest
        bits = pair.view(np.uint32)[0]
        bits = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)) << np.uint32(16)
        low[column] = bits >> np.uint32(16)
        pair.view(np.uint32)[0] = bits
        rest = rest - pair[0]


@compiled()
def round_to_int8(row, low):
    """Fill the start of int8 `low`: times the scale that is returned it is about `row`. The largest number is 127.

    Who changes this gives it another name, as with `dot64`.
    """
    largest = np.full(1, 1e-30, np.float32)
    # The bits of numbers from 0 on are in their order, and of integers the compiler takes many maxima at once.
    bits, top = row.view(np.int32), largest.view(np.int32)[0]
    for d in range(len(row)):
        top = max(top, bits[d] & 0x7FFFFFFF)
    largest.view(np.int32)[0] = top
    up = np.float32(127) / largest[0]
    for d in range(len(row)):
        low[d] = np.int8(np.rint(row[d] * up))
    return largest[0] / np.float32(127)
