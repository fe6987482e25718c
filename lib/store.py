"""Where outputs lie, and runs of activations, read back. How files are written: lib/files.py.

A run is a folder `store/<experiment>/runs/<run_id>/`:

    meta.json                            constants, model, data set, hook points, mask rules, versions
    texts.jsonl                          {"text_id", "text", "split": "train" | "val"}, one per line
    rows/shard_00000.safetensors         text_id, pos, token_id, char_start, char_end : int32 [R]
    <hook>/shard_00000.safetensors       x : [R, D]
    <hook>/stats.safetensors, stats.json mean [D] and covariance [D, D]; scale, norms, gamma (lib/summaries.py)
    manifest.json                        every file with its rows and sha256; written last: it marks the run as finished

Row r of a hook's shard i is row r of rows/shard i, so row -> token -> text needs no language model.
"""
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .environment import INSTALLED, PROJECT, InputError
from .files import fingerprint, read_bytes, read_json, read_lines, read_tensors
from .outputs import check_files, safe_name, why_no_run
from .schemas import CONSTANTS, COUNT, FILES, NAME, PATH, POSITIVE, POSITIVE_NUMBER, SHORT_HASH, Number, Schema

SCHEMA_VERSION = 1
ROW_COLUMNS = ("text_id", "pos", "token_id", "char_start", "char_end")
SHARDS = [{"file": PATH, "rows": POSITIVE}]
RUN_AGAIN = "delete the run's folder and run 01_save_activations.py again"
MANIFEST = Schema({"rows": SHARDS, "hooks": {NAME: SHARDS}, "n_rows": POSITIVE, "files": FILES}, sealed=True,
                  remedy=RUN_AGAIN)
SETTINGS = {
    "max_length": POSITIVE, "batch_tokens": POSITIVE, "store_dtype": ("float32", "bfloat16", "float16"),
    "shard_rows": POSITIVE, "skip_special": bool, "skip_first": COUNT,
    "max_norm_multiple": (float, None),
}
HOOK = {"path": str, "point": ("input", "output"), "signature": NAME, "names?": [str]}
META = Schema({
    "schema_version": int, "settings": SETTINGS, "n_texts": POSITIVE,
    "hooks": [HOOK],
    "model?": {"name": str, "path?": (str, None), "class?": str, "dtype?": str, "weights?": SHORT_HASH},
    "tokenizer?": (str, {"class": str, "fingerprint": SHORT_HASH}),
    "dataset?": {"name": str, "path?": (str, None), "limit?": (POSITIVE, None)}, "constants?": CONSTANTS,
}, remedy=RUN_AGAIN)
RUN_TEXT = {"text_id": COUNT, "text": str, "split": ("train", "val")}
STATS = Schema({"scale": POSITIVE_NUMBER, "median_norm": float, "max_abs": float, "gamma": Number(float, 0),
                "n_outliers": COUNT, "n_rows": POSITIVE, "n_covariance_rows?": POSITIVE}, remedy=RUN_AGAIN)
SHARD_NOTE = [COUNT, COUNT]  # block of texts of the shard's first row, rows before that block


def store_root() -> Path:
    """The folder of all outputs: the environment's STORE_DIR, else store/ in the checkout or, installed, where it runs.

    Raises InputError for a STORE_DIR in the home of an unknown user.
    """
    path = os.path.expanduser(os.environ.get("STORE_DIR") or PROJECT / "store")
    if str(path).startswith("~"):
        raise InputError(f"STORE_DIR={path} is in the home folder of an unknown user; set it to another folder")
    return Path(path)


def experiment_dir(experiment: str) -> Path:
    """store/<experiment>; the first file written there creates it."""
    return store_root() / experiment


def provenance() -> dict[str, Any]:
    """What an output records of its making: versions (None: not installed) and code revision (None without git).

    It holds no time, so that equal runs give equal bytes.
    """
    packages = ("torch", "transformers", "datasets", "overcomplete", "numpy", "scikit-learn")
    return {
        "git": None if INSTALLED else _revision(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": {name: _version(name) for name in packages},
    }


def _revision() -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(PROJECT), "describe", "--always", "--dirty"], capture_output=True,
                              text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@dataclass(frozen=True)
