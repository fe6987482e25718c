"""Every family of tests/zoo.py: its blocks, what the short names mean in numbers, and every step on it."""
import functools
import math
from pathlib import Path

import pytest
import torch
from conftest import TEXTS, word_tokenizer
from torch.nn.functional import cross_entropy
from transformers import LongformerConfig, LongformerModel
from zoo import (
    BLOCK_FAMILIES,
    DOTTED,
    FAMILIES,
    NO_TEXT,
    SIZE,
    SPECIAL,
    TEXT_FAMILIES,
    WITHOUT_BLOCKS,
    build,
    lacks,
    table,
)

from checks.evaluation import loss_recovered
from concepts.codes import encode_run, live_codes
from concepts.continuations import continue_texts
from concepts.effects import draw_occurrences, next_token_effects
from lib.activations import SaveSettings, block_rows, save_activations
from lib.batches import rows_of_run
from lib.blocks import blocks
from lib.environment import InputError
from lib.hooks import capture, edit, resolve, resolve_all
from lib.models import load_model
from lib.residual_stream import ROLES
from lib.texts import tokenise
from lib.training.loop import TrainSettings, train_sae

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])
OTHER = IDS.flip(0).roll(1, 1)


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """folder_of(family): where its tiny model is saved."""

    @functools.cache
    def save(name):
        folder = tmp_path_factory.mktemp(name)
        build(name).save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def model_of(folder_of):
    """model_of(family): its tiny model as a user gets it, from a folder."""
    return functools.cache(lambda name: load_model(str(folder_of(name)), CPU, torch.float32))


@torch.no_grad()
def plain_states(model, ids=IDS):
    """What goes into and comes out of each block, by hooks of this test's own: two lists of [B, T, D]."""
    before, after, handles = [], [], []
    for block in blocks(model)[1]:
        handles.append(block.register_forward_pre_hook(lambda _, args,
                                                       kwargs: before.append((args[0] if args
                                                                              else kwargs["hidden_states"]).clone()),
                                                                              with_kwargs=True))
        handles.append(block.register_forward_hook(lambda _, args, out: after.append((out if torch.is_tensor(out)
                                                                                      else out[0]).clone())))
    model(input_ids=ids, attention_mask=torch.ones_like(ids))
    for handle in handles:
        handle.remove()
    return before, after


@torch.no_grad()
def read(model, *points, ids=IDS):
    with capture(model, list(points), stop=False) as seen:
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    return [seen[point.signature] for point in points]


def found_roles(name, model, block):
    """Role -> hook point of a block; the roles refused must be those the family is known to lack."""
    points = {}
    for role in ROLES:
        if role in lacks(name, block):
            with pytest.raises(InputError) as refusal:
                resolve(model, f"{role}:{block}")
            assert "\n" not in str(refusal.value) and f"no {role}:{block}" in str(refusal.value)
        else:
            points[role] = resolve(model, f"{role}:{block}")
    return points


def test_there_are_at_least_forty_families():
    assert len(FAMILIES) >= 60 and len(BLOCK_FAMILIES) >= 55


@pytest.mark.parametrize("name", BLOCK_FAMILIES)
def test_roles_add_up_at_every_block(name, model_of):
    model = model_of(name)
    before, after = plain_states(model)
    assert len(before) == len(blocks(model)[1]) == model.config.get_text_config().num_hidden_layers
    for i in range(len(before)):
        points = found_roles(name, model, i)
        states = dict(zip(points, read(model, *points.values())))
        assert torch.equal(states["resid_pre"], before[i]) and torch.equal(states["resid_post"], after[i])
        assert all(x.shape == before[i].shape for x in states.values())
        total = before[i]
        if "attn_out" in states and "resid_mid" in states:
            torch.testing.assert_close(total + states["attn_out"], states["resid_mid"], rtol=1e-5, atol=1e-5)
        if "mlp_out" in states:
            total = states["resid_mid"] if "resid_mid" in states else total + states["attn_out"]
            torch.testing.assert_close(total + states["mlp_out"], after[i], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", BLOCK_FAMILIES)
def test_an_edit_changes_the_stream_and_nothing_else(name, model_of):
    """The identity changes no bit; resid_mid of other texts gives their block's result; a zero removes the summand."""
    model = model_of(name)
    _, other_after = plain_states(model, OTHER)
    with torch.no_grad():
        clean = model(input_ids=IDS, attention_mask=torch.ones_like(IDS))[0]
    for i in range(len(other_after)):
        points = found_roles(name, model, i)
        for point in points.values():
            with torch.no_grad(), edit(model, point, lambda x: x):
                assert torch.equal(model(input_ids=IDS, attention_mask=torch.ones_like(IDS))[0], clean)
        # Zamba2's shared block reads the embeddings too, besides the stream.
        stream = {"resid_mid", "resid_post"} if name == "zamba2" else {"resid_pre", "resid_mid", "resid_post"}
        for role in stream & set(points):
            (from_others,) = read(model, points[role], ids=OTHER)
            with edit(model, points[role], lambda x: from_others):
                (result,) = read(model, points["resid_post"])
            torch.testing.assert_close(result, other_after[i], rtol=1e-4, atol=1e-4)
        for role, before, after in (("attn_out", "resid_pre", "resid_mid"), ("mlp_out", "resid_mid", "resid_post")):
            if {role, before, after} <= set(points):
                with edit(model, points[role], torch.zeros_like):
                    x, y = read(model, points[before], points[after])
                torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in BLOCK_FAMILIES if name not in ("rwkv",)])
