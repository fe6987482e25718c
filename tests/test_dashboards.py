"""delphi's cache and Neuronpedia's files hold the codes of the run, at the tokens where they are."""
import gzip
import json
import re

import numpy as np
import pytest
import torch
from conftest import TEXTS, tiny_model, word_tokenizer
from safetensors.numpy import load_file
from test_steering import random_sae

from concepts.codes import encode_run
from concepts.directions import direct_view, promoted_tokens
from concepts.facts import Corpus, collect_facts
from concepts.firings import collect_firings
from exchange.delphi import write_delphi
from exchange.neuronpedia import Latents, place_of, write_neuronpedia
from lib.activations import SaveSettings, save_activations
from lib.environment import InputError
from lib.hooks import resolve
from lib.texts import split_texts

FACTS = {"hook_name": "blocks.1.hook_resid_post", "model_name": "some/model", "dataset_path": "stories",
         "context_size": 128}


@pytest.fixture
def model():
    return tiny_model("llama")


@pytest.fixture
def run(tmp_path, model):
    meta = {"model": {"name": "some/model"}, "dataset": {"name": "stories", "split": "train", "field": "text"}}
    point = resolve(model, "resid_post:1")
    return save_activations(tmp_path / "run", model, word_tokenizer(), [point], texts=TEXTS * 4,
                            splits=split_texts(24, 0.2, 0), settings=SaveSettings(shard_rows=50), meta=meta)


@pytest.fixture
def codes(run):
    return encode_run(run, run.hook(), random_sae())


def dense(codes):
    values, indices = (torch.cat(parts) for parts in list(zip(*codes))[1:])
    return torch.zeros(len(codes), codes.n_latents).scatter_add_(1, indices.long(), values)


def test_delphi_locations_point_at_the_stored_tokens(run, codes, tmp_path):
    write_delphi(tmp_path / "layers.1", run, codes, 7.0, word_tokenizer())
    files = sorted((tmp_path / "layers.1").glob("*.safetensors"), key=lambda path: int(path.stem.split("_")[0]))
    assert [path.stem for path in files] == ["0_7", "8_15", "16_23", "24_31"]
    found = torch.zeros(len(codes), codes.n_latents)
    row_of = {(int(t), int(p)): i for i, (t, p) in enumerate(zip(run.rows["text_id"], run.rows["pos"]))}
    for path in files:
        arrays = load_file(path)
        assert arrays["locations"].dtype == np.uint16 and arrays["activations"].dtype == np.float16
        for (text, pos, latent), value in zip(arrays["locations"].tolist(), arrays["activations"].tolist()):
            row = row_of[text, pos]  # a KeyError would be a code on a special token or on padding
            assert arrays["tokens"][text, pos] == run.rows["token_id"][row]
            found[row, latent + int(path.stem.split("_")[0])] = value
    torch.testing.assert_close(found, 7 * dense(codes), rtol=1e-3, atol=1e-3)
    config = json.loads((tmp_path / "layers.1" / "config.json").read_text())
    assert config["model_name"] == "some/model" and config["ctx_len"] == arrays["tokens"].shape[1]
    with pytest.raises(InputError, match="cuts texts differently"):
        write_delphi(tmp_path / "b", run, codes, 7.0, word_tokenizer(bos=False))
    with pytest.raises(InputError, match="beyond float16"):
        write_delphi(tmp_path / "b", run, codes, 1e6, word_tokenizer())


def test_a_source_has_the_number_of_its_block():
    for hook, source in (("blocks.3.hook_mlp_out", "3-s"), ("model.layers.5.post_feedforward_layernorm", "5-s"),
                         ("transformer.h.11", "11-s"), ("model.layers.2.mlp.up_proj:input", "2-s")):
        assert place_of(FACTS | {"hook_name": hook}, "s", "now").source == source
    with pytest.raises(InputError, match="in no block"):
        place_of(FACTS | {"hook_name": "model.norm"}, "s", "now")


def test_neuronpedia_records(run, codes, model, tmp_path):
    sae, tokenizer = random_sae(), word_tokenizer()
    firings = collect_firings(codes, 3)
    facts, corpus = collect_facts(codes, firings), Corpus(codes.texts, codes.rows)
    latent = int(firings.fires.argmax())
    concepts = {latent: {"name": "something", "source": "human"}}
    latents = Latents(sae, codes, firings.stats(), top=lambda i: facts.top(i, corpus), concepts=concepts,
                      view=direct_view(model, 16), tokenizer=tokenizer)

    def write(root, name="set", **changes):
        facts = FACTS | changes
        return write_neuronpedia(tmp_path / root, place_of(facts, name, "2026-01-01T00:00:00"), facts, latents)

    folder = write("out")
    assert folder == tmp_path / "out" / "model" / "1-set"
    heads = {"release.jsonl", "model.jsonl", "sourceset.jsonl", "source.jsonl"}
    assert {path.name for path in folder.glob("*.jsonl")} == heads

    def lines(kind):
        text = gzip.decompress((folder / kind / "batch-0.jsonl.gz").read_bytes())
        return [json.loads(line) for line in text.splitlines()]

    feature = lines("features")[latent]
    assert [feature[key] for key in ("modelId", "layer", "index")] == ["model", "1-set", str(latent)]
    assert feature["hookName"] == FACTS["hook_name"]
    assert feature["maxActApprox"] == pytest.approx(sae.scale * float(firings.max[latent]))
    assert feature["frac_nonzero"] == pytest.approx(float((dense(codes)[:, latent] > 0).float().mean()))
    assert feature["vector"] == pytest.approx(sae.W_dec[latent].tolist()) and len(lines("features")) == 32
    assert feature["pos_str"][:8] == promoted_tokens(sae, model, tokenizer)[latent]
    assert feature["pos_values"][0] > 0 > feature["neg_values"][0]
    mine = [activation for activation in lines("activations") if activation["index"] == str(latent)]
    assert [a["maxValue"] for a in mine] == pytest.approx([sae.scale * e["score"] for e in latents.top(latent)])
    for activation, example in zip(mine, latents.top(latent)):
        assert activation["tokens"][activation["maxValueTokenIndex"]] == example["token_str"]
        assert len(activation["tokens"]) == len(activation["values"])
    found = [(line["index"], line["description"], line["typeName"]) for line in lines("explanations")]
    assert found == [(str(latent), "something", "human")]
    outside = set(tmp_path.rglob("*"))
    for name in ("../x", "/abs", "..", ""):
        with pytest.raises(InputError, match="use letters"):
            write("out", name)
    for change in ({"model_name": ".."}, {"model_name": "../../x"}, {"model_name": "a/<b>\x00"},
                   {"hook_name": "blocks.1./../../x"}):
        there = write("odd", **change)
        assert there.parent.parent == tmp_path / "odd"
        assert re.fullmatch(r"[\w.-]+/\d+-set", str(there.relative_to(tmp_path / "odd")))
    assert {path for path in tmp_path.rglob("*") if tmp_path / "odd" not in (path, *path.parents)} == outside
    first = (folder / "activations" / "batch-0.jsonl.gz").read_bytes()
    write("again")
    assert (tmp_path / "again" / "model" / "1-set" / "activations" / "batch-0.jsonl.gz").read_bytes() == first
