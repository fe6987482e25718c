"""FGSM and PGD on a linear model, whose worst case has a closed form, and their budgets."""
import pytest
import torch

from lib.metrics.robustness import active_jaccard, fgsm
from lib.metrics.robustness import pgd as seeded_pgd


def pgd(*args, seed=0, **options):
    return seeded_pgd(*args, generator=torch.Generator().manual_seed(seed), **options)


def linear(weight):
    return lambda x: x.flatten(1) @ weight.T


def example():
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 10, generator=g)
    x = torch.rand(200, 10, generator=g)
    return weight, x, linear(weight)(x).argmax(1)


@pytest.mark.parametrize("attack", [fgsm, pgd])
def test_linf_on_a_linear_model_is_the_closed_form(attack):
    """A two-class linear margin falls by exactly eps |w1 - w0|_1."""
    weight, x, y = example()
    moved = attack(linear(weight), x, y, 0.03)
    difference = weight[1] - weight[0]
    sign = torch.where(y == 1, 1.0, -1.0)
    margins = [sign * (rows @ difference) for rows in (x, moved)]
    assert torch.allclose(margins[0] - margins[1], 0.03 * difference.abs().sum().expand(200), atol=1e-4)


def test_l2_moves_each_masked_token_by_eps_and_no_other():
    g = torch.Generator().manual_seed(0)
    x, weight, mask = torch.randn(4, 3, 5, generator=g), torch.randn(2, 15, generator=g), torch.tensor([[1, 1, 0]] * 4)
    y = torch.tensor([0, 1, 0, 1])
    for attack in (fgsm, pgd):
        length = (attack(linear(weight), x, y, 0.2, norm="l2", mask=mask) - x).norm(dim=-1)
        assert torch.allclose(length[:, :2], torch.full((4, 2), 0.2), atol=1e-4) and (length[:, 2] == 0).all()


def test_pgd_is_at_least_as_strong_and_a_large_budget_wins():
    g = torch.Generator().manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(10, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=g))
    x = torch.rand(300, 10, generator=g)
    y = net(x).argmax(1)
    state = torch.random.get_rng_state()
    accuracy = {}
    for name, attack, eps in (("fgsm", fgsm, 0.1), ("pgd", pgd, 0.1), ("large", pgd, 3.0)):
        accuracy[name] = (net(attack(net, x, y, eps)).argmax(1) == y).double().mean().item()
    assert accuracy["pgd"] <= accuracy["fgsm"] < 1 and accuracy["large"] == 0
    assert torch.equal(pgd(net, x, y, 0.1, seed=5), pgd(net, x, y, 0.1, seed=5))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(p.grad is None for p in net.parameters())


def test_bounds_are_kept():
    weight, x, y = example()
    for attack in (fgsm, pgd):
        moved = attack(linear(weight), x, y, 0.5, bounds=(0.0, 1.0))
        assert moved.min() >= 0 and moved.max() <= 1 and (moved - x).abs().max() <= 0.5 + 1e-6


def test_jaccard():
    a, b = torch.tensor([[1.0, 2, 0], [0, 0, 0], [1, 0, 0]]), torch.tensor([[3.0, 0, 1], [0, 0, 0], [0, 1, 0]])
    assert active_jaccard(a, b).tolist() == pytest.approx([1 / 3, 1, 0])
