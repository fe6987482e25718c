"""Texts through a hooked model into the store: one pass for all hook points, resumable, real tokens only."""
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from . import schemas
from .blocks import input_device, n_embeddings, no_cache, require_positions
from .distributed import add_up, own_part, rank, wait_for_all, world_size
from .environment import InputError, is_out_of_memory, log
from .files import read_json, read_note, write_json, write_tensors
from .finishing import finish
from .hooks import HookPoint, capture
from .metrics.layers import layer_statistics
from .outputs import is_current, require_room
from .store import ROW_COLUMNS, SCHEMA_VERSION, Run
from .streaming import write_texts
from .texts import Tokens, filler_id, length_batches, pad, tokenise

BLOCK_TEXTS = 512  # texts sorted by length together; fixed, so that a resumed run forms the same batches
SAMPLE_TEXTS = 64  # texts of the pre-flight report
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


def forward(model: nn.Module, points: list[HookPoint], batch: list[Tokens], pad_id: int) -> list[list[Tensor]]:
    """Hidden states of each text, none of them empty, at each hook point: result[point][text] is [T, D] of its T
    tokens.

    Raises InputError for a token that the model has no embedding for, and for a hook point that gives no [B, T, D].
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
    """forward(), in halves if the batch is too large for the memory; other batches may change the last digits of a row.

    Raises InputError if a single text is too large.
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
    log.warning("%d texts are too many for the memory, trying %d; lower BATCH_SIZE_SAVE to avoid this", len(batch),
                half)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    parts = [forward_in_parts(model, points, part, pad_id) for part in (batch[:half], batch[half:])]
    return [first + second for first, second in zip(*parts)]


def block_rows(
    model: nn.Module, points: list[HookPoint], block: list[Tokens], pad_id: int, settings: SaveSettings
) -> tuple[Tensor, list[Tensor]]:
    """Rows of a block of texts in text order, whatever the batches: columns int32 [R, 5], activations per point [R, D].

    A text without a token has no row and is not run; without any row the activations are [0, 0].
    """
    found: dict[int, list[Tensor]] = {}
    block = [item for item in block if item.ids]
    for batch in length_batches(block, settings.batch_tokens):
        states = forward_in_parts(model, points, batch, pad_id)
        for i, item in enumerate(batch):
            found[item.text_id] = [per_point[i][torch.tensor(item.keep)].cpu() for per_point in states]
    columns = [
        (item.text_id, pos, item.ids[pos], *item.offsets[pos]) for item in block for pos in range(len(item.ids))
        if item.keep[pos]
    ]
    rows = torch.tensor(columns, dtype=torch.int32).reshape(-1, len(ROW_COLUMNS))
    if not block:
        return rows, [torch.zeros(0, 0) for _ in points]
    return rows, [torch.cat([found[item.text_id][p] for item in block]) for p in range(len(points))]


def preflight(
    model: nn.Module, tokenizer, points: list[HookPoint], texts: Sequence[str], settings: SaveSettings
) -> list[dict[str, Any]]:
    """What a sample of the texts says of each hook point, before anything is written; one dict a point.

    What lib/metrics/layers.py says of the sample's rows, and rows_per_text; seconds, of the sample's second pass.
    """
    require_positions(model, settings.max_length)
    sample = tokenise(tokenizer, texts[:SAMPLE_TEXTS], 0, settings.max_length, settings.skip_special,
                      settings.skip_first)
    block_rows(model, points, sample[:4], filler_id(tokenizer), settings)  # the first pass pays for set-up
    start = time.perf_counter()
    rows, states = block_rows(model, points, sample, filler_id(tokenizer), settings)
    seconds = time.perf_counter() - start
    if not len(rows):
        raise InputError("no text yields a token to store (all are empty or special tokens); check TEXT_FIELD and "
                         "SKIP_FIRST")
    check_finite(model, rows, states, points, STORE_DTYPES[settings.store_dtype])
    report = []
    for point, x in zip(points, states):
        report.append({"signature": point.signature, **layer_statistics(x), "rows_per_text": len(rows) / len(sample),
                       "seconds": seconds})
    return report


