"""Everything that runs on a GPU also runs on fake_device, which has no float64 and refuses to mix with the CPU."""
import sys

import pytest
import test_sae_ception_cycles as cycles
import torch
from conftest import TEXTS, tiny_model, word_tokenizer
from fake_device import DEVICE, FakeDevice
from test_sae_ception_cycles import defaults, digits  # noqa: F401  (fixtures)
from test_steering import MAXIMA, random_sae
from test_training import SMALL, make_rows

from checks.evaluation import ev, loss_recovered, row_scores
from checks.sparsity import sweep_k
from checks.weights import inspect_weights
from concepts.codes import encode_run, live_codes
from concepts.directions import promoted_tokens
from concepts.effects import draw_occurrences, next_token_effects
from concepts.steered_texts import Writing, sweep
from lib.activations import SaveSettings, preflight, save_activations
from lib.batches import sample_rows
from lib.hooks import resolve
from lib.sae import load_sae, save_sae
from lib.steering import Edit
from lib.texts import split_texts
from lib.training.kinds import KINDS
from lib.training.loop import TrainSettings, score, train_sae

SETTINGS = SaveSettings(shard_rows=50)
RECORDED = {"max_length": 128, "skip_special": True, "skip_first": 0}


@pytest.fixture(autouse=True)
def fake_device():
    with FakeDevice():
        yield


def language_model():
    """On the device; with the attention that is written in torch operations."""
    return tiny_model("llama", attn_implementation="eager").to(DEVICE)


@pytest.fixture
def run(tmp_path):
    model = language_model()
    points = [resolve(model, "resid_post:1")]
    return save_activations(tmp_path / "run", model, word_tokenizer(), points, texts=TEXTS * 4,
                            splits=split_texts(24, 0.2, 0), settings=SETTINGS)


def test_the_device_refuses_what_a_real_one_refuses():
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


@pytest.mark.parametrize("kind", KINDS)
def test_training_and_scoring(kind, tmp_path):
    rows, _ = make_rows(600)
    settings = TrainSettings(**{**SMALL, "epochs": 2}, kind=kind, dead_after=100)
    here, there = (train_sae(rows, settings, tmp_path / name, name, progress=False) for name in ("cpu", DEVICE))
    assert there[0].W_dec.device.type == DEVICE and here[1]["val"]["step"] == there[1]["val"]["step"]
    assert there[1]["val"]["ev"] == pytest.approx(here[1]["val"]["ev"], abs=0.02)
    assert there[1]["train"]["recon"] == pytest.approx(here[1]["train"]["recon"], rel=0.05)
    on_cpu, on_device = (score(sae, sample_rows(rows, True)) for sae in (there[0].to("cpu"), there[0]))
    assert on_device == pytest.approx(on_cpu, rel=1e-5)
    save_sae(there[0], tmp_path / "topk_sae.pt", rows.shards[0])
    assert load_sae(tmp_path / "topk_sae.pt", DEVICE).W_enc.device.type == DEVICE


def test_activations_codes_and_scores(run):
    model, sae = language_model(), random_sae()
    assert preflight(model, word_tokenizer(), [resolve(model, "resid_post:1")], TEXTS,
                     settings=SETTINGS)[0]["width"] == 16
    hook = run.hook()
    scores = [row_scores(there, run, hook, run.is_val) for there in (sae, sae.to(DEVICE))]
    assert ev(scores[1]) == pytest.approx(ev(scores[0]), rel=1e-5)
    for (_, *mine), (_, *theirs) in zip(encode_run(run, hook, sae), encode_run(run, hook, sae.to(DEVICE))):
        assert all(torch.allclose(a.float(), b.float(), atol=1e-5) for a, b in zip(mine, theirs))
    assert len(live_codes(TEXTS, model, word_tokenizer(), resolve(model, hook), sae.to(DEVICE), SETTINGS))
    for name, value in inspect_weights(sae.to(DEVICE)).items():
        assert torch.allclose(value.cpu().float(), inspect_weights(sae)[name].float(), atol=1e-5), name


