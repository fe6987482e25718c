"""SynthSAEBench's conditional odds: what the other latents of a sample say of one, by Bayes' rule and in a world."""
import math
import sys

import numpy as np
import pytest
import torch
from conftest import PROJECT
from test_synth_scores import drawn

from lib.sae import make_sae

sys.path.insert(0, str(PROJECT / "experiments/benchmarks"))

from synth_context import learn, mutual_information, of_others  # noqa: E402
from synth_rules import codings_of  # noqa: E402
from synth_scores import Dictionary, score  # noqa: E402


def families(n, seed, n_families=6, rate=0.2, children=3, child_rate=0.1):
    """Firings [n, F]: parents, each with children that fire only where it does and exclude each other."""
    g = torch.Generator().manual_seed(seed)
    fires = []
    for _ in range(n_families):
        parent = torch.rand(n, generator=g) < rate
        which = (torch.rand(n, generator=g) / child_rate).long()  # child `which` fires, if there is one
        fires += [parent, *(parent & (which == child) for child in range(children))]
    return torch.stack(fires, 1)


def learnt(fires):
    samples, latents = fires.nonzero(as_tuple=True)
    return learn(samples, latents, n_samples=len(fires), n_latents=fires.shape[1])


def test_mutual_information_has_its_closed_form():
    a, b, both = np.array([300.0, 300.0, 300.0]), np.array([400.0, 300.0, 700.0]), np.array([120.0, 300.0, 0.0])
    entropy = -(0.3 * math.log(0.3) + 0.7 * math.log(0.7))
    assert mutual_information(a, b, both, 1000) == pytest.approx([0, entropy, entropy], abs=1e-12)


def test_a_latent_depends_on_its_kin_as_the_world_does():
    """Log odds with the rate's: a child beside its parent has child_rate, without it next to none, nor by a sibling."""
    fires = families(200_000, seed=1)
    context, rate = learnt(fires), fires.float().mean(0)

    def odds(latent, *others):
        of = torch.tensor([latent, *others])
        more = of_others(context, torch.zeros(len(of), dtype=torch.int64), of, torch.arange(len(of)) > 0)
        return float(more[0] + rate[latent].logit())

    logit = math.log(0.1 / 0.9)
    assert odds(5, 4) == pytest.approx(logit, abs=0.1) and odds(5, 4, 0, 8, 13) == pytest.approx(logit, abs=0.15)
    assert odds(5) < -8 and odds(5, 4, 6) < logit - 3 and odds(5, 0, 1) < -8  # another family's are no help
    assert odds(4, 5) > 5 and odds(4) == pytest.approx(math.log(0.2 * 0.7 / 0.8), abs=0.1)  # no child: less likely
    assert odds(4, 0) == pytest.approx(odds(4), abs=0.1)


def test_latents_that_are_no_kin_say_nothing_of_each_other():
    fires = torch.rand(100_000, 10, generator=torch.Generator().manual_seed(2)) < 0.1
    samples, latents = fires[:1000].nonzero(as_tuple=True)
    told = of_others(learnt(fires), samples, latents, torch.ones(len(samples), dtype=torch.bool))
    assert told.abs().max() < 0.5
    none = torch.zeros(0, dtype=torch.int64)
    assert of_others(learnt(fires), none, none, none.bool()).shape == (0,)


def test_conditional_odds_find_children_that_odds_alone_miss():
    """Orthogonal features and noise: of codes as large as noise those count whose parents fire."""
    fires = families(40_000, seed=3, children=4, child_rate=0.08)
    g = torch.Generator().manual_seed(4)
    values = (2 + 0.4 * torch.randn(fires.shape, generator=g)) * fires
    n_latents = fires.shape[1]
    x = torch.nn.functional.pad(values, (0, 8)) + 0.7 * torch.randn(40_000, n_latents + 8, generator=g)
    eye = torch.eye(n_latents, n_latents + 8)
    sae = make_sae(eye, torch.zeros(n_latents), eye, torch.zeros(n_latents + 8), 1.0, n_latents)
    l0 = float(fires.sum()) / len(fires)
    codings, chosen = codings_of(sae, x[:20_000], mean_l0=(l0,), prune_from=1.4, condition_from=2.0)
    draw = drawn(fires[20_000:], x[20_000:])
    found = score(codings, Dictionary(sae.W_dec, sae.mean), torch.arange(n_latents), draw=draw, n=20_000,
                  n_features=n_latents)
    name = f"conditional {l0:g}"
    assert name in chosen and found[name]["l0"] == pytest.approx(l0, rel=0.03)
    assert found[name]["f1"] > found[f"odds {l0:g}"]["f1"] + 0.05
    assert found["even conditional"]["f1"] > found["even odds"]["f1"] + 0.05
    assert found["even conditional"]["l0"] == pytest.approx(l0, rel=0.15)
