"""Texts through a hooked model into the store: one pass for all hook points, resumable, real tokens only."""
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .blocks import input_device, n_embeddings, no_cache, require_positions
from .distributed import add_up, beat, own_part, rank, wait_for_all, world_size
from .environment import InputError, is_out_of_memory, log
from .hooks import HookPoint, capture
from .metrics.layers import layer_statistics
from .saving import ShardWriter, begin, drop_outliers, finish
from .staging import Staging, all_threads, finite_states, kept, one_ahead, row_table
from .store import SCHEMA_VERSION, Run
from .texts import Tokens, filler_id, length_batches, pad, tokenise

BLOCK_TEXTS = 512  # texts sorted by length together; fixed, so that a resumed run forms the same batches
SAMPLE_TEXTS = 64  # texts of the pre-flight report
NO_TOKENS = "no text yields a token to store (all are empty or special tokens); check TEXT_FIELD and SKIP_FIRST"
STORE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class SaveSettings:
    """What decides the bytes of a run, besides the model, the texts and the hook points."""

    max_length: int = 128
    """Tokens of a text, special tokens included; the rest is cut."""
    batch_tokens: int = 2048
    """Tokens of one forward pass, padding included."""
    store_dtype: str = "float32"
    """Precision on disk: float32, bfloat16 or float16."""
    shard_rows: int = 65536
    """Rows of one file; the last may be shorter."""
    skip_special: bool = True
    """Keep BOS, EOS and other control tokens out."""
    skip_first: int = 0
    """Positions to drop at the start of each text; 1 for tokenizers without BOS, whose first token is a sink."""
    max_norm_multiple: float | None = None
    """Drop rows whose norm exceeds this multiple of the sample's median norm; None keeps all."""

    def tokens(self, tokenizer, texts: Sequence[str], first_id: int = 0) -> list[Tokens]:
        """The texts, numbered from first_id, tokenised as the run has them."""
        return tokenise(tokenizer, texts, first_id, self.max_length, skip_special=self.skip_special,
                        skip_first=self.skip_first)


def forward(model: nn.Module, points: list[HookPoint], batch: list[Tokens], pad_id: int) -> list[list[Tensor]]:
    """Hidden states of each text (none is empty) at each hook point: result[point][text] is [T, D].

    Raises InputError for a token without an embedding, and for a hook point that does not give [B, T, D].
    """
    ids, mask = pad(batch, pad_id)
    known = n_embeddings(model)
    if known is not None and int(ids.max()) >= known:
        raise InputError(f"the tokenizer gives the id {int(ids.max())}, but {type(model).__name__} has {known} "
                         "embeddings; use the model's own tokenizer")
    require_positions(model, ids.shape[1])
    device = input_device(model)
    with torch.inference_mode(), capture(model, points) as seen:
        model(input_ids=ids.to(device), attention_mask=mask.to(device), **no_cache(model))
    states = []
    for point in points:
        hidden = seen[point.signature]
        if hidden.ndim != 3 or hidden.shape[:2] != ids.shape:
            raise InputError(f"{point.signature} gives a tensor of shape {tuple(hidden.shape)}, not [texts, tokens, "
                             "width]; choose another layer")
        states.append([row[: len(item.ids)] for row, item in zip(hidden, batch)])
    return states


def forward_in_parts(model: nn.Module, points: list[HookPoint], batch: list[Tokens], pad_id: int) -> list[list[Tensor]]:
    """forward(), in halves if the batch does not fit into memory, which may change the last digits of a row.

    Raises InputError if a single text does not fit.
    """
    try:
        return forward(model, points, batch, pad_id)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    if len(batch) == 1:
        raise InputError(f"a text of {len(batch[0].ids)} tokens is too large for the memory; lower MAX_LENGTH, or use "
                         "a smaller model or MODEL_DTYPE=bfloat16")
    half = len(batch) // 2
    log.warning("%d texts are too many for the memory, trying %d; lower BATCH_SIZE_SAVE to avoid this",
                len(batch), half)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    parts = [forward_in_parts(model, points, part, pad_id) for part in (batch[:half], batch[half:])]
    return [first + second for first, second in zip(*parts)]


def run_block(
    model: nn.Module, points: list[HookPoint], block: list[Tokens], staging: Staging, *, pad_id: int,
    settings: SaveSettings
) -> Tensor:
    """Run a block of texts and put the rows to store, in text order however batched, into `staging`.

    Returns their table, int32 [R, 5]. A text without a token has no row and is not run.
    """
    rows, at = row_table(block), 0
    staging.begin(len(rows))
    block = [item for item in block if item.ids]
    places: dict[int, tuple[int, slice | Tensor]] = {}
    for item in block:
        places[item.text_id] = at, kept(item)
        at += sum(item.keep)
    for batch in length_batches(block, settings.batch_tokens):
        beat()
        for point, states in enumerate(forward_in_parts(model, points, batch, pad_id)):
            for item, x in zip(batch, states):
                start, wanted = places[item.text_id]
                staging.put(point, start, x[wanted])
    staging.end()
    return rows


def block_rows(
    model: nn.Module, points: list[HookPoint], block: list[Tokens], *, pad_id: int, settings: SaveSettings
) -> tuple[Tensor, list[Tensor]]:
    """Rows of a block of texts in text order, however batched: columns int32 [R, 5], activations per point [R, D].

    A text without a token has no row and is not run; without any row the activations are [0, 0].
    Raises InputError if an activation is not finite, or would not be in the stored precision.
    """
    staging = Staging(len(points))
    rows = run_block(model, points, block, staging, pad_id=pad_id, settings=settings)
    return rows, finite_states(model, points, rows, staging, dtype=STORE_DTYPES[settings.store_dtype])


