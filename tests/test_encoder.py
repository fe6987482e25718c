"""An SAE on a text from code of one's own: the codes of the stored run, the names beside it, steering, and what is
refused.
"""
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import PROJECT, TEXTS, row_text, run_readme, tiny_model
from saved_model import model_of_run, model_of_sae
from test_exchange import PEERS
from test_verify_scripts import script  # noqa: F401  (a fixture)
from transformers import GenerationConfig

from concepts.codes import encode_run
from concepts.continuations import continue_texts
from lib import Edit, Spare, load_encoder, load_sae, steer
from lib.activations import save_activations
from lib.batches import rows_of_run
from lib.environment import InputError
from lib.hooks import resolve
from lib.models import choose_dtype, load_model, load_tokenizer, model_identity, tokenizer_identity
from lib.origin import about_sae, origin_of
from lib.sae import make_sae, sae_hash, save_sae
from lib.saes import find_sae
from lib.training.loop import TrainSettings, highest_codes, train_sae


@pytest.fixture
def trained(tmp_path, saved_model):
    """A run of the texts, and an SAE of random weights in sae_model/topk_sae.pt with a name for each even latent."""
    model, tokenizer = tiny_model("llama"), load_tokenizer(str(saved_model[0]))
    meta = {"model": model_identity(model, str(saved_model[0])), "tokenizer": tokenizer_identity(tokenizer)}
    point = resolve(model, "resid_post:1")
    run = save_activations(tmp_path / "run", model, tokenizer, [point], texts=TEXTS, splits=["train"] * 5 + ["val"],
                           meta=meta)
    W = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    sae = make_sae(W, torch.zeros(40), W, torch.zeros(16), scale=4.0, top_k=3, config=origin_of(run, run.hooks[0]))
    sae.maxima = highest_codes(sae, rows_of_run(run, run.hooks[0]))
    save_sae(sae, tmp_path / "sae_model" / "topk_sae.pt", probe=run.shards(run.hooks[0])[0])
    names = {"sae_hash": sae_hash(sae), "concepts": {str(i): {"name": f"concept {i}"} for i in range(0, 40, 2)}}
    (tmp_path / "concepts.json").write_text(json.dumps(names))
    return run, sae


def test_codes_are_those_of_the_stored_run(tmp_path, trained):
    run, sae = trained
    (_, stored, latents), = encode_run(run, run.hooks[0], sae)
    encoder = load_encoder(tmp_path / "sae_model" / "topk_sae.pt")
    for text_id, text in enumerate(TEXTS):
        here, found = run.rows["text_id"] == text_id, encoder.encode(text)
        assert found.tokens == [row_text(run, row) for row in here.nonzero()[:, 0].tolist()]
        assert torch.equal(found.latents.int(), latents[here])
        torch.testing.assert_close(found.codes, stored[here])
        assert found.names == [[f"concept {i}" if i % 2 == 0 else None for i in row] for row in found.latents.tolist()]
    found = encoder.encode("the cat sat", skip_first=2)  # [BOS] is one of the two
    assert found.tokens == ["cat", "sat"]
    first, second = str(found).splitlines()
    assert first.startswith("'cat'  ") and second.count(".") == int((found.codes[1] > 0).sum())
    assert "concept" in str(encoder.encode(TEXTS[1])) and "latent" in str(encoder.encode(TEXTS[1]))


def test_a_text_without_tokens_has_no_codes(tmp_path, trained):
    found = load_encoder(tmp_path / "sae_model").encode("")
    assert found.tokens == found.names == [] and found.codes.shape == found.latents.shape == (0, 3) and str(found) == ""


def test_masks_are_those_of_the_training_without_its_run(tmp_path, saved_model, trained, caplog):
    run, sae = trained
    sae.config["origin"]["settings"] |= {"skip_first": 3, "skip_special": False}
    save_sae(sae, tmp_path / "sae_model" / "topk_sae.pt", probe=run.shards(run.hooks[0])[0])
    shutil.rmtree(run.path)
    encoder = load_encoder(tmp_path / "sae_model")
    assert encoder.encode("the cat sat").tokens == ["sat"] and "defaults" not in caplog.text  # [BOS] counts
    assert encoder.encode("the cat sat", skip_first=0).tokens == ["", "the", "cat", "sat"]


