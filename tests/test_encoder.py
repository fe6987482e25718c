"""An SAE on a text from code of one's own: the codes of the stored run, the names beside it, and what is refused."""
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import PROJECT, TEXTS, row_text, tiny_model

from concepts.codes import encode_run
from lib import load_encoder, load_sae
from lib.activations import save_activations
from lib.environment import InputError
from lib.hooks import resolve
from lib.models import load_tokenizer, model_identity
from lib.sae import make_sae, sae_hash, save_sae


@pytest.fixture
def trained(tmp_path, saved_model):
    """A run of the texts, and an SAE of random weights in sae_model/topk_sae.pt with a name for each even latent."""
    model, tokenizer = tiny_model("llama"), load_tokenizer(str(saved_model[0]))
    point = resolve(model, "resid_post:1")
    run = save_activations(tmp_path / "run", model, tokenizer, [point], texts=TEXTS, splits=["train"] * 5 + ["val"])
    W = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    config = {"hook": point.signature, "model": model_identity(model, str(saved_model[0]))}
    sae = make_sae(W, torch.zeros(40), W, torch.zeros(16), scale=4.0, top_k=3, config=config)
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
    save_sae(sae, tmp_path / "bare.pt", probe=torch.randn(64, 16))
    with pytest.raises(InputError, match="does not name its language model.*model="):
        load_encoder(tmp_path / "bare.pt")


def test_other_weights_and_too_long_a_text_are_refused(tmp_path, trained, saved_model):
    tiny_model("llama", seed=1).save_pretrained(saved_model[0])
    with pytest.raises(InputError, match="weights of .* have changed"):
        load_encoder(tmp_path / "sae_model")
    encoder = load_encoder(tmp_path / "sae_model", model=str(saved_model[0]))
    encoder.model.config.max_position_embeddings = 4
    with pytest.raises(InputError, match="longer than the 4 tokens"):
        encoder.encode("the cat sat on the mat")


def test_the_public_names_are_lazy():
    code = "import sys, lib; assert 'torch' not in sys.modules; from lib import Edit, load_encoder, load_sae, steer"
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    with pytest.raises(ImportError):
        from lib import nothing_like_this  # noqa: F401
