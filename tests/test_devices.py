"""Everything that runs on a GPU also runs on fake_device, which has no float64 and refuses to mix with the CPU.

Where there is a GPU the same runs on it.
"""
import sys
from contextlib import nullcontext

import pytest
import test_sae_ception_cycles as cycles
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from conftest import CUDA, TEXTS, tiny_model, word_tokenizer
from fake_device import DEVICE, SECOND, WAITS, FakeDevice
from test_sae_ception_cycles import defaults, digits  # noqa: F401  (fixtures)
from test_steering import MAXIMA, random_sae
from test_training import SMALL, make_rows

from checks.evaluation import ev, loss_recovered, row_scores
from checks.sparsity import sweep_k
from checks.weights import inspect_weights
from concepts.codes import encode_run, live_codes
from concepts.directions import promoted_tokens
from concepts.effects import draw_occurrences, next_logits, next_token_effects
from concepts.steered_texts import Writing, sweep
from lib.activations import SaveSettings, block_rows, preflight, save_activations
from lib.batches import sample_rows
from lib.blocks import blocks
from lib.hooks import resolve
from lib.sae import load_sae, save_sae
from lib.steering import Edit, Spare, steer
from lib.texts import split_texts
from lib.training.fast_step import fast_step
from lib.training.kinds import KINDS
from lib.training.loop import TrainSettings, score, train_sae
from lib.training.step import init_state
from lib.training.workspace import Workspace

SETTINGS = SaveSettings(shard_rows=50)


@pytest.fixture(autouse=True, params=[DEVICE, CUDA])
def device(request):
    with FakeDevice() if request.param == DEVICE else nullcontext():
        yield request.param


@pytest.fixture
def fake(device):
    """For what only the fake one shows."""
    if device != DEVICE:
        pytest.skip("about the fake device")


def language_model(device):
    """With the attention that is written in torch operations."""
    return tiny_model("llama", attn_implementation="eager").to(device)


@pytest.fixture
def run(tmp_path, device):
    model = language_model(device)
    points = [resolve(model, "resid_post:1")]
    return save_activations(tmp_path / "run", model, word_tokenizer(), points, texts=TEXTS * 4,
                            splits=split_texts(24, 0.2, 0), settings=SETTINGS)


def test_the_device_refuses_what_a_real_one_refuses(fake):
    x = torch.ones(2, 3, device=DEVICE)
    for refused in (x.double, lambda: torch.zeros(2).double().to(DEVICE),
                    lambda: torch.tensor(0.5, dtype=torch.float64, device=DEVICE),
                    lambda: x @ torch.ones(3).double().to(DEVICE)):
        with pytest.raises(TypeError, match="float64"):
            refused()
    for refused in (lambda: x + torch.ones(3), lambda: x @ torch.ones(3, 1), lambda: torch.cat([x, torch.ones(2, 3)])):
        with pytest.raises(RuntimeError, match="same device"):
            refused()
    with pytest.raises(RuntimeError):
        x.numpy()
    y = x.clone()
    y[0] += 2 * torch.tensor(1.0)
    assert y.cpu().double().sum() == 12 and (x + 1).device.type == x[torch.tensor([1])].device.type == DEVICE


