"""How well the two-level shuffle mixes a run that is larger than its buffer, against what chance would give."""
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lib.batches as batches_module
from lib.batches import Rows, sample_rows, shuffled_batches, steps_per_epoch

N_SHARDS, SHARD_ROWS, TEXT_ROWS, BATCH, WIDTH = 40, 250, 10, 50, 4
N = N_SHARDS * SHARD_ROWS
SHARDS_IN_BUFFER = 8


@pytest.fixture
def rows():
    """Every tenth text is for validation; a row's first number is its position in the run."""
    x = torch.zeros(N, WIDTH)
    x[:, 0] = torch.arange(N)
    is_val = torch.arange(N) // TEXT_ROWS % 10 == 0
    return Rows(list(x.split(SHARD_ROWS)), is_val, torch.zeros(WIDTH), torch.eye(WIDTH))


@pytest.fixture(params=["buffers", "memory"])
def in_memory(request, monkeypatch):
    n = N if request.param == "memory" else SHARDS_IN_BUFFER * SHARD_ROWS
    monkeypatch.setattr(batches_module, "BUFFER_BYTES", n * 4 * WIDTH)
    return request.param == "memory"


def positions(rows, epoch):
    """int64 [batches, BATCH]: which rows each batch of an epoch holds."""
    batches = shuffled_batches(rows, torch.eye(WIDTH), BATCH, seed=0, epoch=epoch)
    return torch.stack([x[:, 0].round().long() for x in batches])


def test_an_epoch_holds_every_training_row_once(rows, in_memory):
    seen = positions(rows, 0)
    assert len(seen) == steps_per_epoch(rows.n_train, BATCH)
    assert len(seen.flatten().unique()) == seen.numel() and not rows.is_val[seen].any()
    assert rows.n_train - seen.numel() < BATCH


def test_the_order_differs_between_epochs_and_does_not_depend_on_the_run(rows, in_memory):
    """A row's place in the epoch correlates with its place in the run as random shards do: 0 on average."""
    correlations = []
    for epoch in range(20):
        order = positions(rows, epoch).flatten().double()
        correlations.append(torch.corrcoef(torch.stack([order, torch.arange(len(order)).double()]))[0, 1])
    sd = N**-0.5 if in_memory else N_SHARDS**-0.5
    assert abs(torch.stack(correlations).mean()) < 4 * sd / 20**0.5
    assert torch.stack(correlations).abs().max() < 4 * sd


