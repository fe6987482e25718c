"""The training step: whitening, schedule, recipe, resume and folding, on the dense reference."""
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize

from lib.environment import InputError
from lib.training.settings import aux_after, learning_rate, schedule
from lib.training.step import (
    BETAS,
    bias_rate,
    dead_in_turn,
    dense_step,
    folded_weights,
    init_state,
    read_stats,
    whitening,
)


@pytest.fixture(autouse=True)
def one_thread():
    """Products this small only lose by threads, and much where the processors are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def planted(n_rows, width, n_features, p, seed):
    """Rows of sparse positive sums of unit features, centred; returns them with the features [n_features, width]."""
    generator = torch.Generator().manual_seed(seed)
    features = normalize(torch.randn(n_features, width, generator=generator), dim=1)
    on = torch.rand(n_rows, n_features, generator=generator) < p
    codes = on * (0.5 + torch.rand(n_rows, n_features, generator=generator))
    x = codes @ features + 0.02 * torch.randn(n_rows, width, generator=generator)
    return x - x.mean(0), features


def skewed(n_rows, width, seed=0):
    """Centred rows with a spectrum over three decades."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    x = torch.randn(n_rows, width, generator=generator) * torch.logspace(0, -1.5, width) @ basis
    return x - x.mean(0)


def train(x, n_latents, n_steps, batch, *, k, lr, dead_after=2000, aligned=True, power=1 / 8, step=dense_step):
    state = init_state(whitening(x.T @ x / len(x), power), n_latents, seed=0, aligned=aligned)
    rows, generator = x @ state["transform"], torch.Generator().manual_seed(1)
    for i in range(n_steps):
        pick = torch.randint(0, len(x), (batch,), generator=generator)
        step(state, rows[pick], k=k, lr=lr * schedule(i, n_steps), dead_after=dead_after)
    return state


def test_whitening_has_the_stated_power_and_norm():
    x = skewed(500, 12)
    C = x.T @ x / len(x)
    T = whitening(C, 1 / 8)
    assert torch.allclose((x @ T).square().sum(1).mean(), torch.ones(()), atol=1e-5)
    ratio = torch.linalg.eigvalsh(T @ C @ T) / torch.linalg.eigvalsh(C) ** 0.75
    assert torch.allclose(ratio, ratio[0].expand(12), rtol=1e-3)
    assert torch.allclose(whitening(C, 0), torch.eye(12) / C.trace().sqrt(), atol=1e-6)


def test_whitening_floors_directions_without_variance_and_refuses_none():
    T = whitening(torch.diag(torch.tensor([1.0, 1e-9, 0.0])))
    assert torch.allclose(T[1, 1] / T[0, 0], torch.tensor(1e-5 ** (-1 / 8)), rtol=1e-4) and T[2, 2] == T[1, 1]
    for bad in (torch.zeros(3, 3), torch.full((3, 3), float("nan"))):
        with pytest.raises(InputError, match="do not vary"):
            whitening(bad)


def test_whitening_is_the_same_with_two_threads_and_refuses_what_float32_cannot_hold():
    x = skewed(500, 200)
    C = x.T @ x / len(x)
    one = whitening(C)
    torch.set_num_threads(2)
    assert torch.equal(whitening(C), one) and torch.get_num_threads() == 2
    with pytest.raises(InputError, match="less than 1e-19"):
        whitening(C * 1e-43)
    assert torch.allclose(whitening(C * 1e-34) * 1e-17, one, rtol=1e-3)


