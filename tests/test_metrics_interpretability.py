"""U, CSI, support and absorption on cases with known answers."""
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_mutual_info_score, mutual_info_score

from lib.metrics import interpretability
from lib.metrics.interpretability import (
    absorption,
    base_threshold,
    csi,
    selectivity,
    selectivity_given,
    uncertainty,
    uncertainty_given,
)


def test_u_perfect_is_one():
    y = torch.tensor([0, 1]).repeat(50)
    scores = uncertainty((y == 1)[:, None], y, 2)
    for name in ("u", "u_label", "u_adj"):
        assert scores[name].item() == pytest.approx(1, abs=1e-12), name


def test_u_definition():
    """Ten balanced classes: a one-class latent has U_b = 1 and U_y = 0.141, half the classes gives 0.301."""
    y = torch.arange(10).repeat(100)
    fired = torch.stack([y == 3, y < 5, torch.ones_like(y).bool(), torch.zeros_like(y).bool()], 1)
    scores = uncertainty(fired, y, 10)
    assert scores["u"].tolist() == pytest.approx([1, 1, 0, 0], abs=1e-12)
    h_b = -0.1 * math.log(0.1) - 0.9 * math.log(0.9)
    assert scores["u_label"].tolist() == pytest.approx([h_b / math.log(10), math.log(2) / math.log(10), 0, 0],
                                                       abs=1e-12)
    assert scores["u_label"][0].item() == pytest.approx(0.141, abs=5e-4)


def test_u_equals_scikit_learn():
    g = np.random.default_rng(0)
    y, b = g.integers(0, 4, 300), g.random((300, 6)) < [0.01, 0.1, 0.3, 0.5, 0.9, 0.99]
    b[:, 2] |= y == 2
    scores = uncertainty(torch.from_numpy(b), torch.from_numpy(y), 4)
    h_y = mutual_info_score(y, y)
    for j in range(6):
        information, h_b = mutual_info_score(y, b[:, j]), mutual_info_score(b[:, j], b[:, j])
        assert scores["u"][j].item() == pytest.approx(information / h_b, abs=1e-10)
        assert scores["u_label"][j].item() == pytest.approx(information / h_y, abs=1e-10)
        ami = adjusted_mutual_info_score(y, b[:, j], average_method="min")  # (I - E)/(min(H) - E), and H(b) < H(y)
        assert scores["u_adj"][j].item() == pytest.approx(ami, abs=1e-8)


def test_adjusted_u_of_chance_is_zero_and_plug_in_is_not():
    """The reason for the support threshold: a latent that fires once in 1000 has plug-in U of about 0.29."""
    g = torch.Generator().manual_seed(1)
    y = torch.arange(10).repeat(100)
    fired = torch.zeros(1000, 500, dtype=torch.bool)
    for column in range(500):
        fired[torch.randperm(1000, generator=g)[: 1 if column < 250 else 20], column] = True
    scores = uncertainty(fired, y, 10)
    assert scores["u"][:250].mean().item() == pytest.approx(0.29, abs=0.01)
    assert scores["u"][250:].mean().item() == pytest.approx(0.05, abs=0.015)
    assert abs(scores["u_adj"].mean().item()) < 0.01


def test_csi_zero_half_and_one():
    y = torch.tensor([0, 0, 1, 1, 2])
    values = torch.tensor([[1.0, 1, 3, -1], [1, 1, 3, -1], [1, 0, 1, -1], [1, 0, 1, 0], [1, 0, 1, 0]])
    assert csi(values, y, 3).tolist() == pytest.approx([0, 1, 0.5, 0])


def test_selectivity_counts_only_supported_latents():
    y = torch.tensor([0, 1]).repeat(100)
    rare = torch.zeros(200)
    rare[:3] = 1
    values = torch.stack([(y == 0).float(), rare, torch.ones(200), torch.zeros(200)], 1)
    result = selectivity(values, values > 0, y, 2)
    assert result["n_supported"] == 1
    assert (result["u"], result["csi"], result["u_std"]) == (pytest.approx(1), 1, 0)
    assert result["u_all"] < 0.5 and result["csi_all"] == pytest.approx((1 + 1 / 3 + 0 + 0) / 4)
    empty = selectivity(torch.zeros(200, 2), torch.zeros(200, 2).bool(), y, 2)
    assert (empty["u"], empty["n_supported"]) == (0.0, 0)


def test_u_of_an_attribute_given_the_label():
    """Digit given parity: a latent of one digit tells H(b) - I(b;parity) beyond it, a latent of a parity nothing."""
    digit = torch.arange(10).repeat(100)
    parity = digit % 2
    fired = torch.stack([digit == 3, parity == 1, torch.ones_like(digit).bool(), torch.zeros_like(digit).bool()], 1)
    scores = uncertainty_given(fired, digit, 10, y=parity, n_classes=2)
    h_b = -0.1 * math.log(0.1) - 0.9 * math.log(0.9)
    inside = -0.2 * math.log(0.2) - 0.8 * math.log(0.8)  # entropy of firing among the odd digits, half of all
    assert scores["u"].tolist() == pytest.approx([0.5 * inside / h_b, 0, 0, 0], abs=1e-12)
    both = [uncertainty(fired, of, n)["u"] for of, n in ((digit, 10), (parity, 2))]
    assert scores["u"].tolist() == pytest.approx((both[0] - both[1]).tolist(), abs=1e-12)
    given = selectivity_given(fired[:, :2], digit, 10, y=parity, n_classes=2)
    assert given["u_weighted"] == pytest.approx((100 * 0.5 * inside / h_b + 0) / 600)
    assert given["information"] == pytest.approx(0.5 * inside)


