"""Steering: an edit changes what it says and nothing else, with and without the cache, in padded batches."""
import pytest
import torch
from conftest import WORDS, tiny_model, word_tokenizer
from torch.nn import functional
from zoo import build

from concepts.continuations import continue_texts, perplexities
from lib import steering
from lib.environment import InputError
from lib.hooks import capture, resolve
from lib.sae import make_sae
from lib.steering import Edit, Spare, new_codes, steer, steered

IDS = torch.tensor([[1, 5, 6, 7, 9], [1, 8, 9, 10, 4]])
MAXIMA = torch.linspace(0.5, 3, 32)


def random_sae(width=16, n_latents=32, top_k=2):
    generator = torch.Generator().manual_seed(1)
    W_enc, W_dec = (torch.randn(n_latents, width, generator=generator) for _ in range(2))
    b_enc, mean = torch.randn(n_latents, generator=generator) / 4, torch.randn(width, generator=generator) / 50
    # the size of the tiny models' activations
    return make_sae(W_enc, b_enc, functional.normalize(W_dec, dim=1), mean, 0.1, top_k)


def logits(model, *arguments, ids=IDS, name="resid_post:1", sae=None, **options):
    """Logits of a steered pass; arguments: edits, positions ..."""
    with torch.no_grad(), steer(model, resolve(model, name), sae or random_sae(), *arguments, **options):
        return model(input_ids=ids).logits


def activation(model, name="resid_post:1", ids=IDS):
    point = resolve(model, name)
    with torch.no_grad(), capture(model, [point]) as seen:
        model(input_ids=ids)
    return seen[point.signature]


def firing(model, ids=IDS, at=(0, 2)):
    """The strongest latent on one token."""
    values, indices = random_sae().encode(activation(model, ids=ids)[at][None])
    return int(indices[0, 0]), float(values[0, 0])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox"])
@pytest.mark.parametrize("name", ["resid_pre:1", "resid_post:1", "mlp_out:1"])
def test_an_edit_that_changes_no_code_is_exact(kind, name):
    model = tiny_model(kind)
    latent, _ = firing(model)
    with torch.no_grad():
        before = model(input_ids=IDS).logits
    for edits in ([], [Edit(latent, "scale", 1.0)], [Edit(latent, "add", 0.0)],
                  [Edit(i, "scale", 1.0) for i in range(32)]):
        assert torch.equal(logits(model, edits, MAXIMA, name=name), before)
    assert torch.equal(logits(model, [Edit(latent, "ablate")], MAXIMA, positions=()), before)


def test_no_op_at_resid_mid_is_exact():
    model = tiny_model("llama")
    with torch.no_grad():
        before = model(input_ids=IDS).logits
    assert torch.equal(logits(model, [Edit(3, "scale", 1.0)], MAXIMA, name="resid_mid:1"), before)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox"])
def test_ablating_subtracts_code_times_dictionary_row(kind):
    model, sae = tiny_model(kind), random_sae()
    latent, code = firing(model)
    x = activation(model).flatten(0, 1)
    new = steered(x, sae, [Edit(latent, "ablate")], MAXIMA)
    torch.testing.assert_close(new[2], x[2] - sae.scale * code * sae.W_dec[latent])
    values, indices = sae.encode(x)
    silent = ~((indices == latent) & (values > 0)).any(1)
    assert silent.any() and torch.equal(new[silent], x[silent])


def test_every_mode_by_hand():
    codes, maxima = torch.tensor([[2.0, 0.0]]), torch.tensor([0.0, 4.0, 10.0])
    for mode, strength, expected in (("add", 0.5, [4.0, 5.0]), ("scale", 3.0, [6.0, 0.0]), ("clamp", 0.5, [2.0, 5.0]),
                                     ("ablate", 0.0, [0.0, 0.0])):
        found = new_codes(codes, [Edit(1, mode, strength), Edit(2, mode, strength)], maxima)
        assert found.tolist() == [expected], mode


