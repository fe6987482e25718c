"""Saving activations: which tokens are stored, in which order, and that nothing else changes them."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
import torch
from conftest import PROJECT, TEXTS, row_text, tiny_model, word_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import lib.activations as activations
import lib.files as files
import lib.saving as saving
from lib.activations import SaveSettings, preflight, save_activations
from lib.environment import InputError
from lib.files import write_text
from lib.hooks import resolve
from lib.metrics.layers import layer_statistics
from lib.models import load_tokenizer
from lib.store import open_run
from lib.texts import length_batches, load_documents, pad, split_texts, tokenise

MANY = [text + " and then " * (i % 7) for i, text in enumerate(TEXTS * 5)]


def save(folder, model=None, tokenizer=None, texts=MANY, names=("resid_post:1",), point="output", **settings):
    model = model or tiny_model("llama")
    points = [resolve(model, name, point) for name in names]
    settings = SaveSettings(**{"shard_rows": 64, **settings})
    return save_activations(folder, model, tokenizer or word_tokenizer(), points, texts=texts,
                            splits=split_texts(len(texts), 0.2, 0), settings=settings)


def stored(run, hook=None):
    return torch.cat(run.shards(run.hook(hook)))


def test_each_row_is_its_tokens_own_activation(tmp_path):
    model, tokenizer = tiny_model("llama"), word_tokenizer()
    run = save(tmp_path / "run", model, tokenizer)
    x, rows = stored(run), run.rows
    for text_id, text in enumerate(MANY):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            alone = model(ids, output_hidden_states=True).hidden_states[2][0]
        mine = rows["text_id"] == text_id
        torch.testing.assert_close(x[mine], alone[rows["pos"][mine].long()], rtol=1e-5, atol=1e-6)
        assert torch.equal(rows["token_id"][mine].long(), ids[0, rows["pos"][mine].long()])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox"])
def test_batch_size_changes_nothing(tmp_path, kind):
    model = tiny_model(kind)
    runs = [save(tmp_path / str(i), model, **s)
            for i, s in enumerate(({}, {"batch_tokens": 1}, {"batch_tokens": 10**6}))]
    for other in runs[1:]:
        torch.testing.assert_close(stored(other), stored(runs[0]), rtol=1e-5, atol=1e-5)
        assert all(torch.equal(other.rows[c], runs[0].rows[c]) for c in other.rows)


def test_rows_come_in_text_order(tmp_path):
    rows = save(tmp_path / "run").rows
    key = rows["text_id"].long() * 1000 + rows["pos"]
    assert (key.diff() > 0).all()


def test_no_special_token_is_stored_and_offsets_give_the_token(tmp_path):
    tokenizer = word_tokenizer()
    run = save(tmp_path / "run", tokenizer=tokenizer)
    assert not set(run.rows["token_id"].tolist()) & set(tokenizer.all_special_ids)
    for row in range(run.n_rows):
        assert row_text(run, row) == tokenizer.decode([int(run.rows["token_id"][row])])


def test_special_tokens_are_kept_on_request_and_first_positions_dropped(tmp_path):
    kept = save(tmp_path / "a", skip_special=False)
    assert (kept.rows["token_id"] == 1).sum() == len(MANY)  # one BOS a text
    later = save(tmp_path / "b", skip_special=False, skip_first=3)
    assert later.rows["pos"].min() == 3


def test_the_unknown_token_is_real_text(tmp_path):
    run = save(tmp_path / "run", texts=["the zebra sat", "a cat ran"] * 3)
    assert (run.rows["token_id"] == 3).sum() == 3


def test_padding_is_told_by_the_mask_where_pad_is_eos(tmp_path):
    tokenizer = word_tokenizer()
    tokenizer.pad_token = "[EOS]"
    torch.testing.assert_close(stored(save(tmp_path / "a", tokenizer=tokenizer)), stored(save(tmp_path / "b")))


def test_several_points_in_one_pass_share_their_rows(tmp_path):
    together = save(tmp_path / "both", names=("resid_post:2", "resid_mid:0"))
    for name in ("resid_post:2", "resid_mid:0"):
        alone = save(tmp_path / name.replace(":", "_"), names=(name,))
        torch.testing.assert_close(stored(together, alone.hooks[0]), stored(alone), rtol=0, atol=0)
        assert together.n_rows == alone.n_rows


def test_statistics_are_those_of_the_training_rows(tmp_path):
    run = save(tmp_path / "run")
    x = stored(run)[~run.is_val].double()
    stats = run.stats(run.hooks[0])
    torch.testing.assert_close(stats["mean"], x.mean(0).float())
    torch.testing.assert_close(stats["covariance"], torch.cov(x.T, correction=0).float())
    assert stats["scale"] == pytest.approx((x - x.mean(0)).square().sum(1).mean().sqrt().item())
    assert stats["n_rows"] == len(x) and stats["median_norm"] == pytest.approx(x.norm(dim=1).median().item())
    assert stats["gamma"] == pytest.approx((x.mean(0).norm() / x.var(0, correction=0).sum().sqrt()).item())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read as Linux tells it")
def test_the_mask_of_many_rows_takes_a_byte_a_row():
    """A run of 1e9 rows is opened with it; as one small mask a shard it took nine."""
    shown = subprocess.run([sys.executable, "-c", """if True:
        import re
        from pathlib import Path
        import torch
        from lib.store import Run

        class Long(Run):
            def _read_texts(self):
                return ({"split": split} for split in ("val", "train", "train"))

            def _row_shards(self):
                return ({"text_id": torch.arange(shard["rows"], dtype=torch.int32) % 3} for shard in SHARDS)

        def peak():  # ru_maxrss would begin at that of the process which started this one
            return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

        SHARDS = [{"rows": 65_536}] * 1500 + [{"rows": 7}]
        run = Long(Path(), {}, {"rows": SHARDS, "n_rows": 1500 * 65_536 + 7})
        before = peak()
        assert run.is_val[65_535:65_540].tolist() == [True, True, False, False, True] and run.is_val[-1]
        print((peak() - before) / run.n_rows)
    """], capture_output=True, text=True, check=True, cwd=PROJECT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert 0.5 < float(shown.stdout) < 1.5


def test_shards_have_the_size_asked_for(tmp_path):
    run = save(tmp_path / "run")
    sizes = [len(shard) for shard in run.shards(run.hooks[0])]
    assert set(sizes[:-1]) == {64} and 0 < sizes[-1] <= 64 and len(sizes) > 3
    assert [shard["rows"] for shard in run.manifest["rows"]] == sizes


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("after", range(1, 10))
@pytest.mark.parametrize("norm", [None, 1.2])
def test_an_interrupted_run_ends_with_the_same_bytes(tmp_path, monkeypatch, after, norm):
    """Killed after any number of files, the run is continued by the same call; shards span blocks of 8 texts."""
    monkeypatch.setattr(activations, "BLOCK_TEXTS", 8)
    names = ("resid_post:1", "resid_post:0")
    settings = {"batch_tokens": 40, "shard_rows": 50, "max_norm_multiple": norm}
    save(tmp_path / "whole", names=names, **settings)
    written = []
    real = files.atomic_write

    def fail_later(path, write):
        if path.suffix == ".safetensors":
            if len(written) >= after:
                raise KeyboardInterrupt
            written.append(path)
        real(path, write)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        for module in (files, saving):
            patch.setattr(module, "atomic_write", fail_later)
        save(tmp_path / "killed", names=names, **settings)
    assert len(written) == after
    save(tmp_path / "killed", names=names, **settings)
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")


def test_outlier_rows_are_dropped_at_every_point(tmp_path):
    model = tiny_model("llama")
    whole = save(tmp_path / "whole", model, names=("resid_post:0", "resid_post:1"))
    norms = stored(whole, whole.hooks[0]).norm(dim=1)
    limit = 1.05
    cut = save(tmp_path / "cut", model, names=("resid_post:0", "resid_post:1"), max_norm_multiple=limit)
    assert 0 < cut.n_rows < whole.n_rows
    sample = preflight(model, word_tokenizer(), [resolve(model, "resid_post:0")], MANY, settings=SaveSettings())
    assert stored(cut, cut.hooks[0]).norm(dim=1).max() <= limit * sample[0]["median_norm"] < norms.max()


def test_activations_that_are_not_finite_are_refused_with_their_text(tmp_path):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[4 + 3] = float("nan")  # "dog"
    with pytest.raises(InputError, match="not finite.*texts 1"):
        save(tmp_path / "run", model)
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_float16_overflow_is_named(tmp_path):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1e7)
    with pytest.raises(InputError, match="STORE_DTYPE=bfloat16"):
        save(tmp_path / "run", model, names=("resid_pre:0",), store_dtype="float16")


def test_activations_whose_squares_overflow_are_refused(tmp_path):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1e21)
    with pytest.raises(InputError, match="too large for statistics"):
        save(tmp_path / "run", model, names=("resid_pre:0",))


def test_texts_without_a_token_to_store_are_refused(tmp_path):
    with pytest.raises(InputError, match="no text yields a token"):
        save(tmp_path / "run", texts=["", "", ""])


def test_an_empty_text_among_others_takes_no_row(tmp_path):
    run = save(tmp_path / "run", texts=["a cat", "", "the dog", "it was red"])
    assert set(run.rows["text_id"].tolist()) == {0, 2, 3}


def test_an_altered_truncated_or_missing_file_is_named(tmp_path, own_store, monkeypatch):
    monkeypatch.setattr("lib.outputs.SMALL_FILE", 500)  # bytes; the shards are larger
    folder = own_store / "verify_sae_training" / "runs" / "r"
    run = save(folder)
    write_text(own_store / "verify_sae_training" / "run_id.txt", "r\n")
    assert open_run("verify_sae_training").n_rows == run.n_rows
    shard = folder / run.manifest["hooks"][run.hooks[0]][1]["file"]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    open_run("verify_sae_training")  # the cheap check looks at sizes
    with pytest.raises(InputError, match="shard_00001.safetensors was altered"):
        open_run("verify_sae_training", verify=True)
    shard.write_bytes(whole[:-1])
    with pytest.raises(InputError, match="shard_00001.safetensors was altered"):
        open_run("verify_sae_training")
    shard.unlink()
    with pytest.raises(InputError, match="shard_00001.safetensors is missing"):
        open_run("verify_sae_training")
    shutil.rmtree(folder)
    with pytest.raises(InputError, match="01_save_activations.py"):
        open_run("verify_sae_training")


def test_a_run_id_cannot_leave_the_store():
    with pytest.raises(InputError, match="not a file name"):
        open_run("verify_sae_training", "../../etc")


def test_batches_hold_texts_of_like_length_within_the_budget():
    tokens = tokenise(word_tokenizer(), MANY, 0, 128)
    batches = list(length_batches(tokens, 60))
    assert sorted(item.text_id for batch in batches for item in batch) == list(range(len(MANY)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(len(item.ids) for item in batch) <= 60
    lengths = [len(item.ids) for batch in batches for item in batch]
    assert lengths == sorted(lengths)


def test_padding_stands_on_the_right():
    tokens = tokenise(word_tokenizer(), ["a cat", "the dog sat"], 0, 128)
    ids, mask = pad(tokens, 0)
    assert ids[0, 3] == 0 and mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_texts_are_cut_at_max_length(tmp_path):
    run = save(tmp_path / "run", max_length=4)
    assert run.rows["pos"].max() == 3


@pytest.mark.parametrize("texts", [["", "a cat", "", "the dog ran", ""] * 3, ["", "", "", "", "it was red", "a cat"],
                                   ["a cat", *[""] * 9]])
@pytest.mark.parametrize("batch_tokens", [1, 3, 1000])
def test_empty_texts_and_no_bos_take_no_row(tmp_path, monkeypatch, texts, batch_tokens):
    """Tokenizers without BOS give an empty text no token at all, and a whole block of texts may be empty."""
    monkeypatch.setattr(activations, "BLOCK_TEXTS", 4)
    model, tokenizer = tiny_model("gpt2"), word_tokenizer(bos=False)
    run = save(tmp_path / "run", model, tokenizer, texts, batch_tokens=batch_tokens)
    words = [(i, word) for i, text in enumerate(texts) for word in text.split()]
    assert [(int(i), row_text(run, row)) for row, i in enumerate(run.rows["text_id"])] == words
    with torch.no_grad():
        alone = model(tokenizer("a cat", return_tensors="pt")["input_ids"],
                      output_hidden_states=True).hidden_states[2][0]
    torch.testing.assert_close(stored(run)[run.rows["text_id"] == texts.index("a cat")], alone, rtol=1e-5, atol=1e-6)


def plain_tokenizer(words="the a cat dog sat".split()):
    """A tokenizer that has no special token of any kind: id 0 is a word."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_without_padding_and_eos_no_real_token_is_taken_for_padding(tmp_path):
    plain_tokenizer().save_pretrained(tmp_path / "tokenizer")
    tokenizer, texts = load_tokenizer(str(tmp_path / "tokenizer")), ["the cat sat", "a dog", "the the the the"] * 3
    run = save(tmp_path / "run", tiny_model("gpt2"), tokenizer, texts)
    assert (run.rows["token_id"] == 0).sum() == 15 and run.n_rows == sum(len(text.split()) for text in texts)


