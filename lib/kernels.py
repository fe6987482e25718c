"""Compiled loops of the fast training step on CPUs (numba): codes and residual by row, gradient and update by latent.

Every function writes into arrays that it is given. Rows and latents are split into contiguous pieces, one thread each,
and nothing is summed across pieces, so the result does not depend on the number of threads.
"""
import numpy as np
from numba import prange

from .compiled import compiled

DECODER, ENCODER = 1, 2  # which rows are frozen
TINY = np.float32(1e-30)  # moments below it become 0: subnormal numbers are computed a hundred times slower


@compiled()
def _keep_largest(keys, index, n, keep):
    """Reorder the first n entries so that the `keep` largest keys come first (Hoare's selection)."""
    low, high = 0, n - 1
    while low < high:
        pivot = keys[(low + high) >> 1]
        i, j = low, high
        while i <= j:
            while keys[i] > pivot:
                i += 1
            while keys[j] < pivot:
                j -= 1
            if i <= j:
                keys[i], keys[j] = keys[j], keys[i]
                index[i], index[j] = index[j], index[i]
                i += 1
                j -= 1
        if keep - 1 <= j:
            high = j
        elif keep - 1 >= i:
            low = i
        else:
            return


@compiled()
def _dot(a, b):
    total = np.float32(0)
    for d in range(len(a)):
        total += a[d] * b[d]
    return total