def test_neighbours_in_a_batch_come_from_one_text_as_often_as_by_chance(rows, in_memory):
    same = torch.stack([(p[:, 1:] // TEXT_ROWS == p[:, :-1] // TEXT_ROWS).float().mean()
                        for p in (positions(rows, e) for e in range(10))]).mean()
    mixed = (N if in_memory else SHARDS_IN_BUFFER * SHARD_ROWS) * 0.9  # training rows of a buffer
    expected = (TEXT_ROWS - 1) / (mixed - 1)
    n_pairs = 10 * N * 0.9
    assert same < expected * 1.1 + 4 * (expected / n_pairs) ** 0.5
    assert same > expected * 0.9 - 4 * (expected / n_pairs) ** 0.5


def test_batches_differ_as_little_as_samples_of_their_buffer_do(rows, in_memory):
    """The spread of the batches' means: that of BATCH random rows, and through buffers that of their random shards."""
    means = torch.cat([positions(rows, epoch).double().mean(1) for epoch in range(10)])
    variance = N**2 / 12
    expected = variance / BATCH + (0 if in_memory else variance / SHARDS_IN_BUFFER)
    assert means.var() < 1.25 * expected
    unshuffled = (torch.arange(N)[~rows.is_val][: len(means) // 10 * BATCH].view(-1, BATCH).double().mean(1)).var()
    assert unshuffled > 5 * means.var()


@pytest.mark.parametrize("start", [1, 33, 34, 170, 179])
def test_a_pass_can_begin_at_any_batch_and_reads_no_buffer_before_it(rows, in_memory, monkeypatch, start):
    whole = list(shuffled_batches(rows, torch.eye(WIDTH), BATCH, seed=3, epoch=1))
    read, real = [], batches_module.read_rows
    monkeypatch.setattr(batches_module, "read_rows", lambda shards, ids, *rest: (read.append(len(ids)),
                                                                              real(shards, ids, *rest))[1])
    rest = list(shuffled_batches(rows, torch.eye(WIDTH), BATCH, seed=3, epoch=1, start=start))
    assert len(rest) == len(whole) - start and all(map(torch.equal, rest, whole[start:]))
    assert sum(read) == (rows.n_train if in_memory else BATCH * (len(whole) - start))


@pytest.mark.parametrize("limit", [None, 1, 7, 300, 5000])
@pytest.mark.parametrize("validation", [True, False])
def test_a_sample_is_every_nth_row_of_its_kind_in_blocks_of_the_disk(rows, monkeypatch, validation, limit):
    monkeypatch.setattr(batches_module, "BATCH_ROWS", 60)  # a shard of 250 rows has blocks of 60, 60, 60, 60 and 10
    ids = (rows.is_val == validation).nonzero()[:, 0]
    every = max(1, len(ids) // limit) if limit else 1
    found = [x[:, 0].long() for x in sample_rows(rows, validation, limit)]
    assert torch.equal(torch.cat(found), ids[::every])
    blocks = [list(dict.fromkeys((part // 250 * 5 + part % 250 // 60).tolist())) for part in found]
    assert [len(block) for block in blocks] == [1] * len(found) and sorted(blocks) == blocks


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that anything allocates."""

    n_bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor) and not function.is_view:
                self.n_bytes = max(self.n_bytes, tensor.untyped_storage().nbytes())
        return out


def test_a_long_run_needs_memory_for_its_buffer_and_not_for_its_rows(monkeypatch):
    """Two million rows that lie in one row's memory; the buffer holds 40,000 of them. A mask over all would take 2 MB,
    their numbers 16 MB.
    """
    shards = [torch.zeros(1, 4).expand(20_000, 4)] * 100
    rows = Rows(shards, torch.arange(2_000_000) % 10 == 0, torch.zeros(4), torch.eye(4))
    monkeypatch.setattr(batches_module, "BUFFER_BYTES", 40_000 * 4 * 4)
    with Largest() as largest:
        assert rows.n_train == 1_800_000
        scored = sum(len(x) for validation in (True, False) for x in rows.sample(validation))
        steps = sum(1 for _ in shuffled_batches(rows, torch.eye(4), 1000, seed=0, epoch=0, start=1600))
    assert scored < 2 * 17_000 and steps == 200
    assert largest.n_bytes <= 40_000 * 4 * 4


@pytest.mark.parametrize("in_buffers", [False, True])
def test_a_buffer_is_in_memory_once(monkeypatch, in_buffers):
    """What read_rows gives is freed before it is called again, and whitened where it stands."""
    monkeypatch.setattr(batches_module, "BUFFER_BYTES", 1 if in_buffers else 2**30)
    monkeypatch.setattr(batches_module, "WHITENED_ROWS", 100)
    held, most, real = [], [], batches_module.read_rows

    def noted(*args):
        most.append(sum(found() is not None for found in held))
        whole = real(*args)
        held.append(weakref.ref(whole))
        return whole

    monkeypatch.setattr(batches_module, "read_rows", noted)
    x = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0))
    rows = Rows(list(x.split(100)), torch.zeros(1000, dtype=torch.bool), x.mean(0), torch.eye(4))
    transform = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    cache = {}
    seen = torch.cat(list(shuffled_batches(rows, transform, 50, seed=0, epoch=0, cache=cache)))
    torch.testing.assert_close(seen.sort(0).values, ((x - x.mean(0)) @ transform).sort(0).values)
    assert len(most) == (5 if in_buffers else 1) and not any(most)
