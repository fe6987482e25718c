"""Training that continues from a trained SAE: nothing changes before the first step, and then it gets better."""
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize

from lib.batches import rows_of_tensor, sample_rows
from lib.environment import InputError
from lib.exchange.folded import fold, gated, normalised, thresholded, unfold
from lib.sae import make_sae, sae_hash
from lib.training.kinds import KINDS
from lib.training.loop import TrainSettings, score, train_sae, unfolded
from lib.training.start import check_start, kind_of, rows_about, state_of
from lib.training.step import folded_weights, init_state, whitening

D, F, K = 16, 48, 3


def rows_with(offset, seed=0, n=6000):
    generator = torch.Generator().manual_seed(seed)
    features = normalize(torch.randn(30, D, generator=torch.Generator().manual_seed(9)), dim=1)
    on = (torch.rand(n, 30, generator=generator) < 0.1) * torch.rand(n, 30, generator=generator).add(0.5)
    return rows_of_tensor(on @ features + offset, torch.arange(n) % 10 == 0)


@pytest.fixture(scope="module")
def rows():
    return rows_with(3)


@pytest.fixture(scope="module")
def sources(rows):
    """A short training of every kind, on rows with another mean and scale."""
    other = rows_with(2.8, seed=5)
    return {kind: train_sae(other, TrainSettings(F, K, kind, epochs=2, batch_size=256), progress=False)[0]
            for kind in KINDS}


def dense(sae, x):
    values, indices = sae.encode(x)
    return sae.scale * torch.zeros(len(x), sae.n_latents).scatter_add_(1, indices, values)


def started(sae, rows, whiten=1 / 8, aligned=True):
    """The SAE that a training from `sae` would save before its first step."""
    about = rows_about(rows, sae.mean)
    kind = "topk" if sae.threshold is None else "jumprelu" if sae.threshold_first is None else "lista"
    state = init_state(whitening(about.covariance, whiten), sae.n_latents, 0, aligned=aligned, kind=kind)
    state |= state_of(sae, state["transform"], aligned)
    assert torch.allclose(state["dec"].norm(dim=1), torch.ones(sae.n_latents), atol=1e-5)
    return unfolded(folded_weights(state, about.scale), kind, mean=about.mean, scale=about.scale, top_k=sae.top_k)


@pytest.mark.parametrize("whiten", [0, 1 / 8])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_before_the_first_step_it_is_the_source(sources, rows, kind, aligned, whiten):
    source, x = sources[kind], rows.shards[0][:1000]
    sae = started(source, rows, whiten, aligned)
    wrong = ((dense(sae, x) - dense(source, x)).abs() > 1e-4 * source.scale).any(1).float().mean()
    assert wrong < 0.01, "but for latents equal to rounding"
    ev, wanted = (score(each, sample_rows(rows, True))["ev"] for each in (sae, source))
    assert ev == pytest.approx(wanted, abs=1e-5)


def test_another_centre_in_closed_form(rows):
    mean = torch.randn(D, generator=torch.Generator().manual_seed(1))
    about, train = rows_about(rows, mean), rows.shards[0][~rows.is_val]
    torch.testing.assert_close(about.covariance, (train - mean).T @ (train - mean) / len(train), rtol=1e-3, atol=1e-3)
    assert torch.equal(about.mean, mean) and not torch.equal(rows.mean, mean)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rate_of_nothing_changes_nothing_and_an_epoch_helps(sources, rows, kind, tmp_path):
    source = sources[kind]
    before = score(source, sample_rows(rows, True))
    settings = TrainSettings(F, K, kind, epochs=1, batch_size=256, lr=1e-30)
    still, _ = train_sae(rows, settings, progress=False, start=source)
    after = score(still, sample_rows(rows, True))
    if KINDS[kind].threshold != "running mean":  # whose threshold follows its batches, at any rate
        assert after["ev"] == pytest.approx(before["ev"], abs=2e-4)
    longer, history = train_sae(rows, replace(settings, epochs=3, lr=None), tmp_path, progress=False, start=source)
    assert score(longer, sample_rows(rows, True))["ev"] > before["ev"] + 0.005
    assert torch.equal(longer.mean, source.mean), "the decoder's bias is not trained"
    again, _ = train_sae(rows, replace(settings, epochs=3, lr=None), tmp_path, progress=False, start=source)
    assert sae_hash(again) == sae_hash(longer), "resumed from its last checkpoint"


def test_another_source_is_another_training(sources, rows, tmp_path):
    settings = TrainSettings(F, K, epochs=1, batch_size=256)
    train_sae(rows, settings, tmp_path, progress=False, start=sources["topk"])
    other = sources["topk"]
    other = make_sae(other.W_enc, other.b_enc + 1e-3, other.W_dec, other.mean, other.scale, K)
    with pytest.raises(InputError, match="made with other constants or data"):
        train_sae(rows, settings, tmp_path, progress=False, start=other)


def test_imported_kinds(sources, rows):
    """Thresholds continue as batchtopk or jumprelu, whichever tool they come from; standard and gated do not."""
    folded = fold(sources["jumprelu"])
    assert kind_of(sources["jumprelu"]) == "jumprelu" and kind_of(sources["topk"]) == "topk"
    imported = unfold(normalised("", folded), 2.0, {"imported": {"kind": "batchtopk"}})
    sae, _ = train_sae(rows, TrainSettings(F, K, "jumprelu", epochs=1, batch_size=256), progress=False, start=imported)
    assert sae.n_latents == F
    g = torch.Generator().manual_seed(0)
    W, b = torch.randn(F, D, generator=g), torch.zeros(F)
    for kind, made in (("standard", thresholded(W, b, W, torch.zeros(D))),
                       ("gated", gated(W, b, b_mag=b, b_gate=b, W_dec=W, b_dec=torch.zeros(D)))):
        sae = unfold(normalised("", made, move_norms=True), 1.0, {"imported": {"kind": kind}})
        with pytest.raises(InputError, match=f"START_FROM is a {kind} SAE, which no KIND trains"):
            train_sae(rows, TrainSettings(F, K, "jumprelu"), progress=False, start=sae)


@pytest.mark.parametrize(("kind", "change", "message"), [
    ("topk", {"kind": "jumprelu"}, "is a topk SAE, which KIND=jumprelu does not continue; set KIND=topk or matryoshka"),
    ("jumprelu", {"kind": "topk"}, "KIND=topk does not continue; set KIND=batchtopk or jumprelu"),
    ("topk", {"top_k": 5}, "START_FROM has k = 3; set TOP_K=3"),
    ("topk", {"n_latents": 96}, "START_FROM has 48 latents, not 96; set N_LATENTS_MULTIPLIER=3"),
])
def test_settings_that_are_not_the_sources_are_refused(sources, kind, change, message):
    with pytest.raises(InputError, match=message):
        check_start(sources[kind], replace(TrainSettings(F, K, kind), **change), D)
    with pytest.raises(InputError, match="for activations of width 16, not 8"):
        check_start(sources[kind], TrainSettings(F, K, kind), 8)
