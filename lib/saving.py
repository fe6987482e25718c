"""Writes a run of activations: its texts, its shards, their statistics, and the manifest that makes it complete.

store.py describes the layout, and reads it.
"""
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from .batches import batches_in_order
from .distributed import add_up, beat, own_part, rank, wait_for_all, world_size
from .environment import InputError
from .files import atomic_write, read_note, write_json, write_tensors
from .outputs import list_files, require_room
from .store import ROW_COLUMNS, SHARD_NOTE, Run

ALIKE = 1e-6  # spread of the rows over the norm of their mean, up to which it is rounding


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


class ShardWriter:
    """Collects rows block by block of texts, and writes them as shards of fixed size, after those already written.

    Of each shard the rows' file is written last: it marks the shard as complete.
    """

    def __init__(self, folder: Path, hooks: list[str], shard_rows: int, dtype: torch.dtype):
        self.folder, self.hooks, self.shard_rows, self.dtype = folder, hooks, shard_rows, dtype
        n_shards, block, rows_before_block = 0, 0, 0
        while (path := self.shard("rows", n_shards)).exists():
            n_shards += 1
            block, rows_before_block = read_note(path, SHARD_NOTE)
        self.start_at(n_shards, block, rows_before_block)

    def shard(self, name: str, number: int) -> Path:
        return self.folder / name / f"shard_{number:05d}.safetensors"

    def start_at(self, shard: int, block: int, rows_before_block: int) -> None:
        """Continue with the shard whose first row is in that block of texts."""
        self.n_shards, self.block, self.rows_before_block = shard, block, rows_before_block
        self.skip = shard * self.shard_rows - rows_before_block  # rows of that block which earlier shards hold
        self.rows: list[Tensor] = []
        self.states: list[list[Tensor]] = [[] for _ in self.hooks]

    @property
    def n_waiting(self) -> int:
        """Rows collected and not yet written."""
        return sum(map(len, self.rows))

    def add(self, rows: Tensor, states: list[Tensor], end: float = math.inf) -> None:
        """Take the next block's rows; write the shards before number `end` that are full."""
        if len(rows):
            self.rows.append(rows[self.skip :])
            for kept, x in zip(self.states, states):
                kept.append(x[self.skip :].to(self.dtype))
            self.skip = 0
        while self.n_waiting >= self.shard_rows and self.n_shards < end:
            self.flush()
        self.block += 1
        self.rows_before_block += len(rows)

    def flush(self) -> None:
        """Write the rows collected, at most shard_rows of them, as one shard."""
        n = self.shard_rows
        require_room(self.folder, sum(x.nbytes for kept in self.states for x in kept))
        for hook, kept in zip(self.hooks, self.states):
            x = torch.cat(kept)
            write_tensors(self.shard(hook, self.n_shards), {"x": x[:n]})
            kept[:] = [x[n:]]
        rows = torch.cat(self.rows)
        columns = {name: rows[:n, i] for i, name in enumerate(ROW_COLUMNS)}
        write_tensors(self.shard("rows", self.n_shards), columns, note=[self.block, self.rows_before_block])
        self.rows = [rows[n:]]
        self.n_shards += 1

    def own_stretches(self, n_rows: Tensor) -> Iterator[int]:
        """Stand before each stretch of shards that is this rank's part of the missing ones; yield the number after it.

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
                block = int((ends <= i * self.shard_rows).sum())
                self.start_at(i, block, int(ends[block] - n_rows[block]))
                yield next(end for end in range(i + 1, len(is_missing) + 1) if end not in own)


def finish(folder: Path, meta: dict[str, Any], hooks: list[str], n_shards: int) -> Run:
    """Write each hook point's statistics, then the manifest, which makes the run complete; ranks share the reading."""
    names = {name: [f"{name}/shard_{i:05d}.safetensors" for i in range(n_shards)] for name in ["rows", *hooks]}
    rows_of = []
    for name in names["rows"]:
        with safe_open(folder / name, "pt") as file:
            rows_of.append(file.get_slice("pos").get_shape()[0])
    shards = {key: [{"file": file, "rows": rows} for file, rows in zip(files, rows_of)] for key, files in names.items()}
    run = Run(folder, meta, {"rows": shards.pop("rows"), "hooks": shards, "n_rows": sum(rows_of)})
    for hook in hooks:
        write_stats(run, hook)
    wait_for_all()
    files = ["meta.json", "texts.jsonl", *(f for part in names.values() for f in part)]
    files += [f"{hook}/stats.{ending}" for hook in hooks for ending in ("json", "safetensors")]
    run.manifest["files"] = list_files(folder, files)
    if rank() == 0:
        write_json(folder / "manifest.json", run.manifest, sealed=True)
    wait_for_all()
    return run


def write_stats(run: Run, hook: str) -> None:
    """Write mean [D], covariance [D, D] and scalars of the hook's training rows.

    scale = sqrt(mean squared norm of x - mean), so that x' = (x - mean) / scale has mean squared norm 1.
    Raises InputError if there is no training row, if all are alike, or if squares overflow float32.
    """
    train = ~run.is_val
    if not train.any():
        raise InputError("the training texts yield no token to store; raise DATA_LIMIT or lower VAL_FRAC")
    mean, covariance, norms, max_abs = _moments(run.shards(hook), train)
    if not torch.isfinite(covariance.float()).all():
        raise InputError(f"the activations at {hook} are too large for statistics in float32; choose another "
                         "LAYER_SIGNATURE, or check the model")
    scale = covariance.trace().sqrt()
    if not scale > ALIKE * mean.norm():
        raise InputError(f"all tokens have the same activation at {hook}, so there is nothing to learn; use more "
                         "texts, or another LAYER_SIGNATURE")
    if rank():
        return
    write_tensors(run.path / hook / "stats.safetensors", {"mean": mean.float(), "covariance": covariance.float()})
    write_json(run.path / hook / "stats.json", {
        "scale": scale.item(),
        "median_norm": norms.median().item(),
        "max_abs": max_abs,
        "gamma": (mean.norm() / scale).item(),
        "n_outliers": int((norms > 10 * norms.median()).sum()),
        "n_rows": len(norms),
    })


def _moments(shards: list[Tensor], wanted: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """Mean, covariance, norms and largest absolute value of the wanted rows, in two passes with float64 sums.

    Each rank reads its part of the shards, so the order of the sums, and with it the last digits, depends on the number
    of ranks.
    """
    n, own = int(wanted.sum()), own_part(len(shards))
    mean = torch.zeros(shards[0].shape[1], dtype=torch.float64)
    for _, x in batches_in_order(shards, wanted, part=own):
        mean += x.double().sum(0)
        beat()
    wait_for_all()
    add_up(mean)
    mean /= n
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    norms, largest = torch.zeros(len(wanted)), torch.zeros(world_size())
    for ids, x in batches_in_order(shards, wanted, part=own):
        norms[ids] = x.norm(dim=1)
        centred = x.double() - mean
        covariance += centred.T @ centred
        largest[rank()] = max(largest[rank()], x.abs().max())
        beat()
    wait_for_all()
    add_up(covariance, norms, largest)
    return mean, covariance / n, norms[wanted], largest.max().item()
