"""Texts through a hooked model into the store: one pass for all hook points, resumable, real tokens only."""
import inspect
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from tqdm.auto import tqdm

from lib.environment import InputError, log
from lib.hooks import HookPoint, capture
from lib.store import ROW_COLUMNS, SCHEMA_VERSION, Run, list_files, read_note, write_json, write_tensors, write_text
from lib.texts import Tokens, length_batches, pad, tokenise

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
    padding_side: str = "right"
    """Where batches are padded; both sides store the same rows."""


def forward(model: nn.Module, points: list[HookPoint], batch: list[Tokens], pad_id: int, side: str = "right") -> list[list[Tensor]]:
    """Hidden states of each text at each hook point: result[point][text] is [T, D] of its T real tokens."""
    ids, mask = pad(batch, pad_id, side)
    device = next(model.parameters()).device
    inputs: dict[str, Any] = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
    accepted = inspect.signature(model.forward).parameters
    if side == "left" and "position_ids" in accepted:
        # Models with learnt positions would otherwise count the padding.
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0).to(device)
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    with torch.inference_mode(), capture(model, points) as seen:
        model(**inputs)
    states = []
    for point in points:
        hidden = seen[point.signature]
        if hidden.ndim != 3 or hidden.shape[:2] != ids.shape:
            raise InputError(f"{point.signature} gives a tensor of shape {tuple(hidden.shape)}, not [texts, tokens, width]; choose another layer")
        states.append([row[keep] for row, keep in zip(hidden, mask.bool().to(device))])
    return states


def block_rows(model: nn.Module, points: list[HookPoint], block: list[Tokens], pad_id: int, settings: SaveSettings) -> tuple[Tensor, list[Tensor]]:
    """Rows of a block of texts in text order, whatever the batches: columns int32 [R, 5], activations per point [R, D]."""
    found: dict[int, list[Tensor]] = {}
    for batch in length_batches(block, settings.batch_tokens):
        states = forward(model, points, batch, pad_id, settings.padding_side)
        for i, item in enumerate(batch):
            found[item.text_id] = [per_point[i][torch.tensor(item.keep)].cpu() for per_point in states]
    columns = [
        (item.text_id, pos, item.ids[pos], *item.offsets[pos]) for item in block for pos in range(len(item.ids)) if item.keep[pos]
    ]
    rows = torch.tensor(columns, dtype=torch.int32).reshape(-1, len(ROW_COLUMNS))
    return rows, [torch.cat([found[item.text_id][p] for item in block]) for p in range(len(points))]


def preflight(model: nn.Module, tokenizer, points: list[HookPoint], texts: list[str], settings: SaveSettings) -> list[dict[str, Any]]:
    """What a sample of the texts says of each hook point, before anything is written; one dict a point.

    width; median_norm; gamma = norm(mean) / norm(per-dimension sd), which predicts dead latents (arXiv 2605.31518);
    outlier_frac, the share of rows over 10 times the median norm; participation, the effective number of dimensions
    (sum of eigenvalues)^2 / sum of their squares; rows_per_text; seconds, of the sample's second pass.
    """
    sample = tokenise(tokenizer, texts[:SAMPLE_TEXTS], 0, settings.max_length, settings.skip_special, settings.skip_first)
    block_rows(model, points, sample[:4], tokenizer.pad_token_id, settings)  # the first pass pays for set-up
    start = time.perf_counter()
    rows, states = block_rows(model, points, sample, tokenizer.pad_token_id, settings)
    seconds = time.perf_counter() - start
    if not len(rows):
        raise InputError("no text yields a token to store (all are empty or special tokens); check TEXT_FIELD and SKIP_FIRST")
    report = []
    for point, x in zip(points, states):
        x = x.double()
        norms, mean = x.norm(dim=1), x.mean(0)
        eigenvalues = torch.linalg.svdvals(x - mean).square()
        report.append({
            "signature": point.signature,
            "width": x.shape[1],
            "median_norm": norms.median().item(),
            "gamma": (mean.norm() / x.var(0, correction=0).sum().sqrt()).item(),
            "outlier_frac": (norms > 10 * norms.median()).double().mean().item(),
            "participation": (eigenvalues.sum().square() / eigenvalues.square().sum()).item(),
            "rows_per_text": len(rows) / len(sample),
            "seconds": seconds,
        })  # fmt: skip
    return report


