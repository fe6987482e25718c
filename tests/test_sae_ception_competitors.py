"""Arms without targets: penalties on the activations, ablation while training, weight decay; and the other losses."""
import pytest
import torch
from test_sae_ception_gates import image_task, text_model, text_task

from cycles.ablation import Ablation, telling_latents
from cycles.auxiliary import Penalty, Targets, probe
from cycles.examples import outputs
from cycles.fine_tuning import TuneSettings, fine_tune
from cycles.modules import MLP, trained_state
from cycles.penalties import TEMPERATURE, Frozen, contrastive_loss, mean_absolute, mono_scores, penalty
from lib.environment import InputError


def rows(n=12, width=5, seed=0):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of(arm, task, model):
    """The penalty of an arm on a small task, with the untrained model's activations as embeddings."""
    h, _ = outputs(model, task, torch.arange(len(task.y)), 16)
    return Penalty(penalty(arm, Frozen(y=task.y, embedding=lambda ids: h[ids])))


def test_mean_absolute_activation():
    assert mean_absolute(torch.tensor([[1.0, -3.0], [0.0, 2.0]])).item() == 1.5


def test_mono_scores_are_the_mean_similarity_over_pairs():
    """Against the sum over all pairs, written out."""
    h, e = rows(), rows(width=3, seed=1)
    unit = e / e.norm(dim=1, keepdim=True)
    a = (h - h.amin(0)) / (h.amax(0) - h.amin(0))
    pairs = [(i, j) for i in range(12) for j in range(i + 1, 12)]
    top = sum(a[i] * a[j] * (unit[i] @ unit[j]) for i, j in pairs)
    expected = top / sum(a[i] * a[j] for i, j in pairs)
    assert torch.allclose(mono_scores(h, e), expected, atol=1e-6)
    assert torch.allclose(mono_scores(3 * h + 7, 5 * e), expected, atol=1e-6)  # neither scale nor offset counts


def test_mono_scores_closed_form():
    e = torch.tensor([[1.0, 0], [1, 0], [0, 1], [-1, 0]])
    h = torch.tensor([[2.0, 2, 2, 1, 5], [2, 0, 0, 1, 0], [0, 2, 0, 1, 0], [0, 0, 2, 1, 0]])
    # fires on the same thing twice; on two that are at right angles; on opposites; always; on one example only
    assert mono_scores(h, e).tolist() == pytest.approx([1, 0, -1, 0, 0], abs=1e-5)


def test_contrastive_loss_closed_form():
    h, y = torch.eye(2).repeat_interleave(2, 0), torch.tensor([0, 0, 1, 1])
    near = torch.tensor(1 / TEMPERATURE)
    assert contrastive_loss(h, y).item() == pytest.approx((near.exp() + 2).log().item() - near.item(), rel=1e-5)
    assert contrastive_loss(7 * h - torch.tensor([[0, 4.0], [0, 1], [2, 0], [9, 0]]), y).item() == pytest.approx(
        contrastive_loss(h, y).item(), rel=1e-5)  # neither length nor what the ReLU cuts off counts
    apart = torch.tensor([0, 1, 0, 1])
    assert contrastive_loss(h, apart).item() == pytest.approx((near.exp() + 2).log().item(), rel=1e-5)
    alone = torch.cat([h, torch.ones(1, 2)]), torch.cat([y, torch.tensor([2])])
    z = torch.nn.functional.normalize(alone[0], dim=1)
    scores = (z @ z.T / TEMPERATURE).exp().fill_diagonal_(0)
    expected = -sum((scores[i, i ^ 1] / scores[i].sum()).log() for i in range(4)) / 4
    assert contrastive_loss(*alone).item() == pytest.approx(expected.item(), rel=1e-5)  # a row alone is a negative only


def test_a_batch_without_pairs_costs_nothing():
    h = torch.rand(3, 4, requires_grad=True)
    contrastive_loss(h, torch.arange(3)).backward()
    assert h.grad.abs().sum() == 0
    assert torch.isfinite(mono_scores(h[:1], h[:1])).all() and torch.isfinite(contrastive_loss(0 * h, torch.zeros(3)))


def slope(p, loss):
    """dloss/dp by finite difference, times the sign of the gradient, at the weight where that is steepest."""
    at, values = int(p.grad.abs().argmax()), []
    with torch.no_grad():
        for sign in (1, -1):
            p.view(-1)[at] += sign * 1e-6
            values.append(loss().item())
            p.view(-1)[at] -= sign * 1e-6
    return (values[0] - values[1]) / 2e-6 * float(p.grad.view(-1)[at].sign())


