"""A run's data set through the run's model: training rows of SAEs without their activations on disk.

    rows = live_rows(run, [(hook, 0)], n_tokens=100_000_000, epochs=10, buffer_tokens=2**18)[hook, 0]
    sae, history = train_sae(rows, settings, folder)

The run is a sample: mean, covariance, held-out rows, and how texts are cut and masked are its own.
"""
import time
from collections.abc import Iterator, Sequence
from functools import cache, partial
from itertools import count, islice
from typing import Any, NamedTuple

import torch
from saved_model import hook_of_run, model_of_run
from torch import Tensor

from lib.activations import SAMPLE_TEXTS, STORE_DTYPES, SaveSettings, block_rows
from lib.batches import rows_of_run
from lib.distributed import own_part
from lib.environment import InputError, log
from lib.files import fingerprint
from lib.hooks import HookPoint, resolve
from lib.models import source_of_run
from lib.saving import drop_outliers
from lib.schemas import Misfit, check
from lib.store import Run
from lib.texts import filler_id

from .documents import Shuffled, Stream, open_documents
from .mixing import LivePass
from .rows import LiveRows

BLOCK_TEXTS = 512  # at most: texts that the model reads between two rounds of the buffer
BLOCK_TOKENS = 65_536  # at most, the special ones included
BLOCKS_IN_BUFFER = 8  # at least


class Reader(NamedTuple):
    """What reads a run's data set anew, and how."""

    model: Any
    tokenizer: Any
    documents: Shuffled | Stream
    held_out: set[str]
    block_texts: int
    settings: SaveSettings
    points: list[HookPoint]
    """Those to train on; where outliers are dropped, also the run's others."""
    limits: list[float | None]
    """The largest norm that a row may have at each."""


