"""Documents in, tokens out: data sets by hub name or local file, and batches of like length."""
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas
import torch
from torch import Tensor

from .distributed import rank
from .environment import InputError, first_line, log
from .files import require_file
from .models import local_path

Documents = list[dict[str, Any]]
MOST_LEFT_OUT = 0.5  # share of the rows that may have no text
DRAW_SEED = 0  # of the documents that a limit leaves: the same ones for every SEED, so that cached activations serve
               # all
CHUNK_ROWS = 10_000  # rows of a file in memory at one time while some are drawn
STREAM_BUFFER = 10_000  # a hub data set is not read to its end: what is drawn comes from so many documents more than
                        # asked for
LONG_TEXT, CHARS_PER_TOKEN = 4096, 64  # characters of a text that are tokenised at once, and more for each token wanted


def load_documents(dataset: str, split: str = "train", text_field: str = "text", limit: int | None = None) -> Documents:
    """`limit` documents drawn at random (None: all), in their order, each a dict whose `text_field` is its text.

    The draw is the same at every call: a file that is sorted by anything gives a fair sample, not its head. Of a hub
    data set it is made from the first limit + 10,000 documents (and its shards in random order), as in lib.streaming.

    dataset: a local .jsonl, .json, .csv, .tsv, .parquet or .txt (one document a paragraph) file, a folder
    written by datasets' save_to_disk, or a hub name. split is used for folders and hub names only.
    Rows whose field is no text (null, a number, a list ...) are left out, and told in one line.
    Raises InputError if it can't be reached, is empty, lacks the field, or has no text in most rows.
    """
    path = local_path(dataset)
    if path is not None and not path.is_dir():
        require_file(path, remedy="set DATASET to a file of texts")
    try:
        if path is None or path.is_dir():
            documents = _from_datasets(str(path or dataset), path is not None, split, limit)
        else:
            documents = _from_file(path, text_field, limit)
    except InputError:
        raise
    except Exception as error:  # pandas, pyarrow and datasets raise many kinds for unreadable input
        raise InputError(f"DATASET={dataset} can't be read ({first_line(error)}); "
                         "set a local file, or a hub name that this machine can reach") from None
    if not documents:
        raise InputError(f"DATASET={dataset} is empty")
    if text_field not in documents[0]:
        raise InputError(f"DATASET={dataset} has no field {text_field!r}; it has {', '.join(map(str, documents[0]))}: "
                         "set TEXT_FIELD")
    missing = [row for row, document in enumerate(documents) if not isinstance(document[text_field], str)]
    if missing:
        tell_left_out(dataset, text_field, len(documents), len(missing), missing[0] + 1,
                      documents[missing[0]][text_field])
    for row in reversed(missing):
        del documents[row]
    return documents


def tell_left_out(dataset: str, text_field: str, n_rows: int, n_missing: int, first: int, example: Any = None) -> None:
    """Say how many rows have no text, the first of them counted from 1. Raises InputError if they are more than
    MOST_LEFT_OUT.
    """
    what = f"{n_missing:,} of {n_rows:,} rows have no text in {text_field!r}; the first is row {first:,} of these"
    if example is not None and example == example:  # NaN stands for what is missing
        what += f", {_kind(example)}"
    if n_missing > MOST_LEFT_OUT * n_rows:
        raise InputError(f"DATASET={dataset}: {what}; set TEXT_FIELD to a column of texts, or remove those rows")
    if rank() == 0:
        log.warning("DATASET=%s: %s: they are left out", dataset, what)


def _kind(value: Any) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", bytes: "binary"}
    return next((name for kind, name in names.items() if isinstance(value, kind)), f"a {type(value).__name__}")


def _from_file(path, text_field: str, limit: int | None) -> Documents:
    if path.suffix == ".txt":
        paragraphs = (part.strip() for part in path.read_text(encoding="utf-8").split("\n\n"))
        documents = [{text_field: part} for part in paragraphs if part]
        return [documents[i] for i in drawn_rows(len(documents), limit)]
    # else a column's type may change from one part of a large file to the next
    csv = {"keep_default_na": False, "low_memory": False}
    readers: dict[str, Callable[..., Any]] = {
        ".jsonl": lambda **chunks: pandas.read_json(path, lines=True, dtype=False, **chunks),
        ".json": lambda: pandas.read_json(path, dtype=False),
        ".csv": lambda **chunks: pandas.read_csv(path, **csv, **chunks),
        ".tsv": lambda **chunks: pandas.read_csv(path, sep="\t", quoting=3, **csv, **chunks),
        ".parquet": lambda: pandas.read_parquet(path).map(_plain),
    }
    if path.suffix not in readers:
        raise InputError(f"{path.name} has no known ending; use {', '.join(readers)} or .txt")
    read = readers[path.suffix]
    if limit is None:
        return read().to_dict("records")
    if path.suffix in (".json", ".parquet"):
        frame = read()
        return frame.iloc[drawn_rows(len(frame), limit)].to_dict("records")
    return _drawn_from(read(chunksize=CHUNK_ROWS), limit)


def drawn_rows(n: int, limit: int | None) -> list[int]:
    """The rows, ascending, that a limit leaves of n: those with the smallest random keys, so that parts can be drawn
    one by one.
    """
    if limit is None or n <= limit:
        return list(range(n))
    log.info("%s of %s documents drawn at random", f"{limit:,}", f"{n:,}")
    return np.sort(np.random.default_rng(DRAW_SEED).random(n).argsort(kind="stable")[:limit]).tolist()