def test_schedule_warms_up_holds_and_falls_to_zero():
    values = [schedule(i, 100) for i in range(100)]
    assert values[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert set(values[5:51]) == {1.0} and values[75] == pytest.approx(0.5) and values[99] == pytest.approx(0.02)
    assert schedule(0, 1) == 1.0


def test_rates_fall_with_latents_and_bias_rate_rises_with_expansion():
    assert learning_rate(1024, 600_000) == pytest.approx(1e-2) and learning_rate(8192, 600_000) == pytest.approx(2.5e-3)
    assert learning_rate(1024, 60_000_000) == pytest.approx(1e-2 * 10**-0.8) and learning_rate(16, 1000) == 3e-2
    assert 0 < bias_rate(1024, 256) < bias_rate(4096, 256) <= 1


@pytest.mark.parametrize("shape, tokens", [((24576, 32, 1024), 7680), ((512, 8, 1024), 3000),
                                           ((24576, 32, 16384), 32768), ((512, 8, 1), 3000)])
def test_dead_means_silent_over_tokens_and_over_three_batches(shape, tokens):
    assert aux_after(*shape) == tokens
    silent_in_two_batches = 2 * shape[2]
    assert not silent_in_two_batches > aux_after(*shape)


def test_aligned_encoder_gradient_matches_finite_differences_along_the_constraint():
    """enc = s dec + u, u orthogonal to dec: the step's direction is minus the gradient of the loss in (dec, u, s)."""
    x = skewed(64, 6).double()
    state = {name: value.double() if value.is_floating_point() else value
             for name, value in init_state(torch.eye(6), 9, 0).items()}
    generator = torch.Generator().manual_seed(5)
    state["enc"] += 0.3 * normalize(torch.randn(9, 6, generator=generator, dtype=torch.float64), dim=1)
    state["gain"] = (state["enc"] * state["dec"]).sum(1)
    u = state["enc"] - state["gain"][:, None] * state["dec"]

    def loss(dec, u, gain):
        dec = normalize(dec, dim=1)
        pre = torch.relu(x @ (gain[:, None] * dec + u - (u * dec).sum(1, keepdim=True) * dec).T + state["bias"])
        value, index = pre.topk(3, dim=1)
        return (x - torch.zeros_like(pre).scatter(1, index, value) @ dec).square().sum() / len(x)

    start = {"dec": state["dec"].clone(), "u": u.clone(), "gain": state["gain"].clone()}
    dense_step(state, x, k=3, lr=0.0, dead_after=10**9)
    for name, moment in (("dec", "dec_m"), ("u", "enc_m"), ("gain", "gain_m")):
        direction = torch.randn(start[name].shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        ends = [loss(**(start | {name: start[name] + sign * 1e-6 * direction})) for sign in (1, -1)]
        gradient = state[moment] / (1 - BETAS[0])
        assert (gradient * direction).sum() == pytest.approx(float(ends[0] - ends[1]) / 2e-6, rel=1e-5)


@pytest.mark.parametrize("aligned", [True, False])
def test_dictionary_stays_at_unit_norm_and_the_encoder_on_its_constraint(aligned):
    state = train(skewed(2000, 10), 40, 30, 64, k=4, lr=5e-2, aligned=aligned)
    assert torch.allclose(state["dec"].norm(dim=1), torch.ones(40), atol=1e-6)
    assert not torch.allclose(state["enc"], state["dec"], atol=1e-3)
    if aligned:
        assert torch.allclose((state["enc"] * state["dec"]).sum(1), state["gain"], atol=1e-5)
        assert (state["gain"] - 1).abs().max() > 1e-2


def test_auxk_reaches_dead_latents_only_and_not_the_residual():
    x = skewed(256, 8)
    x = x / x.square().sum(1).mean().sqrt()

    def moments(aux_weight):
        state = init_state(torch.eye(8), 32, 0, aligned=False)
        state["bias"][:16] = -100.0  # never chosen, and no positive pre-activation
        state["bias"][16:20] = -0.3  # dead below, positive on some rows
        state["silent"][:20] = 1000
        dense_step(state, x, k=1, lr=0.0, dead_after=500, aux_weight=aux_weight)
        return state

    without, weighted = moments(0.0), moments(1.0)
    chosen, _ = dead_in_turn(init_state(torch.eye(8), 32, 0) | {"silent": without["silent"]}, 500)
    assert len(chosen) == 4
    assert torch.equal(without["enc_m"][20:], weighted["enc_m"][20:])
    assert torch.equal(without["dec_m"][20:], weighted["dec_m"][20:])
    assert read_stats(without)["dead"] == 20


def test_auxk_gives_dead_encoder_rows_a_gradient():
    x = skewed(256, 8)
    state = init_state(whitening(x.T @ x / 256), 12, 0)
    state["bias"][:2] = -0.2
    state["silent"][:2] = 1000
    chosen, is_dead = dead_in_turn(state, 500)
    assert set(chosen[is_dead > 0].tolist()) == {0, 1}
    without = {name: value.clone() for name, value in state.items()}
    dense_step(without, x @ state["transform"], k=1, lr=0.0, dead_after=500, aux_weight=0.0)
    dense_step(state, x @ state["transform"], k=1, lr=0.0, dead_after=500, aux_weight=1.0)
    assert (state["enc_m"][:2] - without["enc_m"][:2]).abs().amax(1).min() > 1e-6
    assert torch.equal(state["enc_m"][2:], without["enc_m"][2:])
    assert read_stats(state)["auxk"] > 0


def test_every_dead_latent_gets_its_turn():
    state = init_state(torch.eye(8), 50, 0)
    state["silent"][5:35] = 1000
    seen = set()
    for step in range(13):
        state["step"].fill_(step)
        chosen, is_dead = dead_in_turn(state, 500)
        seen |= set(chosen[is_dead > 0].tolist())
    assert seen == set(range(5, 35))


def test_silence_counts_tokens_and_l0_is_capped():
    x = skewed(300, 8)
    state = init_state(whitening(x.T @ x / 300), 20, 0)
    state["bias"][3] = -100.0
    for _ in range(4):
        dense_step(state, x[:75] @ state["transform"], k=2, lr=1e-3, dead_after=10**9)
    assert state["silent"][3] == 300 and (state["silent"] == 0).any()
    stats = read_stats(state)
    assert 0 < stats["l0"] <= 2 and stats["loss"] == pytest.approx(stats["recon"]) and read_stats(state) == {}


def test_recovers_a_planted_dictionary():
    x, features = planted(20_000, 24, 40, 0.05, seed=0)
    state = train(x, 80, 500, 256, k=3, lr=1e-2)
    W_dec = folded_weights(state, float(x.square().sum(1).mean().sqrt()))["W_dec"]
    assert (features @ W_dec.T).amax(1).mean() > 0.95


@pytest.mark.parametrize("power", [0.0, 1 / 8])
def test_folding_keeps_codes_up_to_their_norm_and_the_reconstruction(power):
    x = skewed(2000, 10) * 7
    scale = float(x.square().sum(1).mean().sqrt())
    state = train(x, 40, 50, 64, k=4, lr=2e-2, power=power)
    W_enc, b_enc, W_dec = folded_weights(state, scale).values()
    n = torch.linalg.solve(state["transform"], state["dec"], left=False).norm(dim=1) / scale
    pre = x @ state["transform"] @ state["enc"].T + state["bias"]
    assert torch.allclose(x / scale @ W_enc.T + b_enc, pre * n, atol=1e-4)
    assert torch.allclose(W_dec.norm(dim=1), torch.ones(40), atol=1e-6)
    value, index = torch.relu(pre).topk(4, dim=1)
    codes = torch.zeros_like(pre).scatter(1, index, value)
    in_raw_units = torch.linalg.solve(state["transform"], codes @ state["dec"], left=False)
    assert torch.allclose(scale * (codes * n) @ W_dec, in_raw_units, atol=1e-3)
    if power == 0:
        assert torch.allclose(n, torch.ones(40), atol=1e-5)


def test_a_resumed_run_ends_with_the_same_bytes(tmp_path):
    x = skewed(1000, 10)
    whole = init_state(whitening(x.T @ x / 1000), 30, 0)
    parts = [part @ whole["transform"] for part in x.split(100)]
    for i, part in enumerate(parts):
        if i == 4:
            save_file(whole, tmp_path / "state.safetensors")
        dense_step(whole, part, k=3, lr=1e-2, dead_after=300)
    resumed = load_file(tmp_path / "state.safetensors")
    for part in parts[4:]:
        dense_step(resumed, part, k=3, lr=1e-2, dead_after=300)
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
