"""The gates that any experiment must pass first: gradients, pairing, position, equality with task-only training."""
import pytest
import torch
import transformers
from conftest import TEXTS, tiny_model, word_tokenizer
from torch.nn.functional import cross_entropy

from cycles.auxiliary import Targets, auxiliary_loss, probe, probe_ids
from cycles.classifier import TextClassifier
from cycles.examples import Entries, make_batch, outputs, shuffled_batches
from cycles.fine_tuning import Checkpoint, TuneSettings, fine_tune, scheduled_lr
from cycles.modules import MLP, load_trained, trained_state
from cycles.sharpening import derangement
from cycles.tasks import Task
from lib.batches import rows_of_tensor
from lib.environment import InputError
from lib.texts import tokenise
from lib.training.loop import TrainSettings, train_sae

KINDS = ("llama", "gpt2", "neox", "bert")


def image_task(n=120, width=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    x = torch.rand(n, width, generator=g) + torch.eye(3).repeat(1, 2)[y]
    ids = torch.arange(n)
    return Task(y, 3, {"train": ids[:80], "val": ids[80:100], "test": ids[100:]}, images=x)


def text_task(n=24):
    texts = [TEXTS[i % len(TEXTS)] for i in range(n)]
    tokens = tokenise(word_tokenizer(), texts, 0, 16)
    ids = torch.arange(n)
    return Task(ids % 2, 2, {"train": ids[:16], "val": ids[16:20], "test": ids[20:]}, texts=texts, tokens=tokens)


def text_model(kind, layer="1", train_below=False, **extra):
    return TextClassifier(tiny_model(kind, **extra), 2, layer, seed=0, train_below=train_below)


def models_under_test():
    return [pytest.param(lambda: (MLP(6, 3, "layers.1", 0), image_task()), id="mlp")] + [
        pytest.param(lambda kind=kind: (text_model(kind), text_task()), id=kind) for kind in KINDS
    ]


@pytest.mark.parametrize("make", models_under_test())
def test_aux_gradient(make):
    """Live up to the target layer, equal to a finite difference, and exactly zero after it."""
    model, task = make()
    model.double().eval()
    batch = make_batch(task, task.splits["train"][:8], torch.device("cpu"))
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}

    def aux():
        h, _ = model(batch)
        return auxiliary_loss(h.double(), t).mean()

    t = torch.randn(8, model(batch)[0].shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = dict(zip(parameters, torch.autograd.grad(aux(), list(parameters.values()), allow_unused=True)))
    reached = {name for name, g in gradients.items() if g is not None and g.abs().sum() > 0}
    block = "layers.0." if isinstance(model, MLP) else f"{model.entry.path}."
    after = [name for name in parameters if not name.removeprefix("lm.").startswith(block)]
    assert after and not reached & set(after)
    name = max(reached, key=lambda n: gradients[n].abs().max())
    p, g = parameters[name], gradients[name]
    at = int(g.abs().argmax())
    step = 1e-4
    values = []
    with torch.no_grad():
        for sign in (1, -1):
            p.view(-1)[at] += sign * step
            values.append(aux().item())
            p.view(-1)[at] -= sign * step
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(g.view(-1)[at].item(), rel=2e-3)


@pytest.mark.parametrize("make", models_under_test())
def test_lambda0_equals_ce(make):
    """Weight 0 with targets in the loss trains to the same bits as no targets at all; weight 1 does not."""
    states = []
    for weight, with_targets in ((0.0, False), (0.0, True), (1.0, True)):
        model, task = make()
        width = model(make_batch(task, torch.arange(2), torch.device("cpu")))[0].shape[1]
        t = torch.randn(len(task.y), width, generator=torch.Generator().manual_seed(1))
        made = Targets(torch.arange(len(task.y)), t) if with_targets else None
        fine_tune(model, task, TuneSettings(epochs=2, batch_size=8, lr=0.01, aux_weight=weight), made)
        states.append(trained_state(model))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_target_pairing():
    """Targets come by example id: the order of the loader changes no example's loss, a permutation of targets does."""
    task = image_task()
    model = MLP(6, 3, "layers.1", 0)
    ids = task.splits["train"]
    h, _ = outputs(model, task, ids, 16)
    sae, _ = train_sae(rows_of_tensor(h, torch.arange(80) >= 64), TrainSettings(64, 8, epochs=60, batch_size=32),
                       progress=False)
    t = sae.decode(*sae.encode(h))
    order = torch.randperm(80, generator=torch.Generator().manual_seed(3))
    straight, shuffled = Targets(ids, t), Targets(ids[order], t[order])
    assert torch.equal(straight.at(ids, "cpu"), shuffled.at(ids, "cpu"))
    per_example = {}
    for seed in (0, 1):
        for part in shuffled_batches(task, ids, 7, seed=seed, epoch=0):
            rows = outputs(model, task, part, 7)[0]
            for i, loss in zip(part.tolist(), straight.loss(rows, part).tolist()):
                assert per_example.setdefault(i, loss) == pytest.approx(loss, abs=1e-6)
    permuted = Targets(ids, t[derangement(80, torch.Generator().manual_seed(0))])
    assert straight.loss(h, ids).mean() < 0.02 < permuted.loss(h, ids).mean()


def test_an_example_without_target_is_refused():
    with pytest.raises(InputError, match="no target"):
        Targets(torch.tensor([0, 2]), torch.ones(2, 3)).at(torch.tensor([1]), torch.device("cpu"))


@pytest.mark.parametrize("kind", KINDS)
def test_pooled_position_in_a_padded_batch(kind):
    """Alone or in a padded batch, an example has the same h and logits, read at its last token, or BERT's first."""
    model, task = text_model(kind).eval(), text_task()
    ids = torch.arange(6)
    batch = task.batch(ids)
    assert not batch["attention_mask"].all()
    with torch.no_grad():
        alone = [model(task.batch(ids[i : i + 1])) for i in range(6)]
        for together, apart in zip(model(batch), zip(*alone)):
            assert torch.allclose(together, torch.cat(apart), atol=1e-5)
    read = batch["input_ids"][ids, model.position(batch["attention_mask"], batch["input_ids"])].tolist()
    assert read == [task.tokens[i].ids[0 if kind == "bert" else -1] for i in range(6)]


def test_position_equals_the_task_heads():
    """The head of transformers' own classifier, with our weights, gives our logits: it reads the same token."""
    model, task = text_model("llama", layer="last").eval(), text_task()
    theirs = transformers.LlamaForSequenceClassification(model.lm.config).eval()
    theirs.model.load_state_dict(model.lm.model.state_dict())
    theirs.score.load_state_dict(model.head.state_dict())
    batch = task.batch(torch.arange(6))
    with torch.no_grad():
        ours = model(batch)[1]
        found = theirs(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert torch.allclose(ours, found, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_cached_entries_give_the_same_model(kind):
    """What a cached batch computes, and its gradients, are those of the whole model; frozen blocks are put back."""
    model, task = text_model(kind), text_task()
    model.eval()
    ids = torch.arange(10)
    states = model.token_states(task.batch(ids), model.entry)
    places, start = [], 0
    for state in states:
        places.append((0, start, start + len(state)))
        start += len(state)
    entries = Entries([torch.cat(states)], places)
    model.train()
    model.eval()
    some = torch.tensor([7, 2, 5])
    results = []
    for cache in (None, entries):
        batch = make_batch(task, some, torch.device("cpu"), cache)
        model.zero_grad()
        h, logits = model(batch)
        (cross_entropy(logits, batch["y"]) + h.square().mean()).backward()
        results.append((h, logits, *(p.grad.clone() for p in model.parameters() if p.grad is not None)))
    assert len(results[0]) == len(results[1]) > 3
    for a, b in zip(*results):
        assert torch.allclose(a, b, atol=1e-5)
    assert all("forward" not in block.__dict__ for block in model.frozen_blocks)


def test_what_is_frozen():
    model = text_model("gpt2")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {n.split(".")[3] for n in trained if ".h." in n} == {"1", "2"}
    assert "lm.transformer.ln_f.weight" in trained and "head.weight" in trained
    assert not any("wte" in n or "wpe" in n for n in trained)
    model.train()
    assert not model.lm.transformer.h[0].training and model.lm.transformer.h[1].training
    whole = TextClassifier(tiny_model("gpt2"), 2, "1", 0, train_below=True)
    assert any(".h.0." in name for name, p in whole.named_parameters() if p.requires_grad)


def test_the_target_layer_by_name_and_number():
    for name in ("last", "2", "-1", "resid_post:2", "model.layers.2", "llamaforcausallm_model_layers_2"):
        assert TextClassifier(tiny_model("llama"), 2, name, 0).target.path == "model.layers.2"
    with pytest.raises(InputError, match="nearest"):
        TextClassifier(tiny_model("llama"), 2, "model.layer.2", 0)


def test_gradient_checkpointing_changes_no_gradient():
    found = []
    for on in (False, True):
        model, task = text_model("neox"), text_task()
        if on:
            model.lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        h, logits = model(task.batch(torch.arange(4)))
        (logits.square().mean() + auxiliary_loss(h, torch.ones(4, 16)).mean()).backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found))


def test_mixed_precision_keeps_trained_weights_in_float32():
    model, task = TextClassifier(tiny_model("llama").to(torch.bfloat16), 2, "last", 0), text_task()
    fine_tune(model, task, TuneSettings(epochs=1, batch_size=8), Targets(torch.arange(24), torch.randn(24, 16), None))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_accumulation():
    """Two batches a step equal one batch of both, and the last, smaller group of an epoch steps too."""
    states = []
    for batch_size, accumulate in ((40, 1), (20, 2)):
        model, task = MLP(6, 3, "layers.1", 0), image_task()
        fine_tune(model, task, TuneSettings(epochs=1, batch_size=batch_size, accumulate=accumulate, lr=0.01))
        states.append(trained_state(model))
    assert all(torch.allclose(states[0][name], states[1][name], atol=1e-6) for name in states[0])
    task = image_task()
    task.splits["train"] = task.splits["train"][:20]
    model = MLP(6, 3, "layers.1", 0)
    before = trained_state(model)
    fine_tune(model, task, TuneSettings(epochs=1, batch_size=10, accumulate=8))  # two batches: less than one group
    assert not torch.equal(before["layers.0.weight"], trained_state(model)["layers.0.weight"])


@pytest.mark.parametrize("kind", ["mlp", "gpt2"])  # gpt2 has dropout, which must resume too
def test_an_interrupted_training_ends_with_the_same_bits(kind, tmp_path):
    def start():
        return (MLP(6, 3, "layers.1", 0), image_task()) if kind == "mlp" else (text_model("gpt2"), text_task())

    def stop_after(n):
        def track(record):
            if record["epoch"] == n:
                raise KeyboardInterrupt

        return track

    settings = TuneSettings(epochs=5, batch_size=8, lr=0.01, optimizer="adamw", weight_decay=0.1, warmup_steps=3,
                            decay=True, clip_norm=1.0, aux_weight=1.0)
    width = 16
    made = Targets(torch.arange(120), torch.randn(120, width, generator=torch.Generator().manual_seed(0)))
    model, task = start()
    whole = fine_tune(model, task, settings, made, checkpoint=Checkpoint(tmp_path / "a.pt"))
    assert whole["epochs"][-1]["cos"] == pytest.approx(whole["aux"]["cos_end"], abs=1e-6)
    assert whole["epochs"][0]["cos"] != whole["aux"]["cos_start"]
    expected = trained_state(model)
    model, _ = start()
    with pytest.raises(KeyboardInterrupt):
        fine_tune(model, task, settings, made, checkpoint=Checkpoint(tmp_path / "b.pt"), log=stop_after(3))
    model, _ = start()
    again = fine_tune(model, task, settings, made, checkpoint=Checkpoint(tmp_path / "b.pt"))
    assert again == whole
    assert all(torch.equal(expected[name], value) for name, value in trained_state(model).items())


@pytest.mark.parametrize("select", ["last", "best"])
def test_the_epoch_that_is_kept(select):
    """By default every training ends with its last epoch; "best" is the best one by validation, the earlier on a
    tie.
    """
    model, task = MLP(6, 3, "layers.1", 0), image_task()
    history = fine_tune(model, task, TuneSettings(epochs=6, batch_size=8, lr=0.3, select=select))
    accuracies = [e["val_accuracy"] for e in history["epochs"]]
    assert history["best_epoch"] == accuracies.index(max(accuracies)) + 1 < 6  # the two differ here
    assert history["kept_epoch"] == (6 if select == "last" else history["best_epoch"])
    y = task.y[task.splits["val"]]
    kept = (outputs(model, task, task.splits["val"], 8)[1].argmax(1) == y).double().mean().item()
    assert kept == accuracies[history["kept_epoch"] - 1] and min(accuracies) < max(accuracies)
    with pytest.raises(InputError, match="SELECT_EPOCH"):
        fine_tune(model, task, TuneSettings(epochs=1, select="first"))


def test_training_leaves_the_global_stream_alone():
    state = torch.random.get_rng_state()
    model, task = text_model("gpt2"), text_task()
    state = torch.random.get_rng_state()
    fine_tune(model, task, TuneSettings(epochs=1, batch_size=8))
    assert torch.equal(state, torch.random.get_rng_state())


def test_centred_cosine_and_dead_rows():
    h, t, mu = torch.tensor([[2.0, 1.0], [0.0, 0.0]],
                            requires_grad=True), torch.tensor([[2.0, 3.0], [1.0, 1.0]]), torch.tensor([2.0, 0.0])
    loss = auxiliary_loss(h, t, mu)
    assert loss[0].item() == pytest.approx(0)  # (0, 1) and (0, 3)
    assert auxiliary_loss(h, t)[0].item() == pytest.approx(1 - 7 / (5**0.5 * 13**0.5))
    auxiliary_loss(h, t).sum().backward()
    assert torch.isfinite(h.grad).all()


def test_probe_says_how_strong_the_pull_is():
    model, task = MLP(6, 3, "layers.1", 0), image_task()
    h, _ = outputs(model, task, task.splits["train"], 16)
    made = Targets(task.splits["train"], torch.randn(80, 16, generator=torch.Generator().manual_seed(0)))
    one, two = (probe(model, task, made, TuneSettings(1, aux_weight=w)) for w in (1.0, 2.0))
    assert two["grad_ratio"] == pytest.approx(2 * one["grad_ratio"], rel=1e-5) and one["grad_ratio"] > 0
    assert one["loss"] == pytest.approx(made.loss(h, task.splits["train"]).mean().item(), abs=1e-6)
    assert one["cos"] == pytest.approx(1 - one["loss"], abs=1e-6)
    own = Targets(task.splits["train"], h)
    assert probe(model, task, own, TuneSettings(1, aux_weight=1.0))["loss"] == pytest.approx(0, abs=1e-6)
    centred = Targets(task.splits["train"], made.t, h.mean(0))
    found = probe(model, task, centred, TuneSettings(1, aux_weight=1.0))
    assert found["cos"] == pytest.approx(1 - centred.loss(h, task.splits["train"]).mean().item(),
                                         abs=1e-6) != one["cos"]


def test_the_probe_draws_from_all_classes(monkeypatch):
    """Of training examples sorted by class not only the first class is looked at."""
    monkeypatch.setattr("cycles.auxiliary.PROBE_EXAMPLES", 12)
    task = image_task()
    task.splits["train"] = task.splits["train"][task.y[:80].argsort(stable=True)]
    assert torch.bincount(task.y[probe_ids(task)]).tolist() == [4, 4, 4]


def test_learning_rate_schedule():
    settings = TuneSettings(1, lr=1.0, warmup_steps=4, decay=True)
    assert [scheduled_lr(i, 12, settings) for i in (0, 3, 4, 8, 11)] == pytest.approx([0.25, 1, 1, 0.5, 0.125])
    assert scheduled_lr(9, 12, TuneSettings(1, lr=1.0)) == 1


def test_trained_weights_only_go_into_their_own_model():
    with pytest.raises(InputError, match="other parameters"):
        load_trained(MLP(6, 3, "layers.1", 0), trained_state(MLP(7, 3, "layers.1", 0)))
