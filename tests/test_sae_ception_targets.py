"""Targets of all arms: exact sets on toy codes, ties, no-ops, random streams."""
from dataclasses import replace

import pytest
import torch

from cycles.arms import ARMS
from cycles.sharpening import (
    class_masks,
    class_means,
    contrast,
    derangement,
    derangement_in_class,
    n_kept,
    per_class,
    per_example,
    random_unit,
)
from cycles.targets import MAKERS, Source, random_sae, targets
from lib.environment import InputError
from lib.sae import make_sae

# four latents; classes 0, 0, 1, 1. Latent 3 is on everywhere, so it is in every per_class mask, but in no contrast mask
DENSE = torch.tensor([[4.0, 0, 0, 3], [2, 1, 0, 3], [0, 0, 5, 3], [0, 1, 1, 3]])
Y = torch.tensor([0, 0, 1, 1])
CENTRE = torch.tensor([30.0, -20.0, 10.0, 5.0])  # far from the origin, as a mean activation is
INDICES = torch.tensor([[3, 2, 1, 0]] * 4)
VALUES = DENSE.gather(1, INDICES)


def dense(values, indices=INDICES):
    return torch.zeros(len(values), 4).scatter_(1, indices, values)


def make_targets(arm, ids=torch.arange(4), seed=0, centre=CENTRE, keep=2):
    return targets(arm, Source(h=DENSE, values=VALUES, indices=INDICES, y=Y, ids=ids, decode=dense, n_classes=2,
                               n_latents=4, keep=keep, keep_per_example=1, seed=seed, centre=centre))


def codes(arm, keep=2, seed=0):
    """The codes that an arm's targets decode: here decoding only makes them dense."""
    return make_targets(arm, keep=keep, seed=seed)[0]


def test_every_arm_of_the_table_that_pulls_has_its_targets():
    assert set(MAKERS) == {name for name, arm in ARMS.items() if arm.has_targets}


def test_n_kept_is_a_percentage():
    assert [n_kept(6144, 1.0), n_kept(256, 2.0), n_kept(256, 10.0), n_kept(256, 0.01)] == [61, 5, 25, 1]


def test_class_means_and_masks():
    means = class_means(VALUES, INDICES, Y, n_classes=2, n_latents=4)
    assert means.tolist() == [[3, 0.5, 0, 3], [0, 0.5, 3, 3]]
    assert class_masks(means, 1).tolist() == [[True, False, False, False], [False, False, True, False]]  # ties: lower
    assert class_masks(contrast(means), 1).tolist() == [[True, False, False, False], [False, False, True, False]]
    assert contrast(means)[:, 3].tolist() == [0, 0]


def test_per_class_keeps_exactly_the_mask():
    assert codes("per_class").tolist() == [[4, 0, 0, 3], [2, 0, 0, 3], [0, 0, 5, 3], [0, 0, 1, 3]]
    assert codes("complement").tolist() == [[0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]]
    assert codes("contrast", keep=1).tolist() == [[4, 0, 0, 0], [2, 0, 0, 0], [0, 0, 5, 0], [0, 0, 1, 0]]


def test_per_example_ignores_labels_and_breaks_ties_low():
    tied = torch.tensor([[2.0, 2.0, 1.0], [0.0, 3.0, 3.0]])
    at = torch.tensor([[7, 4, 9], [1, 6, 2]])
    assert per_example(tied, at, 1).tolist() == [[0, 2, 0], [0, 0, 3]]
    assert codes("per_example").tolist() == [[4, 0, 0, 0], [0, 0, 0, 3], [0, 0, 5, 0], [0, 0, 0, 3]]


def test_no_ops_raise():
    with pytest.raises(InputError, match="KEEP_PER_EXAMPLE"):
        per_example(VALUES, INDICES, 4)
    with pytest.raises(InputError, match="would keep 3 of at most 2 codes that fire"):  # an SAE with all its columns
        per_example(torch.tensor([[3.0, 2, 0, 0], [1, 0, 0, 0]]), torch.arange(4).expand(2, 4), 3)
    with pytest.raises(InputError, match="KEEP_PCT"):
        codes("per_class", keep=4)


