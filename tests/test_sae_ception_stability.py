"""Latents that another SAE seed finds again, and the null: as many as the covariance of the activations alone gives."""
from types import SimpleNamespace

import pytest
import torch
from test_sae_ception_cycles import defaults, digits  # noqa: F401  (fixtures)

from cycles.sae_training import sae_of_rows
from cycles.session import Session
from cycles.stability import alive_rows, gaussian_like, matched, stability
from cycles.steps import train_cycle_sae, train_model
from lib.environment import InputError

C = {"SAE_KIND": "topk", "N_LATENTS_MULTIPLIER": 2, "TOP_K": 2, "SAE_EPOCHS": 20, "SAE_BATCH_SIZE": 128, "SAE_LR": 0.01}


def planted(n=3000, seed=0):
    """Two of sixteen features in eight dimensions at a time."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.nn.functional.normalize(torch.randn(16, 8, generator=torch.Generator().manual_seed(9)), dim=1)
    on = torch.rand(n, 16, generator=generator).argsort(1) < 2
    return (on * (1 + torch.rand(n, 16, generator=generator))) @ features


def test_a_gaussian_has_the_mean_and_the_covariance():
    x = planted()
    x = torch.cat([x, x[:, :1] + x[:, 1:2]], 1)  # of rank 8 in nine dimensions
    rows = gaussian_like(x, 200_000, 0)
    assert torch.equal(rows, gaussian_like(x, 200_000, 0)) and rows.shape == (200_000, 9)
    torch.testing.assert_close(rows.mean(0), x.mean(0), rtol=0, atol=0.02)
    torch.testing.assert_close(torch.cov(rows.T), torch.cov(x.T), rtol=0, atol=0.03)
    torch.testing.assert_close(rows[:, 0] + rows[:, 1], rows[:, 8], rtol=0, atol=1e-4)


def test_matches_are_of_as_many_candidates():
    a = torch.eye(6)
    found, null = matched(a[:4], a, torch.cat([a[3:], a[:1]]))
    assert len(found) == len(null) == 4 and found.tolist() == sorted(found.tolist())
    assert null.tolist() == [0, 0, 1, 1] and found.sum() >= 2  # four of six were drawn
    assert matched(a[[2, 0, 1]], a[:3], a[3:])[0].tolist() == [1, 1, 1]
    with pytest.raises(InputError, match="no latent alive"):
        matched(a[:0], a, a)


@pytest.mark.parametrize("has_features", [True, False])
def test_the_null_is_beaten_by_features_and_by_nothing_else(has_features):
    """On Gaussian activations two seeds agree as much as they do with the null."""
    x = planted() if has_features else gaussian_like(planted(), 3000, 5)
    session, is_val = SimpleNamespace(c=C, device=torch.device("cpu")), torch.arange(3000) >= 2700
    rows = gaussian_like(x, 3000, 1)
    saes = [sae_of_rows(session, of, is_val, seed) for of, seed in ((x, 0), (x, 1), (rows, 1))]
    found, null = matched(*(alive_rows(sae, of) for sae, of in zip(saes, (x, x, rows))))
    gap = float(found.mean() - null.mean())
    assert gap > 0.08 if has_features else abs(gap) < 0.05


def test_stability_of_a_small_run(digits):  # noqa: F811
    session = Session(digits | {"N_SAE_SEEDS": 2}, 0)
    train_model(session, "baseline", 0)
    train_cycle_sae(session, "baseline", 0)
    with pytest.raises(InputError, match="sae_cycle_0_seed1_best.pt is missing"):
        stability(session, "baseline", 0)
    train_cycle_sae(session, "baseline", 0, 1)
    found, null = stability(session, "baseline", 0)
    assert len(found) == len(null) > 0 and found.max() <= 1 + 1e-6 and (found.diff() >= 0).all()
    session.c["N_SAE_SEEDS"] = 1
    with pytest.raises(InputError, match="set N_SAE_SEEDS=2"):
        stability(session, "baseline", 0)
