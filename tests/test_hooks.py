"""Hook points: names, what is captured, where the pass stops, and what an edit reaches."""
import pytest
import torch
from conftest import TEXTS, tiny_model, word_tokenizer

from lib.activations import save_activations
from lib.environment import InputError
from lib.hooks import capture, edit, layer_signatures, resolve, resolve_all
from lib.texts import split_texts

IDS = torch.tensor([[1, 5, 6, 7], [1, 8, 9, 10]])


def states(model, *names, **options):
    points = [resolve(model, name) for name in names]
    with torch.no_grad(), capture(model, points, **options) as seen:
        model(IDS)
    return [seen[point.signature] for point in points]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox", "bert"])
def test_block_outputs_are_the_models_own_hidden_states(kind):
    model = tiny_model(kind)
    with torch.no_grad():
        hidden = model(IDS, output_hidden_states=True).hidden_states
    for i in range(2):  # the last entry of a causal LM is after the final norm
        (post,) = states(model, f"resid_post:{i}")
        torch.testing.assert_close(post, hidden[i + 1], rtol=0, atol=0)
        (pre,) = states(model, f"resid_pre:{i}")
        torch.testing.assert_close(pre, hidden[i], rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_resid_mid_is_the_norms_input_not_its_output(kind):
    model = tiny_model(kind)
    pre, attn, mid = states(model, "resid_pre:1", "attn_out:1", "resid_mid:1")
    torch.testing.assert_close(mid, pre + attn)
    norm = resolve(model, "resid_mid:1").path
    (output,) = states(model, norm)
    assert (output - mid).abs().max() > 0.1


def test_every_spelling_means_the_same_point():
    model = tiny_model("llama")
    signature = "llamaforcausallm_model_layers_1_post_attention_layernorm"
    expected = resolve(model, "resid_mid:1")
    assert expected.signature == signature + "__input"
    assert resolve(model, signature, "input") == expected
    assert resolve(model, signature + ":input") == expected
    assert resolve(model, signature + "__input") == expected
    assert resolve(model, "model.layers.1.post_attention_layernorm:input") == expected
    assert resolve(model, "model.layers.1.post_attention_layernorm").point == "output"
    assert signature in layer_signatures(model)


@pytest.mark.parametrize(
    "kind, name, message",
    [
        ("llama", "model.layers.9", "there is no layer model.layers.9 in LlamaForCausalLM; the nearest are"),
        ("llama", "resid_post:3", "has blocks 0 to 2"),
        ("neox", "resid_mid:0", "parallel"),
        ("bert", "resid_mid:0", "resid_post"),
        ("bert", "attn_out:0", "no part of BertLayer"),
        ("bert", "mlp_out:0", "no part of BertLayer"),
    ],
)
def test_wrong_names_say_what_to_do(kind, name, message):
    with pytest.raises(InputError, match=message):
        resolve(tiny_model(kind), name)


def test_ambiguous_underscores_are_refused():
    model = torch.nn.Sequential()
    model.add_module("a_b", torch.nn.Identity())
    model.add_module("a", torch.nn.Sequential())
    model.a.add_module("b", torch.nn.Identity())
    with pytest.raises(InputError, match="a_b or a.b"):
        resolve(model, "sequential_a_b")


def test_one_pass_with_unsorted_points_equals_single_passes():
    model = tiny_model("llama")
    names = ["resid_post:2", "attn_out:0", "resid_mid:1"]
    for together, name in zip(states(model, *names), names):
        torch.testing.assert_close(together, states(model, name)[0], rtol=0, atol=0)


def test_the_pass_ends_after_the_deepest_point():
    model = tiny_model("llama")
    reached = []
    for i, block in enumerate(model.model.layers):
        block.register_forward_pre_hook(lambda *_, i=i: reached.append(i))
    model.lm_head.register_forward_pre_hook(lambda *_: reached.append("head"))
    states(model, "resid_post:1", "resid_post:0")
    assert reached == [0, 1]


def test_hooks_are_removed_even_after_an_error():
    model = tiny_model("llama")
    point = resolve(model, "resid_post:1")
    with pytest.raises(KeyError), capture(model, [point]):
        raise KeyError
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_point_that_is_never_reached_is_named():
    model = tiny_model("llama")
    with pytest.raises(InputError, match="never reached lm_head"), capture(model, [resolve(model, "lm_head")]):
        model.model(IDS)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox"])
@pytest.mark.parametrize("name", ["resid_pre:1", "resid_post:1", "attn_out:1", "mlp_out:1"])
def test_an_edit_that_changes_nothing_is_exact(kind, name):
    model = tiny_model(kind)
    with torch.no_grad():
        before = model(IDS)[0]
        with edit(model, resolve(model, name), lambda x: x):
            after = model(IDS)[0]
    assert torch.equal(before, after)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_editing_resid_mid_changes_the_residual_stream_itself(kind):
    """Zeroing the stream between attention and MLP leaves nothing of the input in the block's output."""
    model = tiny_model(kind)
    mid, post = resolve(model, "resid_mid:1"), resolve(model, "resid_post:1")
    with torch.no_grad(), edit(model, mid, torch.zeros_like), capture(model, [mid, post]) as seen:
        model(IDS)
    assert seen[mid.signature].abs().max() < 1e-6
    # Every token now enters the MLP as the same vector, so every token leaves with the same one.
    spread = seen[post.signature] - seen[post.signature][0, 0]
    assert spread.abs().max() < 1e-6


@pytest.mark.parametrize(
    "wrong, near",
    [
        ("resid_pots:2", "resid_post:2"), ("resid_post2", "resid_post:2"),
        ("blocks.1.hook_resid_pots", "blocks.1.hook_resid_post"),
        ("model.layer.1", "model.layers.1"), ("llamaforcausallm_model_layer_1", "llamaforcausallm_model_layers_1"),
        ("attn_ot:1", "attn_out:1"),
        ("blocks.1.hook_resid_post.", "blocks.1.hook_resid_post"),
    ],
)
def test_a_typing_error_is_answered_with_what_was_meant(wrong, near):
    with pytest.raises(InputError, match="the nearest are") as error:
        resolve(tiny_model("llama"), wrong)
    assert near in str(error.value).partition("nearest are ")[2].split(";")[0].split(", ")


def test_numbers_from_the_end_and_all_blocks():
    model = tiny_model("llama")
    assert resolve(model, "resid_post:-1") == resolve(model, "resid_post:2") == resolve(model,
                                                                                        "blocks.-1.hook_resid_post")
    points = resolve_all(model, "resid_post:*, resid_pre:0,model.layers.1")
    assert [point.names[0] for point in points] == ["resid_post:0", "resid_post:1", "resid_post:2", "resid_pre:0"]
    for wrong, message in (("resid_post:-4", "has blocks 0 to 2"), ("resid_post:3", "has blocks 0 to 2")):
        with pytest.raises(InputError, match=message):
            resolve(model, wrong)
    with pytest.raises(InputError, match="means several layers"):
        resolve(model, "resid_post:*")


@pytest.mark.parametrize("name, message", [("model.layers", "does not run"), ("model:input", "not a tensor"),
                                           ("model.embed_tokens:input", "not a tensor")])
def test_places_without_activations_are_refused_in_one_line(name, message):
    model = tiny_model("llama")
    with pytest.raises(InputError, match=message) as error:
        states(model, name)
    assert "\n" not in str(error.value)


def test_a_run_is_asked_for_its_layers_in_any_spelling(tmp_path):
    model, texts = tiny_model("llama"), TEXTS * 3
    points = resolve_all(model, "resid_post:0,resid_mid:2")
    run = save_activations(tmp_path / "run", model, word_tokenizer(), points, texts=texts,
                           splits=split_texts(len(texts), 0.2, 0))
    first, mid = run.hooks
    for spelling in (None, "resid_post:0", "resid_post:-3", "blocks.0.hook_resid_post", "model.layers.0",
                     "model.layers.0:output", first):
        assert run.hook(spelling) == first
    for spelling in ("resid_mid:2", "resid_mid:-1", "model.layers.2.post_attention_layernorm:input", mid):
        assert run.hook(spelling) == mid
    with pytest.raises(InputError, match="holds resid_post:0, resid_mid:2, not resid_post:1; save it with"):
        run.hook("resid_post:1")
