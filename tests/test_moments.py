"""Statistics of a run: what they are of, and that no kill, no other split and no large mean changes their digits."""
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import tiny_model, word_tokenizer
from safetensors.torch import save as library_save
from test_activations import MANY, save, stored, tree

import lib.activations as activations
import lib.moments as moments
import lib.saving as saving
import lib.summaries as summaries
from lib.activations import save_activations
from lib.environment import InputError
from lib.files import sha256
from lib.hooks import resolve
from lib.moments import batched, covariance, most_rows, spread_evenly, summary
from lib.saving import write_rows
from lib.staging import Staging, kept, one_ahead, row_table
from lib.texts import Tokens, split_texts

CPU = torch.device("cpu")


def rows(n, width, mean=0.0, seed=0):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed)) + mean


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_summary_is_of_the_training_rows_in_the_stored_precision(dtype):
    x, train = rows(1000, 7, mean=3.0).to(dtype), torch.arange(1000) % 3 > 0
    x[0] = 1000  # no training row
    found, wanted = summary(x, train), x[train].double()
    torch.testing.assert_close(found.sum, wanted.sum(0), rtol=1e-14, atol=0)
    assert torch.equal(found.norms, wanted.norm(dim=1).float()) and float(found.largest) == float(wanted.abs().max())
    empty = summary(x, torch.zeros(1000, dtype=torch.bool))
    assert not empty.sum.any() and len(empty.norms) == 0 and float(empty.largest) == 0


@pytest.mark.parametrize("mean", [0.0, 1e4])
@pytest.mark.parametrize("width", [5, 256, 300])
def test_the_covariance_keeps_its_digits_about_a_large_mean(monkeypatch, width, mean):
    """A float32 product of the rows as they are would be off by 6e-8 * mean^2: 6, where the truth is 1."""
    monkeypatch.setattr(moments, "PRODUCT_ROWS", 100)
    x = rows(950, width, mean)
    exact = x.double()
    found = covariance(iter(x.split(77)), exact.mean(0), CPU)
    torch.testing.assert_close(found, torch.cov(exact.T, correction=0).reshape(width, width), rtol=0, atol=2e-6)
    assert torch.equal(found, found.T)


@pytest.mark.parametrize("size", [1, 3, 10, 100])
def test_batches_hold_all_rows_in_order(size):
    x = rows(23, 2)
    found = [part.clone() for part in batched(iter(x.split([5, 0, 11, 7])), torch.empty(size, 2))]
    assert torch.equal(torch.cat(found), x) and all(len(part) == size for part in found[:-1])


def test_the_rows_of_a_covariance_are_bounded_and_lie_evenly():
    assert most_rows(16) == most_rows(362) == 2**20 and most_rows(768) == 233_016 and most_rows(1536) == 64 * 1536
    for n, most in ((10, 20), (10, 10), (23, 7), (10**9, 1000)):
        found = spread_evenly(n, most)
        assert len(found) == min(n, most) and found[0] == 0 and found[-1] < n
        gaps = found.diff()
        assert not len(gaps) or gaps.min() >= 1 and gaps.max() - gaps.min() <= 1


def test_a_large_run_has_the_covariance_of_some_rows_about_the_mean_of_all(tmp_path, monkeypatch):
    monkeypatch.setattr(moments, "MOST_ROWS", 40)
    run = save(tmp_path / "run", names=("resid_post:1", "resid_post:0"))
    for hook in run.hooks:
        x, stats = stored(run, hook)[~run.is_val].double(), run.stats(hook)
        centred = x[torch.arange(40) * len(x) // 40] - x.mean(0)
        torch.testing.assert_close(stats["mean"], x.mean(0).float())
        torch.testing.assert_close(stats["covariance"], (centred.T @ centred / 40).float())
        assert stats["scale"] == pytest.approx(stats["covariance"].trace().sqrt().item())
        assert stats["n_rows"] == len(x) and stats["n_covariance_rows"] == 40
        assert stats["max_abs"] == float(x.abs().max())


def killed_before_statistics(folder, patch):
    """A run whose shards are all written, and whose statistics are not."""
    def stop(*_, **__):
        raise KeyboardInterrupt

    patch.setattr(activations, "finish", stop)
    with pytest.raises(KeyboardInterrupt):
        save(folder)


@pytest.mark.parametrize("lost", ["nothing", "all", "one", "damaged", "shortened"])
def test_lost_or_damaged_summaries_are_made_again_to_the_same_bytes(tmp_path, monkeypatch, lost):
    save(tmp_path / "whole")
    assert not list(tmp_path.rglob(summaries.SUMMARIES))
    with monkeypatch.context() as patch:
        killed_before_statistics(tmp_path / "killed", patch)
    parts = sorted((tmp_path / "killed" / summaries.SUMMARIES).iterdir())
    for part in parts[: {"nothing": 0, "all": len(parts)}.get(lost, 1)]:
        data = part.read_bytes()
        part.unlink()
        if lost == "damaged":
            part.write_bytes(b"x" * len(data))
        if lost == "shortened":
            part.write_bytes(data[:-4])
    save(tmp_path / "killed")
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")


def test_with_another_split_a_resumed_run_has_the_statistics_of_that_split(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        killed_before_statistics(tmp_path / "run", patch)
    model = tiny_model("llama")
    run = save_activations(tmp_path / "run", model, word_tokenizer(), [resolve(model, "resid_post:1")], texts=MANY,
                           splits=split_texts(len(MANY), 0.5, 7), settings=activations.SaveSettings(shard_rows=64))
    x = stored(run)[~run.is_val].double()
    torch.testing.assert_close(run.stats(run.hooks[0])["mean"], x.mean(0).float())
    assert run.stats(run.hooks[0])["n_rows"] == len(x)


def test_a_rank_reads_the_statistics_only_after_the_first_has_written_them(tmp_path, monkeypatch):
    """As the second rank, for which the first one writes them while it waits."""
    whole = save(tmp_path / "whole")
    with monkeypatch.context() as patch:
        killed_before_statistics(tmp_path / "run", patch)

    def first_rank():
        for path in whole.path.glob("*/stats.*"):
            shutil.copy(path, tmp_path / "run" / path.parent.name)

    for module in (saving, summaries):
        monkeypatch.setattr(module, "rank", lambda: 1)
    monkeypatch.setattr(saving, "wait_for_all", first_rank)
    assert save(tmp_path / "run").manifest == whole.manifest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (12345, 16)])
