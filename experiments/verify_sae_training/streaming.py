"""Texts that don't fit into memory: copied once from a stream to a file, then read from it by number.

    texts = copy_of("HuggingFaceFW/fineweb", limit=10_000_000)            # a file of the store, named for its content
    texts = stream_texts("HuggingFaceFW/fineweb", folder / "texts.jsonl", limit=10_000_000)
    texts[5], texts[512:1024], len(texts)

The copy takes about a thousandth of the room that the activations will take.
"""
import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow.parquet
from tqdm.auto import tqdm

from lib.distributed import LOADING, beat, rank, wait_for_all
from lib.documents import drawn_from_stream, drawn_rows
from lib.environment import InputError, log
from lib.files import fingerprint
from lib.models import local_path
from lib.outputs import in_use
from lib.store import experiment_dir
from lib.texts import has_text, readable, require_field, tell_left_out

COPY_TEXTS = 1000  # documents written together


class TextFile(Sequence[str]):
    """The strings of a file with one JSON value a line; other values are left out. Memory holds only their offsets."""

    def __init__(self, path: Path):
        self.path, self.starts, self.n_lines = path, array("q"), 0
        self.first_left_out = 0  # number of the first line without a string, from 1; 0: there is none
        with open(path, "rb") as file:
            at = 0
            for self.n_lines, line in enumerate(file, 1):
                if line.startswith(b'"'):
                    self.starts.append(at)
                else:
                    self.first_left_out = self.first_left_out or self.n_lines
                at += len(line)

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, which: int) -> str: ...
    @overload
    def __getitem__(self, which: slice) -> list[str]: ...
    def __getitem__(self, which):
        with open(self.path, "rb") as file:
            if isinstance(which, slice):
                return [self._at(file, start) for start in self.starts[which]]
            return self._at(file, self.starts[which])

    @staticmethod
    def _at(file, start: int) -> str:
        file.seek(start)
        return json.loads(file.readline())


def copy_of(dataset: str, split: str = "train", text_field: str = "text", limit: int | None = None) -> TextFile:
    """stream_texts() into a file of the store, by which a later call finds them."""
    folder, path = experiment_dir("verify_sae_training") / "texts", local_path(dataset)
    version = [path.stat().st_size, path.stat().st_mtime] if path else None
    key = fingerprint([dataset, version, split, text_field, limit])
    with in_use(folder):
        return stream_texts(dataset, folder / f"{key}.jsonl", split=split, text_field=text_field, limit=limit)


def stream_texts(
    dataset: str, copy: Path, *, split: str = "train", text_field: str = "text", limit: int | None = None
) -> TextFile:
    """The texts that load_documents draws, read from `copy`, which is written first if it is missing.

    dataset: a hub name, or a local .jsonl or .parquet file. An interrupted copy is resumed. With several ranks, only
    rank 0 copies. Raises InputError if the data can't be reached or read, or lacks the field.
    """
    if rank() == 0 and not copy.exists():
        with readable(dataset):
            _copy(_drawn(dataset, open_stream(dataset, split), limit), copy, dataset, text_field, total=limit)
    wait_for_all()
    texts = TextFile(copy)
    if not texts.n_lines:
        raise InputError(f"DATASET={dataset} is empty")
    if texts.first_left_out:
        tell_left_out(dataset, text_field, f"row {texts.first_left_out:,} of these",
                      n_missing=texts.n_lines - len(texts), n_rows=texts.n_lines)
    return texts


def open_stream(dataset: str, split: str) -> Any:
    """The documents one by one, as they arrive."""
    import datasets

    datasets.disable_progress_bars()
    path = local_path(dataset)
    if path is None:
        return datasets.load_dataset(dataset, split=split, streaming=True)
    kinds = {".jsonl": "json", ".parquet": "parquet"}
    if path.suffix not in kinds:
        raise InputError(f"STREAM reads .jsonl and .parquet files and the hub; set STREAM=False for {path.name}")
    return datasets.load_dataset(kinds[path.suffix], data_files=str(path), split="train", streaming=True)


def _drawn(dataset: str, stream: Any, limit: int | None) -> Any:
    """The documents that the limit leaves: from a file, whose length is known, exactly those of load_documents."""
    path = local_path(dataset)
    if limit is None:
        return stream
    if path is None:
        return drawn_from_stream(stream, limit)
    if path.suffix == ".parquet":
        n = pyarrow.parquet.read_metadata(path).num_rows
    else:
        with open(path, "rb") as file:
            n = sum(1 for line in file if line.strip())
    wanted = np.zeros(n, dtype=bool)
    wanted[drawn_rows(n, limit)] = True
    return (document for document, keep in zip(stream, wanted) if keep)


def _copy(documents: Any, copy: Path, dataset: str, text_field: str, *, total: int | None) -> None:
    copy.parent.mkdir(parents=True, exist_ok=True)
    part = copy.with_name(copy.name + ".part")
    done = _whole_lines(part)
    if done:
        log.info("resuming after document %s of the stream", f"{done:,}")
    beat(LOADING)  # nothing is heard while documents are skipped
    documents = documents.skip(done) if hasattr(documents, "skip") else islice(documents, done, None)
    with open(part, "a", encoding="utf-8") as file:
        lines = []
        for document in tqdm(documents, initial=done, total=total, unit="text", desc="copying the texts"):
            require_field(dataset, document, text_field)
            lines.append(json.dumps(document[text_field] if has_text(document[text_field]) else None) + "\n")
            if len(lines) == COPY_TEXTS:
                file.writelines(lines)
                lines.clear()
                beat()
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, copy)


def _whole_lines(path: Path) -> int:
    """How many whole lines an unfinished copy holds; a broken last line is cut off."""
    if not path.exists():
        return 0
    count = end = 0
    with open(path, "rb+") as file:
        for line in file:
            if line.endswith(b"\n"):
                count, end = count + 1, end + len(line)
        file.truncate(end)
    return count


def fingerprint_texts(texts: Iterable[str]) -> str:
    """lib.files.fingerprint of the list of texts, without the list."""
    digest = hashlib.sha256(b"[")
    for i, text in enumerate(texts):
        digest.update(((", " if i else "") + json.dumps(text)).encode())
    digest.update(b"]")
    return digest.hexdigest()[:16]