def test_random_latents_keep_the_count_and_the_norm():
    method = codes("per_class")
    for seed in range(5):
        control = codes("random_latents", seed=seed)
        assert ((control != 0).sum(1) == (method != 0).sum(1)).all()
        assert torch.allclose(control.norm(dim=1), method.norm(dim=1))
        assert (DENSE[control != 0] > 0).all()
    assert any(not torch.equal(codes("random_latents", seed=s) != 0, method != 0) for s in range(5))


def test_shuffled_labels_use_true_masks():
    g = torch.Generator().manual_seed(0)
    n, f, k = 400, 20, 4
    y = torch.arange(n) % 2
    indices = torch.stack([torch.randperm(f, generator=g)[:k] for _ in range(n)])
    values = torch.rand(n, k, generator=g) + 3 * (indices % 2 == y[:, None])
    masks = class_masks(class_means(values, indices, y, n_classes=2, n_latents=f), 8)
    kept, _ = targets("shuffled_labels", Source(
        h=values, values=values, indices=indices, y=y, ids=torch.arange(n), decode=lambda v, i: v, n_classes=2,
        n_latents=f, keep=8, keep_per_example=1, seed=1))
    as_class = [(per_class(values, indices, torch.full_like(y, c), masks) == kept).all(1) for c in (0, 1)]
    assert (as_class[0] | as_class[1]).all()
    own = torch.where(y == 0, as_class[0], as_class[1]).double().mean()
    assert 0.3 < own < 0.7  # about half of the examples drew the mask of their own label


def test_derangements():
    g = torch.Generator().manual_seed(0)
    y = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    for _ in range(20):
        p, q = derangement(7, g), derangement_in_class(y, g)
        assert sorted(p.tolist()) == sorted(q.tolist()) == list(range(7))
        assert (p != torch.arange(7)).all() and (q != torch.arange(7)).all() and torch.equal(y[q], y)


def test_random_unit_is_fixed_per_example_and_leaves_the_global_stream():
    state = torch.random.get_rng_state()
    a = random_unit(torch.tensor([5, 2, 9]), 6, 42)
    b = random_unit(torch.tensor([9, 5, 2]), 6, 42)
    assert torch.equal(a, b[[1, 2, 0]]) and torch.allclose(a.norm(dim=1), torch.ones(3))
    assert not torch.equal(a, random_unit(torch.tensor([5, 2, 9]), 6, 43))
    for arm in MAKERS:
        make_targets(arm)
    assert torch.equal(state, torch.random.get_rng_state())


def test_targets_of_the_controls():
    method, share = make_targets("per_class")
    assert share["kept_codes_frac"] == pytest.approx(8 / 10)
    assert share["kept_energy_frac"] == pytest.approx(1 - 2 / DENSE.square().sum().item())
    assert torch.equal(make_targets("full_recon")[0], DENSE) and make_targets("full_recon")[1]["kept_codes_frac"] == 1
    assert (make_targets("constant", centre=None)[0] == 0).all()
    permuted = make_targets("permuted")[0]
    assert sorted(permuted.tolist()) == sorted(method.tolist()) and not torch.equal(permuted, method)
    assert torch.equal(make_targets("permuted_in_class")[0], method[[1, 0, 3, 2]])
    assert make_targets("class_mean")[0].tolist() == [[3, 0.5, 0, 3]] * 2 + [[0, 0.5, 3, 3]] * 2
    assert torch.equal(make_targets("permuted", seed=3)[0], make_targets("permuted", seed=3)[0])


