"""Where the documents of a data set lie, and which of them a limit draws. What is made of them: lib/texts.py."""
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas

from .environment import InputError, log

Documents = list[dict[str, Any]]
DRAW_SEED = 0  # the same documents for every SEED, so that all of them share cached activations
CHUNK_ROWS = 10_000  # rows of a file held in memory while some are drawn
STREAM_BUFFER = 10_000  # a hub data set is not read to its end: what is drawn comes from its first limit + this many


def from_file(path: Path, text_field: str, limit: int | None, blank_lines: bool = False) -> Documents:
    """The documents that the limit leaves of a file; a .txt file's have the field alone.

    blank_lines: those of a .csv or .tsv file are rows too.
    """
    lines = {"skip_blank_lines": not blank_lines}
    if path.suffix == ".txt":
        paragraphs = path.read_text(encoding="utf-8").split("\n\n")
        documents = [{text_field: part.strip()} for part in paragraphs if part.strip()]
        return [documents[i] for i in drawn_rows(len(documents), limit)]
    readers: dict[str, Callable[..., Any]] = {
        ".jsonl": lambda **chunks: pandas.read_json(path, lines=True, dtype=False, **chunks),
        ".json": lambda: pandas.read_json(path, dtype=False),
        ".csv": lambda **chunks: _read_csv(path, **lines, **chunks),
        ".tsv": lambda **chunks: _read_csv(path, sep="\t", quoting=3, **lines, **chunks),
        # its lists come as arrays
        ".parquet": lambda: pandas.read_parquet(path).map(lambda x: x.tolist() if isinstance(x, np.ndarray) else x),
    }
    if path.suffix not in readers:
        raise InputError(f"{path.name} has no known ending; use {', '.join(readers)} or .txt")
    read = readers[path.suffix]
    if limit is None:
        return read().to_dict("records")
    if path.suffix in (".json", ".parquet"):
        frame = read()
        return frame.iloc[drawn_rows(len(frame), limit)].to_dict("records")
    return _drawn_in_chunks(read(chunksize=CHUNK_ROWS), limit)


def _read_csv(path: Path, **settings: Any) -> Any:
    """pandas' frame of a .csv or .tsv file; with chunksize, one after the other.

    Raises InputError where the rows have more fields than the header: pandas would take the first column for the rows'
    names, and shift all others.
    """
    def checked(frame: pandas.DataFrame) -> pandas.DataFrame:
        if not isinstance(frame.index, pandas.RangeIndex):
            remedy = "quote fields that hold commas, and end no row with one"
            if path.suffix == ".tsv":  # where a quotation mark is one of the text
                remedy = "leave out the tabs within fields and at the ends of rows"
            raise InputError(f"DATASET={path} has rows with more fields than the header; {remedy}")
        return frame

    # low_memory: a column's type may change half-way
    found = pandas.read_csv(path, keep_default_na=False, low_memory=False, **settings)
    return checked(found) if isinstance(found, pandas.DataFrame) else map(checked, found)


def drawn_rows(n: int, limit: int | None) -> list[int]:
    """The rows, ascending, that a limit leaves of n: those with the smallest random keys."""
    if limit is None or n <= limit:
        return list(range(n))
    log.info("%s of %s documents drawn at random", f"{limit:,}", f"{n:,}")
    return np.sort(np.random.default_rng(DRAW_SEED).random(n).argsort(kind="stable")[:limit]).tolist()


def _drawn_in_chunks(chunks: Any, limit: int) -> Documents:
    """The documents of drawn_rows, with at most limit + CHUNK_ROWS in memory."""
    keys = np.random.default_rng(DRAW_SEED)
    kept: list[tuple[float, int, dict[str, Any]]] = []
    n = 0
    for chunk in chunks:
        kept += zip(keys.random(len(chunk)).tolist(), range(n, n + len(chunk)), chunk.to_dict("records"))
        n += len(chunk)
        kept = sorted(kept, key=lambda item: item[:2])[:limit]
    if n > limit:
        log.info("%s of %s documents drawn at random", f"{limit:,}", f"{n:,}")
    return [document for _, _, document in sorted(kept, key=lambda item: item[1])]


def from_datasets(source: str, is_local: bool, split: str, limit: int | None) -> Documents:
    """Those of a hub data set, or of a folder that datasets wrote. Raises InputError if the folder lacks the split."""
    import datasets

    datasets.disable_progress_bars()
    if is_local:
        loaded = datasets.load_from_disk(source)
        if isinstance(loaded, dict) and split not in loaded:
            raise InputError(f"DATASET={source} has no split {split!r}; it has {', '.join(loaded)}: set DATA_SPLIT "
                             "(in sae_ception TRAIN_SPLIT, VAL_SPLIT or TEST_SPLIT)")
        rows = loaded[split] if isinstance(loaded, dict) else loaded
        return [dict(rows[i]) for i in drawn_rows(len(rows), limit)]
    # Streaming reads only the documents that are asked for, not the whole data set.
    rows = datasets.load_dataset(source, split=split, streaming=limit is not None)
    return [dict(row) for row in (rows if limit is None else drawn_from_stream(rows, limit))]


def drawn_from_stream(rows: Any, limit: int) -> Any:
    """`limit` documents of a stream of unknown length, drawn from a buffer at its beginning."""
    return rows.shuffle(seed=DRAW_SEED, buffer_size=limit + STREAM_BUFFER).take(limit)
