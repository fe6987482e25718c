"""What each latent fires on: firing statistics and example texts, from stored activations or live from a model.

    codes = encode_run(run, hook, sae)                     # or live_codes(texts, model, ...)
    firings = collect_firings(codes, top=10)
    write_top_texts(path, codes, firings, meta)            # concepts/top_texts.py

Everything streams: memory is that of one batch and of tables [F, M], whatever the length of the corpus. An example is
one text with one latent's highest code in it, so a text comes at most once per latent; a code of 0 is never an example.
"""
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lib.activations import STORE_DTYPES, SaveSettings, block_rows
from lib.environment import InputError
from lib.hooks import HookPoint
from lib.sae import SAE
from lib.store import ROW_COLUMNS, Run
from lib.texts import filler_id, tokenise

Batches = Iterator[tuple[int, Tensor, Tensor]]

KEEP_BYTES = 1_000_000_000  # sparse codes up to this size stay in memory for the next pass; larger ones are made again
TABLE_CELLS = 2**24  # cells of the table texts x latents of one batch
QUANTILES = (0.75, 0.5, 0.25)  # of the peaks over texts, for the examples from the middle
SAMPLE = 32  # texts drawn for each latent, among which the quantiles are taken
# p99 comes from a histogram over the leading bits of the float32 codes: 32 bins for each power of two.
MANTISSA_BITS, SMALLEST, LARGEST = 5, -20, 12
N_BINS = (LARGEST - SMALLEST) << MANTISSA_BITS
LOW = (1 << 31) - 1


@dataclass
class Codes:
    """Sparse codes of N token rows, read batch after batch as often as needed."""

    texts: list[str]
    """text_id -> text."""
    rows: dict[str, Tensor]
    """text_id, pos, token_id, char_start, char_end: int32 [N]; the rows of a text stand together, in order."""
    n_latents: int
    make_batches: Callable[[], Batches]

    def __iter__(self) -> Batches:
        """(number of the first row, values float32 [n, k], latent indices [n, k]) in row order; value 0: not fired."""
        return self.make_batches()

    def __len__(self) -> int:
        return len(self.rows["text_id"])

    def slice(self, row: int) -> str:
        """The row's piece of text, by its character offsets; may be empty, and pieces of one character share it."""
        start, end = int(self.rows["char_start"][row]), int(self.rows["char_end"][row])
        return self.texts[int(self.rows["text_id"][row])][start:end]


