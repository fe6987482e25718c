"""Weights in the model's own space: the same codes, closed-form norms and angles."""
import pytest
import torch
from torch.nn import functional

from checks.weights import inspect_weights, nearest_rows, raw_weights
from lib.sae import make_sae


@pytest.fixture
def sae():
    generator = torch.Generator().manual_seed(0)
    W_enc, W_dec = torch.randn(2, 40, 8, generator=generator)
    return make_sae(W_enc, torch.randn(40, generator=generator), functional.normalize(W_dec, dim=1),
                    9 * torch.randn(8, generator=generator), 3.0, 5)


def test_raw_weights_give_the_same_codes_and_reconstruction(sae):
    x = sae.mean + 3 * torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
    raw, (values, indices) = raw_weights(sae), sae.encode(x)
    top = (x @ raw.encoder.T + raw.bias).relu().topk(5, dim=1)
    assert torch.equal(top.indices, indices)
    torch.testing.assert_close(top.values, values, rtol=1e-4, atol=1e-4)
    codes = torch.zeros(50, 40).scatter_add_(1, indices, values)
    torch.testing.assert_close(codes @ raw.decoder + raw.offset, sae.decode(values, indices), rtol=1e-4, atol=1e-4)


def test_nearest_rows_equal_the_full_matrix():
    W = functional.normalize(torch.randn(40, 6, generator=torch.Generator().manual_seed(2)), dim=1)
    full = W @ W.T - 3 * torch.eye(40)
    cosines, numbers = nearest_rows(W, chunk=7)
    torch.testing.assert_close(cosines, full.max(1).values)
    assert torch.equal(numbers, full.argmax(1))
    assert nearest_rows(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))[1].tolist() == [1, 0]


def test_columns_by_hand():
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    encoder = torch.tensor([[2.0, 0.0], [1.0, 1.0], [-3.0, -4.0]])
    bias = torch.tensor([-1.0, 0.5, 0.0])
    sae = make_sae(encoder, bias, rows, torch.tensor([5.0, 5.0]), 2.0, 1)
    start = make_sae(torch.eye(3, 2), torch.zeros(3), torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.6, 0.8]]),
                     torch.zeros(2), 1.0, 1)
    found = inspect_weights(sae, start)
    expected = {
        "encoder_norm": [1.0, 0.5**0.5, 2.5], "bias": [-1.0, 0.5, 0.0], "alignment": [1.0, 0.5**0.5, -1.0],
        "gain": [2.0, 1.0, -5.0],
        "nearest": [0.6, 0.8, 0.8], "neighbour": [2, 2, 1], "moved_dictionary": [2**0.5, 0.0, 0.0],
        "moved_encoder": [1.0, 1.0, 5e12],
    }
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        torch.testing.assert_close(found[key].double(), torch.tensor(values, dtype=torch.double), rtol=1e-5, atol=1e-6)
    assert not any(key.startswith("moved") for key in inspect_weights(sae))


def test_no_column_depends_on_the_units_of_the_activations(sae):
    """The same SAE on activations in other units: only the encoder's norm follows them."""
    other = make_sae(sae.W_enc, sae.b_enc, sae.W_dec, 10 * sae.mean, 10 * sae.scale, sae.top_k)
    before, after = inspect_weights(sae), inspect_weights(other)
    torch.testing.assert_close(after.pop("encoder_norm"), before.pop("encoder_norm") / 10)
    assert all(torch.equal(after[key], before[key]) for key in before)