def test_nothing_is_left_of_a_stream_set_to_zero(name, model_of):
    """Every token enters the MLP as the same vector, so every token leaves the block as the same vector."""
    model = model_of(name)
    for i in range(len(blocks(model)[1])):
        points = found_roles(name, model, i)
        if "resid_mid" in points:
            with edit(model, points["resid_mid"], torch.zeros_like):
                (y,) = read(model, points["resid_post"])
            assert (y - y[0, 0]).abs().max() < 1e-5


@pytest.mark.parametrize("name", NO_TEXT)
def test_models_that_read_no_text_are_refused(name, folder_of):
    with pytest.raises(InputError, match=NO_TEXT[name]) as refusal:
        load_model(str(folder_of(name)), CPU, torch.float32)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", WITHOUT_BLOCKS)
def test_models_without_blocks_say_so(name, model_of):
    model = model_of(name)
    with pytest.raises(InputError, match=WITHOUT_BLOCKS[name]):
        resolve(model, "resid_post:0")


def test_padding_inside_the_model_confirms_nothing():
    """Longformer pads texts to whole windows; equal padding in two texts is no evidence of a residual stream."""
    torch.manual_seed(0)
    config = LongformerConfig(**SIZE, **SPECIAL, attention_window=64)
    with pytest.raises(InputError, match="no resid_mid"):
        resolve(LongformerModel(config).eval(), "resid_mid:0")


def test_a_module_that_runs_twice_is_refused(model_of):
    with pytest.raises(InputError, match="runs 2 times in one pass"):
        resolve(model_of("albert"), "encoder.albert_layer_groups.0")


@pytest.mark.parametrize("name", BLOCK_FAMILIES)
def test_every_spelling_means_the_same(name, model_of):
    model = model_of(name)
    n = len(blocks(model)[1])
    for role in set(ROLES) - set().union(*(lacks(name, i) for i in range(n))):
        point = resolve(model, f"{role}:{n - 1}")
        spellings = [f"{role}:-1", f"blocks.{n - 1}.hook_{role}", point.signature, f"{point.path}:{point.point}"]
        assert [resolve(model, spelling) for spelling in spellings] == [point] * len(spellings)
        assert resolve_all(model, f"{role}:*") == [resolve(model, f"{role}:{i}") for i in range(n)]


MAX_LENGTH = 12
LONG = "the cat sat on the mat and then the dog ran under the tree and it was happy ."
STEP_TEXTS = ["", *TEXTS, "cat", LONG, "", "the dog"]


@pytest.fixture(scope="session")
def run_of(model_of, tmp_path_factory):
    """run_of(family): the run of step 1 at every role of its second block, without BOS, and its points."""

    @functools.cache
    def save(name):
        model = model_of(name)
        if name in WITHOUT_BLOCKS:
            points = resolve_all(model, DOTTED[name])
        else:
            points = list(found_roles(name, model, 1).values())
        folder, settings = tmp_path_factory.mktemp(f"{name}_run"), SaveSettings(max_length=MAX_LENGTH, batch_tokens=40,
                                                                                shard_rows=64)
        splits = ["val" if i % 4 == 1 else "train" for i in range(len(STEP_TEXTS))]
        return save_activations(folder / "run", model, word_tokenizer(bos=False), points, texts=STEP_TEXTS,
                                splits=splits, settings=settings), points

    return save


def close(a, b):
    """Equal up to the rounding of a whole model, whose weights here are large."""
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