def test_a_long_text_is_read_as_far_as_it_is_needed(monkeypatch):
    """The tokens are those of the whole text, and the tokenizer never sees it whole."""
    tokenizer, seen = word_tokenizer(), []
    text = "the cat sat on the mat . " * 20_000

    class Counting:
        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __call__(self, parts, **options):
            seen.append(sum(map(len, parts)))
            return tokenizer(parts, **options)

    (item,) = tokenise(Counting(), [text], 0, 128)
    assert item.ids == tokenizer(text, truncation=True, max_length=128)["input_ids"] and len(item.ids) == 128
    assert sum(seen) < 50_000 < len(text)


@pytest.mark.parametrize("text", ["x" * 100_000 + " the cat", " " * 300_000 + "the cat sat",
                                  "the" + " " * 200_000 + "cat", "a cat " * 3])
def test_of_a_long_word_or_a_long_gap_more_is_read(text):
    tokenizer = word_tokenizer()
    whole = tokenizer(text, truncation=True, max_length=128, return_offsets_mapping=True)
    (item,) = tokenise(tokenizer, [text], 0, 128)
    assert item.ids == whole["input_ids"] and item.offsets == whole["offset_mapping"]


def test_a_token_without_an_embedding_is_named(tmp_path):
    with pytest.raises(InputError, match="id 25, but .*has 10 embeddings"):
        save(tmp_path / "run", tiny_model("llama", vocab_size=10), texts=["the cat .", "a , ."] * 3)


