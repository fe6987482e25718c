"""Writes a run of activations: its texts, its shards, their statistics, and the manifest that makes it complete.

store.py describes the layout, and reads it.
"""
import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from .distributed import add_up, beat, own_part, rank, wait_for_all
from .files import atomic_write, read_json, read_note, write_json, write_tensors
from .moments import summary
from .outputs import is_current, list_files, require_room
from .store import META, ROW_COLUMNS, SHARD_NOTE, Run
from .summaries import SUMMARIES, keep_summaries, shard_digests, write_stats

SAFETENSORS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def begin(folder: Path, meta: dict[str, Any], texts: Sequence[str], splits: list[str]) -> None:
    """Write meta.json and texts.jsonl. Raises InputError if `folder` holds part of a run that was begun differently."""
    if rank():
        return
    path = folder / "meta.json"
    is_current(folder, read_json(path, META) if path.exists() else None,
               {part: value for part, value in meta.items() if part != "provenance"},
               "finish that run with its own, or delete the folder")
    write_json(path, meta)
    write_texts(folder / "texts.jsonl", texts, splits)


def write_texts(path: Path, texts: Sequence[str], splits: list[str]) -> None:
    """Write a run's texts.jsonl, a line at a time."""

    def lines() -> Iterator[str]:
        for i, (text, split) in enumerate(zip(texts, splits)):
            beat()
            yield json.dumps({"text_id": i, "text": text, "split": split}, ensure_ascii=False) + "\n"

    def write(temporary: Path) -> None:
        with open(temporary, "w", encoding="utf-8") as file:
            file.writelines(lines())

    atomic_write(path, write)


