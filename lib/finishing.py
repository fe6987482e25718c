"""What ends the saving of a run: the statistics of each hook point, and the manifest."""
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from .batches import batches_in_order
from .distributed import add_up, own_part, rank, wait_for_all, world_size
from .environment import InputError
from .files import write_json, write_tensors
from .outputs import list_files
from .store import Run

ALIKE = 1e-6  # spread of the rows over the norm of their mean, up to which it is rounding


def finish(folder: Path, meta: dict[str, Any], hooks: list[str], n_shards: int) -> Run:
    """Write the statistics of each hook point and the manifest, which makes the run complete. Ranks share the
    reading.
    """
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
    """Mean [D], covariance [D, D] and scalars of the hook's training rows, in two passes with float64 sums.

    scale = sqrt(mean squared norm of x - mean), so that x' = (x - mean) / scale has mean squared norm 1.
    Each rank reads
    its part of the shards; the order of the sums, and with it the last digits, depends on how many ranks there are.
    Raises InputError if there is no training row, if all are alike, or if squares overflow float32.
    """
    train = ~run.is_val
    n = int(train.sum())
    if n == 0:
        raise InputError("the training texts yield no token to store; raise DATA_LIMIT or lower VAL_FRAC")
    shards = run.shards(hook)
    own = own_part(len(shards))
    mean = torch.zeros(shards[0].shape[1], dtype=torch.float64)
    for _, x in batches_in_order(shards, train, part=own):
        mean += x.double().sum(0)
    add_up(mean)
    mean /= n
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    norms, largest = torch.zeros(len(train)), torch.zeros(world_size())
    for ids, x in batches_in_order(shards, train, part=own):
        norms[ids] = x.norm(dim=1)
        centred = x.double() - mean
        covariance += centred.T @ centred
        largest[rank()] = max(largest[rank()], x.abs().max())
    add_up(covariance, norms, largest)
    covariance /= n
    if not torch.isfinite(covariance.float()).all():
        raise InputError(f"the activations at {hook} are too large for statistics in float32; choose another "
                         "LAYER_SIGNATURE, or check the model")
    norm = norms[train]
    scale = covariance.trace().sqrt()
    if not scale > ALIKE * mean.norm():
        raise InputError(f"all tokens have the same activation at {hook}, so there is nothing to learn; use more "
                         "texts, or another LAYER_SIGNATURE")
    if rank():
        return
    write_tensors(run.path / hook / "stats.safetensors", {"mean": mean.float(), "covariance": covariance.float()})
    write_json(run.path / hook / "stats.json", {
        "scale": scale.item(),
        "median_norm": norm.median().item(),
        "max_abs": largest.max().item(),
        "gamma": (mean.norm() / scale).item(),
        "n_outliers": int((norm > 10 * norm.median()).sum()),
        "n_rows": n,
    })