class _Writer:
    """Collects rows and writes them as shards of fixed size; the rows' shard is written last and marks it complete."""

    def __init__(self, folder: Path, points: list[HookPoint], settings: SaveSettings):
        self.folder, self.points, self.settings = folder, points, settings
        self.dtype = STORE_DTYPES[settings.store_dtype]
        self.n_shards, block, rows_before_block = 0, 0, 0
        while (path := self.shard("rows", self.n_shards)).exists():
            self.n_shards += 1
            block, rows_before_block = read_note(path, schemas.SHARD_NOTE)
        self.start_at(self.n_shards, block, rows_before_block)

    def shard(self, name: str, number: int) -> Path:
        return self.folder / name / f"shard_{number:05d}.safetensors"

    def start_at(self, shard: int, block: int, rows_before_block: int) -> None:
        """Go on with the shard whose first row is in that block of texts."""
        self.n_shards, self.block, self.rows_before_block = shard, block, rows_before_block
        # The rows of that block which earlier shards hold.
        self.skip = shard * self.settings.shard_rows - rows_before_block
        self.rows: list[Tensor] = []
        self.states: list[list[Tensor]] = [[] for _ in self.points]

    def add(self, rows: Tensor, states: list[Tensor], end: float = math.inf) -> None:
        """Take a block's rows, and write what is full of the shards before `end`."""
        n_new = len(rows)
        if n_new:
            self.rows.append(rows[self.skip :])
            for kept, x in zip(self.states, states):
                kept.append(x[self.skip :].to(self.dtype))
            self.skip = 0
        while sum(map(len, self.rows)) >= self.settings.shard_rows and self.n_shards < end:
            self.flush(self.settings.shard_rows)
        self.block += 1
        self.rows_before_block += n_new

    def flush(self, n: int) -> None:
        """Write the first n collected rows as one shard."""
        require_room(self.folder, sum(x.nbytes for kept in self.states for x in kept))
        for point, kept in zip(self.points, self.states):
            x = torch.cat(kept)
            write_tensors(self.shard(point.signature, self.n_shards), {"x": x[:n]})
            kept[:] = [x[n:]]
        rows = torch.cat(self.rows)
        columns = {name: rows[:n, i] for i, name in enumerate(ROW_COLUMNS)}
        write_tensors(self.shard("rows", self.n_shards), columns, note=[self.block, self.rows_before_block])
        self.rows = [rows[n:]]
        self.n_shards += 1


