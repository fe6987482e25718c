"""Texts that are more than memory holds: copied from a stream to a file once, and read from there by number.

    texts = stream_texts("HuggingFaceFW/fineweb", "train", "text", 10_000_000, folder / "texts.jsonl")
    texts[5], texts[512:1024], len(texts)

The copy is a thousandth of the activations that it will give, so that the store, not the data set, has to fit the disk.
"""
import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow.parquet
from tqdm.auto import tqdm

from .distributed import rank, wait_for_all
from .environment import InputError, first_line, log
from .files import atomic_write
from .models import local_path
from .texts import drawn_from_stream, drawn_rows, tell_left_out

COPY_TEXTS = 1000  # documents that are written together


class TextFile(Sequence[str]):
    """The strings of a file with one JSON value a line; in memory is only where each begins. Other values are left
    out.
    """

    def __init__(self, path: Path):
        self.path, self.starts, self.n_lines = path, array("q"), 0
        self.left_out = 0  # number of the first line without a string, from 1; 0: there is none
        with open(path, "rb") as file:
            at = 0
            for self.n_lines, line in enumerate(file, 1):
                if line.startswith(b'"'):
                    self.starts.append(at)
                else:
                    self.left_out = self.left_out or self.n_lines
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


def stream_texts(dataset: str, split: str, text_field: str, limit: int | None, path: Path) -> TextFile:
    """The texts of `limit` documents (None: all), drawn as load_documents draws them, copied to `path` a block at a
    time if they are not there yet.

    dataset: a hub name, or a local .jsonl or .parquet file. A copy that was interrupted goes on where it was.
    Of several ranks the first one copies. Raises InputError if the data can't be reached or read, or lacks the field.
    """
    if rank() == 0 and not path.exists():
        try:
            _copy(_drawn(dataset, _open_stream(dataset, split), limit), dataset, text_field, limit, path)
        except (InputError, KeyboardInterrupt):
            raise
        except Exception as error:  # datasets raises many kinds for what can't be reached or read
            raise InputError(f"DATASET={dataset} can't be streamed ({first_line(error)}); "
                             "set a local file, or a hub name that this machine can reach") from None
    wait_for_all()
    texts = TextFile(path)
    if not texts.n_lines:
        raise InputError(f"DATASET={dataset} is empty")
    if texts.left_out:
        tell_left_out(dataset, text_field, texts.n_lines, texts.n_lines - len(texts), texts.left_out)
    return texts


def _open_stream(dataset: str, split: str) -> Any:
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
    """The documents that the limit leaves: of a file, whose length can be known, the very ones that load_documents
    draws.
    """
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


def _copy(documents: Any, dataset: str, text_field: str, limit: int | None, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    done = _whole_lines(part)
    if done:
        log.info("continuing after document %s of the stream", f"{done:,}")
    documents = documents.skip(done) if hasattr(documents, "skip") else islice(documents, done, None)
    with open(part, "a", encoding="utf-8") as file:
        lines = []
        for document in tqdm(documents, initial=done, total=limit, unit="text", desc="copying the texts"):
            if text_field not in document:
                raise InputError(f"DATASET={dataset} has no field {text_field!r}; it has "
                                 f"{', '.join(map(str, document))}: set TEXT_FIELD")
            lines.append(json.dumps(document[text_field] if isinstance(document[text_field], str) else None) + "\n")
            if len(lines) == COPY_TEXTS:
                file.writelines(lines)
                lines.clear()
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def _whole_lines(path: Path) -> int:
    """How many lines of an unfinished copy are whole; the rest of one that is not is cut off."""
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


def write_texts(path: Path, texts: Sequence[str], splits: list[str]) -> None:
    """Write a run's texts.jsonl, a line at a time."""

    def lines() -> Iterator[str]:
        for i, (text, split) in enumerate(zip(texts, splits)):
            yield json.dumps({"text_id": i, "text": text, "split": split}, ensure_ascii=False) + "\n"

    def write(temporary: Path) -> None:
        with open(temporary, "w", encoding="utf-8") as file:
            file.writelines(lines())

    atomic_write(path, write)