@pytest.mark.parametrize("arm", ["l1_activation", "monoloss", "nonneg_contrastive"])
def test_a_penalty_has_a_live_gradient(arm):
    """It reaches the target layer and below, equals a finite difference, and is nothing after the layer."""
    task, model = image_task(), MLP(6, 3, "layers.1", 0).double()
    made, ids = of(arm, task, MLP(6, 3, "layers.1", 1)), torch.arange(24)
    batch = {"x": task.images[ids].double()}
    loss = lambda: made.loss(model(batch)[0], ids).mean()  # noqa: E731
    loss().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert reached == {"layers.0.weight", "layers.0.bias"}
    weight = model.layers[0].weight
    assert slope(weight, loss) == pytest.approx(float(weight.grad.abs().max()), rel=1e-4)


@pytest.mark.parametrize("arm", ["l1_activation", "monoloss", "nonneg_contrastive"])
def test_a_penalty_falls_below_what_the_task_alone_reaches(arm):
    ends = []
    for weight in (0.0, 1.0):
        task, model = image_task(), MLP(6, 3, "layers.1", 0)
        made = of(arm, task, MLP(6, 3, "layers.1", 0))
        found = fine_tune(model, task, TuneSettings(epochs=10, batch_size=16, lr=0.01, aux_weight=weight), made)["aux"]
        ends.append(found["loss_end"])
        assert not any(name.startswith("cos") for name in found) and (found["grad_ratio"] > 0) == (weight > 0)
    assert ends[1] < ends[0] - 0.01


@pytest.mark.parametrize("arm", ["l1_activation", "monoloss", "nonneg_contrastive"])
def test_a_penalty_of_weight_0_changes_no_bit(arm):
    states = []
    for made in (None, arm):
        task, model = image_task(), MLP(6, 3, "layers.1", 0)
        made = made and of(arm, task, MLP(6, 3, "layers.1", 1))
        fine_tune(model, task, TuneSettings(2, batch_size=16, lr=0.01), made)
        states.append(trained_state(model))
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())


def test_unknown_penalties_are_refused():
    with pytest.raises(InputError, match="no penalty"):
        penalty("per_class", Frozen(y=torch.zeros(1), embedding=lambda ids: ids))


def test_squared_error_is_in_units_of_the_variance():
    h, t = torch.tensor([[1.0, 2.0]], requires_grad=True), torch.tensor([[0.0, 5.0]])
    made = Targets(torch.tensor([4]), t, None, variance=2.0)
    loss = made.loss(h, torch.tensor([4]))
    assert loss.item() == 2.5  # (1 + 9) / 2 / 2
    loss.sum().backward()
    assert h.grad.tolist() == [[0.5, -1.5]]  # 2 (h - t) / (2 * 2)
    assert made.distance(h, torch.tensor([4])).item() == pytest.approx(1 - 10 / (5 * 5**0.5))
    assert Targets(torch.tensor([4]), t).loss(h, torch.tensor([4])).item() == pytest.approx(1 - 10 / (5 * 5**0.5))


def test_weight_decay_is_decoupled():
    """After one step two trainings differ by lr * lambda * weight and nothing else."""
    states = []
    for decay in (0.0, 3.0):
        task, model = image_task(), MLP(6, 3, "layers.1", 0)
        before = trained_state(model)
        fine_tune(model, task, TuneSettings(1, batch_size=80, lr=0.01, optimizer="adamw", weight_decay=decay))
        states.append(trained_state(model))
    for name, start in before.items():
        assert torch.allclose(states[0][name] - states[1][name], 0.01 * 3.0 * start, atol=1e-6)


