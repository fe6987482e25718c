"""Numbers of one model and SAE against dense or closed-form values, and the verdicts on them."""
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import TEXTS, tiny_model, word_tokenizer

from checks.evaluation import ev, ev_by, held_out_tokens, loss_recovered, pca_ev, row_scores, shuffled, untrained_sae
from checks.verification import RULES, check, format_table
from lib.activations import SaveSettings, save_activations
from lib.batches import rows_of_run, rows_of_tensor
from lib.hooks import resolve
from lib.metrics.reconstruction import explained_variance
from lib.sae import make_sae
from lib.texts import split_texts
from lib.training.loop import TrainSettings, train_sae

TOKENS = SaveSettings().tokens(word_tokenizer(), TEXTS)


@pytest.fixture
def model():
    return tiny_model("llama")


@pytest.fixture
def run(tmp_path, model):
    texts = TEXTS * 6
    return save_activations(tmp_path / "run", model, word_tokenizer(), [resolve(model, "resid_post:1")], texts=texts,
                            splits=split_texts(len(texts), 0.2, 0), settings=SaveSettings(shard_rows=100))


def exact_sae(n_inputs):
    """Rebuilds anything: latents +e_i and -e_i for each dimension, as many active as there are dimensions."""
    eye = torch.eye(n_inputs)
    both = torch.cat([eye, -eye])
    return make_sae(both, torch.zeros(2 * n_inputs), both, torch.zeros(n_inputs), 1.0, n_inputs)


def mean_sae(mean):
    """Never fires: predicts the mean."""
    n = len(mean)
    return make_sae(torch.eye(n), torch.full((n,), -1e9), torch.eye(n), mean, 1.0, 1)


def test_mean_predictor_has_ev_0_and_the_exact_sae_1(run):
    hook = run.hooks[0]
    x = torch.cat(run.shards(hook))[run.is_val]
    assert ev(row_scores(mean_sae(x.mean(0)), run, hook, run.is_val)) == pytest.approx(0, abs=1e-6)
    assert ev(row_scores(exact_sae(16), run, hook, run.is_val)) == pytest.approx(1, abs=1e-6)


def test_row_scores_add_up_to_the_dense_computation(run):
    hook = run.hooks[0]
    rows = rows_of_run(run, hook)
    sae = untrained_sae(rows, TrainSettings(n_latents=40, top_k=3))
    scores = row_scores(sae, run, hook, run.is_val)
    x = torch.cat(run.shards(hook))[run.is_val]
    values, indices = sae.encode(x)
    assert ev(scores) == pytest.approx(explained_variance(x, sae.decode(values, indices)), abs=1e-9)
    assert torch.equal(scores.fires, torch.bincount(indices[values > 0], minlength=40))
    assert torch.equal(scores.l0, (values > 0).sum(1)) and torch.allclose(scores.norm, x.norm(dim=1))


def test_bins_hold_every_row_once_and_their_ev_is_about_the_common_mean(run):
    scores = row_scores(untrained_sae(rows_of_run(run, run.hooks[0]), TrainSettings(n_latents=40, top_k=3)), run,
                        run.hooks[0], run.is_val)
    bins = ev_by(scores, scores.norm, 4)
    assert sum(item[3] for item in bins) == len(scores.norm)
    low, high, value, _ = bins[0]
    inside = (scores.norm >= low) & (scores.norm < high)
    assert value == pytest.approx(float(1 - scores.sse[inside].sum() / scores.sst[inside].sum()))


def test_pca_with_all_components_rebuilds_everything(run):
    rows = rows_of_run(run, run.hooks[0])
    x = torch.cat(run.shards(run.hooks[0]))
    assert pca_ev(rows, x, 16) == pytest.approx(1, abs=1e-5)
    train = x[~run.is_val]
    values = torch.linalg.eigvalsh(torch.cov(train.double().T, correction=0))
    assert pca_ev(rows, train, 3) == pytest.approx(float(values[-3:].sum() / values.sum()), abs=1e-5)


def test_shuffling_keeps_each_dimension_and_breaks_what_joins_them():
    x = torch.randn(5000, 1).expand(-1, 3) * torch.tensor([1.0, 2.0, 3.0])
    mixed = shuffled(x)
    assert torch.equal(mixed.sort(0).values, x.sort(0).values)
    assert torch.corrcoef(mixed.T)[0, 1].abs() < 0.1 < torch.corrcoef(x.T)[0, 1]


