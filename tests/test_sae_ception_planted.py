"""Wrong labels and a shortcut, planted by seed: how many, where, and in which splits."""
import pytest
import torch
from test_sae_ception_cycles import defaults, digits  # noqa: F401

from cycles.planted import BLOCK
from cycles.session import Session
from cycles.sources import load_task
from lib.environment import InputError


@pytest.fixture
def two_groups(digits):  # noqa: F811
    return digits | {"LABEL_GROUPS": (0, 1) * 5}


def test_a_share_of_the_training_labels_is_wrong(digits):  # noqa: F811
    clean, noisy = (load_task(digits | {"LABEL_NOISE": share}, seed=3) for share in (0.0, 0.25))
    wrong = clean.y != noisy.y
    train = clean.splits["train"]
    assert int(wrong.sum()) == int(wrong[train].sum()) == round(0.25 * len(train))
    assert torch.bincount(noisy.y[wrong], minlength=10).min() > 0
    again = load_task(digits | {"LABEL_NOISE": 0.25}, seed=3)
    assert torch.equal(noisy.y, again.y)
    other = load_task(digits | {"LABEL_NOISE": 0.25}, seed=4)
    assert not torch.equal(noisy.y, other.y)


def test_the_shortcut_names_the_class_in_training_and_nothing_at_test(two_groups):
    task = load_task(two_groups | {"SHORTCUT": 0.9}, seed=0)
    agrees = task.shortcut == task.y
    assert torch.equal(task.attribute, task.shortcut)
    train, test = task.splits["train"], task.splits["test"]
    assert agrees[train].double().mean().item() == pytest.approx(0.9, abs=0.02)
    assert agrees[test].double().mean().item() == pytest.approx(0.5, abs=0.1)
    corner = task.images.view(-1, 8, 8)[:, :BLOCK, : 2 * BLOCK]
    assert torch.equal(corner[:, :, BLOCK:].flatten(1).min(1).values == task.images.max(), task.shortcut == 1)
    assert torch.equal(corner[:, :, :BLOCK].flatten(1).max(1).values == 0, task.shortcut == 1)
    plain = load_task(two_groups, seed=0)
    assert torch.equal(task.images.view(-1, 8, 8)[:, BLOCK:], plain.images.view(-1, 8, 8)[:, BLOCK:])


def test_a_shortcut_needs_room(digits):  # noqa: F811
    with pytest.raises(InputError, match="at least 20 pixels a side"):
        load_task(digits | {"SHORTCUT": 0.9}, seed=0)


def test_the_worst_group_and_the_probe_within_a_class_are_scored(two_groups):
    from cycles.steps import evaluate_cycle, train_cycle_sae, train_model

    session = Session(two_groups | {"SHORTCUT": 0.9, "METRICS": ("beyond",), "SETTING": "planted"}, 0)
    for step in (train_model, train_cycle_sae):
        step(session, "baseline", 0)
    found = evaluate_cycle(session, "baseline", 0)["test"]
    assert found["task_worst_group_accuracy"] <= found["task_accuracy"]
    for place in ("base", "sae_features"):
        assert 0 <= found[f"{place}_probe_within_majority"] < found[f"{place}_probe_within_accuracy"] <= 1
        assert found[f"{place}_information_attribute_given_label"] > 0