def encode_run(run: Run, hook: str, sae: SAE) -> Codes:
    """Codes of all rows of a run at one hook point, in batches; kept in memory if they take under KEEP_BYTES."""
    kept: list[tuple[int, Tensor, Tensor]] | None = None
    keep = run.n_rows * sae.top_k * 8 <= KEEP_BYTES
    batch_rows = max(64, min(8192, TABLE_CELLS // sae.n_latents))

    def batches() -> Batches:
        nonlocal kept
        if kept is not None:
            yield from kept
            return
        mine = []  # of this pass: another one may run inside it
        for start, x in run.batches(hook, batch_rows):
            values, indices = sae.encode(x.to(sae.mean.device))
            batch = start, values.cpu(), indices.int().cpu()
            if keep:
                mine.append(batch)
            yield batch
        kept = mine if keep else None

    return Codes([text["text"] for text in run.texts], run.rows, sae.n_latents, batches)


def live_codes(
    texts: list[str], model: nn.Module, tokenizer, point: HookPoint, sae: SAE, settings: SaveSettings
) -> Codes:
    """Codes of typed texts: the model runs up to the hook point and only reads; nothing of it is changed.

    settings: those of the run that the SAE was trained on (run.meta["settings"]); the same text then has the codes
    that the stored run has. Raises InputError if no token is left to encode.
    """
    block = tokenise(tokenizer, texts, 0, settings.max_length, settings.skip_special, settings.skip_first)
    rows, (x,) = block_rows(model, [point], block, filler_id(tokenizer), settings)
    if not len(rows):
        raise InputError("these texts hold no token to show (all are empty or special tokens)")
    values, indices = sae.encode(x.to(STORE_DTYPES[settings.store_dtype]).float().to(sae.mean.device))
    batch = 0, values.cpu(), indices.int().cpu()
    columns = {name: rows[:, i] for i, name in enumerate(ROW_COLUMNS)}
    return Codes(texts, columns, sae.n_latents, lambda: iter([batch]))


@dataclass
class Firings:
    """How often and how strongly each of F latents fires, and where its examples are."""

    fires: Tensor
    """Tokens with a code over 0, int64 [F]."""
    max: Tensor
    """Highest code, float32 [F]; 0 for a latent that never fires."""
    mean_active: Tensor
    """Mean of the codes over 0, float32 [F]."""
    p99: Tensor
    """99th percentile of the codes over 0, float32 [F]: the middle of its histogram bin, at most 1.6 % off for codes
    between 2^-20 and 2^12."""
    top_rows: Tensor
    """Rows of the highest peaks, best first, int64 [F, M]; -1 where there is none."""
    middle_rows: Tensor
    """Rows of the peaks at QUANTILES among SAMPLE texts drawn evenly, int64 [F, 3]; -1 where there is none."""

    def stats(self) -> dict[str, Tensor]:
        """The columns of latent_stats.safetensors."""
        return {"fires": self.fires, "max": self.max, "mean_active": self.mean_active, "p99": self.p99}


def collect_firings(codes: Codes, top: int = 10) -> Firings:
    """Statistics and example rows of every latent, in one pass; equal codes are ordered by row."""
    n_latents = codes.n_latents
    fires, histogram = torch.zeros(n_latents, dtype=torch.long), torch.zeros(n_latents * N_BINS, dtype=torch.int32)
    sums = torch.zeros(n_latents, dtype=torch.double)
    best = torch.zeros(n_latents, max(top, 1), dtype=torch.long)
    drawn, drawn_peak = torch.zeros(2, n_latents, SAMPLE, dtype=torch.long)
    for text_ids, latents, values, rows in _whole_texts(codes):
        fires += torch.bincount(latents, minlength=n_latents)
        sums.index_add_(0, latents, values.double())
        bits = values.view(torch.int32)
        bins = ((bits >> (23 - MANTISSA_BITS)) - ((SMALLEST + 127) << MANTISSA_BITS)).clamp_(0, N_BINS - 1)
        histogram.index_add_(0, latents * N_BINS + bins, torch.ones_like(bins))
        # Positive floats order like their bits: one integer holds the code and, below it, the row.
        packed = bits.long() << 32 | (LOW - rows)
        distinct, text = torch.unique_consecutive(text_ids, return_inverse=True)
        peaks = torch.zeros(len(distinct) * n_latents, dtype=torch.long)
        peaks.scatter_reduce_(0, text * n_latents + latents, packed, "amax")
        peaks = peaks.view(len(distinct), n_latents).T
        best = torch.cat([best, peaks], 1).topk(best.shape[1], dim=1).values
        pair = distinct[None, :] * n_latents + torch.arange(n_latents)[:, None]
        priority = torch.where(peaks > 0, _scramble(pair), 0)
        drawn, chosen = torch.cat([drawn, priority], 1).topk(SAMPLE, dim=1)
        drawn_peak = torch.cat([drawn_peak, peaks], 1).gather(1, chosen)
    top_values, top_rows = _unpack(best)
    mean = torch.where(fires > 0, sums / fires.clamp(min=1), 0).float()
    p99 = torch.minimum(_percentile(histogram.view(n_latents, N_BINS), fires, 0.99), top_values[:, 0])
    return Firings(fires, top_values[:, 0], mean, p99, top_rows[:, :top], _at_quantiles(drawn_peak, top_rows[:, :top]))


def _whole_texts(codes: Codes) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The codes over 0 of whole texts at a time: text_id, latent, value, row, each [n], texts in order."""
    text_id = codes.rows["text_id"].long()
    held = [text_id[:0], text_id[:0], torch.zeros(0), text_id[:0]]
    for start, values, indices in codes:
        row, slot = values.gt(0).nonzero(as_tuple=True)
        new = text_id[start + row], indices[row, slot].long(), values[row, slot], start + row
        fired = [torch.cat(column) for column in zip(held, new)]
        end = start + len(values)
        # The last text may go on in the next batch: its codes wait for it.
        cut = len(fired[0]) if end == len(text_id) else int((fired[0] != text_id[end - 1]).sum())
        held = [column[cut:] for column in fired]
        if cut:
            text, latent, value, place = (column[:cut] for column in fired)
            yield text, latent, value, place


def _scramble(x: Tensor) -> Tensor:
    """A positive pseudo-random number for each integer, the same on every machine (multiply and shift)."""
    for factor in (0x9E3779B97F4A7C1, 0xBF58476D1CE4E5B):
        x = x * factor
        x = x ^ (x >> 29 & 0x7FFFFFFFF)
    return (x & (2**62 - 1)) + 1


def _unpack(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Codes float32 and rows int64 of packed peaks; 0 and -1 where a cell is empty."""
    values = (packed >> 32).int().view(torch.float32)
    return values, torch.where(packed > 0, LOW - (packed & LOW), -1)


def _percentile(histogram: Tensor, counts: Tensor, share: float) -> Tensor:
    """The middle of the bin below which at least `share` of each latent's codes lie, float32 [F]."""
    wanted = (counts.double() * share).ceil().clamp(min=1).long()
    at = (histogram.cumsum(1) < wanted[:, None]).sum(1).clamp(max=N_BINS - 1)
    edges = (at[:, None] + torch.tensor([0, 1]) + ((SMALLEST + 127) << MANTISSA_BITS)) << (23 - MANTISSA_BITS)
    return torch.where(counts > 0, edges.int().view(torch.float32).mean(1), 0.0)


def _at_quantiles(peaks: Tensor, top_rows: Tensor) -> Tensor:
    """Rows of the drawn peaks that lie at QUANTILES, [F, 3]; -1 where the row is already an example or none is left."""
    ordered = peaks.sort(dim=1).values
    n = (peaks > 0).sum(1)
    picks: list[Tensor] = []
    for quantile in QUANTILES:
        at = (peaks.shape[1] - n + (quantile * (n - 1).clamp(min=0)).long()).clamp(max=peaks.shape[1] - 1)
        rows = _unpack(ordered.gather(1, at[:, None]))[1][:, 0]
        used = torch.cat([top_rows, *(p[:, None] for p in picks)], 1)
        picks.append(torch.where((used == rows[:, None]).any(1), -1, rows))
    return torch.stack(picks, 1)


def codes_at(codes: Codes, rows: Tensor, latents: Tensor) -> Tensor:
    """The code of latents[i] on rows[i], float32 [n]; 0 where it does not fire or the row is -1. One pass."""
    found = torch.zeros(len(rows))
    order = rows.argsort()
    ordered = rows[order]
    for start, values, indices in codes:
        first, last = torch.searchsorted(ordered, torch.tensor([start, start + len(values)])).tolist()
        here = order[first:last]
        local = rows[here] - start
        found[here] = (values[local] * (indices[local] == latents[here, None])).sum(1)
    return found


def closest_directions(
    W: Tensor, latents: Tensor, n: int, least: float, chunk: int = 256
) -> list[list[tuple[int, float]]]:
    """For each of `latents` int64 [L], the at most n other rows of W [F, D] with the highest cosine over `least`, best
    first.

    Rows of W have unit norm. Never holds more than chunk x F cosines.
    """
    found = []
    for part in latents.split(chunk):
        cosines = W[part] @ W.T
        cosines[torch.arange(len(part)), part] = -1
        best = cosines.topk(min(n, len(W)), dim=1)
        for values, rows in zip(best.values.tolist(), best.indices.tolist()):
            found.append([(row, value) for row, value in zip(rows, values) if value > least])
    return found