class Run:
    """A finished run of activations, opened for reading. Data is loaded when it is first used."""

    path: Path
    """The run's folder."""
    meta: dict[str, Any]
    """Content of meta.json: constants, model, data set, hook points."""
    manifest: dict[str, Any]
    """Content of manifest.json: {"rows": [{file, rows, sha256}], "hooks": {hook: [...]}, "n_rows"}."""

    @property
    def run_id(self) -> str:
        return self.path.name

    @property
    def hooks(self) -> list[str]:
        """Names of the saved hook points, in the order in which step 1 was given them."""
        return list(self.manifest["hooks"])

    @property
    def n_rows(self) -> int:
        return self.manifest["n_rows"]

    def hook(self, name: str | None = None) -> str:
        """The saved hook point called `name`, in any spelling that step 1 accepts; None means the first one."""
        if name is None:
            return self.hooks[0]
        known: dict[str, str] = {}
        for hook in self.meta["hooks"]:
            places = [f"{hook['path']}:{hook['point']}", f"{hook['signature']}:{hook['point']}", hook["path"]]
            for spelling in [hook["signature"], *hook.get("names", []), *places]:
                known.setdefault(spelling, hook["signature"])
        if name not in known:
            saved = ", ".join(map(self.short_name, self.hooks))
            raise InputError(f"run {self.run_id} holds {saved}, not {name}; save it with 01_save_activations.py")
        return known[name]

    def short_name(self, hook: str) -> str:
        """The shortest spelling of a saved hook point, as step 1 takes it: resid_post:3."""
        names = next(point.get("names", []) for point in self.meta["hooks"] if point["signature"] == self.hook(hook))
        return next(iter(names), self.hook(hook))

    @cached_property
    def texts(self) -> list[dict[str, Any]]:
        """text_id -> {"text_id", "text", "split"}."""
        return list(self._read_texts())

    def _read_texts(self) -> Iterator[dict[str, Any]]:
        """The lines of texts.jsonl one by one: together they may not fit into memory."""
        path, count = self.path / "texts.jsonl", 0
        for count, found in enumerate(read_lines(path, RUN_TEXT, RUN_AGAIN), 1):
            if found["text_id"] != count - 1:
                raise InputError(f"{path} is damaged: line {count} holds text {found['text_id']}; {RUN_AGAIN}")
            yield found
        if count != self.meta["n_texts"]:
            raise InputError(f"{path} has {count} texts, meta.json says {self.meta['n_texts']}; {RUN_AGAIN}")

    def _row_shards(self) -> Iterator[dict[str, Tensor]]:
        for shard in self.manifest["rows"]:
            columns = read_tensors(self.path / shard["file"], dict.fromkeys(ROW_COLUMNS, "int32 R"), R=shard["rows"])
            text_id = columns["text_id"]
            if int(text_id.min()) < 0 or int(text_id.max()) >= self.meta["n_texts"]:
                raise InputError(f"{self.path / shard['file']} is damaged: it names a text that the run lacks; "
                                 f"{RUN_AGAIN}")
            yield columns

    @cached_property
    def rows(self) -> dict[str, Tensor]:
        """The columns text_id, pos, token_id, char_start, char_end over all rows, int32 [n_rows] each."""
        shards = list(self._row_shards())
        rows = {column: torch.cat([shard[column] for shard in shards]) for column in ROW_COLUMNS}
        length = torch.tensor([len(text["text"]) for text in self.texts])[rows["text_id"]]
        if ((rows["char_start"] < 0).any() or (rows["char_start"] > rows["char_end"]).any()
            or (rows["char_end"] > length).any() or (rows["pos"] < 0).any()):
            raise InputError(f"{self.path / 'rows'} is damaged: a token lies outside its text; {RUN_AGAIN}")
        return rows

    @cached_property
    def is_val(self) -> Tensor:
        """Whether each row belongs to a validation text, bool [n_rows]."""
        val_text = torch.tensor([text["split"] == "val" for text in self._read_texts()])
        found = torch.empty(self.n_rows, dtype=torch.bool)  # one for all: many small masks took nine times its memory
        for part, shard in zip(found.split([shard["rows"] for shard in self.manifest["rows"]]), self._row_shards()):
            part.copy_(val_text[shard["text_id"]])
        return found

    @property
    def first_position(self) -> int:
        """The lowest position of a stored token in its text (of the first shard); special tokens count."""
        return int(next(self._row_shards())["pos"].min())

    def shards(self, hook: str) -> list[Tensor]:
        """The hook's shards, memory-mapped, [R_i, D] each in the stored precision."""
        found: list[Tensor] = []
        for shard in self.manifest["hooks"][self.hook(hook)]:
            width = {"D": found[0].shape[1]} if found else {}
            found.append(read_tensors(self.path / shard["file"], {"x": "float R D"}, False, R=shard["rows"],
                                      **width)["x"])
        return found

    def stats(self, hook: str) -> dict[str, Any]:
        """Statistics of the hook's training rows: mean, covariance, scale, median_norm, max_abs, gamma ..."""
        folder, width = self.path / hook, self.shards(hook)[0].shape[1]
        tensors = read_tensors(folder / "stats.safetensors", {"mean": "float32 D", "covariance": "float32 D D"},
                               finite=True, D=width)
        return read_json(folder / "stats.json", STATS) | tensors

    def digest(self, hook: str) -> str:
        """One hash over the hook's shards, by which an SAE names the activations that it was trained on."""
        digests = {entry["file"]: entry["sha256"] for entry in self.manifest["files"]}
        return fingerprint([digests[shard["file"]] for shard in self.manifest["hooks"][self.hook(hook)]])


