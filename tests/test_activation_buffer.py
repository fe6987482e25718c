"""The rows of a running model, mixed in memory: how well, what is in memory, and that a resumed pass gives the same."""
import signal
from functools import partial
from itertools import count, islice

import datasets
import pytest
import torch

from activation_buffer import documents as documents_module
from activation_buffer import mixing
from activation_buffer.documents import Shuffled, Stream
from activation_buffer.mixing import LivePass
from activation_buffer.rows import LiveRows
from lib.batches import rows_of_tensor
from lib.environment import InputError
from lib.sae import sae_hash
from lib.training import loop
from lib.training.loop import TrainSettings, take_batch, train_sae

BLOCK_ROWS, TEXT_ROWS, BATCH, WIDTH, WINDOW = 250, 10, 50, 4, 15
IN_MEMORY = (WINDOW + 1) // 2 * BLOCK_ROWS


def numbered(first, points=(0,), sizes=lambda number: BLOCK_ROWS):
    """Blocks of rows whose first number is their position in the stream, as LiveRows.read gives them."""
    start = sum(map(sizes, range(first)))
    for number in count(first):
        block = torch.zeros(sizes(number), WIDTH)
        block[:, 0] = torch.arange(start, start + len(block))
        yield block, str(number)
        start += len(block)


def live(n_tokens, read=numbered, window=WINDOW):
    stored = rows_of_tensor(torch.eye(WIDTH).repeat(5, 1), torch.arange(20) < 4)
    return LiveRows(stored, LivePass(read, n_tokens, window, [WIDTH]), 0, epochs=2, mean=torch.zeros(WIDTH),
                    covariance=torch.eye(WIDTH))


def positions(rows, batch=BATCH, seed=0, begun=(0, {}), n=None):
    """int64 [batches, batch]: where the rows of each batch stood in the stream."""
    batches = rows.batches(torch.eye(WIDTH), batch, seed=seed, begun=[begun])
    found = [x[:, 0].round().long() for x in islice(batches, n)]
    return torch.stack(found) if found else torch.empty(0, batch, dtype=torch.int64)