class _Writer:
    """Collects rows and writes them as shards of fixed size; the rows' shard is written last and marks it complete."""

    def __init__(self, folder: Path, points: list[HookPoint], settings: SaveSettings):
        self.folder, self.points, self.settings = folder, points, settings
        self.dtype = STORE_DTYPES[settings.store_dtype]
        self.rows: list[Tensor] = []
        self.states: list[list[Tensor]] = [[] for _ in points]
        self.n_shards, self.block, self.rows_before_block, self.skip = 0, 0, 0, 0
        while (path := self.shard("rows", self.n_shards)).exists():
            self.n_shards += 1
            self.block, self.rows_before_block = read_note(path)
            # The rows of that block which earlier shards already hold.
            self.skip = self.n_shards * settings.shard_rows - self.rows_before_block

    def shard(self, name: str, number: int) -> Path:
        return self.folder / name / f"shard_{number:05d}.safetensors"

    def add(self, rows: Tensor, states: list[Tensor]) -> None:
        n_new = len(rows)
        self.rows.append(rows[self.skip :])
        for kept, x in zip(self.states, states):
            kept.append(x[self.skip :].to(self.dtype))
        self.skip = 0
        while sum(map(len, self.rows)) >= self.settings.shard_rows:
            self.flush(self.settings.shard_rows)
        self.block += 1
        self.rows_before_block += n_new

    def flush(self, n: int) -> None:
        """Write the first n collected rows as one shard."""
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
    folder: Path, model: nn.Module, tokenizer, points: list[HookPoint], texts: list[str], splits: list[str], settings: SaveSettings, meta: dict[str, Any]
) -> Run:
    """Run `texts` through the model and store what passes the hook points; see lib/store.py for the layout.

    folder: the run's own folder; what an interrupted call left there is continued, and the bytes are the same as
    those of a call that was never interrupted. splits: "train" or "val" for each text. meta: provenance for meta.json.

    Raises InputError if no text yields a row, or if an activation is not finite (the text is named).
    """
    hooks = [point._asdict() for point in points]
    meta = {"schema_version": SCHEMA_VERSION, **meta, "settings": asdict(settings), "hooks": hooks, "n_texts": len(texts)}
    write_json(folder / "meta.json", meta)
    lines = ({"text_id": i, "text": text, "split": split} for i, (text, split) in enumerate(zip(texts, splits)))
    write_text(folder / "texts.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    limits: list[float | None] = [None] * len(points)
    if settings.max_norm_multiple is not None:
        limits = [settings.max_norm_multiple * r["median_norm"] for r in preflight(model, tokenizer, points, texts, settings)]
    writer = _Writer(folder, points, settings)
    if writer.n_shards:
        log.info("continuing after shard %d", writer.n_shards)
    with tqdm(total=len(texts), initial=min(writer.block * BLOCK_TEXTS, len(texts)), unit="text", desc="saving activations") as bar:
        while writer.block * BLOCK_TEXTS < len(texts):
            first = writer.block * BLOCK_TEXTS
            block = tokenise(tokenizer, texts[first : first + BLOCK_TEXTS], first, settings.max_length, settings.skip_special, settings.skip_first)
            rows, states = block_rows(model, points, block, tokenizer.pad_token_id, settings)
            _check_finite(rows, states, points, writer.dtype)
            writer.add(*_drop_outliers(rows, states, limits))
            bar.update(len(block))
    if sum(map(len, writer.rows)):
        writer.flush(settings.shard_rows)
    if not writer.n_shards:
        raise InputError("no text yields a token to store (all are empty or special tokens); check TEXT_FIELD and SKIP_FIRST")
    return finish(folder, meta, [point.signature for point in points], writer.n_shards)


def _check_finite(rows: Tensor, states: list[Tensor], points: list[HookPoint], dtype: torch.dtype) -> None:
    for point, x in zip(points, states):
        bad = ~torch.isfinite(x.to(dtype)).all(1)
        if bad.any():
            text_ids = rows[bad, 0].unique().tolist()
            reason = "beyond the range of float16; set STORE_DTYPE=bfloat16" if torch.isfinite(x).all() else "not finite; try MODEL_DTYPE=float32"
            raise InputError(f"activations of {point.signature} are {reason} (texts {', '.join(map(str, text_ids[:5]))})")


def _drop_outliers(rows: Tensor, states: list[Tensor], limits: list[float | None]) -> tuple[Tensor, list[Tensor]]:
    """Drop the rows whose norm is over the limit at any hook point: all points share their rows."""
    keep = torch.ones(len(rows), dtype=torch.bool)
    for x, limit in zip(states, limits):
        if limit is not None:
            keep &= x.float().norm(dim=1) <= limit
    return rows[keep], [x[keep] for x in states]


def finish(folder: Path, meta: dict[str, Any], hooks: list[str], n_shards: int) -> Run:
    """Write the statistics of each hook point and the manifest, which makes the run complete."""
    names = {name: [f"{name}/shard_{i:05d}.safetensors" for i in range(n_shards)] for name in ["rows", *hooks]}
    rows_of = []
    for name in names["rows"]:
        with safe_open(folder / name, "pt") as file:
            rows_of.append(file.get_slice("pos").get_shape()[0])
    shards = {key: [{"file": file, "rows": rows} for file, rows in zip(files, rows_of)] for key, files in names.items()}
    run = Run(folder, meta, {"rows": shards.pop("rows"), "hooks": shards, "n_rows": sum(rows_of)})
    for hook in hooks:
        write_stats(run, hook)
    files = ["meta.json", "texts.jsonl", *(f for part in names.values() for f in part)]
    files += [f"{hook}/stats.{ending}" for hook in hooks for ending in ("json", "safetensors")]
    run.manifest["files"] = list_files(folder, files)
    write_json(folder / "manifest.json", run.manifest)
    return run


def write_stats(run: Run, hook: str) -> None:
    """Mean [D], covariance [D, D] and scalars of the hook's training rows, in two passes with float64 sums.

    scale = sqrt(mean squared norm of x - mean), so that x' = (x - mean) / scale has mean squared norm 1.
    """
    train = ~run.is_val
    n = int(train.sum())
    if n == 0:
        raise InputError("the training texts yield no token to store; raise DATA_LIMIT or lower VAL_FRAC")
    mean = sum((x[train[i : i + len(x)]].double().sum(0) for i, x in run.batches(hook)), torch.zeros((), dtype=torch.float64)) / n
    covariance, norms, largest = torch.zeros(len(mean), len(mean), dtype=torch.float64), [], 0.0
    for i, x in run.batches(hook):
        x = x[train[i : i + len(x)]]
        if len(x):
            centred = x.double() - mean
            covariance += centred.T @ centred
            norms.append(x.norm(dim=1))
            largest = max(largest, x.abs().max().item())
    covariance /= n
    norm = torch.cat(norms)
    scale = covariance.trace().sqrt()
    write_tensors(run.path / hook / "stats.safetensors", {"mean": mean.float(), "covariance": covariance.float()})
    write_json(run.path / hook / "stats.json", {
        "scale": scale.item(),
        "median_norm": norm.median().item(),
        "max_abs": largest,
        "gamma": (mean.norm() / scale).item(),
        "n_outliers": int((norm > 10 * norm.median()).sum()),
        "n_rows": n,
    })  # fmt: skip
