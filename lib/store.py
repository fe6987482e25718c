"""Everything on disk: where it lies, atomic writes, and runs of activations that can be read back.

A run is a folder `store/<experiment>/runs/<run_id>/`:

    meta.json                            constants, model, data set, hook points, mask rules, versions
    texts.jsonl                          {"text_id", "text", "split": "train" | "val"}, one a line
    rows/shard_00000.safetensors         text_id, pos, token_id, char_start, char_end : int32 [R]
    <hook>/shard_00000.safetensors       x : [R, D]
    <hook>/stats.safetensors, stats.json mean [D] and covariance [D, D]; scale, norms, gamma (training rows)
    manifest.json                        every file with its rows and sha256; written last

Row r of a hook's shard i is row r of rows/shard i, so row -> token -> text needs no language model.
"""
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lib.distributed import add_up, own_part
from lib.environment import PROJECT, InputError

SCHEMA_VERSION = 1
ROW_COLUMNS = ("text_id", "pos", "token_id", "char_start", "char_end")


def store_root() -> Path:
    """The folder of all outputs: the environment variable STORE_DIR, else store/ in the project."""
    return Path(os.environ.get("STORE_DIR") or PROJECT / "store")


def experiment_dir(experiment: str) -> Path:
    """store/<experiment>, created if need be."""
    path = store_root() / experiment
    path.mkdir(parents=True, exist_ok=True)
    return path


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """Call write(temporary path), then rename to `path`: a reader sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    atomic_write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically; NaN and infinity are refused, because other tools can't read them."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; a missing or damaged one is an InputError that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); delete it and run its step again") from None


def write_tensors(path: Path, tensors: dict[str, Tensor], note: Any = None) -> None:
    """Write a safetensors file atomically. note: JSON value for the file's header, read back by read_note().

    The note is one string because safetensors writes several metadata keys in random order: equal files would differ.
    """
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    metadata = None if note is None else {"note": json.dumps(note)}
    atomic_write(path, lambda temporary: save_file(contiguous, temporary, metadata))


def read_note(path: Path) -> Any:
    """The note in a safetensors file's header."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["note"])


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file, memory-mapped; a missing or damaged one is an InputError that names it."""
    if not path.exists():
        raise InputError(f"{path} is missing")
    try:
        return load_file(path)
    except Exception as error:  # safetensors raises its own type, which is not exported
        raise InputError(f"{path} is damaged ({error}); delete it and run its step again") from None


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(value: Any) -> str:
    """Sixteen hex digits of anything JSON can hold, or of a tensor's bytes and shape."""
    if isinstance(value, Tensor):
        data = str((tuple(value.shape), value.dtype)).encode() + value.contiguous().cpu().view(torch.uint8).numpy().tobytes()
    else:
        data = json.dumps(value, sort_keys=True, default=str).encode()
    return hashlib.sha256(data).hexdigest()[:16]


