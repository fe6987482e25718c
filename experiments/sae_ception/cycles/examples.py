"""Examples through a classifier: batches, outputs, and the states below its trained layers, computed once and kept."""
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from cycles.sealed import read_sealed, write_sealed
from cycles.tasks import Task
from lib.distributed import add_up, beat, own_part, rank, wait_for_all
from lib.files import fingerprint
from lib.models import weights_of

GROUPED_BATCHES = 20  # text batches whose examples are sorted by length together: less padding
ENTRY_SHARD_TEXTS = 2048  # texts whose entry states share a file


@dataclass(frozen=True)
class Entries:
    """Cached states at the entry of the first trained block, so that an epoch costs only the trained layers."""

    shards: list[Tensor]
    """[tokens, D] each, memory-mapped."""
    places: list[tuple[int, int, int]]
    """example id -> shard, first row, end row."""

    def batch(self, ids: Tensor, n_positions: int) -> Tensor:
        """The entry states of the examples, right-padded with zeros to [B, n_positions, D]."""
        parts = [self.shards[shard][start:end] for shard, start, end in (self.places[i] for i in ids.tolist())]
        out = parts[0].new_zeros(len(parts), n_positions, parts[0].shape[1])
        for row, part in zip(out, parts):
            row[: len(part)] = part
        return out


def make_batch(task: Task, ids: Tensor, device: torch.device, entries: Entries | None = None) -> dict[str, Tensor]:
    """task.batch on the device, with the cached entry states where there are some."""
    batch = task.batch(ids)
    if entries is not None:
        batch["entry"] = entries.batch(ids, batch["input_ids"].shape[1])
    return {name: value.to(device) for name, value in batch.items()}


def shuffled_batches(task: Task, ids: Tensor, batch_size: int, *, seed: int, epoch: int) -> list[Tensor]:
    """The examples of one pass in batches, in an order drawn from (seed, epoch); texts of similar length together."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = ids[torch.randperm(len(ids), generator=generator)]
    if not task.tokens:
        return list(order.split(batch_size))
    batches = []
    for group in order.split(batch_size * GROUPED_BATCHES):
        lengths = torch.tensor([len(task.tokens[i].ids) for i in group.tolist()])
        batches += group[lengths.argsort(stable=True)].split(batch_size)
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def own_examples(batch: Tensor) -> tuple[Tensor, int]:
    """The examples of a batch [B] that this rank computes, and how many of them count.

    A rank without examples computes the first one, uncounted: all ranks must take part in gathering sharded weights.
    """
    own = batch[own_part(len(batch))]
    return (own if len(own) else batch[:1]), len(own)


@torch.no_grad()
def outputs(
    model: nn.Module, task: Task, ids: Tensor, batch_size: int, *, entries: Entries | None = None
) -> tuple[Tensor, Tensor]:
    """h [N, D] and logits [N, C] of the examples, in the order of ids, on the CPU; the model in eval mode.

    Several ranks share the work, and each gets the whole result.
    """
    model.eval()
    device = next(model.parameters()).device
    order = torch.arange(len(ids))
    if task.tokens:  # similar lengths together: less padding
        order = torch.tensor([len(task.tokens[i].ids) for i in ids.tolist()]).argsort(stable=True)
    found = []
    for part in order.split(batch_size):
        own, n = own_examples(part)
        h, logits = model(make_batch(task, ids[own], device, entries))
        found.append((own[:n], h[:n].float().cpu(), logits[:n].float().cpu()))
    whole_h, whole_logits = (torch.zeros(len(ids), found[0][i].shape[1]) for i in (1, 2))
    for own, h, logits in found:
        whole_h[own], whole_logits[own] = h, logits
    add_up(whole_h, whole_logits)
    return whole_h, whole_logits


def cached_entries(model: Any, task: Task, c: dict[str, Any], root: Path, device: torch.device) -> Entries:
    """What enters a TextClassifier's first trained block, for every example: computed once, then read from `root`."""
    key = fingerprint([c["MODEL"], weights_of(model.lm), [t.ids for t in task.tokens], model.first_trained,
                       c["MODEL_DTYPE"]])
    folder = root / "cache" / key
    lengths = [len(item.ids) for item in task.tokens]
    shards = [range(i, min(i + ENTRY_SHARD_TEXTS, len(lengths))) for i in range(0, len(lengths), ENTRY_SHARD_TEXTS)]
    model.eval()
    done = (folder / f"{len(shards) - 1}.safetensors").exists()
    own = list(enumerate(shards))[own_part(len(shards))]
    for number, ids in tqdm(own, desc="states below the trained layers", leave=False, disable=done or rank() > 0):
        path = folder / f"{number}.safetensors"
        if not path.exists():
            by_length = torch.tensor(sorted(ids, key=lambda i: (lengths[i], i)))
            states: dict[int, Tensor] = {}
            for part in by_length.split(c["BATCH_SIZE"]):
                found = model.token_states(make_batch(task, part, device), model.entry)
                states |= {i: state.cpu() for i, state in zip(part.tolist(), found)}
                beat()
            write_sealed(path, {"x": torch.cat([states[i] for i in ids])})
    wait_for_all()
    places = []
    for number, ids in enumerate(shards):
        start = 0
        for i in ids:
            places.append((number, start, start + lengths[i]))
            start += lengths[i]
    sizes = [sum(lengths[i] for i in ids) for ids in shards]
    return Entries([read_sealed(folder / f"{i}.safetensors", {"x": "float N D"}, N=size)["x"]
                    for i, size in enumerate(sizes)], places)