@pytest.mark.parametrize("name", TEXT_FAMILIES)
def test_rows_do_not_depend_on_batch_padding_or_order(name, model_of, run_of):
    """Each row is what its text gives alone, and what other batches give."""
    model, tokenizer, (run, points) = model_of(name), word_tokenizer(bos=False), run_of(name)
    stored = {point.signature: torch.cat(run.shards(point.signature)) for point in points}
    for text_id, text in enumerate(STEP_TEXTS):
        ids = tokenizer(text, truncation=True, max_length=MAX_LENGTH)["input_ids"]
        mine = run.rows["text_id"] == text_id
        assert run.rows["token_id"][mine].tolist() == ids and len(ids) <= MAX_LENGTH
        if ids:
            for point, alone in zip(points, read(model, *points, ids=torch.tensor([ids]))):
                close(stored[point.signature][mine], alone[0])
    other = SaveSettings(max_length=MAX_LENGTH, batch_tokens=10**6)
    rows, states = block_rows(model, points, tokenise(tokenizer, STEP_TEXTS[::-1], 0, MAX_LENGTH), pad_id=7,
                              settings=other)
    order = torch.cat([(rows[:, 0] == len(STEP_TEXTS) - 1 - i).nonzero()[:, 0] for i in range(len(STEP_TEXTS))])
    for point, x in zip(points, states):
        close(x[order], stored[point.signature])


@pytest.mark.parametrize("name", TEXT_FAMILIES)
def test_the_steps_after_the_first_run(name, model_of, run_of):
    """An SAE trains on the rows, reads live texts as stored ones, and is put back into the model."""
    model, tokenizer, (run, points) = model_of(name), word_tokenizer(bos=False), run_of(name)
    point = next((p for p in points if p.names and p.names[0].startswith("resid_post")), points[0])
    sae, history = train_sae(rows_of_run(run, point.signature), TrainSettings(32, 4, epochs=2, batch_size=16),
                             progress=False)
    assert math.isfinite(history["val"]["ev"][-1])
    live = live_codes(STEP_TEXTS, model, tokenizer, point, sae, SaveSettings(**run.meta["settings"]))
    codes = encode_run(run, point.signature, sae)
    for (_, values, _), (_, again, _) in zip(codes, live):
        torch.testing.assert_close(values, again, rtol=1e-3, atol=1e-3)
    if model.get_output_embeddings() is None:
        return
    for inside in points:  # with the mean in its place at every point, and the SAE at the one it was trained for
        loss = loss_recovered(model, tokenizer, inside, sae, mean=run.stats(inside.signature)["mean"],
                              tokens=SaveSettings(**run.meta["settings"]).tokens(tokenizer, STEP_TEXTS))
        assert all(math.isfinite(loss[f"ce_{name}"]) for name in ("clean", "spliced", "mean_ablated"))
        assert loss["ce_mean_ablated"] != loss["ce_clean"]
    assert loss["ce_clean"] == pytest.approx(clean_loss(model, tokenizer), rel=1e-4)
    latent = int(next(iter(codes))[2][0, 0])
    drawn = draw_occurrences(codes, [latent], 2)
    effect = next_token_effects(model, tokenizer, point, sae, run, drawn, torch.ones(32))[latent]
    assert effect["added"]["kl"] > 0


@torch.no_grad()
def clean_loss(model, tokenizer):
    """Mean cross-entropy of the next token, each text by itself."""
    losses = []
    for text in STEP_TEXTS:
        ids = torch.tensor([tokenizer(text, truncation=True, max_length=MAX_LENGTH)["input_ids"]]).long()
        if ids.shape[1] > 1:
            losses.append(cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="none"))
    return float(torch.cat(losses).double().mean())


@pytest.mark.parametrize("name", ["gpt2", "bloom", "mamba", "rwkv", "recurrent_gemma", "jamba", "llava"])
def test_prompts_of_any_length_are_continued_as_if_alone(name, model_of):
    model, tokenizer, prompts = model_of(name), word_tokenizer(bos=False), ["the cat", "a dog ran and then it", "cat",
                                                                            "it was"]
    together = continue_texts(model, tokenizer, prompts, 5)
    for i, prompt in enumerate(prompts):
        alone = continue_texts(model, tokenizer, [prompt], 5)
        assert together.texts[i] == alone.texts[0]
        assert float(together.perplexity[i]) == pytest.approx(float(alone.perplexity[0]), rel=1e-3)


def test_the_table_of_the_guide_is_what_the_command_prints():
    guide = Path(__file__).resolve().parents[1] / "experiments" / "verify_sae_training" / "README.md"
    assert "\n".join(table()) in guide.read_text(encoding="utf-8")