def test_the_device_tells_its_waits_and_that_there_are_two(fake):
    x, other = torch.ones(2, 3, device=DEVICE), torch.ones(2, 3, device=SECOND)
    with pytest.raises(RuntimeError, match="same device"):
        x + other
    for quiet in (lambda: x @ x.T, lambda: x.masked_fill(x > 0, 2), lambda: torch.zeros(3, device=DEVICE) + 1,
                  lambda: x[:, torch.tensor([0, 1]).to(DEVICE)], lambda: torch.full((), 3, device=DEVICE)):
        WAITS.clear()
        quiet()
        assert WAITS == ["_to_copy"] * ("tensor" in quiet.__code__.co_names), quiet
    for waiting in (lambda: float(x.sum()), lambda: x[x > 0], lambda: x.cpu(), lambda: torch.tensor(3, device=DEVICE),
                    lambda: x.tolist(), lambda: x.nonzero(), lambda: torch.ones(2, 3).to(SECOND),
                    lambda: other.copy_(torch.zeros(2, 3)), lambda: bool((x > 0).any())):
        WAITS.clear()
        waiting()
        assert len(WAITS) == 1, waiting
    assert x.to(SECOND).device.index == 1 and x.device.index in (None, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_training_and_scoring(kind, tmp_path, device):
    rows, _ = make_rows(600)
    settings = TrainSettings(**{**SMALL, "epochs": 2}, kind=kind, dead_after=100)
    here, there = (train_sae(rows, settings, tmp_path / name, name, progress=False) for name in ("cpu", device))
    assert there[0].W_dec.device.type == device and here[1]["val"]["step"] == there[1]["val"]["step"]
    assert there[1]["val"]["ev"] == pytest.approx(here[1]["val"]["ev"], abs=0.02)
    assert there[1]["train"]["recon"] == pytest.approx(here[1]["train"]["recon"], rel=0.05)
    on_cpu, on_device = (score(sae, sample_rows(rows, True)) for sae in (there[0].to("cpu"), there[0]))
    assert on_device == pytest.approx(on_cpu, rel=1e-5)
    save_sae(there[0], tmp_path / "topk_sae.pt", rows.shards[0])
    assert load_sae(tmp_path / "topk_sae.pt", device).W_enc.device.type == device


def test_activations_codes_and_scores(run, device):
    model, sae = language_model(device), random_sae()
    assert preflight(model, word_tokenizer(), [resolve(model, "resid_post:1")], TEXTS,
                     settings=SETTINGS)[0]["width"] == 16
    hook = run.hook()
    scores = [row_scores(there, run, hook, run.is_val) for there in (sae, sae.to(device))]
    assert ev(scores[1]) == pytest.approx(ev(scores[0]), rel=1e-5)
    for (_, *mine), (_, *theirs) in zip(encode_run(run, hook, sae), encode_run(run, hook, sae.to(device))):
        assert all(torch.allclose(a.float(), b.float(), atol=1e-5) for a, b in zip(mine, theirs))
    assert len(live_codes(TEXTS, model, word_tokenizer(), resolve(model, hook), sae.to(device), SETTINGS))
    for name, value in inspect_weights(sae.to(device)).items():
        assert torch.allclose(value.cpu().float(), inspect_weights(sae)[name].float(), atol=1e-5), name


def test_what_the_language_model_loses(run, device):
    mean = run.stats(run.hook())["mean"]
    found = []
    for where in ("cpu", device):
        model = language_model(where)
        found.append(loss_recovered(model, word_tokenizer(), resolve(model, "resid_post:1"), random_sae().to(where),
                                    tokens=SETTINGS.tokens(word_tokenizer(), TEXTS), mean=mean))
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_effects_and_steering(run, device):
    drawn = draw_occurrences(encode_run(run, run.hook(), random_sae()), range(32), 2)
    found, steered = [], []
    for where in ("cpu", device):
        model, sae, tokenizer = language_model(where), random_sae().to(where), word_tokenizer()
        point = resolve(model, "resid_post:1")
        found.append(next_token_effects(model, tokenizer, point, sae, run, drawn, MAXIMA))
        writing = Writing(["the cat sat", "a dog"], 3, spare=Spare({1}), favoured={5, 6})
        steered.append(sweep(model, tokenizer, point, sae, edits=[Edit(5, "add")], maxima=MAXIMA,
                             strengths=(0.0, 2.0), writing=writing))
        assert len(promoted_tokens(sae, model, tokenizer)) == 32
    assert [e["added"]["kl"]
            for e in found[1].values()] == pytest.approx([e["added"]["kl"] for e in found[0].values()], rel=1e-2)
    assert [s["texts"] for s in steered[1]] == [s["texts"] for s in steered[0]]


def test_choice_of_k(device):
    rows, _ = make_rows(400)
    table = sweep_k(rows, TrainSettings(**{**SMALL, "epochs": 1}), (2, 3), device=device)
    assert [row["k"] for row in table] == [2, 3] and all(0 <= row["neighbours"] <= 1 for row in table)


def split_model(model, first, second):
    """The model with the blocks after the first on another device, moved there as by accelerate's device map."""
    stack = blocks(model)[1]
    model.to(first)
    for child in model.base_model.children():
        if child is not stack:
            add_hook_to_module(child, AlignDevicesHook(first))
    for number, block in enumerate(stack):
        where = second if number else first
        add_hook_to_module(block.to(where), AlignDevicesHook(where))
    add_hook_to_module(model.get_output_embeddings(), AlignDevicesHook(first))
    return model


def work_on(model, sae):
    """What reads and edits a model: activations, loss recovered, next-token logits and steered logits."""
    tokenizer, point = word_tokenizer(), resolve(model, "resid_post:1")
    _, (x,) = block_rows(model, [point], SETTINGS.tokens(tokenizer, TEXTS), pad_id=0, settings=SETTINGS)
    lost = loss_recovered(model, tokenizer, point, sae, tokens=SETTINGS.tokens(tokenizer, TEXTS), mean=torch.zeros(16))
    texts = [list(item.ids) for item in SETTINGS.tokens(tokenizer, TEXTS)]
    _, (plain, moved_on) = next(next_logits(model, point, texts, [None, sae.W_dec[: len(texts)]]))
    ids = torch.tensor([texts[0]], device=next(model.parameters()).device)
    with torch.no_grad(), steer(model, point, sae, [Edit(5, "add", 2.0)], maxima=MAXIMA, positions=range(1, 9),
                                spare=Spare({1})):
        steered = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return {"x": x, "plain": plain.cpu(), "moved": moved_on.cpu(), "steered": steered.cpu(),
            "lost": torch.tensor([lost["ce_clean"], lost["ce_spliced"], lost["ce_mean_ablated"]])}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_model_spread_over_two_devices(device, order):
    """As DEVICE_MAP spreads it: ids belong on the embedding's device, and hidden states lie elsewhere."""
    places = (device, SECOND if device == DEVICE else "cpu")
    first, second = (places[i] for i in order)
    expected = work_on(language_model("cpu"), random_sae())
    found = work_on(split_model(language_model("cpu"), first, second), random_sae().to(second))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind, most", [(kind, 8 if kind == "jumprelu" else 0) for kind in KINDS])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_how_often_a_step_waits_for_the_device(fake, kind, most, precision):
    state = init_state(torch.eye(16, device=DEVICE), 64, 0, kind=kind)
    work, x = Workspace(state, precision, kind=kind), torch.randn(32, 16).to(DEVICE)
    for step in range(3):
        WAITS.clear()
        fast_step(state, x, k=4, lr=1e-3, dead_after=40, work=work)
        assert len(WAITS) <= most or not step, WAITS


def on_device(monkeypatch, constants, device):
    """Test scores of a baseline with everything on the device, and a model trained towards its targets."""
    # its list has MPS
    monkeypatch.setattr(sys.modules["torch.optim.adam"], "_device_dtype_check_for_fused", lambda *_: None)
    monkeypatch.setattr("cycles.evaluation._label_selectivity", lambda *_: {})  # slow here, and all of it on the CPU
    monkeypatch.setattr("cycles.session.choose_device", lambda _: torch.device(device))
    session = cycles.Session(constants, 0)
    assert next(session.model.parameters()).device.type == device
    result = cycles.cycle(session, "baseline", 0)
    cycles.train_model(session, "per_class", 1)
    return result["test"]


def test_sae_ception_on_images(monkeypatch, digits, device):  # noqa: F811
    digits |= {"DATA_LIMIT": 400, "N_LATENTS_MULTIPLIER": 2, "EPOCHS_PER_CYCLE": 1, "SAE_EPOCHS": 1,
               "METRICS": ("robustness",)}
    digits |= {"EVAL_LIMIT": 40, "PROBE_LIMIT": 40, "ROBUST_LIMIT": 10}
    expected = cycles.cycle(cycles.Session(digits | {"SETTING": "cpu"}, 0), "baseline", 0)["test"]
    found = on_device(monkeypatch, digits, device)
    for name in ("task_accuracy", "robust_pgd_eps0.1", "robust_jaccard_eps0.1", "sae_explained_variance"):
        assert found[name] == pytest.approx(expected[name], abs=0.1), name


def test_sae_ception_on_texts(monkeypatch, defaults, labelled_texts, device):  # noqa: F811
    tiny, _ = defaults
    small = {"EPOCHS_PER_CYCLE": 1, "SAE_EPOCHS": 1, "PROBE_LIMIT": 40, "EVAL_LIMIT": 20, "ROBUST_LIMIT": 4,
             "N_SAE_SEEDS": 1, "ABSORPTION_TOKENS": 50, "METRICS": ("robustness", "language")}
    constants = tiny | small | {"MODEL": str(labelled_texts / "llama"), "LABEL_FIELD": "mood", "DATA_LIMIT": None}
    constants |= {name: str(labelled_texts / f"{file}.jsonl")
                  for name, file in (("DATASET", "train"), ("VAL_DATASET", "val"), ("TEST_DATASET", "test"))}
    found = on_device(monkeypatch, constants, device)
    assert {"task_perplexity", "absorption_n_tokens", "robust_clean", "sae_explained_variance"} <= found.keys()