def live_rows(
    run: Run, wanted: Sequence[tuple[str, int]], *, n_tokens: int | None, epochs: int, buffer_tokens: int,
    device: torch.device | str = "auto", trust_remote_code: bool = False,
) -> dict[tuple[str, int], LiveRows]:
    """Training rows of the run's hook points from the whole of its data set, without the run's held-out texts.

    wanted: hook points, each with the seed that orders the texts; those with the same seed share a pass of the model.
    n_tokens: rows to give; None: `epochs` passes over the texts, by the run's tokens per text. epochs: parts of the
    training. buffer_tokens: rows that are in memory to be mixed. Raises InputError for a model that
    lib.reopen.open_model refuses, and a data set that can't be reached or, without n_tokens, has no known end.
    """
    hooks, seeds = (list(dict.fromkeys(each)) for each in zip(*wanted))
    per_text, settings = run.n_rows / len(run.texts), SaveSettings(**run.meta["settings"])
    fitting = min(BLOCK_TEXTS, BLOCK_TOKENS // settings.max_length, int(buffer_tokens / BLOCKS_IN_BUFFER / per_text))
    reader = _reader(run, hooks, max(1, fitting), device=device, trust_remote_code=trust_remote_code)
    n_tokens = n_tokens or _tokens_of_all(reader, per_text) * epochs
    window = max(2, round(2 * buffer_tokens / (reader.block_texts * per_text)) - 1)
    stored = {hook: rows_of_run(run, hook) for hook in hooks}
    rows_held = round((window // 2 + 5) * reader.block_texts * per_text)  # two of them are a block while it is made
    n_bytes = {hook: rows_held * len(stored[hook].mean) * STORE_DTYPES[settings.store_dtype].itemsize for hook in hooks}
    model_bytes = sum(p.nbytes for p in reader.model.parameters())
    log.info("live: %s tokens%s, mixed within %s texts; memory: model %.2f GB, buffer %.2f GB", f"{n_tokens:,}",
             f" for each of {len(seeds)} seeds, one pass of the model after the other" if len(seeds) > 1 else "",
             f"{window * reader.block_texts:,}", model_bytes / 1e9, sum(n_bytes.values()) / 1e9)

    timed = cache(partial(_seconds_a_row, reader, [text["text"] for text in run.texts[:SAMPLE_TEXTS]]))
    widths = [len(stored[hook].mean) for hook in hooks]
    passes = {seed: LivePass(partial(_blocks, reader, widths, seed), n_tokens, window, widths) for seed in seeds}
    return {(hook, seed): LiveRows(stored[hook], passes[seed], hooks.index(hook), epochs, mean=stored[hook].mean,
                                   covariance=stored[hook].covariance, buffer_bytes=n_bytes[hook], timed=timed)
            for hook, seed in wanted}


def _reader(
    run: Run, hooks: list[str], block_texts: int, *, device: torch.device | str, trust_remote_code: bool
) -> Reader:
    """Of these hook points of a run."""
    model, tokenizer, _ = model_of_run(run, hooks[0], device, trust_remote_code)
    settings = SaveSettings(**run.meta["settings"])
    if multiple := settings.max_norm_multiple:  # a row that is over the limit at any hook point is none of the run
        hooks = list(dict.fromkeys([*hooks, *(point["signature"] for point in run.meta["hooks"])]))
    places = [hook_of_run(run, hook) for hook in hooks]
    return Reader(model, tokenizer, _documents(run), settings=settings, block_texts=block_texts,
                  held_out={text["text"] for text in run.texts if text["split"] == "val"},
                  points=[resolve(model, place.path, place.point) for place in places],
                  limits=[multiple * run.stats(hook)["median_norm"] if multiple else None for hook in hooks])


def _blocks(
    reader: Reader, widths: list[int], seed: int, first: int, points: list[int]
) -> Iterator[tuple[Tensor, str]]:
    """LivePass.read for the texts in the order of that seed; widths: of the reader's points, in its order."""
    settings, n_texts = reader.settings, reader.block_texts
    seen = points if reader.limits[0] is None else list(range(len(reader.points)))
    texts = reader.documents.texts_from(first * n_texts, seed)
    for number in count(first):
        chosen = [text for text in islice(texts, n_texts) if text is not None and text not in reader.held_out]
        part = own_part(len(chosen))  # of the texts of this block
        tokens = settings.tokens(reader.tokenizer, chosen[part], number * n_texts + part.start)
        rows, found = block_rows(reader.model, [reader.points[i] for i in seen], tokens,
                                 pad_id=filler_id(reader.tokenizer), settings=settings)
        rows, found = drop_outliers(rows, found, [reader.limits[i] for i in seen])
        block = torch.empty(len(rows), sum(widths[i] for i in points), dtype=STORE_DTYPES[settings.store_dtype])
        for i, columns in zip(points, block.split([widths[i] for i in points], dim=1)):
            columns.copy_(found[seen.index(i)].reshape(columns.shape))
        yield block, fingerprint([reader.documents.version, *chosen])


def _seconds_a_row(reader: Reader, texts: list[str], point: int) -> float:
    """Of the model's pass over a sample, up to that hook point."""
    tokens = reader.settings.tokens(reader.tokenizer, texts)
    read = partial(block_rows, reader.model, [reader.points[point]], pad_id=filler_id(reader.tokenizer),
                   settings=reader.settings)
    read(tokens[:4])  # the first pass pays for set-up
    start = time.perf_counter()
    rows, _ = read(tokens)
    return (time.perf_counter() - start) / max(1, len(rows))


def _documents(run: Run) -> Shuffled | Stream:
    """The whole data set of which a run holds a part."""
    try:
        check(run.meta, {"dataset": {"split": str, "field": str}})
    except Misfit as misfit:
        raise InputError(f"the run does not say which texts it holds ({misfit}); run 01_save_activations.py "
                         "again") from None
    dataset = run.meta["dataset"]
    return open_documents(source_of_run(dataset), dataset["split"], dataset["field"])


def _tokens_of_all(reader: Reader, per_text: float) -> int:
    """Training rows of one pass, about."""
    if reader.documents.n_texts is None:
        raise InputError("a data set of the hub has no known end: set N_TOKENS")
    return max(1, round((reader.documents.n_texts - len(reader.held_out)) * per_text))
