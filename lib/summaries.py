"""The summaries of a run's shards, which stand beside them until the run is finished, and its statistics made of them.

    .sums/shard_00000.safetensors    <hook>.sum, <hook>.norms, <hook>.largest of the shard's training rows; in the note
                                     which rows these are, and the checksums of the hooks' files

A summary can always be made again from its shard, to the same bits: one that is missing or damaged costs time alone.
"""
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from .distributed import beat, own_part, rank, wait_for_all
from .environment import InputError
from .files import fingerprint, read_note, read_tensors, sha256, write_json, write_tensors
from .moments import MOST_ROWS, Summary, covariance, most_rows, spread_evenly, summary
from .schemas import NAME, SHA256, SHORT_HASH
from .store import Run

SUMMARIES = ".sums"  # begins with a dot, so no hook point has this name
NOTE = {"train": SHORT_HASH, "sha256": {NAME: SHA256}}
ALIKE = 1e-6  # spread of the rows over the norm of their mean, up to which it is rounding
READ_ROWS = 1024  # of a shard at once, for the covariance


def _place(folder: Path, number: int) -> Path:
    return folder / SUMMARIES / f"shard_{number:05d}.safetensors"


def keep_summaries(
    folder: Path, number: int, found: dict[str, Summary], *, train: Tensor, digests: dict[str, str]
) -> None:
    """Write what a shard adds to the statistics of each hook point.

    train: bool [R], which of its rows are counted. digests: sha256 of each hook's file.
    """
    tensors = {f"{hook}.{part}": x for hook, of_hook in found.items() for part, x in of_hook._asdict().items()}
    write_tensors(_place(folder, number), tensors, note={"train": fingerprint(train), "sha256": digests})


def _read(folder: Path, number: int, hook: str) -> Summary:
    wanted = {f"{hook}.{part}": size for part, size in zip(Summary._fields, ("sums D", "float32 N", "sums L"))}
    found = read_tensors(_place(folder, number), wanted, L=1)
    return Summary(*(found[name] for name in wanted))


def _training_rows(run: Run, number: int, is_val: Tensor) -> Tensor:
    """Which rows of a shard belong to training texts, bool [R]."""
    columns = read_tensors(run.path / run.manifest["rows"][number]["file"], {"text_id": "int32 R"})
    return ~is_val[columns["text_id"].long()]


def _shard(run: Run, hook: str, number: int) -> Tensor:
    return read_tensors(run.path / run.manifest["hooks"][hook][number]["file"], {"x": "float R D"})["x"]


def _make_missing(run: Run, is_val: Tensor) -> None:
    """Make the summaries again that are missing, damaged, or of other training rows; ranks share the shards."""
    n_shards = len(run.manifest["rows"])
    for number in range(n_shards)[own_part(n_shards)]:
        train = _training_rows(run, number, is_val)
        beat()
        try:
            found = [_read(run.path, number, hook) for hook in run.hooks]
            is_made = (read_note(_place(run.path, number), NOTE)["train"] == fingerprint(train)
                       and all(len(of_hook.norms) == int(train.sum()) for of_hook in found))
        except InputError:
            is_made = False
        if not is_made:
            files = {hook: run.manifest["hooks"][hook][number]["file"] for hook in run.hooks}
            made = {hook: summary(_shard(run, hook, number), train) for hook in run.hooks}
            keep_summaries(run.path, number, made, train=train,
                           digests={hook: sha256(run.path / file) for hook, file in files.items()})
    wait_for_all()


def shard_digests(run: Run) -> dict[str, str]:
    """The checksum of each hook's shard, by its file's name in the run: it was taken when the shard was written."""
    found: dict[str, str] = {}
    for number in range(len(run.manifest["rows"])):
        digests = read_note(_place(run.path, number), NOTE)["sha256"]
        found |= {run.manifest["hooks"][hook][number]["file"]: digests[hook] for hook in run.hooks}
    return found


def write_stats(run: Run, is_val: Tensor, device: torch.device) -> None:
    """Write mean [D], covariance [D, D] and scalars of each hook's training rows. is_val: bool [number of texts].

    scale = sqrt(mean squared norm of x - mean), so that x' = (x - mean) / scale has mean squared norm 1. Mean, largest
    value and outliers are of all rows; covariance, scale and gamma of n_covariance_rows, the median norm of at most
    2^20, spread evenly over them.
    Raises InputError if there is no training row, if all are alike, or if squares overflow float32.
    """
    _make_missing(run, is_val)
    for hook in run.hooks:
        tensors, scalars = _statistics(run, hook, is_val, device)
        if rank() == 0:
            write_tensors(run.path / hook / "stats.safetensors", tensors)
            write_json(run.path / hook / "stats.json", scalars)


def _statistics(
    run: Run, hook: str, is_val: Tensor, device: torch.device
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What stats.safetensors and stats.json hold of one hook point."""
    numbers = range(len(run.manifest["rows"]))
    total, largest, counts = torch.zeros((), dtype=torch.float64), 0.0, []
    for number in numbers:
        found = _read(run.path, number, hook)
        beat()
        total, largest = total + found.sum, max(largest, float(found.largest))
        counts.append(len(found.norms))
    n = sum(counts)
    if not n:
        raise InputError("the training texts yield no token to store; raise DATA_LIMIT or lower VAL_FRAC")
    mean = total / n
    chosen = _in_shards(spread_evenly(n, most_rows(len(mean))), counts)
    spread = covariance(_rows(run, hook, is_val, chosen), mean, device)
    if not torch.isfinite(spread.float()).all():
        raise InputError(f"the activations at {hook} are too large for statistics in float32; choose another "
                         "LAYER_SIGNATURE, or check the model")
    scale = spread.trace().sqrt()
    if not scale > ALIKE * mean.norm():
        raise InputError(f"all tokens have the same activation at {hook}, so there is nothing to learn; use more "
                         "texts, or another LAYER_SIGNATURE")
    some = _in_shards(spread_evenly(n, MOST_ROWS), counts)
    median = torch.cat([_read(run.path, i, hook).norms[ids] for i, ids in zip(numbers, some)]).median()
    return {"mean": mean.float(), "covariance": spread.float()}, {
        "scale": scale.item(),
        "median_norm": median.item(),
        "max_abs": largest,
        "gamma": (mean.norm() / scale).item(),
        "n_outliers": sum(int((_read(run.path, i, hook).norms > 10 * median).sum()) for i in numbers),
        "n_rows": n,
        "n_covariance_rows": sum(map(len, chosen)),
    }


def _in_shards(chosen: Tensor, counts: list[int]) -> list[Tensor]:
    """Numbers among all training rows (int64, ascending) as numbers among each shard's."""
    ends = torch.tensor(counts).cumsum(0)
    places = torch.searchsorted(chosen, ends).tolist()
    return [chosen[first:last] - (end - count)
            for first, last, end, count in zip([0, *places], places, ends.tolist(), counts)]


def _rows(run: Run, hook: str, is_val: Tensor, chosen: list[Tensor]) -> Iterator[Tensor]:
    """The chosen training rows of each shard, [n, D] at a time."""
    for number, ids in enumerate(chosen):
        x, wanted = _shard(run, hook, number), _training_rows(run, number, is_val).nonzero()[:, 0][ids]
        for part in wanted.split(READ_ROWS):
            yield x.index_select(0, part)