def test_an_older_file_asks_its_run_and_then_the_defaults(tmp_path, own_store, saved_model, trained, caplog):
    run, sae = trained
    del sae.config["origin"]
    path = own_store / "any" / "runs" / "run"
    shutil.copytree(run.path, path)
    meta = json.loads((path / "meta.json").read_text())
    meta["settings"]["skip_first"] = 2
    (path / "meta.json").write_text(json.dumps(meta))
    for shard in path.rglob("shard_*"):
        shard.unlink()
    assert about_sae(sae.config)["settings"]["skip_first"] == 2 and "defaults" not in caplog.text
    shutil.rmtree(path)
    assert about_sae(sae.config)["settings"]["skip_first"] == 0 and "the defaults of" in caplog.text
    save_sae(sae, tmp_path / "sae_model" / "topk_sae.pt", probe=run.shards(run.hooks[0])[0])
    assert load_encoder(tmp_path / "sae_model").encode(TEXTS[0]).tokens == TEXTS[0].split()


@pytest.mark.parametrize("change", [{"settings": {"skip_first": -1}}, {"hook": {"path": "x"}}, {"constants": {"a": 1}}])
def test_a_damaged_origin_is_one_line(tmp_path, trained, change):
    _, sae = trained
    for part, inner in change.items():
        sae.config["origin"][part] = sae.config["origin"].get(part, {}) | inner if part != "hook" else inner
    with pytest.raises(InputError, match="the SAE's file is damaged: origin"):
        about_sae(sae.config)


def test_the_file_holds_the_highest_codes_of_the_run(tmp_path, trained):
    run, sae = trained
    (_, values, indices), = encode_run(run, run.hooks[0], sae)
    expected = [float(values[indices == i].max()) if (indices == i).any() else 0.0 for i in range(40)]
    torch.testing.assert_close(load_sae(tmp_path / "sae_model" / "topk_sae.pt").maxima, torch.tensor(expected))


def test_steering_is_that_of_lib_steering_and_ends_with_its_block(tmp_path, trained):
    encoder = load_encoder(tmp_path / "sae_model")
    sae, ids = encoder.sae, torch.tensor([[1, 5, 6, 7]])
    latent = int(sae.maxima.argmax())

    def logits():
        with torch.no_grad():
            return encoder.model(input_ids=ids).logits

    before = logits()
    with steer(encoder.model, encoder.point, sae, [Edit(latent, "clamp", 2.0)], sae.maxima, spare=Spare({1})):
        expected = logits()
    with encoder.steer(latent, 2.0, "clamp") as chosen:
        assert chosen == latent and torch.equal(logits(), expected) and not torch.equal(expected, before)
    assert torch.equal(logits(), before)
    with encoder.steer("concept 4", 1) as chosen:
        assert chosen == 4
    with pytest.raises(InputError, match="no latent has 'zebra' in its name"), encoder.steer("zebra"):
        pass
    with pytest.raises(InputError, match="LATENT=40"), encoder.steer(40):
        pass


def test_without_highest_codes_they_come_from_the_stats_or_from_texts(tmp_path, trained):
    from safetensors.torch import save_file

    run, sae = trained
    known, sae.maxima = sae.maxima, None
    save_sae(sae, tmp_path / "sae_model" / "topk_sae.pt", probe=run.shards(run.hooks[0])[0])
    encoder = load_encoder(tmp_path / "sae_model")
    with pytest.raises(InputError, match=r"encoder.measured_on\(texts\)"), encoder.steer(2, 1):
        pass
    with encoder.steer(2, mode="ablate"):
        pass
    measured = encoder.measured_on(TEXTS)
    torch.testing.assert_close(measured.sae.maxima, known)
    assert encoder.sae.maxima is None and sae_hash(measured.sae) == sae_hash(sae)
    save_file({"max": known}, tmp_path / "latent_stats.safetensors")
    assert torch.equal(load_encoder(tmp_path / "sae_model").sae.maxima, known)


