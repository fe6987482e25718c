"""The compiled loops one by one, against torch."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

numba = pytest.importorskip("numba")
from lib.training import kernels  # noqa: E402
from lib.training.code_kernels import keep_above  # noqa: E402
from lib.training.dots import dot64  # noqa: E402
from lib.training.kernels import use_threads  # noqa: E402
from lib.training.row_kernels import count_above, count_between, find_above, find_candidates, sum_between  # noqa: E402

PROJECT = Path(__file__).resolve().parents[1]


def candidates(scores, n_wanted, n_blocks):
    index, count = np.zeros((len(scores), n_wanted), np.int32), np.zeros(len(scores), np.int32)
    find_candidates(scores, n_wanted, n_blocks, use_threads(2), index, count)
    return index, count


@pytest.mark.parametrize("dtype,bits", [(torch.bfloat16, torch.int16), (torch.float32, torch.int32)])
@pytest.mark.parametrize("n,n_wanted,n_blocks", [(257, 5, 16), (64, 1, 8), (100, 30, 32), (9, 9, 9), (1000, 3, 4)])
def test_candidates_are_the_largest_scores(dtype, bits, n, n_wanted, n_blocks):
    scores = torch.randn(50, n, generator=torch.Generator().manual_seed(0)).to(dtype)
    index, count = candidates(scores.view(bits).numpy(), n_wanted, n_blocks)
    expected = scores.float().relu().topk(n_wanted, dim=1).values
    assert np.array_equal(count, (expected > 0).sum(1).numpy())
    for r in range(50):
        found = scores[r, index[r, : count[r]].tolist()].float()
        assert len(set(index[r, : count[r]].tolist())) == count[r]
        assert torch.equal(found.sort(descending=True).values, expected[r, : count[r]])


@pytest.mark.parametrize("order", [1, -1, 0])
def test_candidates_among_ties_and_rising_or_falling_scores(order):
    """More scores reach the bound than there is room for, so the list has to be cut while it is read."""
    rising = np.arange(1, 4097, dtype=np.int16)
    scores = np.tile(np.full_like(rising, 7) if order == 0 else rising[::order], (2, 1))
    index, count = candidates(np.ascontiguousarray(scores), 6, 8)
    assert np.array_equal(count, [6, 6]) and len(set(index[0].tolist())) == 6
    assert sorted(scores[0, index[0]].tolist()) == sorted(np.sort(scores[0])[-6:].tolist())


def test_no_candidate_without_a_positive_score():
    scores = torch.tensor([[-1.0, 0.0, -0.0, -2.0], [-1.0, 3.0, 0.0, 1e-6]]).bfloat16()
    index, count = candidates(scores.view(torch.int16).numpy(), 3, 4)
    assert count.tolist() == [0, 2] and set(index[1, :2].tolist()) == {1, 3}


def test_bfloat16_rounding_is_that_of_torch():
    generator = torch.Generator().manual_seed(0)
    row = torch.cat([torch.randn(200, generator=generator),
                     torch.tensor([0.0, -0.0, 1.00390625, 1.01171875, 3e38, 1e-40])])
    low = np.empty(len(row) + 2, np.uint16)
    kernels._to_bfloat16(row.numpy(), np.float32(0.123456), low)
    got = torch.from_numpy(low.view(np.int16)).view(torch.bfloat16)
    assert torch.equal(got[:-2], row.bfloat16())
    assert float(got[-2]) + float(got[-1]) == pytest.approx(0.123456, rel=1e-4)


@numba.njit
def dots_of(a, table, out):
    for i in range(len(out)):
        out[i] = dot64(a, table[i])


@pytest.mark.parametrize("width", [1, 15, 16, 17, 63, 64, 65, 127, 128, 288, 301])
def test_a_dot_product_sums_64_lanes_in_halves_and_reads_nothing_beyond(width):
    rng = np.random.default_rng(width)
    a, table = rng.standard_normal(width, np.float32), np.full((4, width), np.nan, np.float32)
    table[1:3] = rng.standard_normal((2, width), np.float32)  # neighbours that would show
    out = np.empty(4, np.float32)
    dots_of(a, table, out)
    for row, found in zip(table[1:3], out[1:3]):
        lanes = np.zeros(64, np.float32)
        for d in range(width):
            lanes[d % 64] += a[d] * row[d]
        while len(lanes) > 1:
            lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
        assert found == lanes[0]
        assert found == pytest.approx(float(a.astype(np.float64) @ row), abs=1e-5 * width)


def test_pairs_are_grouped_by_latent_in_row_order():
    first, count = np.array([1, 3, 6]), np.array([2, 1, 2], np.int32)  # places that belong to no row hold anything
    index = np.array([9, 2, 0, 2, 9, 9, 0, 2], np.int32)
    code = np.array([9, 1, 2, 3, 9, 9, 4, 5], np.float32)
    start, row = np.empty(5, np.int64), np.empty(5, np.int32)
    weight, slope = np.empty(5, np.float32), np.empty(5, np.float32)
    kernels.sort_by_latent((first, count, index, code, -code), (start, row, weight, slope))
    assert start.tolist() == [0, 2, 2, 5, 5]
    assert (row.tolist() == [0, 2, 0, 1, 2] and weight.tolist() == [2, 4, 1, 3, 5]
            and slope.tolist() == [-2, -4, -1, -3, -5])


def test_codes_above_a_floor_and_the_first_of_equals_stay():
    first, count = np.array([0, 4]), np.array([3, 2], np.int32)
    index, value = np.array([0, 1, 2, 9, 1, 0], np.int32), np.array([3, 2, 1, 9, 2, 2], np.float32)
    floor = np.array([1, 2, 1], np.float32)
    assert keep_above((first, count, index, value), floor, 1) == 3
    assert first.tolist() == [0, 2] and count.tolist() == [2, 1]
    assert index[:3].tolist() == [0, 1, 0] and value[:3].tolist() == [3, 2, 2]


@pytest.mark.parametrize("n", [1, 131])
def test_scores_in_a_window_are_counted_and_their_values_added_up(n):
    generator = torch.Generator().manual_seed(0)
    scores, values = torch.randn(2, 50, n, generator=generator)
    low = torch.rand(n, generator=generator)
    window = low.view(torch.int32).numpy(), (low + 0.5).view(torch.int32).numpy()
    inside = (scores > low) & (scores < low + 0.5)
    count, total = np.ones(n, np.int32), np.ones(n, np.float32)
    count_between(scores.view(torch.int32).numpy(), window, use_threads(2), count)
    sum_between(scores.view(torch.int32).numpy(), window, values.numpy(), n_pieces=use_threads(2), total=total)
    assert np.array_equal(count, 1 + inside.sum(0).numpy())
    assert np.allclose(total, 1 + (values * inside).sum(0).numpy(), atol=1e-5)


@pytest.mark.parametrize("dtype,bits", [(torch.bfloat16, torch.int16), (torch.float32, torch.int32)])
@pytest.mark.parametrize("n", [5, 64, 131])
def test_scores_above_the_bound_of_their_latent_are_found(dtype, bits, n):
    generator = torch.Generator().manual_seed(0)
    scores, bounds = torch.randn(50, n, generator=generator).to(dtype), torch.rand(n, generator=generator).to(dtype)
    bounds[0] = scores[7, 0] = 1.0
    found, count = scores.view(bits).numpy(), np.empty(50, np.int32)
    count_above(found, bounds.view(bits).numpy(), use_threads(2), count)
    assert np.array_equal(count, (scores >= bounds).sum(1).numpy())
    ends = count.cumsum(dtype=np.int64)
    index, key = np.empty(ends[-1], np.int32), np.empty(ends[-1], found.dtype)
    find_above(found, bounds.view(bits).numpy(), first=ends - count, n_pieces=use_threads(2), index=index, key=key)
    row, latent = (scores >= bounds).nonzero().T.numpy()
    assert np.array_equal(index, latent) and np.array_equal(key, found[row, latent])


def run_python(code, **env):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env},
                          cwd=PROJECT)


def test_without_a_folder_to_cache_in_the_loops_still_compile():
    code = """
