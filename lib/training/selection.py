"""Which codes fire, for the compiled step: one function for each rule of lib.training.kinds.

    (first, count, index, value), near = SELECT[kind](state, x, k=k, work=work, pieces=pieces)

Codes are ragged: those of row r stand at first[r] : first[r] + count[r] of the flat arrays `index` (latents, int32) and
`value` (float32, above 0). The low-precision scores only propose; values are exact, and so is the selection among what
was proposed. `near` is None, or what jumprelu's thresholds learn from (`threshold_gradient`).
"""
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .code_kernels import exact_codes, keep_above
from .kinds import WINDOW, follow_smallest, sampled_rows, set_first_threshold
from .row_kernels import count_above, count_between, find_above, find_candidates, sum_between
from .workspace import MARGIN, Workspace, candidates_wanted, scores

Tiles = Iterator[tuple[int, np.ndarray]]
Ragged = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
SLACK = 0.9  # the first bound tried, times the last step's: thresholds move by a few percent in a step at most


class Near(NamedTuple):
    """Which scores lie in the window around their latent's threshold."""

    threshold: np.ndarray
    """[F]."""
    window: tuple[np.ndarray, np.ndarray]
    """Bits of the scores between which it lies, [F] each."""
    inside: np.ndarray
    """Rows in it, of all, int32 [F]."""
    scores: Tensor
    """Bits of the first rows' scores [sampled_rows, F]."""


def topk(state: dict[str, Tensor], x: Tensor, *, k: int, work: Workspace, pieces: int) -> tuple[Ragged, None]:
    """The k largest of each row."""
    rows, n_latents = len(x), len(state["dec"])
    wanted = candidates_wanted(k, n_latents, work)
    index, count = np.empty((rows, wanted), np.int32), np.empty(rows, np.int32)
    # Blocks cost a comparison each, and n_latents / n_blocks scores are looked at again for each one wanted.
    n_blocks = min(n_latents, 1 << max(2 * wanted, math.isqrt(wanted * n_latents)).bit_length())
    for start, bits in _tiles(state, x, work):
        end = start + len(bits)
        find_candidates(bits, wanted, n_blocks, pieces, index=index[start:end], count=count[start:end])
    codes = np.arange(0, rows * wanted, wanted), count, index.reshape(-1), np.empty(rows * wanted, np.float32)
    exact_codes(x.numpy(), _encoder(state), codes, k, n_pieces=pieces)
    return codes, None


def batchtopk(
    state: dict[str, Tensor], x: Tensor, *, k: int, work: Workspace, pieces: int, name: str = "log_threshold"
) -> tuple[Ragged, None]:
    """The k B largest of the batch; the threshold of that name follows the smallest of them."""
    codes, last = _largest_of_batch(state, x, k, work, pieces=pieces, name=name)
    set_first_threshold(state, torch.tensor(last), name)
    values = codes[3][: codes[1].sum()]
    follow_smallest(state[name], torch.tensor(values.min() if len(values) else np.inf))
    return codes, None


def jumprelu(state: dict[str, Tensor], x: Tensor, *, k: int, work: Workspace, pieces: int) -> tuple[Ragged, Near]:
    """All above their latent's threshold."""
    if int(state["step"]) == 0:
        set_first_threshold(state, torch.tensor(_largest_of_batch(state, x, k, work, pieces=pieces)[1]))
    threshold, dtype = np.exp(state["log_threshold"].numpy()), np.int32 if work.low is None else np.int16
    sample = work.buffer("near", (sampled_rows(len(x)), len(threshold)), x,
                         torch.int32 if work.low is None else torch.int16)
    near = Near(threshold, _window(threshold, dtype), np.zeros(len(threshold), np.int32), sample)
    bounds = np.maximum(_bits((1 - MARGIN) * threshold, dtype), dtype(1))
    first, count, index, _ = _collect(_watched(_tiles(state, x, work), near, pieces), len(x), bounds, pieces)
    codes = first, count, index, np.empty(len(index), np.float32)
    exact_codes(x.numpy(), _encoder(state), codes, len(threshold), n_pieces=pieces)
    keep_above(codes, threshold, 0)
    return codes, near


