"""The texts of a data set in an order without end, in which each has a number: what a running model reads.

    documents = open_documents("HuggingFaceFW/fineweb", seed=0)       # a stream; a local file is read in random order
    texts = documents.texts_from(120_000)                             # the text with that number, the next ...

A data set that ends is read again.
"""
from collections.abc import Iterator, Sequence

import torch
from streaming import copy_of, open_stream

from lib.environment import InputError, log
from lib.models import local_path
from lib.texts import STREAM_BUFFER, load_documents, readable, require_field

ORDER_CHUNK = 10_000  # numbers of texts held as Python's


class Shuffled:
    """Texts that can be read by number, in an order that the seed draws anew for each pass."""

    def __init__(self, texts: Sequence[str], seed: int):
        self.texts, self.seed = texts, seed
        self.n_texts: int | None = len(texts)

    def texts_from(self, first: int) -> Iterator[str | None]:
        number, at = divmod(first, len(self.texts))
        while True:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
            for chunk in torch.randperm(len(self.texts), generator=generator)[at:].split(ORDER_CHUNK):
                yield from (self.texts[i] for i in chunk.tolist())
            number, at = number + 1, 0


class Stream:
    """A data set of the hub, read while it arrives: its shards in random order, documents from a shuffle buffer."""

    def __init__(self, dataset: str, split: str, text_field: str, seed: int):
        self.dataset, self.text_field = dataset, text_field
        self.n_texts: int | None = None  # nobody knows
        with readable(dataset):
            self.documents = open_stream(dataset, split).shuffle(seed=seed, buffer_size=STREAM_BUFFER)

    def texts_from(self, first: int) -> Iterator[str | None]:
        """None stands for a document without text: it keeps its number."""
        at = first
        while True:
            n = 0
            with readable(self.dataset):
                for document in self.documents.skip(at) if at else self.documents:
                    require_field(self.dataset, document, self.text_field)
                    yield document[self.text_field] if isinstance(document[self.text_field], str) else None
                    n += 1
                # A resumed pass may begin beyond the end of the first one.
                length = at + n if n else sum(1 for _ in self.documents)
            if not length:
                raise InputError(f"DATASET={self.dataset} is empty")
            log.info("DATASET=%s ends after %s documents: it is read again from its beginning", self.dataset,
                     f"{length:,}")
            at = 0 if n else at % length


def open_documents(dataset: str, split: str = "train", text_field: str = "text", seed: int = 0) -> Shuffled | Stream:
    """A data set's texts: of the hub as they arrive; .jsonl and .parquet files from a copy in the store, of which
    memory holds the lines' places; any other file whole.

    Raises InputError if it can't be reached or read.
    """
    path = local_path(dataset)
    if path is None:
        return Stream(dataset, split, text_field, seed)
    if path.suffix in (".jsonl", ".parquet"):
        return Shuffled(copy_of(dataset, split, text_field), seed)
    return Shuffled([document[text_field] for document in load_documents(dataset, split, text_field)], seed)
