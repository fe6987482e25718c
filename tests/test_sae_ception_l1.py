"""The paper's SAE: its loss, the same function as lib.sae has it, trained after the classifier or along with it."""
import pytest
import torch
from test_sae_ception_cycles import cycle, defaults, digits  # noqa: F401
from test_sae_ception_targets import DENSE, INDICES, VALUES, Y, dense

from cycles.acting import make_targets
from cycles.l1_sae import L1Training
from cycles.modules import trained_state
from cycles.scored import dense_codes
from cycles.session import Session
from cycles.stamps import stage_constants
from cycles.steps import train_cycle_sae, train_model
from cycles.targets import Source, targets
from lib.environment import InputError
from lib.metrics.reconstruction import explained_variance
from lib.sae import load_sae, make_sae, save_sae

L1 = {"SAE_KIND": "l1", "KEEP_PCT": 10.0, "SAE_LR": None}


def rows(n=300, width=6):
    """Positive rows far from the origin, as those after a ReLU are."""
    g = torch.Generator().manual_seed(0)
    return (torch.randn(n, 3, generator=g) @ torch.randn(3, width, generator=g)).relu() + 4


def test_the_loss_is_the_papers():
    training = L1Training(2, 3, 0, l1=0.75)
    with torch.no_grad():
        training.encoder.weight.copy_(torch.tensor([[1.0, 0], [0, 1], [-1, 0]]))
        training.encoder.bias.copy_(torch.tensor([0.0, 1, 0]))
        training.decoder.weight.copy_(torch.tensor([[1.0, 0, 5], [0, 2, 5]]))
        training.decoder.bias.copy_(torch.tensor([0.5, 0]))
    h = torch.tensor([[2.0, 3.0]], requires_grad=True)  # codes 2, 4, 0; decoded 2.5, 8
    loss = training.loss(h)
    assert loss.item() == pytest.approx((0.25 + 25) / 2 + 0.75 * 6 / 3)
    loss.backward()
    assert h.grad is None and training.encoder.weight.grad.abs().sum() > 0  # the classifier feels nothing of it


def test_the_saved_sae_is_the_same_function(tmp_path):
    training, h = L1Training(6, 20, 1, l1=0.1, lr=1e-2), rows()
    training.epochs(h, 3, 32, seed=0)
    sae = training.sae()
    save_sae(sae, tmp_path / "sae.pt", h)
    sae = load_sae(tmp_path / "sae.pt", "cpu")
    with torch.no_grad():
        z = training.encoder(h).relu()
        assert torch.allclose(sae.decode(*sae.encode(h)), training.decoder(z), atol=1e-4)
    assert torch.allclose(dense_codes(sae, h) / torch.tensor(sae.config["decoder_norm"]), z, atol=1e-4)
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(20), atol=1e-6)


def test_it_learns_and_the_penalty_makes_it_sparse():
    h, found = rows(), {}
    for l1 in (1e-6, 0.5):
        training = L1Training(6, 30, 0, l1=l1, lr=1e-2)
        training.epochs(h, 60, 32, seed=0)
        sae = training.sae()
        fires = (dense_codes(sae, h) > 0).sum(1).double().mean().item()
        found[l1] = explained_variance(h, sae.decode(*sae.encode(h))), fires
    assert found[1e-6][0] > 0.95 and found[0.5][1] < 0.7 * found[1e-6][1], found


def test_latents_are_ranked_by_the_papers_codes():
    """Codes carry the lengths of the dictionary's rows, which the paper's ranking does not know."""
    def kept(unit):
        made = Source(h=DENSE, values=VALUES, indices=INDICES, y=Y, ids=torch.arange(4), decode=dense, n_classes=2,
                      n_latents=4, keep=1, keep_per_example=1, seed=0, unit=unit)
        return targets("per_class", made)[0]

    assert (kept(None)[:2] > 0).any(0).tolist() == [True, False, False, False]  # means 3, .5, 0, 3: the lower of two
    assert (kept(torch.tensor([10.0, 1, 1, 1]))[:2] > 0).any(0).tolist() == [False, False, False, True]


