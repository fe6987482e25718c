"""Sparse codes of stored activations or of typed texts, read in batches as often as needed.

    codes = encode_run(run, hook, sae)                     # or live_codes(texts, model, ...)
    for start, values, indices in codes: ...
"""
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lib.activations import STORE_DTYPES, SaveSettings, block_rows
from lib.batches import batches_in_order, read_rows
from lib.environment import InputError
from lib.hooks import HookPoint
from lib.sae import SAE
from lib.store import ROW_COLUMNS, Run
from lib.texts import filler_id

Batches = Iterator[tuple[int, Tensor, Tensor]]

KEEP_BYTES = 1_000_000_000  # codes up to this size stay in memory for the next pass; larger ones are computed again
TABLE_CELLS = 2**24  # cells of the table texts x latents that one batch may need


@dataclass
class Codes:
    """Sparse codes of N token rows, in batches that can be read as often as needed."""

    texts: list[str]
    """text_id -> text."""
    rows: dict[str, Tensor]
    """text_id, pos, token_id, char_start, char_end: int32 [N]; the rows of one text are adjacent and in order."""
    n_latents: int
    make_batches: Callable[[], Batches]

    def __iter__(self) -> Batches:
        """(number of the first row, values float32 [n, k], latent indices [n, k]) in row order; 0: did not fire."""
        return self.make_batches()

    def __len__(self) -> int:
        return len(self.rows["text_id"])

    def slice(self, row: int) -> str:
        """The row's text, by its character offsets. It may be empty, and tokens that split a character share it."""
        start, end = int(self.rows["char_start"][row]), int(self.rows["char_end"][row])
        return self.texts[int(self.rows["text_id"][row])][start:end]


def encode_run(run: Run, hook: str, sae: SAE) -> Codes:
    """Codes of all rows of a run at one hook point, kept in memory if they take less than KEEP_BYTES."""
    kept: list[tuple[int, Tensor, Tensor]] | None = None
    keep = True
    batch_rows = max(64, min(8192, TABLE_CELLS // sae.n_latents))

    def batches() -> Batches:
        nonlocal kept, keep
        if kept is not None:
            yield from kept
            return
        mine, size = [], 0  # this pass's own list: passes may be nested
        for ids, x in batches_in_order(run.shards(hook), size=batch_rows):
            values, indices = sae.encode(x.to(sae.mean.device))
            batch = int(ids[0]), values.cpu(), indices.int().cpu()
            size += values.numel() * 8
            if keep := keep and size <= KEEP_BYTES:
                mine.append(batch)
            else:
                mine.clear()
            yield batch
        kept = mine if keep else None

    return Codes([text["text"] for text in run.texts], run.rows, sae.n_latents, batches)


def live_codes(
    texts: list[str], model: nn.Module, tokenizer, point: HookPoint, sae: SAE, settings: SaveSettings
) -> Codes:
    """Codes of typed texts: the model runs up to the hook point and is not changed.

    settings: those of the run that the SAE was trained on (run.meta["settings"]), so that a text gets the codes it has
    in the stored run. Raises InputError if no token is left to encode.
    """
    block = settings.tokens(tokenizer, texts)
    rows, (x,) = block_rows(model, [point], block, pad_id=filler_id(tokenizer), settings=settings)
    if not len(rows):
        raise InputError("these texts have no tokens to show: they are empty, or only special tokens")
    values, indices = sae.encode(x.to(STORE_DTYPES[settings.store_dtype]).float().to(sae.mean.device))
    batch = 0, values.cpu(), indices.int().cpu()
    columns = {name: rows[:, i] for i, name in enumerate(ROW_COLUMNS)}
    return Codes(texts, columns, sae.n_latents, lambda: iter([batch]))


def codes_of_text(run: Run, hook: str, sae: SAE, text_id: int) -> Codes:
    """Codes of one text of a run, from its stored activations."""
    mask = run.rows["text_id"] == text_id
    values, indices = sae.encode(read_rows(run.shards(hook), mask).to(sae.mean.device))
    batch = 0, values.cpu(), indices.int().cpu()
    columns = {name: column[mask] for name, column in run.rows.items()}
    columns["text_id"] = torch.zeros_like(columns["text_id"])
    return Codes([run.texts[text_id]["text"]], columns, sae.n_latents, lambda: iter([batch]))


def codes_at(codes: Codes, rows: Tensor, latents: Tensor) -> Tensor:
    """The code of latents[i] on rows[i], in one pass, float32 [n]; 0 where it does not fire or the row is -1."""
    found = torch.zeros(len(rows))
    order = rows.argsort()
    ordered = rows[order]
    for start, values, indices in codes:
        first, last = torch.searchsorted(ordered, torch.tensor([start, start + len(values)])).tolist()
        here = order[first:last]
        local = rows[here] - start
        found[here] = (values[local] * (indices[local] == latents[here, None])).sum(1)
    return found