def test_random_directions_are_random_about_the_centre():
    """Unit vectors about the origin, seen from a centre far away, are all the direction to the origin."""
    ids = torch.arange(200)
    h = CENTRE + torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    y = ids % 2
    codes = torch.ones(200, 2), torch.arange(2).expand(200, 2)
    source = Source(h=h, values=codes[0], indices=codes[1], y=y, ids=ids, decode=lambda v, i: v, n_classes=2,
                    n_latents=4, keep=1, keep_per_example=1, seed=0, centre=CENTRE)
    made = {arm: targets(arm, source)[0] - CENTRE for arm in ("random_unit", "constant", "to_zero")}
    expected = random_unit(ids, 4, 0)
    assert torch.allclose(torch.nn.functional.normalize(made["random_unit"]), expected, atol=1e-5)
    assert made["random_unit"].norm(dim=1)[0].item() == pytest.approx((h - CENTRE).square().sum(1).mean().sqrt().item(),
                                                                      rel=1e-4)
    to_origin = torch.nn.functional.cosine_similarity(made["random_unit"], -CENTRE[None])
    assert abs(to_origin.mean()) < 0.15 < to_origin.std()
    assert (made["constant"] == made["constant"][0]).all() and made["constant"][0].norm() > 1
    assert torch.equal(made["to_zero"], -CENTRE.expand(200, 4))
    assert torch.equal(make_targets("random_unit", centre=None)[0], random_unit(torch.arange(4), 4, 0))
    with pytest.raises(InputError, match="AUX_CENTRED=True"):
        make_targets("to_zero", centre=None)


def test_pca_targets_are_the_best_of_their_rank():
    """Nothing of the given rank about the mean is nearer: the error is the sum of the trailing eigenvalues."""
    h = torch.randn(200, 6, generator=torch.Generator().manual_seed(0)) @ torch.diag(torch.arange(1.0, 7)) + 20
    source = Source(h=h, values=VALUES, indices=INDICES, y=Y, ids=torch.arange(200), decode=dense, n_classes=2,
                    n_latents=4, keep=2, keep_per_example=1, seed=0)
    t, share = targets("pca_targets", source)
    spread = (h - h.mean(0)).double()
    values = torch.linalg.svdvals(spread).square()
    assert torch.linalg.matrix_rank((t - h.mean(0)).double(), rtol=1e-4) == 2
    assert (h - t).double().square().sum().item() == pytest.approx(values[2:].sum().item(), rel=1e-4)
    assert share["kept_energy_frac"] == pytest.approx((values[:2].sum() / values.sum()).item(), rel=1e-6)
    again = targets("pca_targets", replace(source, h=t))[0]
    assert torch.allclose(again, t, atol=1e-3)  # a projection
    with pytest.raises(InputError, match="lower KEEP_PCT"):
        targets("pca_targets", replace(source, keep=6))


def test_an_untrained_sae_has_learnt_nothing():
    g = torch.Generator().manual_seed(0)
    weights = torch.nn.functional.normalize(torch.randn(32, 6, generator=g))
    trained = make_sae(weights, torch.ones(32), weights, mean=torch.arange(6.0), scale=2.0, top_k=3)
    found = random_sae(trained, 7)
    assert (found.top_k, found.n_latents, found.scale) == (3, 32, 2.0) and torch.equal(found.mean, trained.mean)
    assert torch.allclose(found.W_dec.norm(dim=1), torch.ones(32), atol=1e-6) and not found.b_enc.any()
    assert (found.W_dec @ weights.T).abs().max(1).values.mean() < 0.95  # another dictionary
    assert torch.equal(found.W_dec, random_sae(trained, 7).W_dec) and not torch.equal(
        found.W_dec, random_sae(trained, 8).W_dec)
    x = torch.randn(5, 6, generator=g)
    expected = ((x - trained.mean) / 2.0 @ found.W_dec.T).relu().topk(3, dim=1)
    values, indices = found.encode(x)
    assert torch.allclose(values, expected.values, atol=1e-5) and torch.equal(indices, expected.indices)


def test_only_the_distance_and_the_sae_of_two_arms_are_others():
    assert torch.equal(make_targets("mse_loss")[0], make_targets("per_class")[0])
    assert torch.equal(make_targets("untrained_sae")[0], make_targets("per_class")[0])
    assert {name for name, arm in ARMS.items() if arm.loss == "mse"} == {"mse_loss"}
    assert {name for name, arm in ARMS.items() if arm.untrained_sae} == {"untrained_sae"}


@pytest.mark.parametrize("arm", ["lambda0", "nonsense", "caft"])
def test_arms_without_targets_raise(arm):
    with pytest.raises(InputError):
        make_targets(arm)
