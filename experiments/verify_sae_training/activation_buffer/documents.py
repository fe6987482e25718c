"""The texts of a data set in an order without end, in which each has a number: what a running model reads.

    documents = open_documents("HuggingFaceFW/fineweb")       # a stream; a local file is read in random order
    texts = documents.texts_from(120_000, seed=0)             # the text with that number, the next ...

A data set that ends is read again.
"""
from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from streaming import TextFile, copy_of, fingerprint_texts, open_stream

from lib.documents import STREAM_BUFFER
from lib.environment import InputError, log
from lib.files import sha256
from lib.models import local_path
from lib.texts import has_text, load_documents, readable, require_field

ORDER_CHUNK = 10_000  # numbers of texts held as Python's


class Shuffled:
    """Texts that can be read by number, in an order that the seed draws anew for each pass."""

    def __init__(self, texts: Sequence[str]):
        self.texts = texts
        self.n_texts: int | None = len(texts)

    @cached_property
    def version(self) -> str:
        """A word that any other text would change."""
        if isinstance(self.texts, TextFile):
            return sha256(self.texts.path)
        return fingerprint_texts(self.texts)

    def texts_from(self, first: int, seed: int) -> Iterator[str | None]:
        number, at = divmod(first, len(self.texts))
        while True:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
            for chunk in torch.randperm(len(self.texts), generator=generator)[at:].split(ORDER_CHUNK):
                yield from (self.texts[i] for i in chunk.tolist())
            number, at = number + 1, 0


class Stream:
    """A data set of the hub, read while it arrives: its shards in random order, documents from a shuffle buffer."""

    version = ""  # nobody knows before it is read
    n_texts: int | None = None

    def __init__(self, dataset: str, split: str, text_field: str):
        self.dataset, self.text_field = dataset, text_field
        with readable(dataset):
            self.documents = open_stream(dataset, split)

    def texts_from(self, first: int, seed: int) -> Iterator[str | None]:
        """None stands for a document without text: it keeps its number."""
        at, documents = first, self.documents.shuffle(seed=seed, buffer_size=STREAM_BUFFER)
        while True:
            n = 0
            with readable(self.dataset):
                for document in documents.skip(at) if at else documents:
                    require_field(self.dataset, document, self.text_field)
                    yield document[self.text_field] if has_text(document[self.text_field]) else None
                    n += 1
                # A resumed pass may begin beyond the end of the first one.
                length = at + n if n else sum(1 for _ in documents)
            if not length:
                raise InputError(f"DATASET={self.dataset} is empty")
            log.info("DATASET=%s ends after %s documents: it is read again from its beginning", self.dataset,
                     f"{length:,}")
            at = 0 if n else at % length


def open_documents(dataset: str, split: str = "train", text_field: str = "text") -> Shuffled | Stream:
    """A data set's texts: of the hub as they arrive; .jsonl and .parquet files from a copy in the store, of which
    memory holds the lines' places; any other file whole.

    Raises InputError if it can't be reached or read.
    """
    path = local_path(dataset)
    if path is None:
        return Stream(dataset, split, text_field)
    if path.suffix in (".jsonl", ".parquet"):
        return Shuffled(copy_of(dataset, split, text_field))
    return Shuffled([document[text_field] for document in load_documents(dataset, split, text_field)])