def test_information_is_not_raised_by_firing_rarely():
    """A unit that fires on one example has a larger u than one that fires on a quarter of all examples and on three
    quarters of a digit's, and tells less.
    """
    digit = torch.arange(10).repeat(100)
    rare = torch.zeros(1000, dtype=torch.bool)
    rare[1] = True
    broad = torch.arange(1000) // 10 % 4 < torch.where(digit == 1, 3, 1)
    u, information = (uncertainty_given(torch.stack([rare, broad], 1), digit, 10, y=digit % 2, n_classes=2)[key]
                      for key in ("u", "information"))
    assert u[0] > u[1] and information[0] < 0.1 * information[1]


def test_u_given_is_the_conditional_information_and_chance_is_zero():
    """With a label that is no function of the attribute too; firing at random has a positive plug-in u and an adjusted
    one of 0.
    """
    g = np.random.default_rng(0)
    y, a = g.integers(0, 3, 400), g.integers(0, 4, 400)
    b = g.random((400, 60)) < 0.15
    b[:, 0] = (a == 1) & (y != 0)
    scores = uncertainty_given(torch.from_numpy(b), torch.from_numpy(a), 4, y=torch.from_numpy(y), n_classes=3)
    for j in (0, 1):
        expected = mutual_info_score(4 * y + a, b[:, j]) - mutual_info_score(y, b[:, j])
        assert scores["u"][j].item() == pytest.approx(expected / mutual_info_score(b[:, j], b[:, j]), abs=1e-10)
    assert scores["u"][1:].mean().item() > 0.02 > abs(scores["u_adj"][1:].mean().item()) and scores["u_adj"][0] > 0.4


def test_u_weighted_by_firing():
    """Latents count as often as they fire: 0.5 * 100 firings of a perfect one, the rest says nothing."""
    y = torch.tensor([0, 1]).repeat(100)
    half = torch.arange(200) % 4 < 2  # independent of y
    rare = torch.zeros(200, dtype=torch.bool)
    rare[0] = True
    fired = torch.stack([y == 0, half, rare, torch.zeros(200).bool()], 1)
    result = selectivity(fired.float(), fired, y, 2)
    once = uncertainty(rare[:, None], y, 2)["u"].item()
    assert result["u_weighted"] == pytest.approx((100 * 1 + 100 * 0 + 1 * once) / 201)
    more_dead = torch.cat([fired, torch.zeros(200, 5).bool()], 1)
    assert selectivity(more_dead.float(), more_dead, y, 2)["u_weighted"] == result["u_weighted"]
    assert selectivity(torch.zeros(200, 2), torch.zeros(200, 2).bool(), y, 2)["u_weighted"] == 0


def test_base_threshold_is_the_upper_quartile():
    h = torch.stack([torch.arange(101.0), torch.zeros(101)], 1)
    assert base_threshold(h).tolist() == [75.0, 0.0]


def letters_with_absorption(absorbed: bool):
    """Tokens of letters 0 and 1; latent 0 tells letter 0, but for half of its test tokens latent 2 takes over."""
    n = 240
    g = torch.Generator().manual_seed(0)
    letters, splits = torch.arange(n) % 2, (torch.arange(n) // 2) % 3
    dictionary = torch.eye(4)
    x = 0.01 * torch.randn(n, 4, generator=g)
    x[:, 0] += torch.where(letters == 0, 1.0, -1.0)
    indices = torch.zeros(n, 1, dtype=torch.long)
    values = (letters == 0).float()[:, None]
    if absorbed:
        taken = (letters == 0) & (splits == 2) & (torch.arange(n) % 4 == 0)
        indices[taken] = 2
        dictionary[2] = torch.tensor([1.0, 0, 0, 0])
    indices[letters == 1], values[letters == 1] = 1, 1.0
    return x, values, indices, dictionary, letters, splits


def test_absorption_is_left_out_where_it_would_be_noise():
    assert absorption(*letters_with_absorption(False)) == {"n_letters": 2, "n_tokens": 80}


def test_absorption_is_zero_without_and_half_with_it(monkeypatch):
    monkeypatch.setattr(interpretability, "MIN_LETTERS", 2)
    monkeypatch.setattr(interpretability, "MIN_TOKENS", 80)
    clean = absorption(*letters_with_absorption(False))
    assert clean["score"] == 0 and clean["n_letters"] == 2 and clean["n_tokens"] == 80
    taken = absorption(*letters_with_absorption(True))
    assert taken["score"] == pytest.approx(0.25)  # letter 0: half of the tokens are fully absorbed; letter 1: none
    x, values, indices, *rest = letters_with_absorption(True)
    free = torch.zeros_like(values)  # a slot that did not fire may name a latent that did
    padded = absorption(x, torch.cat([values, free], 1), torch.cat([indices, free.long()], 1), *rest)
    assert padded["score"] == taken["score"]


def test_absorption_without_letters():
    x, values, indices, dictionary, letters, splits = letters_with_absorption(False)
    assert absorption(x, values, indices, dictionary, torch.full_like(letters, -1), splits)["n_letters"] == 0
