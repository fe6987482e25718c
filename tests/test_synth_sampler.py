"""The fast sampler of synthetic worlds against a plain one that draws everything, against SAELens', and exact rates."""
import math
import subprocess
import sys

import pytest
import torch
from conftest import PROJECT
from safetensors.torch import load_file
from torch.nn.functional import normalize

sys.path.insert(0, str(PROJECT / "experiments" / "benchmarks"))
from sampler import Sampler, World, load_world  # noqa: E402

ROOTS, BRANCHES, N, RANK, WIDTH = 6, 3, 120, 4, 8  # 6 + 18 + 54 features in trees, 42 outside
DRAWN = 60_000


@pytest.fixture(scope="module")
def world():
    g = torch.Generator().manual_seed(0)
    parent = torch.full((N,), -1)
    parent[ROOTS : ROOTS * (1 + BRANCHES)] = torch.arange(ROOTS).repeat_interleave(BRANCHES)
    second = ROOTS * (1 + BRANCHES)
    parent[second : second + ROOTS * BRANCHES**2] = torch.arange(ROOTS, second).repeat_interleave(BRANCHES)
    factor = 0.2 * torch.randn(N, RANK, generator=g)
    p = torch.cat([torch.full((ROOTS,), 0.4), torch.full((72,), 0.5), torch.logspace(-0.5, -3, 42)])
    return World(normalize(torch.randn(N, WIDTH, generator=g), dim=1), torch.randn(WIDTH, generator=g), factor,
                 (1 - factor.square().sum(1)).sqrt(), -torch.special.ndtri(p), 3 + torch.rand(N, generator=g),
                 2 * torch.rand(N, generator=g), parent)


def plain(world, scaled, n, seed=0):
    """Values [n, N]: every feature drawn, then silenced level by level."""
    g = torch.Generator().manual_seed(seed)
    normal = torch.randn(n, RANK, generator=g) @ world.factor.T + torch.randn(n, N, generator=g) * world.spread
    value = (world.mean + world.std * torch.randn(n, N, generator=g)).relu() * (normal > world.threshold)
    depth = torch.zeros(N, dtype=torch.long)
    for i in range(N):
        depth[i] = 0 if world.parent[i] < 0 else depth[world.parent[i]] + 1
    for level in range(int(depth.max()) + 1):
        at = (depth == level).nonzero().flatten()
        if level:
            above = value[:, world.parent[at]]
            value[:, at] *= above / world.mean[world.parent[at]] if scaled else (above > 0).float()
        for i in at.tolist():
            children = (world.parent == i).nonzero().flatten()
            if len(children):
                on = value[:, children] > 0
                chance = torch.rand(n, len(children), generator=g) * on
                value[:, children] *= chance == chance.amax(1, keepdim=True).clamp(min=1e-12)
    return value


def dense(drawn, n):
    x, index, value, count = drawn
    out = torch.zeros(n, N)
    for r in range(n):
        out[r, index[r, : count[r]].long()] = value[r, : count[r]]
    return out


@pytest.fixture(scope="module", params=[False, True], ids=["unscaled", "scaled"])
def both(request, world):
    sampler = Sampler(world, scaled=request.param, seed=3)
    return dense(sampler(0, DRAWN), DRAWN), plain(world, request.param, DRAWN), request.param


def z_of_counts(a, b):
    """Standardised differences of two counts of DRAWN trials each."""
    pooled = ((a + b) / (2 * DRAWN)).clamp(1e-9, 1 - 1e-9)
    return (a - b) / (2 * DRAWN * pooled * (1 - pooled)).sqrt()


def test_every_feature_fires_as_often(both):
    fast, slow, _ = both
    z = z_of_counts((fast > 0).sum(0).double(), (slow > 0).sum(0).double())
    assert z.abs().max() < 4.5 and 0.6 < z.square().mean() < 1.5 and abs(z.mean()) < 4 / math.sqrt(N)


def test_pairs_fire_together_as_often_and_siblings_never(both, world):
    fast, slow, _ = both
    on, other = (fast > 0).double(), (slow > 0).double()
    together, reference = on.T @ on, other.T @ other
    upper = torch.triu(torch.ones(N, N, dtype=torch.bool), 1)
    often = upper & (reference > 50)
    z = z_of_counts(together[often], reference[often])
    assert z.abs().max() < 5.5 and 0.8 < z.square().mean() < 1.25
    siblings = (world.parent[:, None] == world.parent) & (world.parent >= 0) & upper
    assert together[siblings].sum() == 0
    child = (world.parent >= 0).nonzero().flatten()
    assert ((fast[:, child] > 0) <= (fast[:, world.parent[child]] > 0)).all()


def test_magnitudes_have_mean_and_spread_of_the_plain_ones(both):
    fast, slow, _ = both
    for i in range(N):
        a, b = fast[fast[:, i] > 0, i].double(), slow[slow[:, i] > 0, i].double()
        if min(len(a), len(b)) > 200:
            error = (a.var() / len(a) + b.var() / len(b)).sqrt()
            assert abs(a.mean() - b.mean()) < 4.5 * error
            assert abs(a.std() / b.std() - 1) < 6 / math.sqrt(min(len(a), len(b)))


def test_the_rate_of_a_root_is_the_exact_one(both, world):
    fast, _, _ = both
    alone = (world.parent < 0).nonzero().flatten()
    p = torch.special.ndtr(-world.threshold).double() * torch.special.ndtr(world.mean / world.std).double()
    p = p[alone]
    z = ((fast[:, alone] > 0).double().mean(0) - p) / (p * (1 - p) / DRAWN).sqrt()
    assert z.abs().max() < 4.5


def test_rows_are_sums_of_features_and_a_transform_folds_in(world):
    g = torch.Generator().manual_seed(1)
    transform = torch.randn(WIDTH, WIDTH, generator=g)
    transform = transform + transform.T
    drawn, folded = Sampler(world, True, 5)(100, 300), Sampler(world, True, 5, transform)(100, 300)
    expected = dense(drawn, 300) @ world.features + world.bias
    torch.testing.assert_close(drawn[0], expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(folded[0], expected @ transform, atol=2e-3, rtol=1e-4)


def test_a_sample_depends_on_its_number_and_seed_alone(world):
    sampler = Sampler(world, False, 7)
    whole = sampler(1 << 33, 64)
    for part in (slice(0, 1), slice(13, 40)):
        again = sampler((1 << 33) + part.start, part.stop - part.start)
        assert torch.equal(whole[0][part], again[0]) and torch.equal(whole[3][part], again[3])
    assert not torch.equal(whole[0], Sampler(world, False, 8)(1 << 33, 64)[0])
    assert not torch.equal(whole[0], sampler((1 << 33) + 64, 64)[0])


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
