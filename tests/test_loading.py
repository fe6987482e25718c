"""Loading models: blocks read from the disk give the activations of a model in memory; damage gives one line."""
import json
import re

import pytest
import torch
from conftest import TEXTS, tiny_model, word_tokenizer
from safetensors.torch import load_file, save_file

from lib.activations import save_activations
from lib.environment import InputError
from lib.hooks import capture, resolve
from lib.models import load_model, load_tokenizer, model_identity
from lib.texts import split_texts

CPU = torch.device("cpu")


@pytest.fixture(params=["llama", "gpt2", "neox"])
def folder(tmp_path, request):
    tiny_model(request.param).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_blocks_on_the_disk_give_the_bytes_of_the_model_in_memory(folder, tmp_path):
    texts, stored = TEXTS * 3, []
    for device_map in (None, "disk"):
        model = load_model(str(folder), CPU, torch.float32, device_map=device_map)
        points = [resolve(model, name) for name in ("resid_post:0", "resid_pre:2", "resid_post:2")]
        run = save_activations(tmp_path / str(device_map), model, word_tokenizer(), points, texts=texts,
                               splits=split_texts(len(texts), 0.2, 0))
        stored.append({hook: torch.cat(run.shards(hook)) for hook in run.hooks})
    on_disk = [p for block in range(3)
               for p in model.get_submodule(resolve(model, f"resid_post:{block}").path).parameters()]
    assert on_disk and all(p.is_meta for p in on_disk), "a block stayed in memory"
    for hook, x in stored[0].items():
        assert torch.equal(stored[1][hook], x)


def test_the_identity_of_a_model_does_not_depend_on_where_it_lies(folder):
    whole, spread = (load_model(str(folder), CPU, torch.float32, device_map=device_map)
                     for device_map in (None, "disk"))
    assert model_identity(whole, "m") == model_identity(spread, "m")
    with torch.no_grad():
        next(whole.parameters())[0, 0] += 1
    assert model_identity(whole, "m")["weights"] != model_identity(spread, "m")["weights"]


def test_a_block_read_from_the_disk_is_left_again_in_the_middle(folder):
    """The pass may end inside a block; the next pass is right all the same."""
    whole, spread = (load_model(str(folder), CPU, torch.float32, device_map=device_map)
                     for device_map in (None, "disk"))
    ids = torch.tensor([[1, 5, 6, 7]])
    for name in ("attn_out:1", "resid_post:2"):
        seen = []
        for model in (whole, spread):
            with torch.no_grad(), capture(model, [resolve(model, name)]) as found:
                model(ids)
            seen += found.values()
        assert torch.equal(*seen)


def test_what_cant_be_loaded_so_is_said_in_one_line(folder):
    with pytest.raises(InputError, match="LOAD_BITS=3 must be"):
        load_model(str(folder), CPU, torch.float32, bits=3)
    with pytest.raises(InputError, match="DEVICE_MAP='gpu' must be"):
        load_model(str(folder), CPU, torch.float32, device_map="gpu")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        with pytest.raises(InputError, match="pip install bitsandbytes"):
            load_model(str(folder), CPU, torch.float32, bits=8)


def test_device_map_auto_is_the_same_model(folder):
    whole, spread = (load_model(str(folder), CPU, torch.float32, device_map=device_map)
                     for device_map in (None, "auto"))
    assert model_identity(whole, "m") == model_identity(spread, "m")


def save_llama(folder):
    tiny_model("llama").save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def refusal(folder, load=lambda name: load_model(name, CPU, torch.float32)):
    """The one line that loading fails with, without the folder's name."""
    with pytest.raises(InputError) as error:
        load(str(folder))
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    return str(error.value).replace(str(folder), "")


def weights_changed(folder, change):
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", {"format": "pt"})


def config_changed(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGE = {
    "cut": (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:2000]),
            "can't be loaded"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "can't be loaded"),
    "a web page": (lambda f: (f / "model.safetensors").write_text("<!DOCTYPE html><html><body>404</body></html>" * 9),
                   "can't be loaded"),
    "a pointer": (lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid "
                                                                 "sha256:aa\nsize 9\n"), "can't be loaded"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "can't be loaded"),
    "a layer missing": (lambda f: weights_changed(f, lambda t: {k: v for k, v in t.items() if "layers.1." not in k}),
                        "9 weights of LlamaForCausalLM are missing"),
    "one weight missing": (lambda f: weights_changed(f,
                                                     lambda t: {k: v for k, v in t.items() if k != "lm_head.weight"}),
                                                     "1 weights .* missing .lm_head.weight"),
    "another prefix": (lambda f: weights_changed(f, lambda t: {f"net.{k}": v for k, v in t.items()}), "are missing"),
    "more layers in the config": (lambda f: config_changed(f, num_hidden_layers=4), "9 weights .* are missing"),
    "another shape": (lambda f: config_changed(f, intermediate_size=48), "has the shape .* but config.json says"),
    "unknown architecture": (lambda f: config_changed(f, architectures=["NewForCausalLM"]),
                             "architecture NewForCausalLM, which transformers"),
    "an architecture that is no class": (lambda f: config_changed(f, architectures=["pipeline"]),
                                         "architecture pipeline, which transformers"),
    "another architecture": (lambda f: config_changed(f, architectures=["BertModel"]),
                             "is of a llama, but names the architecture BertModel"),
    "unknown type": (lambda f: config_changed(f, model_type="new"), "can't be loaded"),
    "no config": (lambda f: (f / "config.json").write_text("{"), "can't be loaded"),
    "a list as config": (lambda f: (f / "config.json").write_text("[]"), "can't be loaded"),
    "words for numbers": (lambda f: config_changed(f, hidden_size="wide"), "can't be loaded"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_one_line(tmp_path, kind):
    damage, message = DAMAGE[kind]
    damage(save_llama(tmp_path / "model"))
    assert re.search(message, refusal(tmp_path / "model"))


@pytest.mark.parametrize("device_map", ["auto", "disk"])
def test_with_a_device_map_the_real_cause_is_named(tmp_path, device_map):
    config_changed(save_llama(tmp_path / "model"), architectures=["NewForCausalLM"])
    said = refusal(tmp_path / "model", lambda name: load_model(name, CPU, torch.float32, device_map=device_map))
    assert "architecture NewForCausalLM, which transformers" in said
    config_changed(tmp_path / "model", architectures=None)  # the base model, without a head
    assert type(load_model(str(tmp_path / "model"), CPU, torch.float32, device_map=device_map)).__name__ == "LlamaModel"


def test_a_pickle_with_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "evil"), "w")

    folder = save_llama(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Evil()}, folder / "pytorch_model.bin")
    assert "can't be loaded" in refusal(folder) and not (tmp_path / "evil").exists()


@pytest.mark.parametrize("file, text",
                         [("tokenizer.json", "{"), ("tokenizer.json", ""), ("tokenizer.json", '{"version": 1}'),
                          ("tokenizer_config.json", "[1]"), ("tokenizer_config.json", '{"tokenizer_class": 3}')])
def test_a_damaged_tokenizer_is_one_line(tmp_path, file, text):
    (save_llama(tmp_path / "model") / file).write_text(text)
    assert "tokenizer" in refusal(tmp_path / "model", load_tokenizer)


def test_tied_weights_and_a_pooler_are_not_missed(tmp_path):
    torch.manual_seed(0)
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    model = load_model(str(tmp_path / "tied"), CPU, torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tiny_model("bert").save_pretrained(tmp_path / "bert")  # saved without its pooler
    assert type(load_model(str(tmp_path / "bert"), CPU, torch.float32)).__name__ == "BertModel"