def _drawn_from(chunks: Any, limit: int) -> Documents:
    """The documents of drawn_rows, with at most limit + CHUNK_ROWS of them in memory."""
    keys = np.random.default_rng(DRAW_SEED)
    kept: list[tuple[float, int, dict[str, Any]]] = []
    n = 0
    for chunk in chunks:
        of_rows = keys.random(len(chunk))
        kept += [(key, n + i, document)
                 for i, (key, document) in enumerate(zip(of_rows.tolist(), chunk.to_dict("records")))]
        n += len(chunk)
        kept = sorted(kept, key=lambda item: item[:2])[:limit]
    if n > limit:
        log.info("%s of %s documents drawn at random", f"{limit:,}", f"{n:,}")
    return [document for _, _, document in sorted(kept, key=lambda item: item[1])]


def _plain(value: Any) -> Any:
    """Parquet's lists come as arrays."""
    return value.tolist() if isinstance(value, np.ndarray) else value


def _from_datasets(source: str, is_local: bool, split: str, limit: int | None) -> Documents:
    import datasets

    datasets.disable_progress_bars()
    if is_local:
        loaded = datasets.load_from_disk(source)
        rows = loaded[split] if isinstance(loaded, dict) else loaded
        return [dict(rows[i]) for i in drawn_rows(len(rows), limit)]
    # Streaming reads only the documents that are asked for, not the whole data set.
    rows = datasets.load_dataset(source, split=split, streaming=limit is not None)
    return [dict(row) for row in (rows if limit is None else drawn_from_stream(rows, limit))]


def drawn_from_stream(rows: Any, limit: int) -> Any:
    """`limit` documents of a stream of datasets, drawn from a buffer: its length is not known before its end."""
    return rows.shuffle(seed=DRAW_SEED, buffer_size=limit + STREAM_BUFFER).take(limit)


class Tokens(NamedTuple):
    """One tokenised text of T tokens, special tokens included."""

    text_id: int
    ids: list[int]
    offsets: list[tuple[int, int]]
    """Character range [start, end) of each token in the text."""
    keep: list[bool]
    """False for special tokens and for positions below SKIP_FIRST: these are never stored."""


def tokenise(
    tokenizer, texts: Sequence[str], first_id: int, max_length: int, skip_special: bool = True, skip_first: int = 0
) -> list[Tokens]:
    """Tokenise texts numbered from first_id, cut at max_length tokens, special tokens included.

    skip_special drops BOS, EOS, padding and other control tokens from what is kept; the unknown token stands for
    real text and stays, unless it shares its id with one of them (as in GPT-2).
    """
    encoded = _encoded(tokenizer, texts, max_length)
    dropped = control_ids(tokenizer) if skip_special else set()
    return [
        Tokens(first_id + i, ids, offsets,
               [pos >= skip_first and token not in dropped for pos, token in enumerate(ids)])
        for i, (ids, offsets) in enumerate(encoded)
    ]


def _encoded(tokenizer, texts: Sequence[str], max_length: int) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Ids and character ranges of each text, cut at max_length tokens.

    Of a long text only the beginning is read: as much as gives max_length tokens in its first half, and the same ones
    when twice as much is read.
    """

    def encode(parts: list[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        if not parts:
            return []
        found = tokenizer(parts, truncation=True, max_length=max_length, return_offsets_mapping=True)
        return list(zip(found["input_ids"], found["offset_mapping"]))

    n_chars = LONG_TEXT + CHARS_PER_TOKEN * max_length
    whole = tokenizer.truncation_side != "right"  # the end is wanted
    found = encode([text if whole else text[:n_chars] for text in texts])
    for i, text in enumerate(texts):
        read = n_chars
        while not whole and read < len(text):
            (longer,) = encode([text[: 2 * read]])
            is_full = len(longer[0]) >= max_length and max(end for _, end in longer[1]) < read // 2
            if is_full and longer == found[i]:
                break
            found[i], read = longer, 2 * read
    return found


def filler_id(tokenizer) -> int:
    """The id that fills batches up: padding's, or 0 where there is none; which tokens are real is told by the mask."""
    return 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def control_ids(tokenizer) -> set[int]:
    """Ids of BOS, EOS, padding and other control tokens, without an unknown token of its own."""
    unknown = {tokenizer.unk_token_id} - {
        tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.cls_token_id,
        tokenizer.sep_token_id, tokenizer.mask_token_id
    }
    return set(tokenizer.all_special_ids) - unknown


def length_batches(tokens: list[Tokens], max_tokens: int) -> Iterator[list[Tokens]]:
    """Batches of texts of like length, each of at most max_tokens with its padding (at least one text)."""
    batch: list[Tokens] = []
    for item in sorted(tokens, key=lambda item: (len(item.ids), item.text_id)):
        if batch and len(item.ids) * (len(batch) + 1) > max_tokens:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def pad(batch: list[Tokens], pad_id: int, side: str = "right") -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask, int64 [B, T], padded on the given side.

    On the right no token reads padding in any model; on the left RWKV and RecurrentGemma do, and BART counts it.
    """
    length = max(len(item.ids) for item in batch)
    ids = torch.full((len(batch), length), pad_id)
    mask = torch.zeros(len(batch), length, dtype=torch.long)
    for row, item in enumerate(batch):
        n = len(item.ids)
        where = slice(0, n) if side == "right" else slice(length - n, length)
        ids[row, where] = torch.tensor(item.ids, dtype=torch.long)
        mask[row, where] = 1
    return ids, mask


def split_texts(n_texts: int, val_frac: float, seed: int) -> list[str]:
    """ "train" or "val" for each text: round(n * val_frac) validation texts, at least one of each, drawn by seed."""
    if n_texts < 2:
        raise InputError("at least two texts are needed, one of them for validation; raise DATA_LIMIT")
    n_val = min(max(1, round(n_texts * val_frac)), n_texts - 1)
    chosen = set(random.Random(seed).sample(range(n_texts), n_val))
    return ["val" if i in chosen else "train" for i in range(n_texts)]
