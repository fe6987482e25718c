"""Compiled loops of the fast step over rows: candidates from tiles of pre-activations. Codes: code_kernels.py."""
import numpy as np
from numba import prange

from .kernels import compiled

SPAN = 16  # scores compared at once: most spans hold none above the bound


@compiled()
def _largest_bound(keys, n, keep, one):
    """The largest t that at least `keep` of the first n keys reach. keys: integers; one: room for one of them.

    Halving the range only counts, without branches, which costs half as much as a selection.
    """
    low, high = np.int64(keys[0]), np.int64(keys[0])
    for j in range(n):
        low, high = min(low, np.int64(keys[j])), max(high, np.int64(keys[j]))
    while low < high:
        middle = (low + high + 1) >> 1
        one[0] = middle
        bound = one[0]
        reached = 0
        for j in range(n):
            reached += keys[j] >= bound
        if reached >= keep:
            low = middle
            if reached == keep:
                break
        else:
            high = middle - 1
    return low


@compiled()
def _cut(keys, index, n, keep, one):
    """Move the `keep` largest of n keys to the front, in order, the first of equals; returns the smallest kept."""
    one[0] = _largest_bound(keys, n, keep, one)
    bound = one[0]
    above = 0
    for j in range(n):
        above += keys[j] > bound
    equals = keep - above
    kept = 0
    for j in range(n):
        if keys[j] > bound or (keys[j] == bound and equals > 0):
            equals -= keys[j] == bound
            keys[kept], index[kept] = keys[j], index[j]
            kept += 1
    return bound


@compiled()
def _candidates_of_row(scores, n_wanted, maxima, keys, index, one):
    """Indices of the n_wanted largest positive scores of a row into `index`; returns how many there are.

    scores are the bits of floats as integers, in the same order where positive. The n_wanted-th largest of the maxima
    over interleaved blocks is at most the n_wanted-th largest score, so few scores are looked at twice.
    """
    n, n_blocks, room = len(scores), len(maxima), len(keys)
    for j in range(n_blocks):
        maxima[j] = scores[j]
    whole = n // n_blocks
    for i in range(1, whole):
        part = scores[i * n_blocks : (i + 1) * n_blocks]
        for j in range(n_blocks):
            maxima[j] = max(maxima[j], part[j])
    for j in range(whole * n_blocks, n):
        maxima[j - whole * n_blocks] = max(maxima[j - whole * n_blocks], scores[j])
    one[0] = max(1, _largest_bound(maxima, n_blocks, n_wanted, one))
    bound = one[0]
    found = 0
    for j in range(n_blocks):
        if maxima[j] >= bound:
            for i in range(j, n, n_blocks):
                if scores[i] >= bound:
                    if found == room:
                        bound = _cut(keys, index, found, keep=n_wanted, one=one)
                        found = n_wanted
                        if scores[i] <= bound:
                            continue
                    keys[found] = scores[i]
                    index[found] = i
                    found += 1
    if found > n_wanted:
        _cut(keys, index, found, keep=n_wanted, one=one)
        found = n_wanted
    return found


@compiled(parallel=True)
def find_candidates(scores, n_wanted, n_blocks, n_pieces, index, count):
    """The n_wanted largest positive of each row's scores, int [R, F] -> index int32 [R, n_wanted], count int32 [R]."""
    rows = len(scores)
    for piece in prange(n_pieces):
        room = max(4 * n_wanted, n_blocks)
        maxima, one = np.empty(n_blocks, scores.dtype), np.empty(1, scores.dtype)
        keys, found = np.empty(room, scores.dtype), np.empty(room, np.int32)
        for r in range(rows * piece // n_pieces, rows * (piece + 1) // n_pieces):
            n = _candidates_of_row(scores[r], n_wanted, maxima, keys, index=found, one=one)
            count[r] = n
            for c in range(n):
                index[r, c] = found[c]


@compiled(parallel=True)
def count_above(scores, bounds, n_pieces, count):
    """How many of each row's scores, int [R, F], reach their latent's bound, int [F] above 0 -> count int32 [R]."""
    rows = len(scores)
    for piece in prange(n_pieces):
        for r in range(rows * piece // n_pieces, rows * (piece + 1) // n_pieces):
            row = scores[r]
            n = 0
            for j in range(len(row)):
                n += row[j] >= bounds[j]
            count[r] = n


@compiled(parallel=True)
def find_above(scores, bounds, first, n_pieces, index, key):
    """The scores that `count_above` counts, row r's from place first[r] on -> latents int32 [N], scores [N]."""
    rows, n_latents = scores.shape
    whole = n_latents // SPAN * SPAN
    for piece in prange(n_pieces):
        for r in range(rows * piece // n_pieces, rows * (piece + 1) // n_pieces):
            row, p = scores[r], first[r]
            for start in range(0, whole, SPAN):
                reached = False
                for j in range(start, start + SPAN):
                    reached |= row[j] >= bounds[j]
                if reached:
                    for j in range(start, start + SPAN):
                        if row[j] >= bounds[j]:
                            index[p], key[p] = j, row[j]
                            p += 1
            for j in range(whole, n_latents):
                if row[j] >= bounds[j]:
                    index[p], key[p] = j, row[j]
                    p += 1


@compiled(parallel=True)
def count_between(scores, window, n_pieces, count):
    """Add to count int32 [F] how many of each latent's scores, int [R, F], lie between its two bounds, int [F] each."""
    low, high = window
    rows, n_latents = scores.shape
    for piece in prange(n_pieces):
        first, end = n_latents * piece // n_pieces, n_latents * (piece + 1) // n_pieces
        own, below, above = count[first:end], low[first:end], high[first:end]
        for r in range(rows):
            row = scores[r, first:end]
            for j in range(len(row)):
                own[j] += np.int32(row[j] > below[j] and row[j] < above[j])


@compiled(parallel=True)
def sum_between(scores, window, values, n_pieces, total):
    """Add to total float32 [F] the values [R, F] where each latent's scores, int [R, F], lie between its bounds."""
    low, high = window
    rows, n_latents = scores.shape
    for piece in prange(n_pieces):
        first, end = n_latents * piece // n_pieces, n_latents * (piece + 1) // n_pieces
        own, below, above = total[first:end], low[first:end], high[first:end]
        for r in range(rows):
            row, value = scores[r, first:end], values[r, first:end]
            for j in range(len(row)):
                own[j] += value[j] if row[j] > below[j] and row[j] < above[j] else np.float32(0)