def test_adding_moves_the_activation_by_the_latents_highest_code():
    sae = random_sae()
    x = torch.randn(6, 16)
    new = steered(x, sae, [Edit(5, "add", -2.0), Edit(7, "add", 1.0)], MAXIMA)
    expected = sae.scale * (-2 * MAXIMA[5] * sae.W_dec[5] + MAXIMA[7] * sae.W_dec[7])
    torch.testing.assert_close(new - x, expected.expand_as(x))


def test_only_chosen_positions_change_and_special_tokens_stay():
    model = tiny_model("llama")
    x = activation(model)
    point = resolve(model, "resid_post:1")

    def changed(**options):
        with torch.no_grad(), steer(model, point, random_sae(), [Edit(5, "add", 1.0)], MAXIMA,
                                    **options), capture(model, [point]) as seen:
            model(input_ids=IDS)
        return (seen[point.signature] != x).any(2)[0].tolist()

    assert changed() == [True] * 5
    assert changed(spare=Spare({1})) == [False] + [True] * 4
    assert changed(spare=Spare(first=2)) == [False] * 2 + [True] * 3
    assert changed(positions={2, 4}) == [False, False, True, False, True]
    assert changed(positions=range(3, 10**9)) == [False, False, False, True, True]


@pytest.mark.parametrize("family", ["llama", "gpt2", "mamba", "mamba2", "rwkv", "recurrent_gemma", "jamba", "zamba2"])
def test_first_tokens_are_spared_once_and_not_what_is_written(family, monkeypatch):
    """Also where the model keeps states that don't count tokens."""
    model, counts = build(family), []
    own = steering._chosen

    def counted(*arguments):
        counts.append(int((chosen := own(*arguments)).sum()))
        return chosen

    monkeypatch.setattr(steering, "_chosen", counted)
    point = resolve(model, "resid_post:0")
    for first in (0, 1):
        counts.append(None)
        edits, spare = [Edit(5, "add", 1.0)], Spare(first=first)
        with torch.no_grad(), steer(model, point, random_sae(), edits, MAXIMA, spare=spare):
            model.generate(torch.tensor([[4, 5, 6]]), max_new_tokens=5, do_sample=False)
    every, later = counts[1 : counts.index(None, 1)], counts[counts.index(None, 1) + 1 :]
    assert sum(every) - sum(later) == 1 and every[1:] == later[1:]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox"])
def test_generating_with_the_cache_equals_without(kind):
    model = tiny_model(kind)
    latent, _ = firing(model)
    prompt = IDS[:1, :3]
    for positions in (None, range(4, 7)):
        texts = []
        for cached in (True, False):
            with steer(model, resolve(model, "resid_post:1"), random_sae(),
                       [Edit(latent, "clamp", 2.0), Edit(9, "add", 1.0)], MAXIMA, positions):
                out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False,
                                     use_cache=cached, eos_token_id=None, output_scores=True,
                                     return_dict_in_generate=True)
            texts.append(out)
        assert torch.equal(texts[0].sequences, texts[1].sequences)
        torch.testing.assert_close(torch.stack(texts[0].scores), torch.stack(texts[1].scores), atol=1e-4, rtol=1e-4)
    plain = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False,
                           eos_token_id=None, output_scores=True, return_dict_in_generate=True)
    assert (torch.stack(plain.scores) - torch.stack(texts[0].scores)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_left_padding_changes_nothing(kind):
    """Positions are those of the text, not of the padded row, and padding is not edited."""
    model = tiny_model(kind)
    point = resolve(model, "resid_post:0")
    short, long = [1, 5, 6], [1, 8, 9, 10, 4]
    batch = torch.tensor([[0, 0, *short], long])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "output_scores": True,
               "return_dict_in_generate": True}
    arguments = (model, point, random_sae(), [Edit(5, "add", 1.5)], MAXIMA, {1, 2, 5})
    with steer(*arguments), capture(model, [point]) as seen, torch.no_grad():
        model(input_ids=batch, attention_mask=mask)
    with capture(model, [point]) as clean, torch.no_grad():
        model(input_ids=batch, attention_mask=mask)
    edited = (seen[point.signature] != clean[point.signature]).any(2)
    assert edited.tolist() == [[False, False, False, True, True], [False, True, True, False, False]]
    with steer(*arguments):
        together = model.generate(batch, attention_mask=mask, **options)
        alone = model.generate(torch.tensor([short]), attention_mask=torch.ones(1, 3, dtype=torch.long), **options)
    assert torch.equal(together.sequences[0, 2:], alone.sequences[0])
    torch.testing.assert_close(torch.stack(together.scores)[:, 0], torch.stack(alone.scores)[:, 0], atol=1e-4,
                               rtol=1e-4)


