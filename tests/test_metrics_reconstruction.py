"""Closed-form values of the reconstruction metrics, and their independence of the batch size."""
import math

import pytest
import torch

from lib.metrics.reconstruction import Reconstruction, dead_pct, explained_variance, usage_entropy


def measure(x, xhat, values, indices, n_latents, batch):
    sums = Reconstruction(n_latents)
    for parts in zip(*(t.split(batch) for t in (x, xhat, values, indices))):
        sums.add(*parts)
    return sums.result()


def example(n=97, d=5, f=12, k=3):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=g) + 100 * torch.arange(d)
    xhat = x + 0.5 * torch.randn(n, d, generator=g)
    values = torch.rand(n, k, generator=g) * (torch.rand(n, k, generator=g) > 0.3)
    indices = torch.stack([torch.randperm(f, generator=g)[:k] for _ in range(n)])
    return x, xhat, values, indices, f


def test_mean_predictor_has_ev_zero_and_perfect_one():
    x, _, values, indices, f = example()
    mean = x.double().mean(0).expand(len(x), -1)
    assert measure(x, mean, values, indices, f, 10)["ev"] == pytest.approx(0, abs=1e-12)
    assert measure(x, x, values, indices, f, 10)["ev"] == 1
    assert explained_variance(x, mean) == pytest.approx(0, abs=1e-12)


def test_known_explained_variance():
    x = torch.tensor([[0.0, 10.0], [2.0, 12.0]])  # SST = 4 about the mean (1, 11)
    xhat = torch.tensor([[0.0, 10.0], [2.0, 11.0]])  # SSE = 1
    result = measure(x, xhat, torch.tensor([[1.0], [0.0]]), torch.tensor([[0], [1]]), 2, 1)
    assert (result["ev"], result["fvu"], result["mse"]) == (0.75, 0.25, 0.25)


@pytest.mark.parametrize("batch", [1, 7, 50, 97])
def test_ev_batch_invariant(batch):
    data = example()
    whole, parts = measure(*data, batch=97), measure(*data, batch=batch)
    for key, value in whole.items():
        assert parts[key] == pytest.approx(value, rel=1e-10), key
    assert whole["ev"] == pytest.approx(explained_variance(data[0], data[1]), rel=1e-10)


def test_large_mean_loses_no_digits():
    x = torch.tensor([[1e6], [1e6 + 1], [1e6 + 2]], dtype=torch.float64)
    xhat = x + torch.tensor([[0.5], [0.0], [0.0]], dtype=torch.float64)
    assert measure(x, xhat, torch.zeros(3, 1), torch.zeros(3, 1, dtype=torch.long), 1, 2)["ev"] == pytest.approx(0.875)


def test_sparsity_and_dead_counts():
    values = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    indices = torch.tensor([[0, 1], [0, 3]])  # the second slot of row 1 did not fire
    x = torch.tensor([[0.0], [1.0]])
    result = measure(x, x, values, indices, 4, 1)
    assert (result["l0_mean"], result["l0_std"], result["l1_mean"], result["dead_pct"]) == (1.5, 0.5, 3.0, 50.0)


def test_usage_entropy():
    assert usage_entropy(torch.tensor([5, 5, 5, 5, 0])) == pytest.approx(math.log(4))
    assert usage_entropy(torch.tensor([9, 0])) == 0 and usage_entropy(torch.zeros(3)) == 0
    assert dead_pct(torch.tensor([0, 1, 0, 2])) == 50


def test_no_variance_is_nan_and_no_rows_raises():
    assert math.isnan(explained_variance(torch.ones(1, 3), torch.zeros(1, 3)))
    with pytest.raises(ValueError):
        Reconstruction(3).result()
