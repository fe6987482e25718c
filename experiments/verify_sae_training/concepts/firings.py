"""How often and how strongly each latent fires, and the texts on which it fires most, in one pass over the codes.

    firings = collect_firings(codes, top=10)               # codes: concepts/codes.py

Everything streams: memory is that of one batch and of tables [F, M], whatever the length of the corpus. An example is
one text with one latent's highest code in it, so a text appears at most once per latent; a code of 0 is never one.
What else is shown of a latent is in concepts/facts.py.
"""
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from concepts.codes import Codes
from lib.files import read_tensors

# p99 comes from a histogram over the leading bits of the float32 codes: 32 bins for each power of two.
MANTISSA_BITS, SMALLEST, LARGEST = 5, -20, 12
N_BINS = (LARGEST - SMALLEST) << MANTISSA_BITS
LOW = (1 << 31) - 1
CHUNK = 4096  # latents whose histograms are summed up at one time
LATENT_STATS = {"fires": "int64 F", "max": "float32 F", "mean_active": "float32 F", "p99": "float32 F"}


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
    """99th percentile of the codes over 0, float32 [F], within 1.6 % for codes between 2^-20 and 2^12."""
    top_rows: Tensor
    """Rows of the highest peaks, highest first, int64 [F, M]; -1: none."""

    def stats(self) -> dict[str, Tensor]:
        """The columns of latent_stats.safetensors."""
        return {"fires": self.fires, "max": self.max, "mean_active": self.mean_active, "p99": self.p99}


def collect_firings(codes: Codes, top: int = 10) -> Firings:
    """Statistics and example rows of every latent, in one pass; equal codes rank by row."""
    n_latents = codes.n_latents
    fires, histogram = torch.zeros(n_latents, dtype=torch.long), torch.zeros(n_latents * N_BINS, dtype=torch.int32)
    sums = torch.zeros(n_latents, dtype=torch.double)
    best = torch.zeros(n_latents, max(top, 1), dtype=torch.long)
    for text_ids, latents, values, rows in _whole_texts(codes):
        fires += torch.bincount(latents, minlength=n_latents)
        sums.index_add_(0, latents, values.double())
        bits = values.view(torch.int32)
        bins = ((bits >> (23 - MANTISSA_BITS)) - ((SMALLEST + 127) << MANTISSA_BITS)).clamp_(0, N_BINS - 1)
        histogram.index_add_(0, latents * N_BINS + bins, torch.ones_like(bins))
        keep_highest(best, *peaks_of_texts(text_ids, latents, packed=pack(values, rows)))
    top_values, top_rows = unpack(best)
    mean = torch.where(fires > 0, sums / fires.clamp(min=1), 0).float()
    parts = zip(histogram.view(n_latents, N_BINS).split(CHUNK), fires.split(CHUNK))
    p99 = torch.minimum(torch.cat([_percentile(part, counts, 0.99) for part, counts in parts]), top_values[:, 0])
    return Firings(fires=fires, max=top_values[:, 0], mean_active=mean, p99=p99, top_rows=top_rows[:, :top])


def _whole_texts(codes: Codes) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The codes over 0 of whole texts at a time: text_id, latent, value, row, each [n], texts in order."""
    text_id = codes.rows["text_id"].long()
    held = [text_id[:0], text_id[:0], torch.zeros(0), text_id[:0]]
    for start, values, indices in codes:
        row, slot = values.gt(0).nonzero(as_tuple=True)
        new = text_id[start + row], indices[row, slot].long(), values[row, slot], start + row
        fired = [torch.cat(column) for column in zip(held, new)]
        end = start + len(values)
        # The last text may continue in the next batch: its codes wait.
        cut = len(fired[0]) if end == len(text_id) else int((fired[0] != text_id[end - 1]).sum())
        held = [column[cut:] for column in fired]
        if cut:
            text, latent, value, place = (column[:cut] for column in fired)
            yield text, latent, value, place


def pack(values: Tensor, rows: Tensor) -> Tensor:
    """Values over 0, float32 [n], and rows as one integer each: larger values first, then earlier rows."""
    return values.view(torch.int32).long() << 32 | (LOW - rows)  # positive floats order like their bits


def unpack(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Values float32 and rows int64 of what pack() made; 0 and -1 where a cell is empty."""
    values = (packed >> 32).int().view(torch.float32)
    return values, torch.where(packed > 0, LOW - (packed & LOW), -1)


def peaks_of_texts(text_ids: Tensor, latents: Tensor, packed: Tensor) -> tuple[Tensor, Tensor]:
    """The highest entry of each latent in each text: latents [n], ascending, and packed [n]."""
    order = packed.argsort(descending=True)
    order = order[text_ids[order].argsort(stable=True)]
    order = order[latents[order].argsort(stable=True)]
    latents, text_ids, packed = latents[order], text_ids[order], packed[order]
    first = torch.ones(len(order), dtype=torch.bool)
    first[1:] = (latents[1:] != latents[:-1]) | (text_ids[1:] != text_ids[:-1])
    return latents[first], packed[first]


def keep_highest(table: Tensor, groups: Tensor, packed: Tensor) -> None:
    """Merge entries into a table int64 [G, M] of each group's M highest, highest first; 0: empty. groups: int64 [n]."""
    order = packed.argsort(descending=True)
    order = order[groups[order].argsort(stable=True)]
    groups, packed = groups[order], packed[order]
    rank = torch.arange(len(order)) - torch.searchsorted(groups, groups)
    kept = rank < table.shape[1]
    touched, line = groups[kept].unique_consecutive(return_inverse=True)
    new = torch.zeros(len(touched), table.shape[1], dtype=torch.long)
    new[line, rank[kept]] = packed[kept]
    table[touched] = torch.cat([table[touched], new], 1).topk(table.shape[1], dim=1).values


def scramble(x: Tensor) -> Tensor:
    """A pseudo-random number from 1 to 2^31 - 1 for each integer, the same on every machine."""
    for factor in (0x9E3779B97F4A7C1, 0xBF58476D1CE4E5B):
        x = x * factor
        x = x ^ (x >> 29 & 0x7FFFFFFFF)
    return (x >> 20 & LOW).clamp(min=1)


def _percentile(histogram: Tensor, counts: Tensor, share: float) -> Tensor:
    """The middle of the bin at which the histogram reaches `share` of each latent's codes, float32 [F]."""
    wanted = (counts.double() * share).ceil().clamp(min=1).long()
    at = (histogram.cumsum(1) < wanted[:, None]).sum(1).clamp(max=N_BINS - 1)
    edges = (at[:, None] + torch.tensor([0, 1]) + ((SMALLEST + 127) << MANTISSA_BITS)) << (23 - MANTISSA_BITS)
    return torch.where(counts > 0, edges.int().view(torch.float32).mean(1), 0.0)


def read_latent_stats(path: Path, n_latents: int) -> dict[str, Tensor]:
    """The columns of Firings.stats(), [n_latents] each, from step 4's latent_stats.safetensors.

    Raises InputError if the file is missing, damaged or about another SAE.
    """
    return read_tensors(path, LATENT_STATS, finite=True, F=n_latents)