@compiled(parallel=True)
def code_rows(x, weights, candidates, count, k, n_pieces, index, code, slope, error, loss):
    """Codes of each row from its candidates, the error x - x_hat, and the gradient at each code.

    x [B, D], weights: see `update_latents`, candidates int32 [B, C], count int32 [B]
    -> index int32 [B, k], code, slope [B, k] (slope: dloss/dcode of the mean over rows), error [B, D], loss [B].
    A code is the exact float32 pre-activation; places without a positive one have code 0 and index 0.
    """
    dec, enc, _, bias = weights
    rows, width = x.shape
    scale = np.float32(-2.0 / rows)
    for piece in prange(n_pieces):
        room = candidates.shape[1]
        value, place = np.empty(room, np.float32), np.empty(room, np.int32)
        for r in range(rows * piece // n_pieces, rows * (piece + 1) // n_pieces):
            n = count[r]
            for c in range(n):
                place[c] = candidates[r, c]
                value[c] = _dot(x[r], enc[place[c]]) + bias[place[c]]
            if n > k:
                _keep_largest(value, place, n, k)
                n = k
            residual = error[r]
            residual[:] = x[r]
            for c in range(k):
                index[r, c], code[r, c], slope[r, c] = 0, 0, 0
            for c in range(n):
                if value[c] > 0:
                    row, z = dec[place[c]], value[c]
                    index[r, c], code[r, c] = place[c], z
                    for d in range(width):
                        residual[d] -= z * row[d]
            for c in range(n):
                if code[r, c] > 0:
                    slope[r, c] = scale * _dot(residual, dec[index[r, c]])
            loss[r] = _dot(residual, residual)


@compiled()
def sort_by_latent(index, code, slope, start, row, weight, slope_sorted):
    """Group the active (row, latent) pairs by latent: those of latent i stand at start[i] : start[i + 1]."""
    rows, k = index.shape
    start[:] = 0
    for r in range(rows):
        for c in range(k):
            if code[r, c] > 0:
                start[index[r, c] + 1] += 1
    for i in range(1, len(start)):
        start[i] += start[i - 1]
    for r in range(rows):
        for c in range(k):
            if code[r, c] > 0:
                p = start[index[r, c]]
                row[p], weight[p], slope_sorted[p] = r, code[r, c], slope[r, c]
                start[index[r, c]] += 1
    for i in range(len(start) - 1, 0, -1):
        start[i] = start[i - 1]
    start[0] = 0


@compiled()
def _gradient(i, x, error, pairs, aux, dec, enc, gain, g_dec, g_enc, frozen):
    """Gradient of latent i into g_dec, g_enc [D]; returns those of gain and bias, and the squared norm of all."""
    start, row, weight, slope = pairs
    aux_slot, aux_dec, aux_enc, aux_bias = aux
    width = len(g_dec)
    zero = np.float32(0)
    scale = np.float32(-2.0 / len(x))
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
        x_row, e_row, z, s = x[row[p]], error[row[p]], scale * weight[p], slope[p]
        g_bias += s
        for d in range(width):
            g_dec[d] += z * e_row[d]
            g_enc[d] += s * x_row[d]
    d_row, e_row = dec[i], enc[i]
    if len(gain):
        g_gain, s = _dot(d_row, g_enc), gain[i]
        for d in range(width):
            u = e_row[d] - s * d_row[d]
            g_dec[d] += s * g_enc[d] - g_gain * u
            g_enc[d] -= g_gain * d_row[d]
    if frozen == DECODER:
        g_dec[:] = zero
    elif frozen == ENCODER:
        g_enc[:] = zero
    along = _dot(d_row, g_dec)
    total = g_gain * g_gain + g_bias * g_bias
    for d in range(width):
        g_dec[d] -= along * d_row[d]
        total += g_dec[d] * g_dec[d] + g_enc[d] * g_enc[d]
    return g_gain, g_bias, total


@compiled()
def _adam(w, g, m, v, rate, rates):
    """Adam on a row, in place. rates: float32 (1 - beta1, 1 - beta2, 1 / (1 - beta2^t), eps); rate: lr / (1 -
    beta1^t).
    """
    new1, new2, correction, eps = rates
    for d in range(len(w)):
        m_d = m[d] + new1 * (g[d] - m[d])
        v_d = v[d] + new2 * (g[d] * g[d] - v[d])
        m_d = m_d if abs(m_d) > TINY else np.float32(0)
        v_d = v_d if v_d > TINY else np.float32(0)
        m[d], v[d] = m_d, v_d
        w[d] -= rate * m_d / (np.sqrt(v_d * correction) + eps)


@compiled(parallel=True)
def gradient_norms(x, error, pairs, aux, dec, enc, gain, frozen, bounds, norms):
    """Squared norm of each latent's gradient into norms [F]; latents bounds[p] : bounds[p + 1] are piece p."""
    for piece in prange(len(bounds) - 1):
        g_dec, g_enc = np.empty(x.shape[1], np.float32), np.empty(x.shape[1], np.float32)
        for i in range(bounds[piece], bounds[piece + 1]):
            norms[i] = _gradient(i, x, error, pairs, aux, dec, enc, gain, g_dec, g_enc, frozen)[2]


@compiled(parallel=True)
def update_latents(x, error, pairs, aux, weights, moments, low, bounds, factor, lr, rates, norms, frozen):
    """Gradient, Adam, unit norm and constraint of every latent in one pass over its row.

    x, error [B, D]. pairs: `sort_by_latent`. aux: (slot [F] or -1, gradients of dec, enc [A, D], bias [A]).
    weights: dec, enc [F, D], gain [F or 0], bias [F]; moments: m and v of each in this order. low: bfloat16 bits of
    the encoder and of the bias in two columns, uint16 [F, D + 2 or more], or [0, 0]. factor: times the gradient.
    lr: of dec and enc, gain, bias, each over 1 - beta1^t; rates: see `_adam`. frozen: DECODER, ENCODER or 0; what is
    frozen gets a gradient of 0, by which Adam moves nothing, not even the last bit.
    """
    dec, enc, gain, bias = weights
    dec_m, dec_v, enc_m, enc_v, gain_m, gain_v, bias_m, bias_v = moments
    lr_rows, lr_gain, lr_bias = lr
    width = x.shape[1]
    for piece in prange(len(bounds) - 1):
        g_dec, g_enc = np.empty(width, np.float32), np.empty(width, np.float32)
        one = np.empty(1, np.float32)
        for i in range(bounds[piece], bounds[piece + 1]):
            g_gain, g_bias, norms[i] = _gradient(i, x, error, pairs, aux, dec, enc, gain, g_dec, g_enc, frozen)
            if factor != 1:
                for d in range(width):
                    g_dec[d] *= factor
                    g_enc[d] *= factor
            d_row, e_row = dec[i], enc[i]
            if len(gain):
                for d in range(width):
                    e_row[d] -= gain[i] * d_row[d]
                one[0] = g_gain * factor
                _adam(gain[i : i + 1], one, gain_m[i : i + 1], gain_v[i : i + 1], lr_gain, rates)
            _adam(d_row, g_dec, dec_m[i], dec_v[i], lr_rows, rates)
            _adam(e_row, g_enc, enc_m[i], enc_v[i], lr_rows, rates)
            one[0] = g_bias * factor
            _adam(bias[i : i + 1], one, bias_m[i : i + 1], bias_v[i : i + 1], lr_bias, rates)
            if frozen != DECODER:
                shrink = np.float32(1) / np.sqrt(_dot(d_row, d_row))
                for d in range(width):
                    d_row[d] *= shrink
            if len(gain):
                along = gain[i] - _dot(e_row, d_row)
                for d in range(width):
                    e_row[d] += along * d_row[d]
            if len(low):
                _to_bfloat16(e_row, bias[i], low[i])


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