@pytest.mark.parametrize("n_tokens", [100, 2000, 25_000])
def test_every_row_that_was_read_leaves_once(n_tokens):
    """Too few for a window, for two, and many; only what fills no batch at the end is left."""
    seen = positions(live(n_tokens)).flatten()
    n_read = -(-n_tokens // BLOCK_ROWS) * BLOCK_ROWS
    assert len(seen.unique()) == len(seen) and n_read - len(seen) < BATCH and int(seen.max()) < n_read


def test_neighbours_in_a_batch_come_from_one_text_as_often_as_by_chance():
    """As from rows of a store twice as large as what is in memory, which is what tests/test_shuffle.py holds a store
    to that is as large as its buffer.
    """
    seen = torch.cat([positions(live(30_000), seed=seed) for seed in range(3)])
    same = (seen[:, 1:] // TEXT_ROWS == seen[:, :-1] // TEXT_ROWS).float().mean()
    expected, n_pairs = (TEXT_ROWS - 1) / (WINDOW * BLOCK_ROWS - 1), seen.numel()
    assert abs(same - expected) < expected * 0.1 + 4 * (expected / n_pairs) ** 0.5
    assert expected < 0.6 * (TEXT_ROWS - 1) / (IN_MEMORY - 1)


def test_batches_differ_as_little_as_random_rows_of_the_window_do():
    """Beside the way that the stream itself has come, the batches' means vary as those of that many random rows."""
    seen = positions(live(40_000))[100:-100].double().mean(1)
    at = torch.arange(len(seen)).double()
    slope = torch.corrcoef(torch.stack([seen, at]))[0, 1] * seen.std() / at.std()
    spread = (seen - slope * at).var()
    assert abs(slope / BATCH - 1) < 0.01 and spread < 1.25 * (WINDOW * BLOCK_ROWS) ** 2 / 12 / BATCH
    assert spread < 0.25 * (2 * IN_MEMORY) ** 2 / 12  # blocks as they come


def test_the_order_is_the_seeds():
    first, again, other = (positions(live(5000), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(first.flatten().sort().values, other.flatten().sort().values)


def test_memory_holds_little_more_than_half_a_window(monkeypatch):
    """What has been read and not yet given, at any step; and the tensor that holds it."""
    read, buffers = [], []

    class Seen(mixing.Buffer):
        def __init__(self, *given, **named):
            super().__init__(*given, **named)
            buffers.append(self)

    monkeypatch.setattr(mixing, "Buffer", Seen)

    def counting(first, points):
        for block, word in numbered(first):
            read.append(len(block))
            yield block, word

    rows, held = live(20_000, counting), []
    for given, _ in enumerate(rows.batches(torch.eye(WIDTH), BATCH, seed=0, begun=[(0, {})]), 1):
        held.append(sum(read) - given * BATCH)
    assert max(held) < 1.1 * IN_MEMORY + BLOCK_ROWS and len(buffers[0].rows) < 1.3 * IN_MEMORY


@pytest.mark.parametrize("sizes", [lambda number: BLOCK_ROWS, lambda number: [0, 30, 700][number % 3]])
@pytest.mark.parametrize("batch", [BATCH, 333])
def test_a_resumed_pass_gives_the_same_batches_and_reads_only_its_window(sizes, batch):
    """Stopped after any step; also where blocks are of any size, and smaller than a batch."""
    whole = positions(live(9000, partial(numbered, sizes=sizes)), batch)
    rows = live(9000, partial(numbered, sizes=sizes))
    batches = rows.batches(torch.eye(WIDTH), batch, seed=0, begun=[(0, {})])
    for step in range(1, len(whole) + 1):
        next(batches)
        if batch == BATCH and step % 9:
            continue
        place, began = rows.place(), []

        def counted(first, points, began=began):
            began.append(first)
            yield from numbered(first, sizes=sizes)

        resumed = live(9000, counted)
        rest = positions(resumed, batch, begun=(step, place))
        assert torch.equal(rest, whole[step:])
        assert began[0] >= place["round"] - WINDOW + 1


def test_a_damaged_place_is_refused():
    for wrong in ({"round": -1}, {"n_rows": "1"}, {"given": 0}, {"n_over": 1.5}, {"texts": None}):
        place = {"round": 20, "given": 1, "n_blocks": 21, "n_rows": 5250, "n_over": 0, "texts": 16 * "0"} | wrong
        with pytest.raises(InputError, match="place in the texts is damaged"):
            positions(live(9000), begun=(70, place), n=1)
    with pytest.raises(InputError, match="place in the texts is damaged"):
        positions(live(9000), begun=(70, {}), n=1)


def test_texts_that_give_no_rows_end_it():
    with pytest.raises(InputError, match="no more tokens"):
        positions(live(9000, partial(numbered, sizes=lambda number: 0)))


def test_each_pass_over_a_file_reads_every_text_in_another_order():
    texts = [str(i) for i in range(57)]
    found = list(islice(Shuffled(texts).texts_from(0, seed=3), 57 * 3))
    passes = [found[i : i + 57] for i in (0, 57, 114)]
    assert all(sorted(part) == sorted(texts) for part in passes) and passes[0] != passes[1] != passes[2]
    for first in (0, 1, 56, 57, 100, 114):
        assert list(islice(Shuffled(texts).texts_from(first, seed=3), 30)) == found[first : first + 30] or first > 141
    assert list(islice(Shuffled(texts).texts_from(0, seed=4), 57)) != passes[0]


@pytest.fixture
def hub(monkeypatch):
    """A data set of 100 documents that stands for one of the hub; every seventh has no text."""
    def open_stream(dataset, split):
        rows = [{"text": (None, " ")[i % 2] if i % 7 == 3 else f"{dataset} {split} {i}"} for i in range(100)]
        return datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=4)

    monkeypatch.setattr(documents_module, "open_stream", open_stream)
    monkeypatch.setattr(documents_module, "STREAM_BUFFER", 20)


def test_a_stream_is_read_from_any_number_and_again_from_its_beginning(hub, caplog):
    caplog.set_level("INFO", "workbench")
    stream = Stream("data", "train", "text")
    found = list(islice(stream.texts_from(0, seed=0), 250))
    assert found[:50] == found[100:150] == found[200:] and len(set(found[:100]) - {None}) == 86
    for first in (1, 99, 100, 101, 230):
        assert list(islice(stream.texts_from(first, seed=0), 20)) == found[first : first + 20]
    assert "ends after 100 documents" in caplog.text


def test_training_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """The same bytes, wherever it stopped: the checkpoint holds the place."""
    def read(first, points):
        for number in count(first):
            yield torch.randn(300, 8, generator=torch.Generator().manual_seed(number)), str(number)

    def training(folder):
        x = torch.randn(400, 8, generator=torch.Generator().manual_seed(99))
        stored = rows_of_tensor(x, torch.arange(400) < 100)
        rows = LiveRows(stored, LivePass(read, 6000, 4, [8]), 0, epochs=3, mean=stored.mean,
                        covariance=stored.covariance)
        return train_sae(rows, TrainSettings(n_latents=16, top_k=2, epochs=3, batch_size=100), folder, progress=False)

    whole, history = training(None)
    for stop_at in (1, 17, 20, 41, 59):
        steps = count(1)

        def stop(training, x, steps=steps, stop_at=stop_at):
            if next(steps) == stop_at:
                signal.raise_signal(signal.SIGINT)
            return take_batch(training, x)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(loop, "take_batch", stop)
            training(tmp_path / str(stop_at))
        again, same = training(tmp_path / str(stop_at))
        assert sae_hash(again) == sae_hash(whole) and same == history


def test_a_stream_without_the_field_is_named(hub):
    with pytest.raises(InputError, match="no field 'story'"):
        next(Stream("data", "train", "story").texts_from(0, seed=0))