def test_dense_codes_of_many_rows_with_thresholds():
    """Blocks of rows are padded to the widest; the padding names latent 0, whose code must stay."""
    weights = torch.eye(4)
    sae = make_sae(weights, torch.zeros(4), weights, mean=torch.zeros(4), scale=1.0, top_k=4, threshold=torch.zeros(4))
    h = torch.zeros(5000, 4)
    h[:, 0] = 2.0
    h[4500, 1:] = 1.0  # the second block has wider rows
    assert torch.equal(dense_codes(sae, h), h)


@pytest.mark.parametrize("given,said", [
    ({"SAE_TRAINED": "along", "SAE_KIND": "topk"}, "for SAE_KIND=l1"),
    ({"SAE_KIND": "l1", "SAE_TRAINED": "along", "SELECT_EPOCH": "best"}, "SELECT_EPOCH=last"),
    ({"SAE_KIND": "relu"}, "must be one of topk, l1"),
])
def test_saes_that_can_not_be_trained_are_refused(digits, given, said):  # noqa: F811
    with pytest.raises(InputError, match=said):
        Session(digits | given, 0)


def test_texts_need_their_pooled_position(defaults):  # noqa: F811
    with pytest.raises(InputError, match="SAE_POSITIONS=pooled"):
        Session(defaults[0] | {"SAE_KIND": "l1"}, 0)


def test_along_with_the_classifier(digits, monkeypatch):  # noqa: F811
    """One step for each of the classifier's batches, which end with the same weights; with `after` another SAE."""
    steps = []
    step = L1Training.step
    monkeypatch.setattr(L1Training, "step", lambda self, h: (steps.append(len(h)), step(self, h)))
    found = {}
    for trained, setting in (("along", "a"), ("along", "b"), ("after", "c")):
        session = Session(digits | L1 | {"SAE_TRAINED": trained, "SETTING": setting}, 0)
        for arm, n in (("baseline", 0), ("per_class", 1)):
            train_model(session, arm, n)
            before = trained_state(session.model)
            steps.clear()
            train_cycle_sae(session, arm, n)
            assert all(torch.equal(before[name], value) for name, value in trained_state(session.model).items())
            if trained == "along":
                assert sum(steps) == 2 * 1077 and set(steps) == {64, 1077 % 64}
            found[setting, n] = session.sae(arm, n)
    for n in (0, 1):
        assert torch.equal(found["a", n].W_enc, found["b", n].W_enc)
        assert not torch.equal(found["a", n].W_enc, found["c", n].W_enc)
    assert found["a", 0].threshold is not None and found["a", 0].top_k == 256


def test_training_along_that_ends_elsewhere_is_refused(digits):  # noqa: F811
    session = Session(digits | L1 | {"SAE_TRAINED": "along"}, 0)
    train_model(session, "baseline", 0)
    session.initial["layers.0.bias"] += 0.1  # as another machine's last bits would
    with pytest.raises(InputError, match="SAE_TRAINED=after"):
        train_cycle_sae(session, "baseline", 0)


def test_arms_on_the_papers_sae(digits):  # noqa: F811
    """The centre is the mean activation, not b_dec; the half of the codes is the half of those that fire."""
    session = Session(digits | L1 | {"AUX_CENTRED": True, "METRICS": ()}, 0)
    assert cycle(session, "baseline", 0)["test"]["sparsity_l0_mean"] > 8
    h, _ = session.outputs(session.task.splits["train"])
    for arm in ("per_class", "per_example", "untrained_sae"):
        made, share = make_targets(session, arm, 0, stage_constants(session.c, "aux", arm))
        assert torch.allclose(made.centre, h.mean(0), atol=1e-4) and 0 < share["kept_codes_frac"] < 1
        assert torch.isfinite(made.t).all()
    assert cycle(session, "per_class", 1)["val"]["aux_grad_ratio"] > 0


def test_the_papers_preset(defaults):  # noqa: F811
    paper = defaults[1]["paper"]
    assert (paper["AUX_WEIGHT"], paper["SAE_KIND"], paper["SAE_TRAINED"]) == ((0.14, 0.06, 0.18), "l1", "along")
    assert 16 * paper["N_LATENTS_MULTIPLIER"] * paper["KEEP_PCT"] // 100 == 25
