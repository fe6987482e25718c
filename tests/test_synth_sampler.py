"""The fast sampler of synthetic worlds against a plain one that draws everything, and exact rates."""
import math
import sys

import numba
import numpy as np
import pytest
import torch
from conftest import PROJECT
from torch.nn.functional import normalize

sys.path.insert(0, str(PROJECT / "experiments" / "benchmarks"))
import sampler as sampler_module  # noqa: E402
import sampler_loops as loops  # noqa: E402
from sampler import Sampler, World  # noqa: E402

N, RANK, WIDTH = 120, 4, 8
DRAWN = 60_000


def world_of(roots, branches):
    """Trees of three levels, and what is left of the features outside them."""
    g = torch.Generator().manual_seed(0)
    parent, second = torch.full((N,), -1), roots * (1 + branches)
    in_trees = second + roots * branches**2
    parent[roots:second] = torch.arange(roots).repeat_interleave(branches)
    parent[second:in_trees] = torch.arange(roots, second).repeat_interleave(branches)
    factor = 0.2 * torch.randn(N, RANK, generator=g)
    p = torch.cat([torch.full((roots,), 0.4), torch.full((in_trees - roots,), 0.5),
                   torch.logspace(-0.5, -3, N - in_trees)])
    return World(normalize(torch.randn(N, WIDTH, generator=g), dim=1), torch.randn(WIDTH, generator=g), factor,
                 (1 - factor.square().sum(1)).sqrt(), -torch.special.ndtri(p), 3 + torch.rand(N, generator=g),
                 2 * torch.rand(N, generator=g), parent)


@pytest.fixture(scope="module")
def world():
    return world_of(roots=6, branches=3)  # 6 + 18 + 54 features in trees, 42 outside


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


@pytest.mark.parametrize("branches", [3, 5], ids=["one group", "two groups"])
def test_the_bound_silences_nothing_that_fires(branches):
    """The same random numbers, and every feature computed: the same features fire, and the same children win."""
    world, seed, n = world_of(3, branches), 11, 400
    sampler = Sampler(world, False, seed)
    _, index, _, count = sampler(5, n)
    u = np.zeros((n, RANK), np.float32)
    loops.factors(seed, 5, rank=RANK, layers=sampler.tables[1], u=u, norm=np.empty(n, np.float32))
    z = (torch.from_numpy(u).double() @ world.factor.double().T - world.threshold) / world.spread
    chance = torch.special.ndtr(z) * torch.special.ndtr((world.mean / world.std).double())
    columns = sampler.roots[0][: int((world.parent < 0).sum())]
    base = RANK + len(sampler.roots[0]) // 4
    children = [(world.parent == f).nonzero().flatten().tolist() for f in range(N)]
    for r in range(n):
        key, step = (np.uint64(number) for number in loops.start(seed, 5 + r))
        uniform = [loops.uniform(np.uint64(loops.bits(key, step, base + i))) for i in range(3 * N)]
        fire = []
        for c, f in enumerate(columns.tolist()):
            low = int(loops.bits(key, step, RANK + c // 4)) >> 16 * (c % 4) & 0xFFFF
            if (low + uniform[3 * f]) / 65536 < chance[r, f]:
                fire.append(f)
        for f in fire:
            contenders = [c for c in children[f] if uniform[3 * c] < chance[r, c]]
            fire += [contenders[int(uniform[3 * f + 1] * len(contenders))]] if contenders else []
        assert sorted(index[r, : count[r]].tolist()) == sorted(fire), r


def test_the_precision_of_the_bound_and_the_number_of_threads_change_no_sample(world, monkeypatch):
    expected = Sampler(world, True, 3)(7, 1500)
    monkeypatch.setattr(sampler_module, "multiplies_bfloat16", lambda device: False)
    before = numba.get_num_threads()
    for threads in {1, before}:
        numba.set_num_threads(threads)
        found = Sampler(world, True, 3)(7, 1500)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[3], expected[3])
    numba.set_num_threads(before)


def test_normals_are_normal_into_the_tail():
    layers, n = sampler_module._layers(), 2_000_000
    assert layers[255, 0] ** 2 == pytest.approx(-2 * math.log(1 - np.diff(layers[:, 1])[-1]))
    u = np.empty((n // 25, 25), np.float32)
    loops.factors(1 << 40, 0, rank=25, layers=layers, u=u, norm=np.empty(len(u), np.float32))
    edges = np.array([-np.inf, *np.linspace(-3.6, 3.6, 73), 3.8, 4.2, np.inf])
    expected = n * np.diff(torch.special.ndtr(torch.from_numpy(edges)).numpy())
    z = (np.histogram(u, edges)[0] - expected) / np.sqrt(expected)
    assert abs(z).max() < 4.5 and 0.65 < (z**2).mean() < 1.45
    assert abs(np.corrcoef(u.T) - np.eye(25)).max() < 5 / math.sqrt(len(u))


def test_no_two_samples_share_random_numbers():
    """Runs of neighbouring seeds and the seeds of scoring, far beyond a million samples: all keys differ, and so do
    the factors that sample i of one seed has and sample j of another."""
    seeds = [0, 1, 2, 3, 1 << 59, 1 << 60, 1 << 61]
    starts = [0, 1_000_000, 1 << 20, 200_000_000, 1 << 32]
    keys = {int(loops.start(seed, first + i)[0]) for seed in seeds for first in starts for i in range(2000)}
    assert len(keys) == len(seeds) * (2000 * len(starts))
    u, layers = np.empty((len(seeds), 4000, 25), np.float32), sampler_module._layers()
    for place, seed in enumerate(seeds):
        loops.factors(seed, 0, rank=25, layers=layers, u=u[place], norm=np.empty(4000, np.float32))
    rows = u.reshape(-1, 25)
    assert len(np.unique(rows, axis=0)) == len(rows)
    assert abs(np.corrcoef(u.reshape(len(seeds), -1)) - np.eye(len(seeds))).max() < 5 / math.sqrt(4000 * 25)


def test_rows_are_sums_of_features_and_a_transform_folds_in(world):
    g = torch.Generator().manual_seed(1)
    transform = torch.randn(WIDTH, WIDTH, generator=g)
    transform = transform + transform.T
    for matrix in (torch.eye(WIDTH), transform):
        drawn = Sampler(world, True, 5, matrix)(100, 300)
        features = (world.features @ matrix).bfloat16().float()
        torch.testing.assert_close(drawn[0], dense(drawn, 300) @ features + world.bias @ matrix, atol=2e-4, rtol=1e-5)
    assert torch.equal(Sampler(world, True, 5)(100, 300)[0], Sampler(world, True, 5, torch.eye(WIDTH))(100, 300)[0])
    features = normalize(torch.randn(4000, 768, generator=g, dtype=torch.float64), dim=1)
    assert torch.cosine_similarity(features.bfloat16().double(), features).min() > 0.99999


def test_a_sample_depends_on_its_number_and_seed_alone(world):
    sampler = Sampler(world, False, 7)
    whole = sampler(1 << 33, 64)
    for part in (slice(0, 1), slice(13, 40)):
        again = sampler((1 << 33) + part.start, part.stop - part.start)
        assert torch.equal(whole[0][part], again[0]) and torch.equal(whole[3][part], again[3])
    assert not torch.equal(whole[0], Sampler(world, False, 8)(1 << 33, 64)[0])
    assert not torch.equal(whole[0], sampler((1 << 33) + 64, 64)[0])