def test_telling_latents_know_the_attribute_beyond_the_label():
    n = 400
    y, attribute = torch.arange(n) % 2, (torch.arange(n) // 2) % 2
    codes = torch.zeros(n, 5)
    codes[:, 0] = y  # the label itself
    codes[:, 1] = attribute
    codes[:, 2] = attribute * (torch.arange(n) % 3 > 0)  # the attribute, not always
    codes[:4, 3] = attribute[:4]  # hardly ever
    assert telling_latents(codes, attribute, 2, y=y).tolist() == [1, 2]
    assert telling_latents(codes, attribute, 5, y=y).tolist() == [1, 2, 3]  # the others tell nothing
    with pytest.raises(InputError, match="another ATTRIBUTE_FIELD"):
        telling_latents(codes[:, [0, 4]], attribute, 2, y=y)


def test_ablation_takes_the_subspace_out_while_training_only():
    model, task = MLP(6, 3, "layers.1", 0).double(), image_task()
    batch, ids = {"x": task.images[:8].double()}, torch.arange(8)
    directions = rows(3, 16)
    h, logits = (x.detach() for x in model(batch))
    q = torch.linalg.qr(directions.T)[0]
    made = Ablation(directions, 1.0)
    assert torch.allclose(made.part(h), h @ q @ q.T, atol=1e-5)
    assert torch.allclose(made.loss(h, ids), (h @ q).square().sum(1) / h.square().sum(1), atol=1e-5)
    with made.while_training(model):
        ablated, changed = model(batch)
    assert torch.allclose(ablated, h - h @ q @ q.T, atol=1e-5)
    assert torch.allclose(changed, model.layers[2:](h - h @ q @ q.T), atol=1e-5)
    assert torch.equal(model(batch)[1], logits)
    half = Ablation(directions, 0.5)
    with half.while_training(model):
        assert torch.allclose(model(batch)[0], h - 0.5 * h @ q @ q.T, atol=1e-5)
    # directions that repeat span no more
    assert Ablation(torch.cat([directions, directions]), 1.0).basis.shape == (16, 3)


def test_ablation_has_a_live_gradient_outside_the_subspace_only():
    """The task loss pulls nothing along the ablated directions, and below the layer its gradient is exact."""
    model, task = MLP(6, 3, "layers.1", 0).double(), image_task()
    made = Ablation(rows(3, 16), 1.0)
    batch, y = {"x": task.images[:16].double()}, task.y[:16]

    def loss():
        with made.while_training(model):
            return torch.nn.functional.cross_entropy(model(batch)[1], y)

    loss().backward()
    head = model.layers[2].weight.grad
    assert head.abs().sum() > 0 and torch.allclose(head @ made.basis.double(), torch.zeros(16, 3).double(), atol=1e-6)
    weight = model.layers[0].weight
    assert slope(weight, loss) == pytest.approx(float(weight.grad.abs().max()), rel=1e-4)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_ablation_in_a_language_model(checkpointed):
    """Every token's output of the target block is projected, also where the backward pass computes it again."""
    model, task = text_model("llama"), text_task()
    if checkpointed:
        model.lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    made = Ablation(rows(3, 16).float(), 1.0)
    ids = task.splits["train"]
    settings = TuneSettings(1, batch_size=16, lr=0.01, aux_weight=1.0)
    plain, ablated = text_model("llama"), text_model("llama")
    for tuned, targets in ((model, made), (ablated, made), (plain, None)):
        fine_tune(tuned, task, settings, targets)
    states = [trained_state(tuned) for tuned in (model, ablated, plain)]
    assert all(torch.allclose(states[0][name], states[1][name], atol=1e-6) for name in states[0])
    assert any(not torch.equal(states[1][name], states[2][name]) for name in states[0])
    with made.while_training(model), torch.no_grad():
        assert made.part(model(task.batch(ids[:4]))[0]).abs().max() < 1e-5


def test_an_ablated_shortcut_is_not_learnt():
    """What the network finds on the ablated directions can't decide its answer, so that removing it later costs less.

    Input 0 gives the class away in training; inputs 3 to 5 tell it too. The first layer is the identity, frozen.
    """
    found = []
    for share in (0.0, 1.0):
        task, model = image_task(), MLP(6, 3, "layers.1", 0)
        task.images[:, 0] = 3.0 * task.y
        with torch.no_grad():
            model.layers[0].weight.copy_(torch.eye(16, 6))
            model.layers[0].bias.zero_()
        model.layers[0].requires_grad_(False)
        made = Ablation(torch.eye(16)[:1], share)
        history = fine_tune(model, task, TuneSettings(30, batch_size=16, lr=0.02, aux_weight=share), made)
        hidden = task.images[100:].clone()
        hidden[:, 0] = 0
        found.append((model({"x": hidden})[1].argmax(1) == task.y[100:]).double().mean().item())
        assert history["aux"]["grad_ratio"] == 0
    assert found[1] > found[0] + 0.2


@pytest.mark.parametrize("share,n,said", [(1.5, 2, "from 0 to 1"), (-0.1, 2, "from 0 to 1"), (1.0, 16, "lower KEEP")])
def test_ablations_that_can_not_be_are_refused(share, n, said):
    with pytest.raises(InputError, match=said):
        Ablation(torch.eye(16)[:n], share)


def test_the_probe_of_an_arm_without_gradient_says_so():
    task, model = image_task(), MLP(6, 3, "layers.1", 0)
    found = probe(model, task, Ablation(torch.eye(16)[:2], 1.0), TuneSettings(1, aux_weight=1.0))
    assert found["grad_ratio"] == 0 and 0 < found["loss"] < 1 and "cos" not in found