def open_run(experiment: str, run_id: str | None = None, verify: bool = False) -> Run:
    """Open a finished run; None means the one that 01_save_activations.py finished last.

    verify: compare the checksums of all files, not only of small ones; this reads the whole run.
    Raises InputError if the run is missing, unfinished, of another schema, or damaged.
    """
    folder = store_root() / experiment
    if run_id is None:
        if not (folder / "run_id.txt").exists():
            raise InputError(f"there are no saved activations under {folder}; run 01_save_activations.py first")
        run_id = read_bytes(folder / "run_id.txt", 1000).decode(errors="replace").strip()
    path = folder / "runs" / safe_name(run_id)
    if not (path / "manifest.json").exists():
        raise InputError(why_no_run(path))
    run = Run(path, read_json(path / "meta.json", META), read_json(path / "manifest.json", MANIFEST))
    if run.meta["schema_version"] != SCHEMA_VERSION:
        raise InputError(f"run {run_id} has schema {run.meta['schema_version']}, this code reads {SCHEMA_VERSION}; "
                         "save it again")
    _check_manifest(run)
    check_files(path, run.manifest["files"], verify)
    return run


def _check_manifest(run: Run) -> None:
    """Raise InputError if the manifest's rows, hooks and listed files contradict each other."""
    manifest, stated = run.manifest, {entry["file"] for entry in run.manifest["files"]}
    sizes = [shard["rows"] for shard in manifest["rows"]]
    needed = {"meta.json", "texts.jsonl",
              *(f"{hook}/stats.{ending}" for hook in manifest["hooks"] for ending in ("json", "safetensors"))}
    needed |= {shard["file"] for shards in (manifest["rows"], *manifest["hooks"].values()) for shard in shards}
    same = all([shard["rows"] for shard in shards] == sizes for shards in manifest["hooks"].values())
    if not manifest["hooks"] or not needed <= stated or not same or sum(sizes) != manifest["n_rows"]:
        raise InputError(f"{run.path / 'manifest.json'} is damaged: its files and rows don't fit together; {RUN_AGAIN}")
