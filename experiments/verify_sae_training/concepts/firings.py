"""What each latent fires on: firing statistics and example texts, computed in one pass, written and read.

    firings = collect_firings(codes, top=10)               # codes: concepts/codes.py
    write_top_texts(path, codes, firings, meta)

Everything streams: memory is that of one batch and of tables [F, M], whatever the length of the corpus. An example is
one text with one latent's highest code in it, so a text appears at most once per latent; a code of 0 is never one.
"""
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from concepts.codes import Codes, codes_at
from lib.environment import InputError
from lib.files import read_json, read_tensors, write_text
from lib.schemas import COUNT, POSITIVE, Schema, Text

SCHEMA_VERSION = 1  # of top_texts.json
WINDOW = (20, 10)  # stored tokens shown before and after the peak of an example
QUANTILES = (0.75, 0.5, 0.25)  # of the peaks over texts, for the examples from the middle
SAMPLE = 32  # texts drawn for each latent, among which the quantiles are taken
# p99 comes from a histogram over the leading bits of the float32 codes: 32 bins for each power of two.
MANTISSA_BITS, SMALLEST, LARGEST = 5, -20, 12
N_BINS = (LARGEST - SMALLEST) << MANTISSA_BITS
LOW = (1 << 31) - 1
Examples = dict[int, list[dict[str, Any]]]
LATENT = Text(r"0|[1-9][0-9]{0,8}")
EXAMPLE = {"text": str, "score": float, "token_str": str, "acts?": [float], "spans?": [[COUNT]], "char_start?": COUNT,
           "char_end?": COUNT}
TOP_TEXTS = Schema({
    "meta?": {"n_tokens?": POSITIVE, "n_texts?": COUNT, "n_latents?": POSITIVE, "sae_hash?": str},
    "middle?": {LATENT: [EXAMPLE]}, LATENT: [EXAMPLE],
}, remedy="delete it and run notebook 04 again", limit=1 << 34)
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
    middle_rows: Tensor
    """Rows of the peaks at QUANTILES among SAMPLE texts drawn evenly, int64 [F, 3]; -1: none."""

    def stats(self) -> dict[str, Tensor]:
        """The columns of latent_stats.safetensors."""
        return {"fires": self.fires, "max": self.max, "mean_active": self.mean_active, "p99": self.p99}


def collect_firings(codes: Codes, top: int = 10) -> Firings:
    """Statistics and example rows of every latent, in one pass; equal codes rank by row."""
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
    examples = top_rows[:, :top]
    return Firings(fires=fires, max=top_values[:, 0], mean_active=mean, p99=p99, top_rows=examples,
                   middle_rows=_at_quantiles(drawn_peak, examples))


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


def _scramble(x: Tensor) -> Tensor:
    """A positive pseudo-random number for each integer, the same on every machine."""
    for factor in (0x9E3779B97F4A7C1, 0xBF58476D1CE4E5B):
        x = x * factor
        x = x ^ (x >> 29 & 0x7FFFFFFFF)
    return (x & (2**62 - 1)) + 1