def test_the_untrained_sae_is_what_training_starts_from():
    x = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
    rows = rows_of_tensor(x, torch.arange(400) % 10 == 0)
    settings = TrainSettings(n_latents=16, top_k=2, epochs=1, batch_size=64, lr=1e-12)
    barely, _ = train_sae(rows, settings, progress=False)
    torch.testing.assert_close(barely.W_dec, untrained_sae(rows, settings).W_dec, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox"])
def test_loss_recovered_is_1_for_an_exact_sae_and_0_for_the_mean(kind):
    model, tokenizer = tiny_model(kind), word_tokenizer()
    point = resolve(model, "resid_post:1")
    damage = {}
    for seed in range(8):  # of what stands in its place, some makes these texts likelier to a random model
        mean = torch.randn(16, generator=torch.Generator().manual_seed(seed))
        found = loss_recovered(model, tokenizer, point, exact_sae(16), tokens=TOKENS, mean=mean)
        damage[found["ce_mean_ablated"] - found["ce_clean"]] = mean
        assert math.isnan(found["loss_recovered"]) == (found["ce_mean_ablated"] <= found["ce_clean"])
    assert max(damage) > 0 and (min(damage) < 0 or kind == "llama")
    mean = damage[max(damage)]
    exact = loss_recovered(model, tokenizer, point, exact_sae(16), tokens=TOKENS, mean=mean)
    assert exact["loss_recovered"] == pytest.approx(1, abs=1e-4)
    ablated = loss_recovered(model, tokenizer, point, mean_sae(mean), tokens=TOKENS, mean=mean)
    assert ablated["loss_recovered"] == pytest.approx(0, abs=1e-4)
    assert exact["ce_mean_ablated"] == ablated["ce_mean_ablated"] != exact["ce_clean"]


@pytest.mark.parametrize("norm", [None, 1.05])
def test_only_what_the_run_stored_is_replaced(tmp_path, model, norm):
    point = resolve(model, "resid_post:1")
    run = save_activations(tmp_path / "run", model, word_tokenizer(), [point], texts=TEXTS,
                           splits=split_texts(len(TEXTS), 0.5, 0), settings=SaveSettings(max_norm_multiple=norm))
    replaced = []
    sae = SimpleNamespace(encode=lambda x: (replaced.append(x), x), decode=lambda _, x: x)
    loss_recovered(model, word_tokenizer(), point, sae, mean=torch.zeros(16), max_tokens=1,
                   tokens=held_out_tokens(run, word_tokenizer(), len(TEXTS)))
    stored = torch.cat(run.shards(run.hooks[0]))[run.is_val]
    assert len(torch.cat(replaced)) == len(stored)
    torch.testing.assert_close(torch.cat(replaced).norm(dim=1).sort().values, stored.norm(dim=1).sort().values)


def test_clean_loss_is_the_models_own_and_independent_of_batches(model):
    tokenizer = word_tokenizer()
    point, sae = resolve(model, "resid_post:1"), exact_sae(16)
    total = count = 0.0
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            total += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    for max_tokens in (1, 30, 8192):
        found = loss_recovered(model, tokenizer, point, sae, tokens=TOKENS, mean=torch.zeros(16),
                               max_tokens=max_tokens)
        assert found["ce_clean"] == pytest.approx(total / count, rel=1e-5) and found["n_tokens"] == count


@pytest.mark.parametrize(
    "name, value, verdict",
    [
        ("loss_fell", 0.7, "PASS"), ("loss_fell", 0.9, "WARN"), ("loss_fell", 0.96, "FAIL"),
        ("weights_moved", 0.05, "PASS"), ("weights_moved", 0.02, "WARN"), ("weights_moved", 0.0, "FAIL"),
        ("l0_cap", 0, "PASS"), ("l0_cap", 1, "FAIL"), ("l0_mean", 0.9, "PASS"), ("l0_mean", 0.4, "FAIL"),
        ("ev", 0.5, "PASS"), ("ev", 0.1, "WARN"), ("ev", 0.0, "FAIL"), ("ev_pca", 0.01, "PASS"),
        ("ev_pca", 0.0, "FAIL"),
        ("ev_random", 0.0, "FAIL"), ("ev_trim", 0.05, "PASS"), ("gap", -0.2, "PASS"), ("gap", 0.2, "FAIL"),
        ("dead", 9.9, "PASS"), ("dead", 49.0, "WARN"), ("dead", 95.0, "FAIL"), ("duplicates", 10.0, "FAIL"),
        ("ce_recovered", 0.95, "PASS"), ("ce_recovered", float("nan"), "FAIL"),
    ],
)
def test_verdicts(name, value, verdict):
    assert check(name, value)["verdict"] == verdict


def test_the_table_names_every_check():
    table = format_table([check(name, 0.5) for name in RULES])
    assert all(name in table for name in RULES)
