"""The scores of SynthSAEBench: closed forms, rules chosen without labels, SAELens' own functions on the same SAE."""
import json
import math
import subprocess
import sys

import pytest
import torch
from conftest import PROJECT
from safetensors.torch import load_file
from torch.nn.functional import normalize

from lib.sae import make_sae

FOLDER = PROJECT / "experiments" / "benchmarks"
sys.path.insert(0, str(FOLDER))
from synth_rules import Known, above, batch_topk, codings_of, everything, log_odds  # noqa: E402
from synth_scores import Dictionary, costs, decode, matching, score, select  # noqa: E402


def drawn(fires, x):
    """A function that hands out these samples: fires bool [n, N], x [n, D]."""
    count = fires.sum(1)
    index = torch.zeros(len(fires), int(count.max()), dtype=torch.int32)
    for row, on in enumerate(fires):
        index[row, : count[row]] = on.nonzero().flatten()
    return lambda first, n: (x[first : first + n], index[first : first + n], index[first : first + n].float(),
                             count[first : first + n])


def random_sae(width=12, n_latents=40, k=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    W_enc, W_dec = torch.randn(n_latents, width, generator=g), torch.randn(n_latents, width, generator=g)
    return make_sae(W_enc, 0.1 * torch.randn(n_latents, generator=g), normalize(W_dec, dim=1),
                    torch.randn(width, generator=g), 1.0, k)


def test_scores_have_their_closed_form():
    """Latents: feature 0 found half the time, feature 1 with one false alarm, one that never fires."""
    features = torch.eye(3)
    dictionary = Dictionary(torch.tensor([[1.0, 0, 0], [0, -1, 0], [0, 0.6, 0.8]]), torch.tensor([1.0, 1, 1]))
    best, mcc, unique = matching(dictionary.rows, features)
    assert best.tolist() == [0, 1, 2] and mcc == pytest.approx((1 + 1 + 0.8) / 3) and unique == 1
    fires = torch.tensor([[1, 0, 0], [1, 1, 1], [0, 1, 0], [0, 0, 0]], dtype=torch.bool)
    x = fires.float() + 1
    codes = torch.tensor([[1.0, 0, 0], [0, -1, 0], [0, -1, 0], [0, -1, 0]])  # a code below 0 fires too
    values, latents = codes.sort(dim=1, descending=True)
    found = score([(lambda x: (values, latents), {"own": everything})], dictionary, best, draw=drawn(fires, x), n=4,
                  n_features=3)["own"]
    errors = (codes @ dictionary.rows + dictionary.centre - x).square().sum()
    assert found["f1"] == pytest.approx((2 / 3 + 4 / 5 + 0) / 3)
    assert found["precision"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert found["recall"] == pytest.approx((1 / 2 + 1 + 0) / 3)
    assert found["l0"] == 1 and found["dead_pct"] == pytest.approx(100 / 3)
    assert found["ev"] == pytest.approx(float(1 - errors / (x - x.mean(0)).square().sum()))


def test_the_cost_of_a_code_is_what_its_removal_adds_to_the_error():
    sae, x = random_sae(width=70), torch.randn(20, 70, generator=torch.Generator().manual_seed(1))
    dictionary = Dictionary(sae.W_dec, sae.mean)
    values, latents = sae.encode(x)
    codes = select(values, latents, values > 0)
    found, before = costs(x, codes, dictionary), (x - decode(codes, dictionary)).square().sum()
    for i in range(len(codes.value)):
        without = codes._replace(value=codes.value.clone())
        without.value[i] = 0
        after = (x - decode(without, dictionary)).square().sum()
        assert float(after - before) == pytest.approx(float(found[i]), rel=1e-3, abs=1e-3)


def test_rules_meet_their_mean_l0_on_the_samples_that_chose_them():
    sae, x = random_sae(), torch.randn(3000, 12, generator=torch.Generator().manual_seed(2))
    dictionary = Dictionary(sae.W_dec, sae.mean)
    codings, chosen = codings_of(sae, x, mean_l0=(2.0, 5.0), prune_from=1.5, condition_from=2.0, batch_k=3.0)
    (own, _), (encode, rules) = codings
    assert list(rules) == ["batch 3", "threshold 2", "pruned 2", "odds 2", "conditional 2", "threshold 5",
                           "pruned 5", "odds 5", "conditional 5", "even odds", "even conditional"]
    values, latents = encode(x)
    kept = {name: rule(x, values, latents, dictionary) for name, rule in rules.items()}
    for name in ("even odds", "even conditional"):  # have an L0 of their own
        del kept[name]
    looked = [kept.pop(f"conditional {n}") for n in (2, 5)]  # at codes again, until what is kept agrees with itself
    assert [float(on.sum()) / len(x) for on in looked] == pytest.approx([2, 5], rel=0.05)
    assert {name: round(float(on.sum()) / len(x), 2) for name, on in kept.items()} == {
        "batch 3": 3, "threshold 2": 2, "pruned 2": 2, "odds 2": 2, "threshold 5": 5, "pruned 5": 5, "odds 5": 5}
    assert chosen["threshold 2"] > chosen["threshold 5"] > 0
    least, most = ([float(values[on].min()) for on in (kept[f"pruned {n}"], kept[f"threshold {n}"])] for n in (2, 5))
    assert least[0] < least[1] and most[0] < most[1]  # pruning keeps smaller codes that are needed

    def error(on):
        return (x - decode(select(values, latents, on), dictionary)).square().sum()

    assert error(kept["pruned 5"]) < error(kept["threshold 5"])
    assert torch.equal(own(x)[0], sae.encode(x)[0])


def test_odds_are_those_of_bayes_rule():
    """x = a d + error, a ~ N(1.5, .4) with probability .1, else 0: the evidence by summing over a fine grid of a."""
    noise, mean, variance, rate = 0.3, 1.5, 0.4, 0.1
    x = torch.tensor([-0.5, 0.2, 1.0, 2.5], dtype=torch.float64)  # along d
    a = torch.linspace(-6, 9, 30_001, dtype=torch.float64)
    normal = torch.distributions.Normal
    fires = (normal(mean, variance**0.5).log_prob(a).exp() * normal(a, noise**0.5).log_prob(x[:, None]).exp()).sum(1)
    fires = fires * (a[1] - a[0])
    true = (rate * fires / ((1 - rate) * normal(0, noise**0.5).log_prob(x).exp())).log()
    known = Known(torch.tensor([0.5, rate]), torch.tensor([9.0, mean]), torch.tensor([9.0, variance + noise]), noise)
    found = log_odds(torch.ones(4, dtype=torch.int64), x.float(), x.float().square(), known)
    assert found.double() == pytest.approx(true, abs=1e-4)


def test_odds_know_a_rare_latent_from_noise():
    """24 orthogonal features, half of them on .2 % of the samples: nearly all false alarms are of these."""
    g = torch.Generator().manual_seed(4)
    rates = torch.tensor([0.2] * 12 + [0.002] * 12)
    fires = torch.rand(60_000, 24, generator=g) < rates
    values = (2 + 0.4 * torch.randn(60_000, 24, generator=g)) * fires
    x = torch.nn.functional.pad(values, (0, 8)) + 0.5 * torch.randn(60_000, 32, generator=g)
    sae = make_sae(torch.eye(24, 32), torch.zeros(24), torch.eye(24, 32), torch.zeros(32), 1.0, 24)
    l0 = float(rates.sum())
    codings, _ = codings_of(sae, x[:30_000], mean_l0=(l0,), prune_from=1.4, condition_from=2.0)
    found = score(codings, Dictionary(sae.W_dec, sae.mean), torch.arange(24), draw=drawn(fires[30_000:], x[30_000:]),
                  n=30_000, n_features=24)
    spread = 0.4**2 + 0.5**2
    true = ((x[30_000:, :24] / 0.5).square() - (x[30_000:, :24] - 2).square() / spread + math.log(0.25 / spread)) / 2
    on = true + rates.logit() > 0  # by the numbers that drew the world
    best = (2 * (on & fires[30_000:]).sum(0) / (on.sum(0) + fires[30_000:].sum(0))).mean()
    assert found["even odds"]["l0"] == pytest.approx(l0, rel=0.04)  # nobody told it
    odds, pruned = found[f"odds {l0:g}"]["f1"], found[f"pruned {l0:g}"]["f1"]
    assert found["even odds"]["f1"] == pytest.approx(float(best), abs=0.02) and odds > pruned + 0.1


def test_batch_topk_chooses_within_groups_of_1024():
    values = torch.rand(1500, 6, generator=torch.Generator().manual_seed(3)).sort(1, descending=True).values
    values[:1024] += 1
    none = torch.zeros(0)
    kept = batch_topk(2)(none, values, none, Dictionary(none, none))
    assert int(kept[:1024].sum()) == 2048 and int(kept[1024:].sum()) == 2 * 476
    assert values[:1024][kept[:1024]].min() > values[:1024][~kept[:1024]].max()
    assert above(1.5)(none, values, none, Dictionary(none, none)).sum() == (values > 1.5).sum()


def test_scores_do_not_depend_on_how_codes_are_padded():
    sae = random_sae()
    g = torch.Generator().manual_seed(4)
    features = normalize(torch.randn(60, 12, generator=g), dim=1)
    fires = torch.rand(5000, 60, generator=g) < 0.1
    x = fires.float() @ features
    best, _, _ = matching(sae.W_dec, features)

    def padded(x):
        values, latents = sae.encode(x)
        return torch.nn.functional.pad(values, (0, 3)), torch.nn.functional.pad(latents, (0, 3))

    codings = [(sae.encode, {"own": everything}), (padded, {"padded": everything})]
    found = score(codings, Dictionary(sae.W_dec, sae.mean), best, draw=drawn(fires, x), n=5000, n_features=60)
    assert found["own"] == pytest.approx(found["padded"], rel=1e-6)


PEERS = PROJECT / ".venv-peers" / "bin" / "python"
THEIRS = """
import json, sys
import torch
from safetensors.torch import save_file
from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.synthetic import SyntheticModel, SyntheticModelConfig
from sae_lens.synthetic.evals import eval_sae_on_synthetic_data
from sae_lens.synthetic import ZipfianFiringProbabilityConfig
torch.manual_seed(0)
model = SyntheticModel(SyntheticModelConfig(num_features=200, hidden_dim=16, bias=0.5, seed=1, orthogonalization=None,
    firing_probability=ZipfianFiringProbabilityConfig(exponent=0.5, max_prob=0.3, min_prob=1e-3)))
sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=16, d_sae=50, k=6))
with torch.no_grad():
    sae.W_dec[:40] = 2 * model.feature_dict.feature_vectors[:40]
    sae.W_enc.copy_(sae.W_dec.T)
    sae.b_dec.copy_(model.feature_dict.bias)
    sae.b_enc[-3:] = -100  # dead
acts = model.activation_generator.sample(3072)

class Replayed:
    at = 0
    def sample(self, n):
        self.at += n
        return acts[self.at - n : self.at]

found = eval_sae_on_synthetic_data(sae, model.feature_dict, Replayed(), num_samples=3072, batch_size=1024)
norm = sae.W_dec.norm(dim=1)
parts = {"W_enc": (sae.W_enc * norm).T, "b_enc": sae.b_enc * norm, "W_dec": sae.W_dec / norm[:, None],
         "mean": sae.b_dec, "features": model.feature_dict.feature_vectors, "acts": acts,
         "x": model.feature_dict(acts)}
save_file({name: part.detach().contiguous() for name, part in parts.items()}, sys.argv[1])
print(json.dumps(found.to_dict()))
"""


@pytest.mark.skipif(not PEERS.exists(), reason="needs make peers")
def test_saelens_own_evaluation_says_the_same(tmp_path):
    done = subprocess.run([str(PEERS), "-c", THEIRS, str(tmp_path / "all.safetensors")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs, made = json.loads(done.stdout.splitlines()[-1]), load_file(tmp_path / "all.safetensors")
    acts, x, features = made.pop("acts"), made.pop("x"), made.pop("features")
    sae = make_sae(**made, scale=1.0, top_k=6)
    best, mcc, unique = matching(sae.W_dec, features)
    codings, _ = codings_of(sae, x, mean_l0=(6.0,), prune_from=1.4, condition_from=2.0, batch_k=6.0)
    ours = score(codings, Dictionary(sae.W_dec, sae.mean), best, draw=drawn(acts > 0, x), n=3072, n_features=200)
    batch = ours["batch 6"]
    assert (mcc, unique) == pytest.approx((theirs["mcc"], theirs["uniqueness"]), rel=1e-5)
    assert batch["ev"] == pytest.approx(theirs["explained_variance"], abs=1e-5)
    assert batch["l0"] == pytest.approx(theirs["sae_l0"], abs=1e-9) and theirs["dead_latents"] >= 3
    assert batch["dead_pct"] == pytest.approx(100 * theirs["dead_latents"] / 50)
    of = theirs["classification"]
    assert (batch["f1"], batch["precision"], batch["recall"]) == pytest.approx(
        (of["f1_score"], of["precision"], of["recall"]), rel=1e-5)