def threshold_gradient(
    near: Near, dec: Tensor, error: Tensor, *, n_fires: int, k: int, work: Workspace, pieces: int
) -> Tensor:
    """Gradient of the loss and of the penalty (L0 / k - 1)^2 by the logarithm of each threshold, [F].

    dec [F, D]; error [B, D]. The products of errors and dictionary are taken in the precision of the scores.
    """
    rows, dtype = len(error), torch.float32 if work.low is None else torch.bfloat16
    total, n = np.zeros(len(dec), np.float32), len(near.scores)
    low_dec, low_error = dec.to(dtype), error[:n].to(dtype)
    for start in range(0, n, work.tile_rows):
        part = low_error[start : start + work.tile_rows]
        product = work.buffer("scores", (len(part), len(dec)), error, dtype)
        along = work.buffer("along", product.shape, error).copy_(torch.mm(part, low_dec.T, out=product))
        bits = near.scores[start : start + work.tile_rows].numpy()
        sum_between(bits, near.window, along.numpy(), n_pieces=pieces, total=total)
    of_codes = total * near.threshold * (-2 / n)
    of_count = near.inside * (2 * (n_fires / rows / k - 1) / (k * rows))
    return torch.from_numpy((-(of_codes + of_count) / WINDOW * near.threshold).astype(np.float32))


def _watched(tiles: Tiles, near: Near, pieces: int) -> Tiles:
    """The tiles as they are, after `near` has taken from each what it needs."""
    for start, bits in tiles:
        count_between(bits, near.window, pieces, near.inside)
        sample = near.scores[start : start + len(bits)]
        sample.copy_(torch.from_numpy(bits[: len(sample)]))
        yield start, bits


def _window(threshold: np.ndarray, dtype: type) -> tuple[np.ndarray, np.ndarray]:
    """Bits between which the scores lie that differ from the threshold by less than half the window.

    Scores up to 0 count as 0, so they lie in it where the threshold is below half the window.
    """
    low, high = threshold - np.float32(WINDOW / 2), threshold + np.float32(WINDOW / 2)
    whole = high.view(np.int32)
    above = whole if dtype is np.int32 else (whole + 0xFFFF >> 16).astype(np.int16)
    return np.where(low < 0, np.iinfo(dtype).min, _bits(np.maximum(low, 0), dtype)).astype(dtype), above


def _largest_of_batch(state, x, k, work, *, pieces, name="log_threshold") -> tuple[Ragged, float]:
    """The k B largest codes above 0, without gaps, and the last of them; 0 if there are fewer."""
    n_latents = len(state["dec"])
    wanted = min(len(x) * candidates_wanted(k, n_latents, work), len(x) * n_latents)
    for bound in _bounds(state, x, work, wanted / len(x), last=work.batch_bounds.get(name)):
        first, count, index, keys = _collect(_tiles(state, x, work), len(x), np.full(n_latents, bound), pieces)
        if len(keys) >= wanted or bound <= 1:
            break
    # What is proposed no longer depends on the bound, which followed earlier steps.
    if len(keys) > wanted:
        floor = np.partition(keys, len(keys) - wanted)[-wanted]
        work.batch_bounds[name] = float(_values(np.array([floor]))[0])
        n = keep_above((first, count, index, keys), np.full(n_latents, floor, keys.dtype), len(keys))
        index = index[:n]
    codes = first, count, index, np.empty(len(index), np.float32)
    exact_codes(x.numpy(), _encoder(state), codes, n_latents, n_pieces=pieces)
    n, keep, values, zeros = int(count.sum()), k * len(x), codes[3], np.zeros(n_latents, np.float32)
    smallest = np.partition(values, -keep)[-keep] if n >= keep else np.float32(0)
    keep_above(codes, zeros + smallest, keep - int((values > smallest).sum()) if smallest else 0)
    return codes, float(smallest)


def _bounds(state, x, work, wanted: float, *, last: float | None) -> Iterator[Any]:
    """Bounds to try in turn, from above, as bits of scores; the last keeps all that is above 0.

    wanted: scores of a row on average. last: about the smallest score that the last step looked at.
    """
    dtype = np.int32 if work.low is None else np.int16
    if last:
        yield _bits(np.array([SLACK * last], np.float32), dtype)[0]
    _, bits = next(_tiles(state, x, work))
    n = min(bits.size, int(1.2 * wanted * len(bits)) + 1)
    yield max(np.partition(bits, bits.size - n, axis=None)[-n], dtype(1))
    yield dtype(1)


def _collect(tiles: Tiles, rows: int, bounds: np.ndarray, pieces: int) -> Ragged:
    """All scores that reach their latent's bound: (first, count, latents, bits)."""
    first, count, parts, n = np.empty(rows, np.int64), np.empty(rows, np.int32), [], 0
    for start, bits in tiles:
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


def _tiles(state, x, work) -> Tiles:
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


SELECT: dict[str, Callable[..., tuple[Ragged, Near | None]]] = {
    "topk": topk, "batchtopk": batchtopk, "jumprelu": jumprelu, "matryoshka": topk, "lista": batchtopk}
