"""The kinds of SAE: which codes fire, their gradients, and that the trained SAE keeps what it learnt."""
import pytest
import torch
from torch.nn.functional import normalize

from lib.batches import rows_of_tensor, sample_rows
from lib.environment import InputError
from lib.exchange.folded import fold
from lib.sae import load_sae, make_sae, refining, sae_hash, save_sae
from lib.training.kinds import KINDS, WINDOW, WITH_THRESHOLD, first_threshold, prefix_sizes
from lib.training.loop import TrainSettings, score, train_sae, unfolded
from lib.training.step import dense_step, folded_weights, init_state, whitening


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(0)
    features = normalize(torch.randn(30, 16, generator=generator), dim=1)
    on = (torch.rand(6000, 30, generator=generator) < 0.1) * torch.rand(6000, 30, generator=generator).add(0.5)
    return rows_of_tensor(on @ features + 3, torch.arange(6000) % 10 == 0)


def test_topk_counts_per_row_and_batchtopk_over_the_batch():
    pre = torch.tensor([[5.0, 4, 3, 0], [1, 0, 0, 0], [2, 0.5, 0, 0]])
    topk, _ = KINDS["topk"].codes(pre, 2, None)
    assert topk.tolist() == [[5, 4, 0, 0], [1, 0, 0, 0], [2, 0.5, 0, 0]]
    batch, _ = KINDS["batchtopk"].codes(pre, 1, None)
    assert batch.tolist() == [[5, 4, 3, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert first_threshold(pre, 1) == 3


def test_jumprelu_penalty_and_gradients_have_their_closed_form():
    threshold = torch.tensor([0.5, 0.5])
    log_threshold = threshold.log().requires_grad_()
    pre = torch.tensor([[0.5 + WINDOW / 4, 0.2], [0.9, 0.5 - WINDOW / 4]], requires_grad=True)
    codes, penalty = KINDS["jumprelu"].codes(pre, 2, log_threshold)
    assert (torch.equal(codes, pre.where(pre > 0.5, 0))
            and float(penalty.detach()) == pytest.approx((2 / 2 / 2 - 1) ** 2))
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    (codes * weight).sum().backward()
    assert torch.equal(pre.grad, weight * (pre > 0.5))
    # dcode/dthreshold is -threshold / WINDOW inside the window: once for each latent; times the threshold, for its
    # logarithm
    assert torch.allclose(log_threshold.grad, -torch.tensor([1.0, 4.0]) * 0.5 / WINDOW * 0.5)
    log_threshold.grad = None
    KINDS["jumprelu"].codes(pre, 2, log_threshold)[1].backward()
    slope = 2 * (1 / 2 - 1) / 2 / 2  # of (L0 / k - 1)^2 by each of two rows, k = 2
    assert torch.allclose(log_threshold.grad, torch.full((2,), -slope / WINDOW * 0.5))


def test_nested_error_is_the_mean_over_prefixes():
    generator = torch.Generator().manual_seed(1)
    x, codes, dec = (torch.randn(*shape, generator=generator) for shape in ((5, 8), (5, 32), (32, 8)))
    error, total = KINDS["matryoshka"].errors(x, codes, dec)
    sizes = prefix_sizes(32)
    assert sizes == [2, 4, 8, 16, 32] and prefix_sizes(3) == [1, 3]
    wanted = [(x - codes[:, :m] @ dec[:m]).square().sum() / 5 for m in sizes]
    assert torch.allclose(total, torch.stack(wanted).mean()) and torch.allclose(error, x - codes @ dec, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_folded_thresholds_make_the_same_latents_fire(kind, rows):
    state = init_state(whitening(rows.covariance), 40, 0, kind=kind)
    x = rows.shards[0][:2000] - rows.mean
    for i in range(10):
        dense_step(state, x[200 * i : 200 * i + 200] @ state["transform"], k=3, lr=1e-2, dead_after=10**9, kind=kind)
    weights = folded_weights(state, rows.scale)
    assert ("threshold" in weights) == (kind in WITH_THRESHOLD)
    if kind not in WITH_THRESHOLD:
        return
    sae = unfolded(weights, kind, mean=rows.mean, scale=rows.scale, top_k=40)
    values, indices = sae.encode(rows.shards[0][:500])
    x = (rows.shards[0][:500] - rows.mean) @ state["transform"]
    if KINDS[kind].refine:
        pre = torch.relu(x @ state["enc"].T + state["bias"])
        x = x + KINDS[kind].refine * (x - pre * (pre > state["log_threshold_first"].exp()) @ state["dec"])
    pre = torch.relu(x @ state["enc"].T + state["bias"])
    fires = torch.zeros(500, 40).scatter_add(1, indices, (values > 0).float()) > 0
    assert (fires == (pre > state["log_threshold"].exp())).float().mean() > 0.999


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_learns_resumes_and_is_read_back(kind, rows, tmp_path):
    settings = TrainSettings(64, 3, kind, epochs=4, batch_size=256)
    sae, history = train_sae(rows, settings, tmp_path, progress=False)
    held_out = score(sae, sample_rows(rows, True))
    assert held_out["ev"] > 0.6 and 2 < held_out["l0_mean"] < 4.5
    again, _ = train_sae(rows, settings, tmp_path, progress=False)  # from the last checkpoint: nothing left to do
    assert sae_hash(again) == sae_hash(sae)
    save_sae(sae, tmp_path / "sae.pt", rows.shards[0])
    found = load_sae(tmp_path / "sae.pt")
    assert sae_hash(found) == sae_hash(sae)
    assert all(torch.equal(a, b) for a, b in zip(found.encode(rows.shards[0]), sae.encode(rows.shards[0])))
    assert sae_hash(found.to("cpu")) == sae_hash(sae)


def test_an_sae_that_refines_codes_twice_and_says_so_in_its_hash():
    eye = torch.eye(2)
    plain = make_sae(eye, torch.zeros(2), eye, torch.zeros(2), 1.0, 2, threshold=torch.tensor([0.7, 0.7]))
    twice = refining(plain, torch.tensor([0.9, 0.2]), 0.5)
    values, indices = twice.encode(torch.tensor([[0.6, 0.5]]))  # the first coding has the second latent alone
    assert indices[0, 0] == 0 and values.tolist() == [[pytest.approx(0.9)]]
    assert plain.encode(torch.tensor([[0.6, 0.5]]))[0].tolist() == [[0.0]]
    assert len({sae_hash(sae) for sae in (plain, twice, refining(plain, torch.tensor([0.9, 0.2]), 0.25))}) == 3
    with pytest.raises(InputError, match="KIND=lista"):
        fold(twice)
    for threshold, share in ((torch.zeros(3), 0.5), (torch.tensor([-1.0, 0]), 0.5), (torch.zeros(2), 0.0)):
        with pytest.raises(InputError, match="first coding"):
            refining(plain, threshold, share)


def test_wrong_kinds_and_thresholds_are_refused(rows):
    with pytest.raises(InputError, match="topk, batchtopk"):
        train_sae(rows, TrainSettings(64, 3, "gated"), progress=False)
    eye = torch.eye(3)
    with pytest.raises(InputError, match="from 0 up"):
        make_sae(eye, torch.zeros(3), eye, torch.zeros(3), 1.0, 2, threshold=torch.tensor([-1.0, 0, 0]))