def save_activations(
    folder: Path, model: nn.Module, tokenizer, points: list[HookPoint], texts: Sequence[str], splits: list[str],
    settings: SaveSettings, meta: dict[str, Any]
) -> Run:
    """Run `texts` through the model and store what passes the hook points; see lib/store.py for the layout.

    folder: the run's own folder; what an interrupted call left there is continued, and the bytes are the same as
    those of a call that was never interrupted. splits: "train" or "val" for each text. meta: provenance for meta.json.

    Raises InputError if no text yields a row, or if an activation is not finite (the text is named).
    """
    require_positions(model, settings.max_length)
    hooks = [point._asdict() for point in points]
    meta = {"schema_version": SCHEMA_VERSION, **meta, "settings": asdict(settings), "hooks": hooks,
            "n_texts": len(texts)}
    if rank() == 0:
        _check_same_run(folder, meta)
        write_json(folder / "meta.json", meta)
        write_texts(folder / "texts.jsonl", texts, splits)
    limits: list[float | None] = [None] * len(points)
    if settings.max_norm_multiple is not None:
        if world_size() > 1:
            raise InputError("MAX_NORM_MULTIPLE drops rows that only the model can tell, so ranks can't share them "
                             "out; save in one process")
        limits = [settings.max_norm_multiple * r["median_norm"]
                  for r in preflight(model, tokenizer, points, texts, settings)]
    writer = _Writer(folder, points, settings)
    if writer.n_shards:
        log.info("continuing after shard %d", writer.n_shards)
    with tqdm(total=len(texts) // world_size(), unit="text", desc="saving activations", disable=rank() > 0) as bar:
        bar.update(min(writer.block * BLOCK_TEXTS, len(texts)))
        for end in _missing(writer, tokenizer, texts):
            while writer.block * BLOCK_TEXTS < len(texts) and writer.n_shards < end:
                block = _tokens(tokenizer, texts, writer.block, settings)
                rows, states = block_rows(model, points, block, filler_id(tokenizer), settings)
                check_finite(model, rows, states, points, writer.dtype)
                writer.add(*_drop_outliers(rows, states, limits), end)
                bar.update(len(block))
            if sum(map(len, writer.rows)) and writer.n_shards < end:
                writer.flush(settings.shard_rows)
    wait_for_all()
    n_shards = _Writer(folder, points, settings).n_shards
    if not n_shards:
        raise InputError("no text yields a token to store (all are empty or special tokens); check TEXT_FIELD and "
                         "SKIP_FIRST")
    return finish(folder, meta, [point.signature for point in points], n_shards)


def _tokens(tokenizer, texts: Sequence[str], block: int, settings: SaveSettings) -> list[Tokens]:
    first = block * BLOCK_TEXTS
    return tokenise(tokenizer, texts[first : first + BLOCK_TEXTS], first, settings.max_length, settings.skip_special,
                    settings.skip_first)


def _missing(writer: _Writer, tokenizer, texts: Sequence[str]) -> Iterator[float]:
    """Put the writer before each stretch of shards that this rank is to write, and yield the shard after its last.

    One process goes on where its shards end. Ranks count the rows of all blocks together, and each takes its part of
    the
    shards that are not there, from the block that holds their first row: a shard is the same whoever writes it.
    """
    if world_size() == 1:
        yield math.inf
        return
    settings, n_blocks = writer.settings, -(-len(texts) // BLOCK_TEXTS)
    n_rows = torch.zeros(n_blocks, dtype=torch.int64)
    for block in range(n_blocks)[own_part(n_blocks)]:
        n_rows[block] = sum(sum(item.keep) for item in _tokens(tokenizer, texts, block, settings))
    add_up(n_rows)
    ends = n_rows.cumsum(0)
    is_missing = torch.zeros(-(-int(ends[-1]) // settings.shard_rows), dtype=torch.int64)
    if rank() == 0:  # one look for all, before anyone writes
        is_missing += torch.tensor([not writer.shard("rows", i).exists() for i in range(len(is_missing))],
                                   dtype=torch.int64)
    add_up(is_missing)
    missing = is_missing.nonzero()[:, 0].tolist()
    own = missing[own_part(len(missing))]
    for i in own:
        if i - 1 not in own:
            block = int((ends <= i * settings.shard_rows).sum())
            writer.start_at(i, block, int(ends[block] - n_rows[block]))
            yield next(end for end in range(i + 1, len(is_missing) + 1) if end not in own)


def _check_same_run(folder: Path, meta: dict[str, Any]) -> None:
    """Raise InputError if `folder` holds part of a run that was begun with something else."""
    path = folder / "meta.json"
    is_current(folder, read_json(path, schemas.META) if path.exists() else None,
               {part: value for part, value in meta.items() if part != "provenance"},
               "finish that run with its own, or delete the folder")


def check_finite(
    model: nn.Module, rows: Tensor, states: list[Tensor], points: list[HookPoint], dtype: torch.dtype
) -> None:
    """Raise InputError if an activation is not finite, or would not be in the stored precision; says whether the model
    is to blame.
    """
    for point, x in zip(points, states):
        bad = ~torch.isfinite(x.to(dtype)).all(1)
        if bad.any():
            text_ids = rows[bad, 0].unique().tolist()
            reason = "beyond the range of float16; set STORE_DTYPE=bfloat16"
            if not torch.isfinite(x).all():
                broken = next((name for name, p in model.named_parameters()
                               if not (p.is_meta or torch.isfinite(p).all())), None)
                reason = (f"not finite, because {broken} of the model is not: download it again" if broken
                          else "not finite; try MODEL_DTYPE=float32")
            raise InputError(f"activations of {point.signature} are {reason} (texts "
                             f"{', '.join(map(str, text_ids[:5]))})")


def _drop_outliers(rows: Tensor, states: list[Tensor], limits: list[float | None]) -> tuple[Tensor, list[Tensor]]:
    """Drop the rows whose norm is over the limit at any hook point: all points share their rows."""
    keep = torch.ones(len(rows), dtype=torch.bool)
    for x, limit in zip(states, limits):
        if limit is not None:
            keep &= x.float().norm(dim=1) <= limit
    return rows[keep], [x[keep] for x in states]