def test_what_the_language_model_loses(run):
    mean = run.stats(run.hook())["mean"]
    found = []
    for device in ("cpu", DEVICE):
        model = language_model().to(device)
        found.append(loss_recovered(model, word_tokenizer(), resolve(model, "resid_post:1"), random_sae().to(device),
                                    texts=TEXTS, mean=mean, settings=RECORDED))
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_effects_and_steering(run):
    drawn = draw_occurrences(encode_run(run, run.hook(), random_sae()), range(32), 2)
    found, steered = [], []
    for device in ("cpu", DEVICE):
        model, sae, tokenizer = language_model().to(device), random_sae().to(device), word_tokenizer()
        point = resolve(model, "resid_post:1")
        found.append(next_token_effects(model, tokenizer, point, sae, run, drawn, MAXIMA))
        writing = Writing(["the cat sat", "a dog"], 3, skip_ids={1}, favoured={5, 6})
        steered.append(sweep(model, tokenizer, point, sae, edits=[Edit(5, "add")], maxima=MAXIMA,
                             strengths=(0.0, 2.0), writing=writing))
        assert len(promoted_tokens(sae, model, tokenizer)) == 32
    assert [e["added"]["kl"]
            for e in found[1].values()] == pytest.approx([e["added"]["kl"] for e in found[0].values()], rel=1e-2)
    assert [s["texts"] for s in steered[1]] == [s["texts"] for s in steered[0]]


def test_choice_of_k():
    rows, _ = make_rows(400)
    table = sweep_k(rows, TrainSettings(**{**SMALL, "epochs": 1}), (2, 3), device=DEVICE)
    assert [row["k"] for row in table] == [2, 3] and all(0 <= row["neighbours"] <= 1 for row in table)


def on_device(monkeypatch, constants):
    """Test scores of a baseline with everything on the device, and a model trained towards its targets."""
    # its list has MPS
    monkeypatch.setattr(sys.modules["torch.optim.adam"], "_device_dtype_check_for_fused", lambda *_: None)
    monkeypatch.setattr("cycles.evaluation._label_selectivity", lambda *_: {})  # slow here, and all of it on the CPU
    monkeypatch.setattr("cycles.session.choose_device", lambda _: torch.device(DEVICE))
    session = cycles.Session(constants, 0)
    assert next(session.model.parameters()).device.type == DEVICE
    result = cycles.cycle(session, "baseline", 0)
    cycles.train_model(session, "per_class", 1)
    return result["test"]


def test_sae_ception_on_images(monkeypatch, digits):  # noqa: F811
    digits |= {"DATA_LIMIT": 400, "N_LATENTS_MULTIPLIER": 2, "EPOCHS_PER_CYCLE": 1, "SAE_EPOCHS": 1,
               "METRICS": ("robustness",)}
    digits |= {"EVAL_LIMIT": 40, "PROBE_LIMIT": 40, "ROBUST_LIMIT": 10}
    expected = cycles.cycle(cycles.Session(digits | {"SETTING": "cpu"}, 0), "baseline", 0)["test"]
    found = on_device(monkeypatch, digits)
    for name in ("task_accuracy", "robust_pgd_eps0.1", "robust_jaccard_eps0.1", "sae_explained_variance"):
        assert found[name] == pytest.approx(expected[name], abs=0.1), name


def test_sae_ception_on_texts(monkeypatch, defaults, labelled_texts):  # noqa: F811
    tiny, _ = defaults
    small = {"EPOCHS_PER_CYCLE": 1, "SAE_EPOCHS": 1, "PROBE_LIMIT": 40, "EVAL_LIMIT": 20, "ROBUST_LIMIT": 4,
             "N_SAE_SEEDS": 1, "ABSORPTION_TOKENS": 50, "METRICS": ("robustness", "language")}
    constants = tiny | small | {"MODEL": str(labelled_texts / "llama"), "LABEL_FIELD": "mood", "DATA_LIMIT": None}
    constants |= {name: str(labelled_texts / f"{file}.jsonl")
                  for name, file in (("DATASET", "train"), ("VAL_DATASET", "val"), ("TEST_DATASET", "test"))}
    found = on_device(monkeypatch, constants)
    assert {"task_perplexity", "absorption_n_tokens", "robust_clean", "sae_explained_variance"} <= found.keys()
