"""Accuracy, F1, probes and perplexity on cases with known answers."""
import pytest
import torch

from lib.metrics.performance import (
    classification,
    k_sparse_probe,
    logistic_probe,
    next_token_loss,
    perplexity,
    probe_within,
    worst_group,
)


def test_classification():
    logits = torch.tensor([[9.0, 0], [9, 0], [9, 0], [0, 9]])
    scores = classification(logits, torch.tensor([0, 0, 1, 1]))
    assert scores["accuracy"] == 0.75
    assert scores["f1_macro"] == pytest.approx((0.8 + 2 / 3) / 2) == scores["f1_weighted"]
    assert classification(torch.zeros(5, 4),
                          torch.arange(5) % 4)["loss"] == pytest.approx(torch.tensor(4.0).log().item())


def test_probe_runs():
    g = torch.Generator().manual_seed(0)
    y = torch.arange(200) % 4
    x = torch.zeros(200, 30)
    x[torch.arange(200), y] = 5.0
    noise = torch.rand(200, 30, generator=g)
    for features in (x, x + noise):  # the first goes through sparse matrices
        scores = logistic_probe(features[:120], y[:120], features[120:], y[120:])
        assert scores["train_accuracy"] == scores["test_accuracy"] == scores["test_f1_macro"] == 1
    chance = logistic_probe(noise[:120], y[:120], noise[120:], y[120:])
    assert chance["test_accuracy"] < 0.6


def test_probe_within_a_class():
    """One column tells the attribute in class 0, nothing does in class 1, and class 2 has one value only."""
    y = torch.arange(300) % 3
    a = (torch.arange(300) // 3) % 2
    a[y == 2] = 0
    x = torch.zeros(300, 2)
    x[:, 0] = torch.where(y == 0, a, 0).float()
    x[:, 1] = y.float()
    rows = torch.arange(300)
    train, test = rows[:180], rows[180:]
    a[test[(y[test] == 1)][:5]] = 0  # of 40 test rows of class 1 more are 0
    share = float((a[test][y[test] == 1] == 0).double().mean())
    found = probe_within(x[train], x[test], attribute=(a[train], a[test]), y=(y[train], y[test]))
    assert found["accuracy"] == pytest.approx((1 + share) / 2)
    assert found["majority"] == pytest.approx((0.5 + share) / 2)
    assert probe_within(x, x, attribute=(y, y), y=(y, y)) == {}


def test_the_worst_group():
    """Right on all of class 0; of class 1 on a half of those without the shortcut, all of those with it."""
    y = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    group = torch.tensor([0, 0, 1, 1, 0, 0, 1, 1])
    guess = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1])
    assert worst_group(torch.nn.functional.one_hot(guess, 2).float(), y, group) == 0.5
    assert worst_group(torch.nn.functional.one_hot(y, 2).float(), y, group) == 1


def test_k_sparse():
    """One latent for class 0, two that only together tell class 1 from 2, and a loud latent that tells nothing."""
    y = torch.arange(300) % 3
    x = torch.zeros(300, 5)
    x[:, 0] = (y == 0).float()
    x[:, 1] = (y == 1).float()
    x[:, 2] = (y == 2).float()
    x[:, 4] = 100.0
    scores = k_sparse_probe(x[:150], y[:150], x[150:], y[150:])
    assert set(scores) == {1, 2, 5}  # 10, 25 and 50 exceed the five latents
    assert scores[1] == scores[2] == 1


def test_k_sparse_selects_on_the_training_rows_only():
    y = torch.arange(200) % 2
    train, test = torch.rand(200, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(200, 3)
    train[:, 1] += y  # the best training latent says nothing on the test rows, where latent 2 is perfect
    test[:, 2] = y.float()
    assert k_sparse_probe(train, y, test, y)[1] == 0.5


def test_perplexity_uniform():
    ids, mask = torch.randint(0, 50, (3, 7), generator=torch.Generator().manual_seed(0)), torch.ones(3, 7)
    mask[1, 4:] = 0
    loss = next_token_loss(torch.zeros(3, 7, 50), ids, mask)
    assert loss[1] == 6 + 3 + 6
    assert perplexity([loss, loss]) == pytest.approx(50)


def test_perplexity_is_shifted_masked_and_batch_free():
    ids = torch.tensor([[3, 1, 2, 0], [2, 2, 1, 3]])
    logits = torch.nn.functional.one_hot(ids.roll(-1, 1), 4).float() * 50  # knows the next id, nothing of this one
    assert perplexity([next_token_loss(logits, ids, torch.ones(2, 4))]) == pytest.approx(1)
    g = torch.Generator().manual_seed(0)
    logits, mask = torch.randn(2, 4, 4, generator=g), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]])
    whole = perplexity([next_token_loss(logits, ids, mask)])
    rows = [next_token_loss(logits[i : i + 1], ids[i : i + 1], mask[i : i + 1]) for i in range(2)]
    assert perplexity(rows) == pytest.approx(whole)
    logits[mask == 0] = 1e4  # what stands at a pad doesn't count
    assert perplexity([next_token_loss(logits, ids, mask)]) == pytest.approx(whole)