def test_writing_is_that_of_the_notebooks(tmp_path, trained):
    encoder = load_encoder(tmp_path / "sae_model")
    for temperature in (0.0, 0.8):
        expected = continue_texts(encoder.model, encoder.tokenizer, ["the cat"], 6, temperature=temperature, seed=3)
        assert encoder.generate("the cat", 6, temperature=temperature, seed=3) == expected.texts[0]
    with pytest.raises(InputError, match="no token"):
        encoder._replace(tokenizer=lambda text: {"input_ids": []}).generate("")
    with pytest.raises(InputError, match="writes no text"):
        encoder._replace(model=tiny_model("bert")).generate("the cat")


def test_a_word_is_sought_as_a_pattern_then_as_a_word_then_anywhere(trained, tmp_path):
    names = {1: "hundred, ten", 2: "after “red”", 3: "blue, red (+3)", 4: "big; red, green", 5: "Red", 6: "green"}
    encoder = load_encoder(tmp_path / "sae_model")._replace(names=names)
    assert encoder.find("red") == [5, 3, 4, 2, 1] and encoder.find("zebra") == []


def test_names_are_listed_with_the_best_first(tmp_path, trained):
    _, sae = trained
    entries = {"3": {"name": "a", "f1": 0.2}, "5": {"name": "b", "f1": None}, "9": {"name": "c", "f1": 0.9}}
    (tmp_path / "concepts.json").write_text(json.dumps({"sae_hash": sae_hash(sae), "concepts": entries}))
    assert list(load_encoder(tmp_path / "sae_model").names) == [9, 3, 5]


@pytest.mark.parametrize("device", ["auto", "cpu", torch.device("cpu")])
def test_a_device_may_be_a_name_wherever_it_is_taken(tmp_path, saved_model, trained, device):
    run, sae = trained
    path = tmp_path / "sae_model" / "topk_sae.pt"
    assert load_sae(path, device).mean.device.type == sae.to(device).mean.device.type == "cpu"
    assert load_encoder(path, device=device).encode("a cat").tokens == ["a", "cat"]
    assert choose_dtype("auto", device) == torch.float32
    load_model(str(saved_model[0]), device, torch.float32)
    for found in (model_of_run(run, run.hooks[0], device), model_of_sae(sae, device)):
        assert found[2].path == "model.layers.1"
    settings = TrainSettings(n_latents=16, top_k=2, epochs=1, batch_size=16)
    assert train_sae(rows_of_run(run, run.hooks[0]), settings, device=device, progress=False)[0].n_latents == 16


def test_names_of_another_sae_are_not_used(tmp_path, trained, caplog):
    (tmp_path / "concepts.json").write_text('{"sae_hash": "other", "concepts": {"1": {"name": "x"}}}')
    assert load_encoder(tmp_path / "sae_model").names == {} and "another SAE" in caplog.text
    (tmp_path / "concepts.json").write_text('{"sae_hash": "other", "concepts": {"1": {"name": 7}}}')
    with pytest.raises(InputError, match="concepts.1.name must be text"):
        load_encoder(tmp_path / "sae_model")


def test_the_model_may_lie_elsewhere(tmp_path, trained, saved_model):
    text, here = TEXTS[0], saved_model[0].rename(tmp_path / "moved")
    with pytest.raises(InputError, match="gone.*load_encoder"):
        load_encoder(tmp_path / "sae_model")
    assert load_encoder(tmp_path / "sae_model", model=str(here)).encode(text).tokens == text.split()


def test_a_file_that_names_no_model_asks_for_it(tmp_path, trained):
    sae = load_sae(tmp_path / "sae_model" / "topk_sae.pt")
    del sae.config["model"]
    save_sae(sae, tmp_path / "bare" / "topk_sae.pt", probe=torch.randn(64, 16))
    with pytest.raises(InputError, match="language model is not named.*model="):
        load_encoder(tmp_path / "bare" / "topk_sae.pt")