import numba.core.caching
numba.core.caching.CacheImpl._locator_classes = []
import numpy as np
from lib.training import kernels
low = np.empty(3, np.uint16)
kernels._to_bfloat16(np.ones(1, np.float32), np.float32(0), low)
print(low[0], kernels.is_cached(kernels._to_bfloat16))
"""
    done = run_python(code)
    assert done.stdout.split() == ["16256", "False"], done.stderr


def test_the_cache_can_be_put_elsewhere(tmp_path):
    code = """
import numpy as np
from lib.training import kernels
before = kernels.is_cached(kernels._to_bfloat16)
kernels._to_bfloat16(np.ones(1, np.float32), np.float32(0), np.empty(3, np.uint16))
print(before, kernels.is_cached(kernels._to_bfloat16))
"""
    done = run_python(code, NUMBA_CACHE_DIR=str(tmp_path))
    assert done.stdout.split() == ["False", "True"], done.stderr
    assert list(tmp_path.rglob("*.nbi"))


def test_without_numba_torch_operations_take_over():
    code = """
import sys
sys.modules["numba"] = None
import torch
from lib.training import fast_step
from lib.training import workspace
from lib.training.step import dense_step, init_state
assert workspace.kernels is None
x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
fast, dense = init_state(torch.eye(8), 20, 0), init_state(torch.eye(8), 20, 0)
work = workspace.Workspace(fast, "float32")
for _ in range(3):
    fast_step.fast_step(fast, x, k=3, lr=1e-3, dead_after=100, work=work)
    dense_step(dense, x, k=3, lr=1e-3, dead_after=100)
print(float((fast["dec"] - dense["dec"]).abs().max()) < 1e-4, int(fast["step"]))
"""
    done = run_python(code)
    assert done.stdout.split() == ["True", "3"], done.stderr


STEP = """
import lib, sys, hashlib, torch
from lib.training.fast_step import fast_step
from lib.training.step import init_state
from lib.training.workspace import Workspace
torch.set_num_threads(int(sys.argv[1]))
x = torch.randn(512, 72, generator=torch.Generator().manual_seed(0))
state = init_state(torch.eye(72), 300, 0)
work = Workspace(state, "float32")
for part in x.split(128):
    fast_step(state, part, k=4, lr=1e-2, dead_after=300, work=work)
print(hashlib.sha256(b"".join(state[n].numpy().tobytes() for n in ("dec", "enc", "gain", "bias"))).hexdigest())
"""


def test_code_just_compiled_and_code_from_the_cache_take_the_same_step(tmp_path):
    """Where the compiler may reorder sums, the two differ in the last digits: one seed would have two results."""
    found = []
    for threads in (1, 1, 2):
        environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(PROJECT)}
        done = subprocess.run([sys.executable, "-c", STEP, str(threads)], capture_output=True, text=True,
                              env=environment, check=True)
        found.append(done.stdout.split()[-1])
    assert len(set(found)) == 1
