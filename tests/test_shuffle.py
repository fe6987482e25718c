"""How well the two-level shuffle mixes a run that is larger than its buffer, against what chance would give."""
import pytest
import torch

import lib.batches as batches_module
from lib.batches import Rows, shuffled_batches, steps_per_epoch

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
