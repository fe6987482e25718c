"""Texts in, tokens out: data sets by hub name or local file, and batches of texts of like length."""
import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .distributed import rank
from .documents import Documents, from_datasets, from_file
from .environment import InputError, first_line, log
from .files import require_file
from .models import local_path

MOST_LEFT_OUT = 0.5  # share of the rows that may have no text
LONG_TEXT, CHARS_PER_TOKEN = 4096, 64  # characters of a text tokenised at once, and more for each token wanted


def load_documents(dataset: str, split: str = "train", text_field: str = "text", limit: int | None = None) -> Documents:
    """`limit` documents drawn at random (None: all), in their order, each a dict whose `text_field` is its text.

    Those of read_documents(), but for rows without text (see has_text), which are left out and logged.
    Raises InputError as it does, and where most rows have no text.
    """
    documents = read_documents(dataset, split, text_field, limit)
    missing = [row for row, document in enumerate(documents) if not has_text(document[text_field])]
    if missing:
        first = f"row {missing[0] + 1:,} of these{_kind(documents[missing[0]][text_field])}"
        tell_left_out(dataset, text_field, first, n_missing=len(missing), n_rows=len(documents))
    for row in reversed(missing):
        del documents[row]
    return documents


def read_documents(
    dataset: str, split: str = "train", text_field: str = "text", limit: int | None = None, blank_lines: bool = False
) -> Documents:
    """`limit` documents drawn at random (None: all), in their order, each a dict with `text_field`.

    Every call draws the same ones, from all of a file, or from the first limit + 10,000 documents of a hub data set
    (its shards in random order).

    dataset: a local .jsonl, .json, .csv, .tsv, .parquet or .txt (one document a paragraph) file, a folder
    written by datasets' save_to_disk, or a hub name. split is used for folders and hub names only. blank_lines: those
    of a .csv or .tsv file are rows too.
    Raises InputError if it can't be reached, is empty, or lacks the field.
    """
    path = local_path(dataset)
    with readable(dataset):
        if path is None or path.is_dir():
            documents = from_datasets(str(path or dataset), path is not None, split, limit)
        else:
            require_file(path, remedy="set DATASET to a file of texts")
            documents = from_file(path, text_field, limit, blank_lines)
    if not documents:
        raise InputError(f"DATASET={dataset} is empty")
    require_field(dataset, documents[0], text_field)
    return documents


def has_text(value: Any) -> bool:
    """Whether a row's field holds text: not if it is null, a number, a list ..., or blank."""
    return isinstance(value, str) and bool(value.strip())


