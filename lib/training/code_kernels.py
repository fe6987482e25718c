"""Compiled loops of the fast step over codes: exact values, selection, errors and gradients.

Codes are ragged: those of row r stand at first[r] : first[r] + count[r] of flat arrays of latents (int32), values and
the loss's gradients at them (float32).
"""
from numba import prange

from .dots import dot64
from .kernels import compiled


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


@compiled(parallel=True)
def exact_codes(x, weights, codes, k, n_pieces):
    """Pre-activations of the candidates of each row in float32; the k largest positive ones stay, the rest goes.

    x [B, D]; weights: encoder [F, D] and bias [F]; codes: first, count, latents and room for values, 0 where one went.
    """
    enc, bias = weights
    first, count, index, value = codes
    rows = len(x)
    for piece in prange(n_pieces):
        for r in range(rows * piece // n_pieces, rows * (piece + 1) // n_pieces):
            start, n = first[r], count[r]
            place, z = index[start : start + n], value[start : start + n]
            for c in range(n):
                z[c] = dot64(x[r], enc[place[c]]) + bias[place[c]]
            if n > k:
                _keep_largest(z, place, n, k)
                n = k
            kept = 0
            for c in range(n):
                if z[c] > 0:
                    place[kept], z[kept] = place[c], z[c]
                    kept += 1
            z[kept:] = 0
            count[r] = kept


@compiled()
def keep_above(codes, floor, equals):
    """Keep the values above their latent's floor [F], and the first `equals` that equal it; close the gaps.

    Returns how many are left.
    """
    first, count, index, value = codes
    to = 0
    for r in range(len(first)):
        start, n = first[r], count[r]
        first[r] = to
        for p in range(start, start + n):
            bound = floor[index[p]]
            if value[p] > bound or (value[p] == bound and equals > 0):
                equals -= value[p] == bound
                index[to], value[to] = index[p], value[p]
                to += 1
        count[r] = to - first[r]
    return to


@compiled(parallel=True)
def row_errors(x, dec, codes, training, n_pieces, error, loss):
    """Errors of each row, the gradient at each of its codes, and the squared error of all its codes, [B].

    x [B, D]. training: levels of the latents, uint8 [F], the gradient over code times error, `own` and `ridge`. error
    [L, B, D]: for each level what trains its latents, the last x - x_hat: with own < 0 the sum of the errors after this
    level and after every later one, else own times that after this level + (1 - own) times the last.
    """
    levels, scale, own, ridge = training
    first, count, index, value, slope = codes
    n_levels, rows, width = error.shape
    for piece in prange(n_pieces):
        for r in range(rows * piece // n_pieces, rows * (piece + 1) // n_pieces):
            start, end = first[r], first[r] + count[r]
            residual = error[n_levels - 1, r]
            residual[:] = x[r]
            for level in range(n_levels):
                for p in range(start, end):
                    if levels[index[p]] == level:
                        row, z = dec[index[p]], value[p]
                        for d in range(width):
                            residual[d] -= z * row[d]
                if level < n_levels - 1:
                    error[level, r] = residual
            loss[r] = dot64(residual, residual)
            for level in range(n_levels - 2, -1, -1):
                below, above = error[level, r], error[level + 1, r]
                if own < 0:
                    for d in range(width):
                        below[d] += above[d]
                else:
                    for d in range(width):
                        below[d] = own * below[d] + (1 - own) * residual[d]
            for p in range(start, end):
                slope[p] = scale * (dot64(error[levels[index[p]], r], dec[index[p]]) - ridge * value[p])


@compiled(parallel=True)
def refine_rows(x, dec, codes, refine, n_pieces, out):
    """x + refine * (x - x_hat), x_hat of the codes -> out [B, D]."""
    first, count, index, value = codes
    rows, width = x.shape
    for piece in prange(n_pieces):
        for r in range(rows * piece // n_pieces, rows * (piece + 1) // n_pieces):
            row = out[r]
            for d in range(width):
                row[d] = (1 + refine) * x[r, d]
            for p in range(first[r], first[r] + count[r]):
                atom, z = dec[index[p]], refine * value[p]
                for d in range(width):
                    row[d] -= z * atom[d]


@compiled(parallel=True)
def pull_back(weights, codes, earlier, factors, n_pieces, pull):
    """Gradient of the loss through the rows that `refine_rows` made: pull [B, D] is to the earlier codes what an error
    is to codes, - that by x - x_hat over `scale`, and the gradient at each of them is filled in.

    weights: encoder and dictionary [F, D]; codes: the second coding with its gradients; factors: refine and scale.
    """
    enc, dec = weights
    first, count, index, _, slope = codes
    first0, count0, index0, _, slope0 = earlier
    refine, scale = factors
    rows, width = pull.shape
    for piece in prange(n_pieces):
        for r in range(rows * piece // n_pieces, rows * (piece + 1) // n_pieces):
            row = pull[r]
            row[:] = 0
            for p in range(first[r], first[r] + count[r]):
                atom, s = enc[index[p]], refine * slope[p] / -scale
                for d in range(width):
                    row[d] += s * atom[d]
            for p in range(first0[r], first0[r] + count0[r]):
                slope0[p] = scale * dot64(row, dec[index0[p]])
