"""The fast step against the dense reference, in all precisions, compiled and in torch operations."""
import math
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from lib.environment import PROJECT, InputError
from lib.training import workspace as module
from lib.training.fast_step import fast_step
from lib.training.step import BETAS, dense_step, init_state, read_stats, whitening
from lib.training.workspace import (
    Workspace,
    candidates_wanted,
    choose_precision,
    low_precision,
    multiplies_bfloat16,
    scores,
)

PATHS = [True, False] if module.kernels is not None else [False]
WAYS = [(compiled, precision) for compiled in PATHS for precision in ("float32", "bfloat16", "int8")[: 2 + compiled]]
WIDTH, LATENTS = 21, 67  # multiples of nothing


@pytest.fixture(autouse=True)
def one_thread():
    """Products this small only lose by threads, and much where the processors are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def activations(n_rows=1500, width=WIDTH):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n_rows, width, generator=generator) * torch.logspace(0, -1, width)
    return x - x.mean(0)


def pair_of_states(x, aligned=True, n_latents=LATENTS, kind="topk"):
    """The same state twice. Without a bias some gradients of k=1 are mere rounding, which Adam would scale up."""
    state = init_state(whitening(x.T @ x / len(x)), n_latents, 0, aligned=aligned, kind=kind)
    state["bias"] += 0.1 * torch.randn(n_latents, generator=torch.Generator().manual_seed(2))
    if kind == "jumprelu":  # the first threshold is a code, which rounding puts on either side of it
        state["log_threshold"].fill_(-1.2)
    return state, {name: value.clone() for name, value in state.items()}


def assert_close(a, b, atol=2e-5):
    assert a.keys() == b.keys()
    for name in a:
        if a[name].is_floating_point():
            assert torch.allclose(a[name].double(), b[name].double(), atol=atol, rtol=1e-3), name
        else:
            assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("compiled", PATHS)
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("k", [5, 1])
def test_a_hundred_steps_equal_the_dense_reference(compiled, aligned, k):
    x = activations()
    dense, fast = pair_of_states(x, aligned)
    work = Workspace(fast, "float32", compiled)
    generator, dead = torch.Generator().manual_seed(1), 0
    for i in range(100):
        rows = x[torch.randint(0, len(x), (29 + i % 3,), generator=generator)] @ dense["transform"]
        dense_step(dense, rows, k=k, lr=1e-3, dead_after=60)
        fast_step(fast, rows, k=k, lr=1e-3, dead_after=60, work=work)
        dead += int((dense["silent"] > 60).sum())
    assert dead > 100  # AuxK was at work
    assert_close({n: v for n, v in dense.items() if n != "sums"}, {n: v for n, v in fast.items() if n != "sums"})
    assert read_stats(fast) == pytest.approx(read_stats(dense), rel=1e-4)


@pytest.mark.parametrize("compiled", PATHS)
@pytest.mark.parametrize("frozen, name", [("decoder", "dec"), ("encoder", "enc")])
def test_a_frozen_part_keeps_its_bits_and_the_rest_moves_as_in_the_reference(compiled, frozen, name):
    x = activations()
    dense, fast = pair_of_states(x, aligned=False)
    start = {part: fast[part].clone() for part in ("dec", "enc", "bias")}
    work, generator, dead = Workspace(fast, "float32", compiled), torch.Generator().manual_seed(1), 0
    for _ in range(60):
        rows = x[torch.randint(0, len(x), (31,), generator=generator)] @ dense["transform"]
        dense_step(dense, rows, k=5, lr=1e-3, dead_after=60, frozen=frozen)
        fast_step(fast, rows, k=5, lr=1e-3, dead_after=60, work=work, frozen=frozen)
        dead += int((dense["silent"] > 60).sum())
    assert dead > 100  # AuxK was at work, and it does not move what is frozen either
    for state in (dense, fast):
        assert torch.equal(state[name], start[name]) and not state[f"{name}_m"].any()
        assert all((state[part] - start[part]).abs().max() > 1e-3 for part in start if part != name)
    assert_close({n: v for n, v in dense.items() if n != "sums"}, {n: v for n, v in fast.items() if n != "sums"})
    assert read_stats(fast) == pytest.approx(read_stats(dense), rel=1e-4)


@pytest.mark.parametrize("compiled", PATHS)
@pytest.mark.parametrize("frozen", ["decoder", "encoder"])
def test_the_gradient_of_what_is_not_frozen_is_autograds(compiled, frozen):
    """Against a loss written out here, not against the reference step."""
    x = activations()
    _, state = pair_of_states(x, aligned=False)
    rows = x[:200] @ state["transform"]
    leaves = {name: state[name].clone().requires_grad_() for name in ("dec", "enc", "bias")}
    values, chosen = torch.relu(rows @ leaves["enc"].T + leaves["bias"]).topk(4, dim=1)
    codes = torch.zeros(200, LATENTS).scatter(1, chosen, values)
    ((rows - codes @ leaves["dec"]).square().sum() / 200).backward()
    tangent = leaves["dec"].grad - (leaves["dec"].grad * state["dec"]).sum(1, keepdim=True) * state["dec"]
    expected = {"dec_m": tangent, "enc_m": leaves["enc"].grad, "bias_m": leaves["bias"].grad}
    work = Workspace(state, "float32", compiled)
    fast_step(state, rows, k=4, lr=0.0, dead_after=10**9, work=work, frozen=frozen)
    still = {"decoder": "dec_m", "encoder": "enc_m"}[frozen]
    assert not state[still].any()
    for name in expected.keys() - {still}:
        torch.testing.assert_close(state[name] / (1 - BETAS[0]), expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("compiled, precision", WAYS)
def test_gradients_equal_autograd_with_and_without_dead_latents(compiled, precision):
    x = activations()
    for dead_after in (10**9, 0):
        dense, fast = pair_of_states(x)
        for state in (dense, fast):
            state["silent"][::3] = 100
            state["bias"][::3] = -0.1
        rows, work = x[:200] @ dense["transform"], Workspace(fast, precision, compiled)
        dense_step(dense, rows, k=4, lr=0.0, dead_after=dead_after)
        fast_step(fast, rows, k=4, lr=0.0, dead_after=dead_after, work=work)
        for name in ("dec_m", "enc_m", "gain_m", "bias_m"):
            assert torch.allclose(dense[name], fast[name], atol=1e-6, rtol=1e-4), name
        assert torch.equal(dense["silent"], fast["silent"])


@pytest.mark.parametrize("compiled, precision", [way for way in WAYS if way[1] != "float32"])
def test_selection_in_low_precision_follows_the_reference_over_a_run(compiled, precision):
    x = activations()
    dense, fast = pair_of_states(x)
    work = Workspace(fast, precision, compiled)
    for part in (x @ dense["transform"]).split(50):
        dense_step(dense, part, k=5, lr=1e-3, dead_after=300)
        fast_step(fast, part, k=5, lr=1e-3, dead_after=300, work=work)
    assert read_stats(fast) == pytest.approx(read_stats(dense), rel=1e-3)
    if precision == "bfloat16":
        assert torch.equal(work.low, low_precision(fast["enc"], fast["bias"]))
    else:
        new = Workspace(fast, precision)
        assert torch.equal(work.low, new.low) and torch.equal(work.scale, new.scale)


@pytest.mark.parametrize("compiled", PATHS)
def test_tiles_and_threads_do_not_change_the_result(compiled):
    x = activations()
    states = []
    for n_threads, tile_rows in ((1, 40), (2, 40), (2, 512)):
        torch.set_num_threads(n_threads)
        state, _ = pair_of_states(x)
        work = Workspace(state, "float32", compiled)
        work.tile_rows, work.tile_bytes = tile_rows, 0
        for part in (x @ state["transform"]).split(301):
            fast_step(state, part, k=3, lr=1e-3, dead_after=200, work=work)
        states.append(state)
    assert_close(states[0], states[1], atol=1e-5)
    assert_close(states[0], states[2], atol=1e-5)


@pytest.mark.parametrize("compiled", PATHS)
def test_every_latent_may_be_asked_for_and_rows_of_zeros_fire_nothing(compiled):
    x = torch.cat([activations(40, 6), torch.zeros(3, 6)])
    dense, fast = pair_of_states(x, n_latents=7)
    work = Workspace(fast, compiled=compiled)
    for _ in range(5):
        dense_step(dense, x @ dense["transform"], k=7, lr=1e-3, dead_after=10**9)
        fast_step(fast, x @ dense["transform"], k=7, lr=1e-3, dead_after=10**9, work=work)
    assert_close(dense, fast)


ODD = [(7, 1, 5, 1), (7, 1, 1, 7), (33, 2, 3, 33), (67, 3, 1, 5), (31, 4, 2, 1), (1, 3, 8, 1), (5, 37, 3, 2),
       (257, 6, 300, 17)]  # latents, width, rows, k


def odd_rows(rows, n_rows, width, generator):
    x = torch.randn(n_rows, width, generator=generator)
    if rows == "half zero":
        x[::2] = 0
    elif rows == "duplicates":
        x[:] = x[:1]
    elif rows == "constant dimension":
        x[:, 0] = 0
    elif rows == "all zero":
        x[:] = 0
    elif rows == "one huge":
        x[0] *= 1e6
    return x


@pytest.mark.parametrize("rows", ["plain", "half zero", "duplicates", "constant dimension", "all zero", "one huge"])
@pytest.mark.parametrize("compiled, precision", WAYS)
def test_odd_shapes_and_rows_equal_the_dense_reference(compiled, precision, rows):
    """One row, one dimension, one latent, fewer rows than dimensions, no round numbers."""
    for number, (n_latents, width, n_rows, k) in enumerate(ODD):
        generator = torch.Generator().manual_seed(number)
        dense = init_state(torch.eye(width), n_latents, 0, aligned=number % 2 == 0)
        dense["bias"] += 0.1 * torch.randn(n_latents, generator=generator)
        fast = {name: value.clone() for name, value in dense.items()}
        work = Workspace(fast, precision, compiled)
        for _ in range(4):
            x = odd_rows(rows, n_rows, width, generator=generator)
            # Without a rate: Adam would scale a gradient that is 0 but for rounding up to a whole step.
            dense_step(dense, x, k=k, lr=0.0, dead_after=2 * n_rows)
            fast_step(fast, x.T.contiguous().T, k=k, lr=0.0, dead_after=2 * n_rows, work=work)
        moments = [name for name in dense if name.endswith("_m")]
        largest = max(float(dense[name].abs().max()) for name in moments)
        for name in moments:
            assert (fast[name] - dense[name]).abs().max() <= 1e-5 + 1e-5 * largest, (name, n_latents, width, n_rows, k)
        assert torch.equal(fast["silent"], dense["silent"])
        assert read_stats(fast) == pytest.approx(read_stats(dense), rel=1e-3, abs=1e-6), (n_latents, width, n_rows, k)


@pytest.mark.parametrize("compiled, precision", [way for way in WAYS if way[0] == PATHS[0]])
def test_a_resumed_run_ends_with_the_same_bytes(tmp_path, compiled, precision):
    x = activations()
    whole, _ = pair_of_states(x)
    parts, work = (x @ whole["transform"]).split(100), Workspace(whole, precision, compiled)
    for i, part in enumerate(parts):
        if i == 7:
            save_file(whole, tmp_path / "state.safetensors")
        fast_step(whole, part, k=3, lr=1e-2, dead_after=300, work=work)
    resumed = load_file(tmp_path / "state.safetensors")
    work = Workspace(resumed, precision, compiled)
    for part in parts[7:]:
        fast_step(resumed, part, k=3, lr=1e-2, dead_after=300, work=work)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("compiled, precision", WAYS)
def test_a_row_that_is_not_finite_shows_in_the_loss(compiled, precision):
    x = activations(50)
    state, _ = pair_of_states(x)
    x[7, 3] = float("nan")
    fast_step(state, x, k=3, lr=1e-3, dead_after=10**9, work=Workspace(state, precision, compiled))
    assert math.isnan(read_stats(state)["loss"])


def test_moments_of_latents_that_never_fire_end_at_zero_not_at_subnormal_numbers():
    if module.kernels is None:
        pytest.skip("only the compiled loops flush")
    x = activations(64)
    state, _ = pair_of_states(x)
    state["bias"][:] = -100.0
    for name in ("dec_m", "dec_v", "enc_m", "enc_v"):
        state[name].fill_(1e-28)
    work = Workspace(state, "float32")
    for _ in range(60):
        fast_step(state, x @ state["transform"], k=3, lr=1e-3, dead_after=10**9, work=work)
    assert all(state[name].abs().max() == 0 for name in ("dec_m", "enc_m"))


@pytest.mark.parametrize(
    "flags, platform, expected",
    [
        ({"amx_bf16": True, "avx512_bf16": True, "avx512_vnni": True}, "linux", "bfloat16"),  # Xeon with AMX
        ({"avx512_bf16": True, "amx_bf16": False, "avx512_vnni": True}, "linux", "int8"),  # EPYC from Zen 4
        ({"avx512_vnni": True}, "linux", "int8"),  # Xeon without AMX
        ({"avx512_bf16": True}, "linux", "bfloat16"),
        ({"avx512_f": True, "avx512_bf16": False}, "linux", "float32"),
        ({"avx2": True}, "linux", "float32"),
        ({"neon": True, "bf16": True}, "linux", "bfloat16"),
        ({"neon": True, "bf16": True}, "darwin", "float32"),
        ({}, "linux", "float32"),
    ],
)
def test_precision_is_chosen_by_what_the_processor_can_do(monkeypatch, flags, platform, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    monkeypatch.setattr(module.sys, "platform", platform)
    assert not hasattr(module, "time")  # no clock
    cpu = torch.device("cpu")
    precision, line = choose_precision(2048, 128, cpu, compiled=True)
    assert precision == expected and expected in line
    without = "bfloat16" if multiplies_bfloat16(cpu) else "float32"
    assert choose_precision(2048, 128, cpu, compiled=False)[0] == without
    for shape in ((2048, 127), (64, 16)):
        assert choose_precision(*shape, cpu, compiled=True)[0] == "float32"


@pytest.mark.parametrize("device, capability, expected",
                         [("cuda", (8, 0), "bfloat16"), ("cuda", (7, 5), "float32"), ("mps", None, "float32")])
def test_precision_is_chosen_by_what_the_gpu_can_do(monkeypatch, device, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert choose_precision(4096, 512, torch.device(device), compiled=False)[0] == expected


def test_int8_without_compiled_loops_is_refused():
    state = init_state(torch.eye(8), 16, 0)
    with pytest.raises(InputError, match="PRECISION=int8 needs numba"):
        Workspace(state, "int8", compiled=False)


@pytest.mark.skipif(not PATHS[0], reason="only with numba")
def test_the_int8_product_is_exact_and_its_scores_are_rounded_once():
    x = activations(300)
    state, _ = pair_of_states(x)
    x[5], x[6] = 0, 1e30
    state["enc"][3] = 0
    work = Workspace(state, "int8")
    low_x, low = (rows / rows.abs().amax(1, keepdim=True).clamp(min=1e-30) * 127 for rows in (x, state["enc"]))
    assert (work.low - low).abs().max() < 0.5001 and (work.low == 127).logical_or(work.low == -127).any(1)[4:].all()
    assert torch.allclose(work.scale[:, None] * 127, state["enc"].abs().amax(1, keepdim=True))
    for start, found in scores(state, x, work):
        sums = low_x.round().double() @ work.low.double().T
        expected = sums * (x.abs().amax(1, keepdim=True) / 127) * work.scale + state["bias"]
        assert found.dtype == torch.bfloat16 and start == 0
        assert torch.allclose(found.double(), expected, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("compiled, precision", [way for way in WAYS if way[1] != "float32"])
@pytest.mark.parametrize("outlier", [1, 30])
def test_low_precision_proposes_the_largest_even_beside_an_outlier_dimension(compiled, precision, outlier):
    x = activations(600, width=64)
    x[:, 5] *= outlier
    state = init_state(whitening(x.T @ x / len(x), power=0), 512, 0)
    rows, work = x @ state["transform"], Workspace(state, precision, compiled)
    for part in rows.split(50):
        fast_step(state, part, k=8, lr=1e-2, dead_after=10**9, work=work)
    exact, k = rows @ state["enc"].T + state["bias"], candidates_wanted(8, 512, work)
    proposed = torch.cat([tile.float().topk(k).indices for _, tile in scores(state, rows, work)])
    least = exact.gather(1, proposed).topk(8).values[:, -1]
    assert (least >= exact.topk(8).values[:, -1]).float().mean() > 0.99


def test_low_precision_product_includes_the_bias():
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(*shape, generator=generator) for shape in ((9, 5), (9,), (4, 5)))
    low = low_precision(weight, bias)
    assert low.shape == (9, 32) and not low[:, 7:].any()
    ones = torch.cat([x, torch.ones(4, 27)], dim=1)
    assert torch.allclose(ones @ low.float().T, x @ weight.bfloat16().float().T + bias, atol=1e-4)


def test_a_workspace_leaves_torch_its_number_of_threads():
    code = """
import torch
from lib.training.fast_step import fast_step
from lib.training.step import init_state, whitening
from lib.training.workspace import Workspace
torch.set_num_threads(1)
state = init_state(whitening(torch.eye(8)), 16, 0)
fast_step(state, torch.randn(32, 8), k=2, lr=1e-3, dead_after=100, work=Workspace(state))
assert torch.get_num_threads() == 1, torch.get_num_threads()
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PROJECT)