@pytest.mark.parametrize("kind, limit", [("gpt2", "n_positions"), ("bert", "max_position_embeddings"),
                                         ("llama", "max_position_embeddings")])
def test_texts_longer_than_the_positions_are_refused_before_anything_is_written(tmp_path, kind, limit):
    with pytest.raises(InputError, match="MAX_LENGTH=128 is beyond the 32 positions"):
        save(tmp_path / "run", tiny_model(kind, **{limit: 32}))
    assert not (tmp_path / "run").exists()
    assert save(tmp_path / "run", tiny_model(kind, **{limit: 32}), max_length=32).n_rows


def test_weights_that_are_not_numbers_are_named(tmp_path):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 2] = float("nan")
    with pytest.raises(InputError, match="not finite, because model.layers.0.mlp.up_proj.weight"):
        preflight(model, word_tokenizer(), [resolve(model, "resid_post:0")], MANY, settings=SaveSettings())
    with pytest.raises(InputError, match="not finite, because model.layers.0.mlp.up_proj.weight"):
        save(tmp_path / "run", model)


@pytest.mark.parametrize("shape", [(40, 7), (7, 40), (3, 3)])
def test_effective_dimensions_are_those_of_the_singular_values(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.double) * torch.arange(1,
                                                                                                          shape[1] + 1)
    values = torch.linalg.svdvals(x - x.mean(0)).square()
    expected = float(values.sum() ** 2 / values.square().sum())
    assert layer_statistics(x)["participation"] == pytest.approx(expected, rel=1e-9)


def test_lists_of_words_in_a_parquet_file_are_lists(tmp_path):
    pandas.DataFrame({"text": ["a cat", "the dog"],
                      "concepts": [[1, 2], [0, 3]]}).to_parquet(tmp_path / "texts.parquet")
    assert [document["concepts"] for document in load_documents(str(tmp_path / "texts.parquet"))] == [[1, 2], [0, 3]]