def test_other_weights_and_too_long_a_text_are_refused(tmp_path, trained, saved_model):
    tiny_model("llama", seed=1).save_pretrained(saved_model[0])
    with pytest.raises(InputError, match="weights of .* have changed"):
        load_encoder(tmp_path / "sae_model")
    encoder = load_encoder(tmp_path / "sae_model", model=str(saved_model[0]))
    encoder.model.config.max_position_embeddings = 4
    with pytest.raises(InputError, match="longer than the 4 tokens"):
        encoder.encode("the cat sat on the mat")
    with pytest.raises(InputError, match="the 4 that the model reads; lower n_tokens"):
        encoder.generate("the cat", 5)


def test_writing_is_the_models_own_whatever_its_files_say_of_sampling(tmp_path, trained):
    encoder = load_encoder(tmp_path / "sae_model")
    model, how = encoder.model, {"temperature": 0.8, "seed": 3}
    model.generation_config.eos_token_id = None
    plain, drawn = encoder.generate("the cat", 12), encoder.generate("the cat", 12, **how)
    ids = encoder.tokenizer("the cat", return_tensors="pt")["input_ids"]
    for _ in range(12):  # the likeliest token, by hand
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert plain == encoder.tokenizer.decode(ids[0], skip_special_tokens=True)
    together = continue_texts(model, encoder.tokenizer, ["the cat", "a dog"], 12)
    taste = GenerationConfig(repetition_penalty=50.0, top_p=0.01, no_repeat_ngram_size=1, num_beams=3, do_sample=True)
    model.generation_config = taste
    assert encoder.generate("the cat", 12) == plain and encoder.generate("the cat", 12, **how) == drawn
    assert torch.equal(continue_texts(model, encoder.tokenizer, ["the cat", "a dog"], 12).ids, together.ids)
    assert model.generation_config is taste


def test_the_public_names_are_lazy():
    code = "import sys, lib; assert 'torch' not in sys.modules; from lib import Edit, load_encoder, load_sae, steer"
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    with pytest.raises(ImportError):
        from lib import nothing_like_this  # noqa: F401


RESAVE = """
import sys
from sae_lens import SAE
SAE.load_from_disk(sys.argv[1], device="cpu").save_model(sys.argv[2])
"""


@pytest.mark.skipif(not PEERS.exists(), reason="the other libraries are not installed: make peers")
def test_the_block_of_the_readme_on_an_sae_from_saelens(script, own_store, tmp_path, capsys):  # noqa: F811
    """A file that SAELens wrote: opened as it is, and imported, then with names as README shows it."""
    assert script("01_save_activations.py", "DATA_LIMIT=100", "PREFLIGHT=False")[0] == 0
    assert script("02_train_sae.py", "EPOCHS=1", "N_LATENTS_MULTIPLIER=2")[0] == 0
    assert script("export_sae.py", "FORMAT=sae_lens")[0] == 0
    ours, made = load_encoder(), tmp_path / "made"
    source = next((find_sae() / "exports" / "sae_lens").rglob("cfg.json")).parent
    subprocess.run([str(PEERS), "-c", RESAVE, str(source), str(made)], check=True, capture_output=True)
    text = "Lily was happy. She ran to the big red ball."
    opened, expected = load_encoder(made, model="store/embedded/model", hook="resid_post:0"), ours.encode(text)
    theirs = opened.encode(text)
    assert theirs.tokens == expected.tokens and torch.equal(theirs.latents[:, 0], expected.latents[:, 0])
    torch.testing.assert_close(theirs.codes, ours.sae.scale * expected.codes, rtol=1e-4, atol=1e-4)
    assert script("import_sae.py", f"SOURCE={made}", "LAYER=resid_post:0")[0] == 0
    imported = load_encoder()
    assert imported.sae.config["imported"]["format"] == "sae_lens"
    latent = int(imported.sae.maxima.argmax())
    (find_sae() / "concepts.json").write_text(json.dumps({"sae_hash": sae_hash(imported.sae),
                                                          "concepts": {str(latent): {"name": "river"}}}))
    said = run_readme(capsys)
    assert said.count("\n") >= 13 and "'red' " in said and said.splitlines()[-1].startswith("One day")
