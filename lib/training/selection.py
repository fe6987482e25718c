"""Which codes fire, for the compiled step: one function for each rule of lib.training.kinds.

    select = SELECT[kind]
    first, count, index, value = select(state, x, k=k, work=work, pieces=pieces)

Codes are ragged: those of row r stand at first[r] : first[r] + count[r] of the flat arrays `index` (latents, int32) and
`value` (float32, above 0). The low-precision scores only propose; values are exact, and so is the selection among what
was proposed.
"""
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .code_kernels import exact_codes, keep_above
from .kinds import follow_smallest, set_first_threshold
from .row_kernels import count_above, find_above, find_candidates
from .workspace import Workspace, candidates_wanted, scores

Ragged = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
SLACK = 0.9  # the first bound tried, times the last step's: thresholds move by a few percent in a step at most


def topk(state: dict[str, Tensor], x: Tensor, *, k: int, work: Workspace, pieces: int) -> Ragged:
    """The k largest of each row."""
    rows, n_latents = len(x), len(state["dec"])
    wanted = candidates_wanted(k, n_latents, work)
    index, count = np.empty((rows, wanted), np.int32), np.empty(rows, np.int32)
    n_blocks = min(n_latents, 1 << max(3 * wanted, int(1.3 * n_latents**0.5)).bit_length())
    for start, bits in _tiles(state, x, work):
        end = start + len(bits)
        find_candidates(bits, wanted, n_blocks, pieces, index=index[start:end], count=count[start:end])
    codes = np.arange(0, rows * wanted, wanted), count, index.reshape(-1), np.empty(rows * wanted, np.float32)
    exact_codes(x.numpy(), _encoder(state), codes, k, n_pieces=pieces)
    return codes


def batchtopk(state: dict[str, Tensor], x: Tensor, *, k: int, work: Workspace, pieces: int) -> Ragged:
    """The k B largest of the batch; the threshold follows the smallest of them."""
    codes, last = _largest_of_batch(state, x, k, work, pieces=pieces)
    set_first_threshold(state, torch.tensor(last))
    values = codes[3][: codes[1].sum()]
    follow_smallest(state["log_threshold"], torch.tensor(values.min() if len(values) else np.inf))
    return codes


def _largest_of_batch(state, x, k, work, *, pieces) -> tuple[Ragged, float]:
    """The k B largest codes above 0, without gaps, and the last of them; 0 if there are fewer."""
    n_latents = len(state["dec"])
    wanted = min(len(x) * candidates_wanted(k, n_latents, work), len(x) * n_latents)
    for bound in _bounds(state, x, work, wanted / len(x)):
        first, count, index, keys = _collect(state, x, work, np.full(n_latents, bound), pieces=pieces)
        if len(keys) >= wanted or bound <= 1:
            break
    # What is proposed no longer depends on the bound, which followed earlier steps.
    if len(keys) > wanted:
        floor = np.partition(keys, len(keys) - wanted)[-wanted]
        work.batch_bound = float(_values(np.array([floor]))[0])
        n = keep_above((first, count, index, keys), np.full(n_latents, floor, keys.dtype), len(keys))
        index = index[:n]
    codes = first, count, index, np.empty(len(index), np.float32)
    exact_codes(x.numpy(), _encoder(state), codes, n_latents, n_pieces=pieces)
    zeros = np.zeros(n_latents, np.float32)
    n, keep = keep_above(codes, zeros, 0), k * len(x)
    if n < keep:
        return codes, 0.0
    values = codes[3][:n]
    smallest = np.partition(values, n - keep)[n - keep]
    keep_above(codes, zeros + smallest, keep - int((values > smallest).sum()))
    return codes, float(smallest)


def _bounds(state, x, work, wanted: float) -> Iterator[Any]:
    """Bounds to try in turn, from above, as bits of scores; the last keeps all that is above 0.

    wanted: scores of a row on average.
    """
    dtype = np.int32 if work.low is None else np.int16
    if work.batch_bound:
        yield _bits(np.array([SLACK * work.batch_bound], np.float32), dtype)[0]
    _, bits = next(_tiles(state, x, work))
    n = min(bits.size, int(1.2 * wanted * len(bits)) + 1)
    yield max(np.partition(bits, bits.size - n, axis=None)[-n], dtype(1))
    yield dtype(1)


def _collect(state, x, work, bounds: np.ndarray, *, pieces) -> Ragged:
    """All scores that reach their latent's bound: (first, count, latents, bits)."""
    count, parts, n = np.empty(len(x), np.int32), [], 0
    first = np.empty(len(x), np.int64)
    for start, bits in _tiles(state, x, work):
        here = count[start : start + len(bits)]
        count_above(bits, bounds, pieces, here)
        ends = here.cumsum(dtype=np.int64)
        first[start : start + len(bits)] = n + ends - here
        part = np.empty(ends[-1], np.int32), np.empty(ends[-1], bits.dtype)
        find_above(bits, bounds, ends - here, pieces, index=part[0], key=part[1])
        parts.append(part)
        n += ends[-1]
    index, keys = (np.concatenate(column) for column in zip(*parts))
    return first, count, index, keys


def _tiles(state, x, work) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, bits of the scores of a tile of rows, int16 or int32 [R, F]), in the order of positive scores."""
    dtype = torch.int32 if work.low is None else torch.int16
    for start, out in scores(state, x, work):
        yield start, out.view(dtype).numpy()


def _bits(values: np.ndarray, dtype: type) -> np.ndarray:
    """float32 above 0 -> the bits of scores that are as large, rounded down where those have 16."""
    bits = values.view(np.int32)
    return bits if dtype is np.int32 else (bits >> 16).astype(np.int16)


def _values(bits: np.ndarray) -> np.ndarray:
    """What `_bits` takes, rounded."""
    return (bits if bits.dtype == np.int32 else bits.astype(np.int32) << 16).view(np.float32)


def _encoder(state) -> tuple[np.ndarray, np.ndarray]:
    return state["enc"].numpy(), state["bias"].numpy()


SELECT = {"topk": topk, "batchtopk": batchtopk}