@contextmanager
def readable(dataset: str) -> Iterator[None]:
    """Turn whatever pandas, pyarrow and datasets raise for unreadable or unreachable data into one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"DATASET={dataset} can't be read ({first_line(error)}); "
                         "set a local file, or a hub name that this machine can reach") from None


def require_field(dataset: str, document: dict[str, Any], text_field: str) -> None:
    if text_field not in document:
        raise InputError(f"DATASET={dataset} has no field {text_field!r}; it has {', '.join(map(str, document))}: "
                         "set TEXT_FIELD")


def tell_left_out(dataset: str, text_field: str, first: str, *, n_missing: int, n_rows: int) -> None:
    """Log how many rows have no text. Raises InputError if they are more than MOST_LEFT_OUT."""
    what = f"{n_missing:,} of {n_rows:,} rows have no text in {text_field!r}; the first is {first}"
    if n_missing > MOST_LEFT_OUT * n_rows:
        raise InputError(f"DATASET={dataset}: {what}; set TEXT_FIELD to a column of texts, or remove those rows")
    if rank() == 0:
        log.warning("DATASET=%s: %s: they are left out", dataset, what)


def _kind(value: Any) -> str:
    if value is None or value != value:  # NaN stands for what is missing
        return ""
    if isinstance(value, str):
        return ", which is blank"
    names = {bool: "true or false", int: "a number", float: "a number", bytes: "binary"}
    return ", " + next((name for kind, name in names.items() if isinstance(value, kind)), f"a {type(value).__name__}")


class Tokens(NamedTuple):
    """One tokenised text of T tokens, special tokens included."""

    text_id: int
    ids: list[int]
    offsets: list[tuple[int, int]]
    """Character range [start, end) of each token in the text."""
    keep: list[bool]
    """False for special tokens and for positions below SKIP_FIRST: these are never stored."""


def tokenise(
    tokenizer, texts: Sequence[str], first_id: int, max_length: int, *, skip_special: bool = True, skip_first: int = 0
) -> list[Tokens]:
    """Tokenise texts numbered from first_id, cut at max_length tokens, special tokens included.

    skip_special drops BOS, EOS, padding and other control tokens from what is kept. The unknown token stands for
    real text and stays, unless it shares its id with one of them (as in GPT-2).
    """
    dropped = control_ids(tokenizer) if skip_special else set()
    return [
        Tokens(text_id, ids, offsets, [pos >= skip_first and token not in dropped for pos, token in enumerate(ids)])
        for text_id, (ids, offsets) in enumerate(_encoded(tokenizer, texts, max_length), first_id)
    ]


def _encoded(tokenizer, texts: Sequence[str], max_length: int) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Ids and character ranges of each text, cut at max_length tokens.

    Only the beginning of a long text is read: enough to hold max_length tokens in its first half, which must stay the
    same when twice as much is read.
    """

    def encode(parts: list[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        if not parts:
            return []
        found = tokenizer(parts, truncation=True, max_length=max_length, return_offsets_mapping=True)
        return list(zip(found["input_ids"], found["offset_mapping"]))

    if tokenizer.truncation_side != "right":  # the end is kept
        return encode(list(texts))
    n_chars = LONG_TEXT + CHARS_PER_TOKEN * max_length
    found = encode([text[:n_chars] for text in texts])
    for i, text in enumerate(texts):
        read = n_chars
        while read < len(text):
            (longer,) = encode([text[: 2 * read]])
            is_full = len(longer[0]) >= max_length and max(end for _, end in longer[1]) < read // 2
            if is_full and longer == found[i]:
                break
            found[i], read = longer, 2 * read
    return found


def filler_id(tokenizer) -> int:
    """The id that fills up a batch: the padding token's, or 0 without one. The mask says which tokens are real."""
    return 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def control_ids(tokenizer) -> set[int]:
    """Ids of BOS, EOS, padding and other control tokens; the unknown token is one only if it shares such an id."""
    control = (getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad", "cls", "sep", "mask"))
    return set(tokenizer.all_special_ids) - ({tokenizer.unk_token_id} - set(control))


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


def pad(batch: list[Tokens], pad_id: int) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask, int64 [B, T], padded on the right.

    There no token reads padding in any model; on the left RWKV and RecurrentGemma read it, and BART counts it.
    """
    ids = torch.full((len(batch), max(len(item.ids) for item in batch)), pad_id)
    mask = torch.zeros_like(ids)
    for row, item in enumerate(batch):
        ids[row, : len(item.ids)] = torch.tensor(item.ids, dtype=torch.long)
        mask[row, : len(item.ids)] = 1
    return ids, mask


def split_texts(n_texts: int, val_frac: float, seed: int) -> list[str]:
    """ "train" or "val" for each text: round(n * val_frac) validation texts, at least one of each, drawn by seed."""
    if n_texts < 2:
        raise InputError("at least two different texts are needed, one of them for validation; raise DATA_LIMIT")
    n_val = min(max(1, round(n_texts * val_frac)), n_texts - 1)
    chosen = set(random.Random(seed).sample(range(n_texts), n_val))
    return ["val" if i in chosen else "train" for i in range(n_texts)]


def split_by_text(texts: Sequence[str], val_frac: float, seed: int) -> list[str]:
    """split_texts() of the different texts: one that occurs twice stands on one side, so training sees none of the
    validation texts.
    """
    digests = np.fromiter((int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest())
                           for text in texts), np.uint64, len(texts))
    _, first, which = np.unique(digests, return_index=True, return_inverse=True)
    if len(first) < len(texts):
        log.info("%s of %s texts occur before: each is split as the first of its kind", f"{len(texts) - len(first):,}",
                 f"{len(texts):,}")
    splits = split_texts(len(first), val_frac, seed)
    in_order = first.argsort().argsort()  # the n-th different text has number n, as without repetitions
    return [splits[i] for i in in_order[which].tolist()]
