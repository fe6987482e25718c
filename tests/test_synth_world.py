"""The synthetic world drawn with SAELens' classes: its figures, and its samples against those of SAELens' sampler."""
import math
import subprocess
import sys

import pytest
import torch
from conftest import PROJECT
from safetensors.torch import load_file

sys.path.insert(0, str(PROJECT / "experiments" / "benchmarks"))
import world_figures  # noqa: E402
from sampler import Sampler, World, load_world  # noqa: E402


def test_configured_rates_fall_from_most_to_least():
    p = world_figures.configured(16_384)
    assert float(p[0]) == pytest.approx(0.4) and float(p[-1]) == pytest.approx(5e-4) and (p.diff() < 0).all()
    assert float(p[3]) == pytest.approx(5e-4 + 0.3995 * (0.5 - 1 / 128) / (1 - 1 / 128))


def test_levels_count_parents_and_features_outside_trees_have_none():
    assert world_figures.levels(torch.tensor([-1, -1, 0, 0, 2, -1])).tolist() == [0, -1, 1, 1, 2, -1]


def test_largest_cosine_of_known_directions():
    rows = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [-math.sqrt(0.5), math.sqrt(0.5), 0.0], [0.0, 0.0, 1.0]])
    assert world_figures.largest_cosine(rows) == pytest.approx(0.75 * math.sqrt(0.5))


def test_firings_are_counted_in_all_chunks_and_rates_compared_with_exact_ones(monkeypatch):
    monkeypatch.setattr(world_figures, "CHUNK", 3)

    def draw(first, n):  # sample i has feature 2, and feature 0 where i is even
        even = torch.arange(first, first + n) % 2 == 0
        return None, torch.tensor([[2, 0, 99]]).repeat(n, 1).int(), None, 1 + even.int()

    fired = world_figures.count_firings(draw, 10, 3)
    assert fired.tolist() == [5, 0, 10]
    parent, zero = torch.tensor([-1, 0, -1]), torch.zeros(3)
    world = World(torch.eye(3), zero, zero[:, None], zero + 1, -torch.special.ndtri(torch.tensor([0.5, 0.5, 0.9])),
                  zero + 50, zero + 1, parent)
    square, largest = world_figures.rates_against_exact(world, fired, 10)
    assert largest == pytest.approx(1 / math.sqrt(0.9), rel=1e-4) and square == pytest.approx(0.5 / 0.9, rel=1e-4)
    x, index, value = torch.tensor([[1.0, 3.0], [4.0, 5.0]]), torch.zeros(2, 2), torch.tensor([[2.0, 9.0], [4.0, 6.0]])
    found = world_figures.strength(lambda first, n: (x, index, value, torch.tensor([1, 2])), torch.ones(2), 2)
    assert found == pytest.approx((4.0, 3.5))


PEERS = PROJECT / ".venv-peers" / "bin" / "python"
THEIRS = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from draw_world import configuration, gradient, orthogonalised, tensors
from sae_lens.synthetic import SyntheticModel
from sae_lens.synthetic.feature_dictionary import orthogonalize_embeddings
from safetensors.torch import save_file
rows = torch.nn.functional.normalize(torch.randn(60, 12), dim=1)
theirs = orthogonalize_embeddings(rows, num_steps=20, lr=1e-2, chunk_size=16)
torch.testing.assert_close(orthogonalised(rows, 20, 1e-2), theirs, atol=2e-5, rtol=0)
model = SyntheticModel(configuration(3000, 16, scaled=sys.argv[3] == "True"))
torch.manual_seed(0)
value = torch.cat([model.activation_generator.sample(1024) for _ in range(20)])
x = model.feature_dict(value[:64])
save_file(tensors(model, model.feature_dict.feature_vectors), sys.argv[2] + "/world.safetensors")
save_file({"value": value, "x": x.detach()}, sys.argv[2] + "/drawn.safetensors")
"""


@pytest.mark.skipif(not PEERS.exists(), reason="needs make peers")
@pytest.mark.parametrize("scaled", [False, True])
def test_samples_are_those_of_saelens(tmp_path, scaled):
    """On a world of 3,000 features in four levels: rates, pairs, magnitudes; and rows are the same sums."""
    command = [str(PEERS), "-c", THEIRS, str(PROJECT / "experiments" / "benchmarks"), str(tmp_path), str(scaled)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = load_file(tmp_path / "drawn.safetensors")
    world = load_world(tmp_path / "world.safetensors")
    torch.testing.assert_close(theirs["value"][:64] @ world.features + world.bias, theirs["x"])
    n = len(theirs["value"])
    _, index, value, count = Sampler(world, scaled, 1)(0, n)
    on = torch.arange(index.shape[1]) < count[:, None]
    ours = torch.zeros(n, len(world.mean)).scatter_add_(1, torch.where(on, index, 0).long(),
                                                        torch.where(on, value, 0.0))
    a, b = (ours > 0).double(), (theirs["value"] > 0).double()
    pooled = (a.sum(0) + b.sum(0)) / (2 * n)
    seen = pooled * n > 20
    z = ((a.sum(0) - b.sum(0)) / (2 * n * pooled * (1 - pooled)).sqrt())[seen]
    assert z.abs().max() < 5 and 0.85 < z.square().mean() < 1.15
    often = pooled.argsort(descending=True)[:100]
    pairs, reference = a[:, often].T @ a[:, often], b[:, often].T @ b[:, often]
    chosen = torch.triu(torch.ones(100, 100, dtype=torch.bool), 1) & (reference > 20)
    p = ((pairs + reference) / (2 * n))[chosen]
    z = (pairs - reference)[chosen] / (2 * n * p * (1 - p)).sqrt()
    assert z.abs().max() < 5.5 and 0.85 < z.square().mean() < 1.2
    for f in (ours, theirs["value"]):
        assert f[f > 0].mean() == pytest.approx(float(theirs["value"][theirs["value"] > 0].mean()), rel=0.01)
