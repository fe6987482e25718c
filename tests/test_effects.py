"""The effect of a latent on the next token, against edits made by hand and against finite differences."""
import pytest
import torch
from conftest import TEXTS, tiny_model, word_tokenizer
from test_steering import random_sae
from zoo import FAMILIES, build

from concepts.codes import encode_run
from concepts.directions import _gain, direct_view
from concepts.effects import (
    ablation,
    divergence,
    draw_occurrences,
    next_logits,
    next_token_effects,
    of_length,
    prefixes,
)
from lib.activations import SaveSettings, save_activations
from lib.blocks import blocks, no_cache
from lib.environment import InputError
from lib.hooks import edit, resolve
from lib.steering import Edit, steer
from lib.texts import split_texts


@pytest.fixture
def model():
    return tiny_model("llama")


@pytest.fixture
def run(tmp_path, model):
    point = resolve(model, "resid_post:1")
    return save_activations(tmp_path / "run", model, word_tokenizer(), [point], texts=TEXTS * 4,
                            splits=split_texts(24, 0.2, 0), settings=SaveSettings(shard_rows=50))


def test_firings_are_drawn_evenly_where_the_latent_fires(run):
    codes = encode_run(run, run.hook(), random_sae())
    values, indices = (torch.cat(parts) for parts in list(zip(*codes))[1:])
    dense = torch.zeros(len(codes), 32).scatter_add_(1, indices.long(), values)
    wanted = (dense > 0).sum(0).argsort(descending=True)[:5].tolist()
    drawn = draw_occurrences(codes, wanted, 6)
    assert torch.equal(drawn.code, dense[drawn.row, drawn.latent]) and (drawn.code > 0).all()
    assert drawn.latent.tolist() == sorted(drawn.latent.tolist())
    assert [int((drawn.latent == i).sum()) for i in wanted] == [min(6, int((dense[:, i] > 0).sum())) for i in wanted]
    assert len(set(zip(drawn.row.tolist(), drawn.latent.tolist()))) == len(drawn.row)
    val = draw_occurrences(codes, wanted, 10**6, run.is_val)
    assert len(val.row) == int((dense[run.is_val][:, wanted] > 0).sum()) and run.is_val[val.row].all()
    first = torch.stack([draw_occurrences(codes, wanted[:1], 1, seed=seed).row for seed in range(40)])
    assert len(first.unique()) > 10


def test_prefixes_end_on_the_stored_token(run):
    rows = torch.tensor([0, 7, 30, len(run.rows["pos"]) - 1])
    found = prefixes(run, word_tokenizer(), rows)
    assert [ids[-1] for ids in found] == run.rows["token_id"][rows].tolist() and all(ids[0] == 1 for ids in found)
    with pytest.raises(InputError, match="differently"):
        prefixes(run, word_tokenizer(bos=False), rows)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox"])
def test_next_logits_are_those_of_each_text_alone(kind):
    model = tiny_model(kind)
    point, texts = resolve(model, "resid_post:1"), [[1, 5, 6, 7, 8], [1, 9], [1, 4, 4]]
    delta = torch.randn(3, 16)
    for lines, (clean, moved) in next_logits(model, point, texts, [None, delta]):
        for i, line in enumerate(lines.tolist()):
            ids = torch.tensor([texts[line]])

            def add(x, line=line):
                return torch.cat([x[:, :-1], x[:, -1:] + delta[line]], 1)

            with torch.no_grad():
                torch.testing.assert_close(clean[i], model(input_ids=ids).logits[0, -1], atol=1e-5, rtol=1e-5)
                with edit(model, point, add):
                    torch.testing.assert_close(moved[i], model(input_ids=ids).logits[0, -1], atol=1e-5, rtol=1e-5)


def test_divergence_by_hand():
    p, q = torch.tensor([[0.5, 0.5], [0.2, 0.8]]), torch.tensor([[0.25, 0.75], [0.2, 0.8]])
    expected = 0.5 * torch.log(torch.tensor(2.0)) + 0.5 * torch.log(torch.tensor(2 / 3))
    found = divergence(p.log() + 7, q.log() - 3)
    torch.testing.assert_close(found, torch.tensor([float(expected), 0.0], dtype=torch.double), atol=1e-6, rtol=1e-6)


