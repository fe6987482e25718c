"""Models larger than memory: blocks read from the disk as they run give the activations of the model in memory."""
import pytest
import torch
from conftest import TEXTS, tiny_model, word_tokenizer

from lib.activations import SaveSettings, save_activations
from lib.environment import InputError
from lib.hooks import capture, resolve
from lib.models import load_model, model_identity
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
        run = save_activations(tmp_path / str(device_map), model, word_tokenizer(), points, texts, split_texts(len(texts), 0.2, 0), SaveSettings(), {})
        stored.append({hook: torch.cat(run.shards(hook)) for hook in run.hooks})
    on_disk = [p for block in range(3) for p in model.get_submodule(resolve(model, f"resid_post:{block}").path).parameters()]
    assert on_disk and all(p.is_meta for p in on_disk), "a block stayed in memory"
    for hook, x in stored[0].items():
        assert torch.equal(stored[1][hook], x)


def test_the_identity_of_a_model_does_not_depend_on_where_it_lies(folder):
    whole, spread = (load_model(str(folder), CPU, torch.float32, device_map=device_map) for device_map in (None, "disk"))
    assert model_identity(whole, "m") == model_identity(spread, "m")
    with torch.no_grad():
        next(whole.parameters())[0, 0] += 1
    assert model_identity(whole, "m")["weights"] != model_identity(spread, "m")["weights"]


def test_a_block_read_from_the_disk_is_left_again_in_the_middle(folder):
    """The pass ends inside a block where a point asks for it; the next pass is right all the same."""
    whole, spread = (load_model(str(folder), CPU, torch.float32, device_map=device_map) for device_map in (None, "disk"))
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
    whole, spread = (load_model(str(folder), CPU, torch.float32, device_map=device_map) for device_map in (None, "auto"))
    assert model_identity(whole, "m") == model_identity(spread, "m")