def provenance() -> dict[str, Any]:
    """Versions and code revision that an output is stamped with. No time: equal runs give equal bytes."""
    packages = ("torch", "transformers", "datasets", "overcomplete", "numpy", "scikit-learn")
    git = subprocess.run(["git", "-C", str(PROJECT), "describe", "--always", "--dirty"], capture_output=True, text=True)
    return {
        "git": git.stdout.strip() or None,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def safe_name(name: str) -> str:
    """`name` if it is a plain file name; anything that could leave its folder is an InputError."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*", name):
        raise InputError(f"{name!r} is no file name; use letters, digits, '_', '-' and '.'")
    return name


@dataclass(frozen=True)
class Run:
    """A finished run of activations, opened for reading. Nothing is loaded until it is asked for."""

    path: Path
    """The run's folder."""
    meta: dict[str, Any]
    """What meta.json holds: constants, model, data set, hook points."""
    manifest: dict[str, Any]
    """What manifest.json holds: {"rows": [{file, rows, sha256}], "hooks": {hook: [...]}, "n_rows"}."""

    @property
    def run_id(self) -> str:
        return self.path.name

    @property
    def hooks(self) -> list[str]:
        """Names of the saved hook points, in the order they were asked for."""
        return list(self.manifest["hooks"])

    @property
    def n_rows(self) -> int:
        return self.manifest["n_rows"]

    def hook(self, name: str | None = None) -> str:
        """`name` if it was saved, or the first saved hook point for None."""
        if name is not None and name not in self.hooks:
            raise InputError(f"run {self.run_id} holds {', '.join(self.hooks)}, not {name}; save it with 01_save_activations.py")
        return name or self.hooks[0]

    @cached_property
    def texts(self) -> list[dict[str, Any]]:
        """text_id -> {"text_id", "text", "split"}."""
        with open(self.path / "texts.jsonl", encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    @cached_property
    def rows(self) -> dict[str, Tensor]:
        """The columns text_id, pos, token_id, char_start, char_end over all rows, int32 [n_rows] each."""
        shards = [read_tensors(self.path / shard["file"]) for shard in self.manifest["rows"]]
        return {column: torch.cat([shard[column] for shard in shards]) for column in ROW_COLUMNS}

    @cached_property
    def is_val(self) -> Tensor:
        """bool [n_rows]: the row belongs to a validation text."""
        val_text = torch.tensor([text["split"] == "val" for text in self.texts])
        return val_text[self.rows["text_id"]]

    def shards(self, hook: str) -> list[Tensor]:
        """The hook's shards, memory-mapped, [R_i, D] each in the stored precision."""
        return [read_tensors(self.path / shard["file"])["x"] for shard in self.manifest["hooks"][hook]]

    def batches(self, hook: str, batch_rows: int = 8192, part: slice = slice(None)) -> Iterator[tuple[int, Tensor]]:
        """All rows in order, or those of a part of the shards: (number of the first row, float32 [<= batch_rows, D])."""
        shards = self.shards(hook)
        starts = [0, *accumulate(map(len, shards))]
        for start, shard in list(zip(starts, shards))[part]:
            for piece in shard.split(batch_rows):
                yield start, piece.float()
                start += len(piece)

    def select(self, hook: str, mask: Tensor) -> Tensor:
        """The rows where `mask` (bool [n_rows]) holds, float32 [n, D], in order."""
        parts = mask.split([len(shard) for shard in self.shards(hook)])
        return torch.cat([shard[part].float() for shard, part in zip(self.shards(hook), parts)])

    def stats(self, hook: str) -> dict[str, Any]:
        """Statistics of the hook's training rows: mean, covariance, scale, median_norm, max_abs, gamma ..."""
        folder = self.path / hook
        return read_json(folder / "stats.json") | read_tensors(folder / "stats.safetensors")

    def digest(self, hook: str) -> str:
        """One hash over the hook's shards: what an SAE records as the data that it was trained on."""
        digests = {entry["file"]: entry["sha256"] for entry in self.manifest["files"]}
        return fingerprint([digests[shard["file"]] for shard in self.manifest["hooks"][hook]])

    def token(self, row: int) -> str:
        """The row's piece of text, by its stored character offsets."""
        rows = self.rows
        return self.texts[int(rows["text_id"][row])]["text"][int(rows["char_start"][row]) : int(rows["char_end"][row])]


def open_run(experiment: str, run_id: str | None = None, verify: bool = False) -> Run:
    """Open a finished run; None means the one that 01_save_activations.py finished last.

    verify: also compare every file's sha256, which reads the whole run; without it only sizes are checked.
    Raises InputError if the run is missing, unfinished, of another schema, or damaged.
    """
    folder = store_root() / experiment
    if run_id is None:
        if not (folder / "run_id.txt").exists():
            raise InputError(f"there are no saved activations under {folder}; run 01_save_activations.py first")
        run_id = (folder / "run_id.txt").read_text().strip()
    path = folder / "runs" / safe_name(run_id)
    if not (path / "manifest.json").exists():
        raise InputError(f"run {run_id} is missing or unfinished; run 01_save_activations.py to finish it")
    run = Run(path, read_json(path / "meta.json"), read_json(path / "manifest.json"))
    if run.meta.get("schema_version") != SCHEMA_VERSION:
        raise InputError(f"run {run_id} has schema {run.meta.get('schema_version')}, this code reads {SCHEMA_VERSION}; save it again")
    check_files(path, run.manifest["files"], verify)
    return run


def list_files(folder: Path, names: list[str]) -> list[dict[str, Any]]:
    """The entries of a manifest for files under `folder`: name, bytes, sha256. All ranks call it, each reads its part."""
    digests = torch.zeros(len(names), 32, dtype=torch.uint8)
    for i in range(len(names))[own_part(len(names))]:
        digests[i] = torch.tensor(list(bytes.fromhex(sha256(folder / names[i]))), dtype=torch.uint8)
    add_up(digests)
    return [
        {"file": name, "bytes": (folder / name).stat().st_size, "sha256": bytes(digest).hex()} for name, digest in zip(names, digests.tolist())
    ]


def check_files(folder: Path, entries: list[dict[str, Any]], verify: bool = False) -> None:
    """Raise InputError for the first listed file that is missing, has another size or (verify) another sha256."""
    for entry in entries:
        path = folder / entry["file"]
        if not path.exists():
            raise InputError(f"{path} is missing; save the run again")
        if path.stat().st_size != entry["bytes"] or (verify and sha256(path) != entry["sha256"]):
            raise InputError(f"{path} was altered or truncated since it was written; save the run again")