def write_rows(path: Path, x: Tensor) -> str:
    """Write {"x": x [R, D]} as safetensors' save() would, byte for byte, but from where it lies; returns its sha256.

    The library's save() copies it into new memory, and its save_file() leaves a file of its own if it is killed.
    """
    entry = {"dtype": SAFETENSORS[x.dtype], "shape": list(x.shape), "data_offsets": [0, x.nbytes]}
    header = json.dumps({"x": entry}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    pieces: list[Any] = [len(header).to_bytes(8, "little") + header, x.view(torch.uint8).numpy().data]

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            file.writelines(pieces)

    atomic_write(path, write)
    return checksum(pieces)


def checksum(pieces: list[Any]) -> str:
    """Hex digest of bytes that lie in several pieces."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def drop_outliers(
    rows: Tensor, states: list[Tensor], limits: list[float | None]
) -> tuple[Tensor, list[Tensor]]:
    """Drop the rows whose norm is over the limit at any hook point: all points share their rows."""
    if all(limit is None for limit in limits):
        return rows, states
    keep = torch.ones(len(rows), dtype=torch.bool)
    for x, limit in zip(states, limits):
        if limit is not None:
            keep &= x.float().norm(dim=1) <= limit
    return rows[keep], [x[keep] for x in states]


class ShardWriter:
    """Collects rows block by block of texts, and writes them as shards of fixed size, after those already written.

    Of each shard the rows' file is written last: it marks the shard as complete.
    """

    def __init__(self, folder: Path, hooks: list[str], shard_rows: int, dtype: torch.dtype, *, is_val: Tensor):
        """is_val: bool [number of texts], the validation texts, which statistics leave out."""
        self.folder, self.hooks, self.shard_rows, self.dtype = folder, hooks, shard_rows, dtype
        self.is_val = is_val
        self.memory = [torch.empty(0, 0, dtype=dtype) for _ in hooks]
        n_shards, block, rows_before_block = self.count(), 0, 0
        if n_shards:
            block, rows_before_block = read_note(self.shard("rows", n_shards - 1), SHARD_NOTE)
        self.start_at(n_shards, block, rows_before_block)

    def shard(self, name: str, number: int) -> Path:
        return self.folder / name / f"shard_{number:05d}.safetensors"

    def count(self) -> int:
        """How many shards are complete, from the first one on."""
        n_shards = 0
        while self.shard("rows", n_shards).exists():
            n_shards += 1
        return n_shards

    def start_at(self, shard: int, block: int, rows_before_block: int) -> None:
        """Continue with the shard whose first row is in that block of texts."""
        self.n_shards, self.block, self.rows_before_block = shard, block, rows_before_block
        self.skip = shard * self.shard_rows - rows_before_block  # rows of that block which earlier shards hold
        self.rows: list[Tensor] = []
        self.n_waiting = 0  # rows collected and not yet written

    def add(self, rows: Tensor, states: list[Tensor], end: float = math.inf) -> None:
        """Take the next block's rows; write the shards before number `end` that are full."""
        at, n = min(self.skip, len(rows)), len(rows)
        self.skip -= at
        while at < n and self.n_shards < end:
            part = slice(at, min(n, at + self.shard_rows - self.n_waiting))
            for i, x in enumerate(states):
                self._collect(i, x[part])
            self.rows.append(rows[part])
            self.n_waiting += part.stop - at
            at = part.stop
            if self.n_waiting == self.shard_rows:
                self.flush()
        self.block += 1
        self.rows_before_block += n

    def _collect(self, hook: int, x: Tensor) -> None:
        """Copy x [n, D] behind the rows waiting, in the stored precision; the memory is used for every shard."""
        memory, end = self.memory[hook], self.n_waiting + len(x)
        if end > len(memory):
            self.memory[hook] = torch.empty(min(self.shard_rows, 2 * end), x.shape[1], dtype=self.dtype)
            if self.n_waiting:
                self.memory[hook][: self.n_waiting] = memory[: self.n_waiting]
        self.memory[hook][self.n_waiting : end] = x

    def end_stretch(self, end: float) -> None:
        """Write the last rows, which fill no shard, if the shard is before number `end`."""
        if self.n_waiting and self.n_shards < end:
            self.flush()

    def flush(self) -> None:
        """Write the rows collected as one shard."""
        rows, states = torch.cat(self.rows), [memory[: self.n_waiting] for memory in self.memory]
        require_room(self.folder, sum(x.nbytes for x in states))
        train = ~self.is_val[rows[:, 0].long()]
        found, digests = {}, {}
        for hook, x in zip(self.hooks, states):
            digests[hook] = write_rows(self.shard(hook, self.n_shards), x)
            found[hook] = summary(x, train)
        keep_summaries(self.folder, self.n_shards, found, train=train, digests=digests)
        columns = {name: rows[:, i] for i, name in enumerate(ROW_COLUMNS)}
        write_tensors(self.shard("rows", self.n_shards), columns, note=[self.block, self.rows_before_block])
        self.rows, self.n_waiting = [], 0
        self.n_shards += 1

    def own_stretches(self, n_rows: Tensor) -> Iterator[tuple[range, int]]:
        """Stand before each stretch of shards that is this rank's part of the missing ones; yield the blocks that hold
        its rows, and the number after its last shard.

        n_rows: of each block of texts. A stretch starts from the block that holds its first row, so that a shard is the
        same whoever writes it.
        """
        ends = n_rows.cumsum(0)
        is_missing = torch.zeros(-(-int(ends[-1]) // self.shard_rows), dtype=torch.int64)
        if rank() == 0:  # one look for all, before anyone writes
            for i in range(len(is_missing)):
                is_missing[i] = not self.shard("rows", i).exists()
        add_up(is_missing)
        missing = is_missing.nonzero()[:, 0].tolist()
        own = missing[own_part(len(missing))]
        for i in own:
            if i - 1 not in own:
                end = next(end for end in range(i + 1, len(is_missing) + 1) if end not in own)
                block, after = (int((ends < row).sum()) for row in (i * self.shard_rows + 1, end * self.shard_rows))
                self.start_at(i, block, int(ends[block] - n_rows[block]))
                yield range(block, min(after + 1, len(ends))), end


def finish(
    folder: Path, meta: dict[str, Any], hooks: list[str], n_shards: int, *, is_val: Tensor, device: torch.device
) -> Run:
    """Write each hook point's statistics, then the manifest, which makes the run complete.

    is_val: as for ShardWriter. device: where the covariance's products are formed.
    """
    names = {name: [f"{name}/shard_{i:05d}.safetensors" for i in range(n_shards)] for name in ["rows", *hooks]}
    rows_of = []
    for name in names["rows"]:
        with safe_open(folder / name, "pt") as file:
            rows_of.append(file.get_slice("pos").get_shape()[0])
    shards = {key: [{"file": file, "rows": rows} for file, rows in zip(files, rows_of)] for key, files in names.items()}
    run = Run(folder, meta, {"rows": shards.pop("rows"), "hooks": shards, "n_rows": sum(rows_of)})
    write_stats(run, is_val, device)
    wait_for_all()  # rank 0 writes them
    files = ["meta.json", "texts.jsonl", *(f for part in names.values() for f in part)]
    files += [f"{hook}/stats.{ending}" for hook in hooks for ending in ("json", "safetensors")]
    run.manifest["files"] = list_files(folder, files, known=shard_digests(run))
    wait_for_all()
    if rank() == 0:
        shutil.rmtree(folder / SUMMARIES, ignore_errors=True)
        write_json(folder / "manifest.json", run.manifest, sealed=True)
    wait_for_all()
    return run