def test_effects_equal_steering_at_the_tokens_where_the_latent_fires(run, model):
    sae, tokenizer = random_sae(), word_tokenizer()
    codes = encode_run(run, run.hook(), sae)
    maxima, point = torch.full((32,), 3.0), resolve(model, "resid_post:1")
    latent = int(torch.cat([indices[:, 0] for _, _, indices in codes]).mode().values)
    drawn = draw_occurrences(codes, [latent], 3)
    found = next_token_effects(model, tokenizer, point, sae, run, drawn, maxima)[latent]
    for name, change in (("ablated", Edit(latent, "ablate")), ("added", Edit(latent, "add", 1.0))):
        differences, kl = [], []
        for ids in prefixes(run, tokenizer, drawn.row):
            ids = torch.tensor([ids])
            with torch.no_grad():
                clean = model(input_ids=ids).logits[:, -1]
                with steer(model, point, sae, [change], maxima, positions={ids.shape[1] - 1}):
                    edited = model(input_ids=ids).logits[:, -1]
            differences.append(edited - clean - (edited - clean).mean())
            kl.append(float(divergence(clean, edited)))
        mean = torch.cat(differences).mean(0)
        assert found[name]["kl"] == pytest.approx(sum(kl) / 3, rel=2e-2)
        token, value = found[name]["raised"][0]
        assert (token == tokenizer.convert_ids_to_tokens(int(mean.argmax()))
                and value == pytest.approx(float(mean.max()), rel=1e-2))
        assert found[name]["lowered"][0][1] == pytest.approx(float(mean.min()), rel=1e-2)
    assert found["n_tokens"] == 3 and -1 <= found["direct_cosine"] <= 1


WITH_HEAD = [name for name, (kind, _) in FAMILIES.items()
             if kind.endswith(("ForCausalLM", "LMHeadModel")) or name == "llava"]


@pytest.mark.parametrize("family", WITH_HEAD)
def test_the_direct_view_of_every_family_is_the_derivative(family):
    """Whatever its final norm is called, wherever it lies, and whether it multiplies by its weight or by 1 + weight."""
    model = build(family)
    width, last = model.get_output_embeddings().weight.shape[1], blocks(model)[1][-1]
    view = direct_view(model, width)
    if family == "opt_350m":  # the unembedding is narrower than the stream, with a projection before it
        assert view is None
        return
    seen = {}

    def logits(change):
        def add(_module, _args, output):
            hidden = output[0] if isinstance(output, tuple) else output
            seen["x"] = hidden[0, -1].clone()
            hidden[0, -1] += change

        handle = last.register_forward_hook(add)
        with torch.no_grad():
            found = model(input_ids=torch.arange(3, 9)[None], **no_cache(model)).logits[0, -1]
        handle.remove()
        return found

    torch.manual_seed(0)
    logits(torch.zeros(width))
    x = seen["x"]
    basis = torch.linalg.qr(torch.stack([x, torch.ones(width)], 1))[0]
    for _ in range(3):
        direction = torch.randn(width)
        direction -= basis @ (basis.T @ direction)  # it leaves the size of the activation as it is
        direction *= 0.02 * x.norm() / direction.norm()
        slope = logits(direction) - logits(-direction)
        assert torch.cosine_similarity(slope - slope.mean(), direction @ view.T, dim=0) > 0.999


@pytest.mark.parametrize("width", [9, 16])
def test_a_norms_gain_is_measured(width):
    torch.manual_seed(0)
    for norm, centres in ((torch.nn.LayerNorm(width), True), (torch.nn.RMSNorm(width), False)):
        with torch.no_grad():
            for parameter in norm.parameters():
                parameter.copy_(torch.randn(width))
        gain, is_centred = _gain(norm, norm.weight, width)
        torch.testing.assert_close(gain, norm.weight.detach(), rtol=1e-4, atol=1e-5)
        assert is_centred == centres


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox"])
def test_the_direct_view_is_the_derivative_after_the_last_block(kind):
    """Up to the size of the activation, for directions that leave that size as it is."""
    model = tiny_model(kind).double()
    norm = {"llama": "model.norm", "gpt2": "transformer.ln_f", "neox": "gpt_neox.final_layer_norm"}[kind]
    with torch.no_grad():
        model.get_submodule(norm).weight.copy_(torch.rand(16) + 0.5)
    x = torch.randn(16, dtype=torch.double)
    direction = torch.randn(16, dtype=torch.double)
    centred = x if kind == "llama" else x - x.mean()
    direction -= centred * (direction @ centred) / (centred @ centred)
    head = torch.nn.Sequential(model.get_submodule(norm), model.get_output_embeddings())
    with torch.no_grad():
        slope = (head(x + 0.01 * direction) - head(x - 0.01 * direction)) / 0.02
    slope, direct = slope - slope.mean(), direction @ direct_view(model, 16).double().T
    assert torch.cosine_similarity(slope, direct, dim=0) > 1 - 1e-4
    assert direct_view(model, 8) is None and direct_view(tiny_model("bert"), 16) is None


def test_an_ablation_takes_the_latents_part_out_of_the_reconstruction():
    sae, x = random_sae(), torch.randn(40, 16)
    values, indices = sae.encode(x)
    latents = indices[:, 0].clone()
    latents[::4] = (indices[::4, 0] + 1) % 32
    fires = (indices == latents[:, None]) & (values > 0)
    without = sae.decode(values.where(~fires, 0), indices)
    found = ablation(sae, x, latents)
    torch.testing.assert_close(found, without - sae.decode(values, indices), atol=1e-5, rtol=1e-5)
    assert not found[~fires.any(1)].any() and found[fires.any(1)].any(1).all()
    torch.testing.assert_close(of_length(torch.randn(40, 16), torch.arange(40.0)).norm(dim=1), torch.arange(40.0))