def preflight(
    model: nn.Module, tokenizer, points: list[HookPoint], texts: Sequence[str], *, settings: SaveSettings
) -> list[dict[str, Any]]:
    """What a sample of the texts says of each hook point before anything is written: one dict a point.

    layer_statistics() of the sample's rows (lib/metrics/layers.py), rows_per_text, and the seconds of the sample.
    """
    require_positions(model, settings.max_length)
    sample, pad_id = settings.tokens(tokenizer, texts[:SAMPLE_TEXTS]), filler_id(tokenizer)
    block_rows(model, points, sample[:4], pad_id=pad_id, settings=settings)  # the first pass pays for set-up
    start = time.perf_counter()
    rows, states = block_rows(model, points, sample, pad_id=pad_id, settings=settings)
    seconds = time.perf_counter() - start
    if not len(rows):
        raise InputError(NO_TOKENS)
    return [{"signature": point.signature, **layer_statistics(x), "rows_per_text": len(rows) / len(sample),
             "seconds": seconds} for point, x in zip(points, states)]


def save_activations(
    folder: Path, model: nn.Module, tokenizer, points: list[HookPoint], *, texts: Sequence[str], splits: list[str],
    settings: SaveSettings | None = None, meta: dict[str, Any] | None = None
) -> Run:
    """Run `texts` through the model and store what passes the hook points; lib/store.py has the layout.

    folder: the run's own folder. An interrupted call is resumed, and ends with the bytes of one that never was.
    splits: "train" or "val" for each text. meta: what meta.json says of the run's origin.

    Raises InputError if no text yields a row, or if an activation is not finite (the text is named).
    """
    settings = settings or SaveSettings()
    require_positions(model, settings.max_length)
    hooks = [point.signature for point in points]
    meta = {"schema_version": SCHEMA_VERSION, **(meta or {}), "settings": asdict(settings),
            "hooks": [point._asdict() for point in points], "n_texts": len(texts)}
    begin(folder, meta, texts, splits)
    limits = _norm_limits(model, tokenizer, points, texts, settings=settings)
    is_val = torch.tensor([split == "val" for split in splits])
    dtype = STORE_DTYPES[settings.store_dtype]
    writer = ShardWriter(folder, hooks, settings.shard_rows, dtype, is_val=is_val)
    if writer.n_shards:
        log.info("resuming after shard %d", writer.n_shards)
    staging = Staging(len(points)), Staging(len(points))  # one is written while the other is filled

    def write(rows: Tensor, filled: Staging, end: float) -> None:
        states = finite_states(model, points, rows, filled, dtype=dtype)
        writer.add(*drop_outliers(rows, states, limits), end)

    with (tqdm(total=len(texts) // world_size(), unit="text", desc="saving activations", disable=rank() > 0) as bar,
          ThreadPoolExecutor(1) as ahead, ThreadPoolExecutor(1) as behind):
        bar.update(min(writer.block * BLOCK_TEXTS, len(texts)))
        for blocks, end in _stretches(writer, tokenizer, texts, settings):
            tokenised = one_ahead(ahead, partial(_tokens, tokenizer, texts, settings), blocks)
            writing: Future | None = None
            for block, filled in zip(tokenised, cycle(staging)):
                rows = run_block(model, points, block, filled, pad_id=filler_id(tokenizer), settings=settings)
                if writing:
                    writing.result()
                writing = behind.submit(write, rows, filled, end)
                bar.update(len(block))
            if writing:
                writing.result()
            writer.end_stretch(end)
    wait_for_all()
    n_shards = writer.count()
    if not n_shards:
        raise InputError(NO_TOKENS)
    return finish(folder, meta, hooks, n_shards, is_val=is_val, device=input_device(model))


def _norm_limits(
    model: nn.Module, tokenizer, points: list[HookPoint], texts: Sequence[str], *, settings: SaveSettings
) -> list[float | None]:
    """The largest norm that a row may have at each hook point; None: any."""
    if settings.max_norm_multiple is None:
        return [None] * len(points)
    if world_size() > 1:
        raise InputError("MAX_NORM_MULTIPLE drops rows that only the model can tell, so ranks can't share them out; "
                         "save in one process")
    sample = preflight(model, tokenizer, points, texts, settings=settings)
    return [settings.max_norm_multiple * row["median_norm"] for row in sample]


def _tokens(tokenizer, texts: Sequence[str], settings: SaveSettings, block: int) -> list[Tokens]:
    first = block * BLOCK_TEXTS
    with all_threads():
        return settings.tokens(tokenizer, texts[first : first + BLOCK_TEXTS], first)


def _stretches(
    writer: ShardWriter, tokenizer, texts: Sequence[str], settings: SaveSettings
) -> Iterator[tuple[range, float]]:
    """Put the writer before each stretch of shards that this rank has to write; yield its blocks, and the number after
    its last shard.

    One process continues where its shards end. Several ranks first count the rows of all blocks together.
    """
    n_blocks = -(-len(texts) // BLOCK_TEXTS)
    if world_size() == 1:
        yield range(writer.block, n_blocks), math.inf
        return
    n_rows = torch.zeros(n_blocks, dtype=torch.int64)
    for block in range(n_blocks)[own_part(n_blocks)]:
        n_rows[block] = sum(sum(item.keep) for item in _tokens(tokenizer, texts, settings, block))
        beat()
    wait_for_all()
    add_up(n_rows)
    yield from writer.own_stretches(n_rows)