def test_hooks_are_gone_after_the_block_even_after_an_error():
    model = tiny_model("llama")
    with pytest.raises(KeyError), steer(model, resolve(model, "resid_post:1"), random_sae(), [Edit(1, "ablate")],
                                        MAXIMA):
        raise KeyError
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    "edits, message",
    [
        ([Edit(32, "ablate")], "the SAE has latents 0 to 31"),
        ([Edit(1, "push")], "is unknown; choose one of add, scale, clamp, ablate"),
        ([Edit(1, "ablate"), Edit(1, "add", 1)], "latent 1 is edited twice"),
        ([Edit(0, "add", 1.0)], "latent 0 never fires"),
        ([Edit(1, "add", float("nan"))], "must be a finite number"),
    ],
)
def test_senseless_edits_are_refused(edits, message):
    model = tiny_model("llama")
    maxima = MAXIMA.clone()
    maxima[0] = 0
    with pytest.raises(InputError, match=message):
        logits(model, edits, maxima)


def test_perplexity_is_that_of_the_continuation_alone():
    model = tiny_model("gpt2")
    ids, mask = torch.tensor([[0, 0, 1, 5, 6], [1, 8, 9, 10, 4]]), torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    judged = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]).bool()
    with torch.no_grad():
        short = model(input_ids=ids[:1, 2:]).logits.log_softmax(2)
        long = model(input_ids=ids[1:]).logits.log_softmax(2)
        found = perplexities(model, ids, mask, judged)
    torch.testing.assert_close(found, torch.stack([(-(short[0, 0, 5] + short[0, 1, 6]) / 2).exp(),
                                                   (-long[0, 3, 4]).exp()]), rtol=1e-4, atol=1e-4)


def test_continuations_keep_their_prompts_and_a_strong_edit_changes_them():
    model, tokenizer = tiny_model("llama"), word_tokenizer()
    prompts = ["the cat sat", "a dog ran and then"]
    plain = continue_texts(model, tokenizer, prompts, 6)
    again = continue_texts(model, tokenizer, prompts, 6)
    assert plain.texts == again.texts and all(text.startswith(prompt) for text, prompt in zip(plain.texts, prompts))
    assert (plain.written.sum(1) <= 6).all() and (plain.perplexity > 1).all()
    steering = steer(model, resolve(model, "resid_post:1"), random_sae(), [Edit(31, "add", 20.0)], MAXIMA)
    other = continue_texts(model, tokenizer, prompts, 6, steering)
    assert other.texts != plain.texts and set(" ".join(other.texts).split()) <= {*WORDS, *"[UNK]".split()}
    sampled = [continue_texts(model, tokenizer, prompts, 6, temperature=1.0, seed=seed).texts for seed in (0, 0, 1)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_sampling_repeats_by_its_seed_and_leaves_the_global_stream():
    model, tokenizer = tiny_model("llama"), word_tokenizer()
    before = torch.get_rng_state()
    first, again, other = (continue_texts(model, tokenizer, ["the cat"], 8, temperature=5.0, seed=seed).texts
                           for seed in (1, 1, 2))
    assert first == again != other and torch.equal(torch.get_rng_state(), before)


def test_a_model_that_writes_nothing_is_named():
    with pytest.raises(InputError, match="writes no text"):
        continue_texts(tiny_model("bert"), word_tokenizer(), ["the cat"], 3)
