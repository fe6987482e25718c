"""A run's data set through the run's model: an SAE's training rows without their activations on disk.

    rows = live_rows(run, hook, n_tokens=100_000_000, epochs=10, buffer_tokens=2**18, seed=0)
    sae, history = train_sae(rows, settings, folder)

The run is a sample: mean, covariance, held-out rows, and how texts are cut and masked are its own.
"""
from collections.abc import Iterator
from itertools import count, islice

import torch
from saved_model import model_of_run
from torch import Tensor

from lib.activations import STORE_DTYPES, SaveSettings, block_rows
from lib.batches import rows_of_run
from lib.distributed import own_part
from lib.environment import InputError, log
from lib.models import source_of_run
from lib.schemas import Misfit, check
from lib.store import Run
from lib.texts import filler_id

from .documents import Shuffled, Stream, open_documents
from .rows import LiveRows

BLOCK_TEXTS = 512  # at most: texts that the model reads between two rounds of the buffer
BLOCK_TOKENS = 65_536  # at most, the special ones included
BLOCKS_IN_BUFFER = 8  # at least


def live_rows(
    run: Run, hook: str, *, n_tokens: int | None, epochs: int, buffer_tokens: int, seed: int,
    device: torch.device | str = "auto", trust_remote_code: bool = False,
) -> LiveRows:
    """Training rows of the run's hook point from the whole of its data set, without the run's held-out texts.

    n_tokens: rows to give; None: `epochs` passes over the texts, by the run's tokens per text. epochs: parts of the
    training. buffer_tokens: rows that are in memory to be mixed. Raises InputError for a model that
    lib.reopen.open_model refuses, and a data set that can't be reached or, without n_tokens, has no known end.
    """
    model, tokenizer, point = model_of_run(run, hook, device, trust_remote_code)
    documents = _documents(run, seed)
    held_out = {text["text"] for text in run.texts if text["split"] == "val"}
    per_text = run.n_rows / len(run.texts)
    settings = SaveSettings(**run.meta["settings"])
    n_tokens = n_tokens or _tokens_of_all(documents, len(held_out), per_text) * epochs
    fitting = min(BLOCK_TEXTS, BLOCK_TOKENS // settings.max_length, int(buffer_tokens / BLOCKS_IN_BUFFER / per_text))
    block_texts = max(1, fitting)
    window = max(2, round(2 * buffer_tokens / (block_texts * per_text)) - 1)
    stored = rows_of_run(run, hook)
    rows_held = (window // 2 + 5) * block_texts * per_text  # two of them are a block while it is made
    n_bytes = {"model": sum(p.nbytes for p in model.parameters()),
               "buffer": rows_held * len(stored.mean) * STORE_DTYPES[settings.store_dtype].itemsize}
    log.info("live: %s tokens, mixed within %s texts; memory: %s", f"{n_tokens:,}", f"{window * block_texts:,}",
             ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in n_bytes.items()))

    limit = settings.max_norm_multiple and settings.max_norm_multiple * run.stats(hook)["median_norm"]

    def read(first: int) -> Iterator[Tensor]:
        texts = documents.texts_from(first * block_texts)
        for number in count(first):
            chosen = [text for text in islice(texts, block_texts) if text is not None and text not in held_out]
            part = own_part(len(chosen))  # of the texts of this block
            tokens = settings.tokens(tokenizer, chosen[part], number * block_texts + part.start)
            rows, (x,) = block_rows(model, [point], tokens, pad_id=filler_id(tokenizer), settings=settings)
            x = x.to(STORE_DTYPES[settings.store_dtype]).reshape(len(rows), len(stored.mean))
            yield x if limit is None else x[x.float().norm(dim=1) <= limit]

    return LiveRows(stored, read, n_tokens, epochs, window=window, mean=stored.mean, covariance=stored.covariance)


def _documents(run: Run, seed: int) -> Shuffled | Stream:
    """The whole data set of which a run holds a part."""
    try:
        check(run.meta, {"dataset": {"split": str, "field": str}})
    except Misfit as misfit:
        raise InputError(f"the run does not say which texts it holds ({misfit}); run 01_save_activations.py "
                         "again") from None
    dataset = run.meta["dataset"]
    return open_documents(source_of_run(dataset), dataset["split"], dataset["field"], seed)


def _tokens_of_all(documents: Shuffled | Stream, n_held_out: int, per_text: float) -> int:
    """Training rows of one pass, about."""
    if documents.n_texts is None:
        raise InputError("a data set of the hub has no known end: set N_TOKENS")
    return max(1, round((documents.n_texts - n_held_out) * per_text))