def _unpack(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Codes float32 and rows int64 of packed peaks; 0 and -1 where a cell is empty."""
    values = (packed >> 32).int().view(torch.float32)
    return values, torch.where(packed > 0, LOW - (packed & LOW), -1)


def _percentile(histogram: Tensor, counts: Tensor, share: float) -> Tensor:
    """The middle of the bin at which the histogram reaches `share` of each latent's codes, float32 [F]."""
    wanted = (counts.double() * share).ceil().clamp(min=1).long()
    at = (histogram.cumsum(1) < wanted[:, None]).sum(1).clamp(max=N_BINS - 1)
    edges = (at[:, None] + torch.tensor([0, 1]) + ((SMALLEST + 127) << MANTISSA_BITS)) << (23 - MANTISSA_BITS)
    return torch.where(counts > 0, edges.int().view(torch.float32).mean(1), 0.0)


def _at_quantiles(peaks: Tensor, top_rows: Tensor) -> Tensor:
    """Rows of the drawn peaks at QUANTILES, [F, 3]; -1 where that row is an example already, or there is none."""
    ordered = peaks.sort(dim=1).values
    n = (peaks > 0).sum(1)
    picks: list[Tensor] = []
    for quantile in QUANTILES:
        at = (peaks.shape[1] - n + (quantile * (n - 1).clamp(min=0)).long()).clamp(max=peaks.shape[1] - 1)
        rows = _unpack(ordered.gather(1, at[:, None]))[1][:, 0]
        used = torch.cat([top_rows, *(p[:, None] for p in picks)], 1)
        picks.append(torch.where((used == rows[:, None]).any(1), -1, rows))
    return torch.stack(picks, 1)


def write_top_texts(
    path: Path, codes: Codes, firings: Firings, meta: dict[str, Any], window: tuple[int, int] = WINDOW
) -> None:
    """Write top_texts.json: "meta", each latent's examples, highest first, and under "middle" those at QUANTILES.

    An example: text, score (the code), token_str = text[char_start:char_end], token_idx (position in the tokenised
    text, special tokens included), text_id, char_start, char_end; `window` [first, last], the positions of the stored
    tokens around the peak, with their codes `acts` and character ranges `spans`. One latent per line.
    """
    rows = torch.cat([firings.top_rows, firings.middle_rows], 1)
    n_latents, n_examples = rows.shape
    offsets = torch.arange(-window[0], window[1] + 1)
    peak = rows.reshape(-1, 1)
    around = peak + offsets
    inside = around.clamp(0, len(codes) - 1)
    text_id = codes.rows["text_id"]
    around[(inside != around) | (peak < 0) | (text_id[inside] != text_id[peak.clamp(min=0)])] = -1
    latent = torch.arange(n_latents).repeat_interleave(n_examples * len(offsets))
    acts = codes_at(codes, around.reshape(-1), latent).view(n_latents, n_examples, -1)
    around = around.view(n_latents, n_examples, -1)

    def examples(latent: int, first: int, last: int) -> list[dict[str, Any]]:
        there = [e for e in range(first, last) if rows[latent, e] >= 0]
        return [_example(codes, int(rows[latent, e]), around[latent, e], acts[latent, e]) for e in there]

    top = firings.top_rows.shape[1]
    meta = {"schema_version": SCHEMA_VERSION, **meta, "n_latents": n_latents, "top": top}
    best = [_line(latent, examples(latent, 0, top)) for latent in range(n_latents)]
    middle = [_line(latent, examples(latent, top, n_examples)) for latent in range(n_latents)]
    inner = ",\n".join([_line("meta", meta), *best, '"middle": {\n' + ",\n".join(middle) + "\n}"])
    write_text(path, "{\n" + inner + "\n}\n")


def _line(key: int | str, value: Any) -> str:
    return f'"{key}": {json.dumps(value, ensure_ascii=False)}'


def _example(codes: Codes, row: int, around: Tensor, acts: Tensor) -> dict[str, Any]:
    there = around >= 0
    near, columns = around[there], codes.rows
    text_id, start, end = (int(columns[name][row]) for name in ("text_id", "char_start", "char_end"))
    rounded = [float(f"{value:.6g}") if value else 0 for value in acts[there].tolist()]
    return {
        "text": codes.texts[text_id], "score": rounded[near.tolist().index(row)],
        "token_str": codes.texts[text_id][start:end], "token_idx": int(columns["pos"][row]),
        "text_id": text_id, "char_start": start, "char_end": end,
        "window": [int(columns["pos"][near[0]]), int(columns["pos"][near[-1]])], "acts": rounded,
        "spans": torch.stack([columns["char_start"][near], columns["char_end"][near]], 1).tolist(),
    }


def read_top_texts(path: Path) -> tuple[dict[str, Any], Examples, Examples]:
    """What write_top_texts wrote: meta, examples by latent, examples from the middle by latent.

    A file without "meta" and "middle" is read too. Raises InputError if it is missing or damaged.
    """
    content = read_json(path, TOP_TEXTS)
    top = {int(key): value for key, value in content.items() if key not in ("meta", "middle")}
    middle = {int(key): value for key, value in content.get("middle", {}).items()}
    meta = content.get("meta", {})
    n_latents = meta.get("n_latents")
    if n_latents is not None and not top.keys() == middle.keys() == set(range(n_latents)):
        raise InputError(f"{path} is damaged: it should list {n_latents} latents; {TOP_TEXTS.remedy}")
    return meta, top, middle


def read_latent_stats(path: Path, n_latents: int) -> dict[str, Tensor]:
    """The columns of Firings.stats(), [n_latents] each, from step 4's latent_stats.safetensors.

    Raises InputError if the file is missing, damaged or about another SAE.
    """
    return read_tensors(path, LATENT_STATS, finite=True, F=n_latents)