def test_shards_have_the_bytes_that_safetensors_gives_them(tmp_path, dtype, shape):
    x = torch.randn(shape).to(dtype)
    digest = write_rows(tmp_path / "x.safetensors", x)
    assert (tmp_path / "x.safetensors").read_bytes() == library_save({"x": x})
    assert digest == sha256(tmp_path / "x.safetensors")


TOKENS = [Tokens(3, [7, 8, 9], [(0, 1), (1, 4), (4, 5)], [False, True, True]), Tokens(4, [], [], []),
          Tokens(5, [1, 2, 3, 4], [(0, 0), (0, 2), (2, 3), (3, 9)], [True, False, True, True]),
          Tokens(6, [1], [(0, 0)], [False])]


def test_the_table_of_a_block_holds_the_kept_tokens():
    expected = [(item.text_id, pos, item.ids[pos], *item.offsets[pos])
                for item in TOKENS for pos in range(len(item.ids)) if item.keep[pos]]
    found = row_table(TOKENS)
    assert found.dtype == torch.int32 and list(map(tuple, found.tolist())) == expected
    assert row_table(TOKENS[1:2]).shape == row_table([]).shape == (0, 5)
    for item in TOKENS:
        ids = torch.tensor(item.ids)
        assert ids[kept(item)].tolist() == [token for token, keep in zip(item.ids, item.keep) if keep]
    assert isinstance(kept(TOKENS[0]), slice)


def test_a_stage_takes_its_memory_again():
    stage = Staging(1)
    stage.begin(4)
    stage.put(0, 1, torch.ones(3, 2))
    stage.put(0, 0, torch.zeros(1, 2))
    (first,) = stage.wait()
    assert first.tolist() == [[0, 0], [1, 1], [1, 1], [1, 1]]
    stage.begin(2)
    stage.put(0, 0, torch.full((2, 2), 5.0))
    (second,) = stage.wait()
    assert len(second) == 2 and second.data_ptr() == first.data_ptr()
    stage.begin(1)
    stage.put(0, 0, torch.zeros(1, 3, dtype=torch.bfloat16))
    assert stage.wait()[0].shape == (1, 3) and stage.wait()[0].dtype == torch.bfloat16


class Direct:
    """A pool that works at once, and notes what was asked of it."""

    def __init__(self):
        self.asked = []

    def submit(self, work, item):
        self.asked.append(item)
        return type("Done", (), {"result": lambda _: work(item)})()


def test_one_item_is_made_ahead():
    pool = Direct()
    found = one_ahead(pool, lambda item: item * 10, range(4))
    assert next(found) == 0 and pool.asked == [0, 1] and list(found) == [10, 20, 30] and pool.asked == [0, 1, 2, 3]
    assert list(one_ahead(pool, str, [])) == [] and list(one_ahead(pool, str, [5])) == ["5"]


@pytest.mark.parametrize("where", ["tokenising", "writing"])
def test_an_error_in_a_thread_ends_the_run_in_its_own_words(tmp_path, monkeypatch, where):
    def fail(*_, **__):
        raise InputError("the disk is gone")

    monkeypatch.setattr(activations, "_tokens" if where == "tokenising" else "finite_states", fail)
    with pytest.raises(InputError, match="the disk is gone"):
        save(tmp_path / "run")


def test_statistics_are_plain_numbers_of_json(tmp_path):
    run = save(tmp_path / "run")
    found = json.loads((run.path / run.hooks[0] / "stats.json").read_text())
    assert set(found) == {"scale", "median_norm", "max_abs", "gamma", "n_outliers", "n_rows", "n_covariance_rows"}
    assert np.isfinite(list(found.values())).all()
