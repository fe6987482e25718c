"""What saving and reading take beside the model: each stage of them, with a model that costs nothing."""
import shutil
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from lib.activations import SaveSettings, save_activations
from lib.batches import read_rows, rows_of_run
from lib.hooks import resolve
from lib.models import load_tokenizer
from lib.store import Run
from lib.texts import load_documents, split_texts

BATCH_ROWS = 4096  # read together
STAGES = ("tokenising", "saving", "reading", "whitening")


class Nothing(nn.Module):
    """A model whose hidden states are the same for every text, and cost nothing."""

    def __init__(self, width: int, n_tokens: int):
        super().__init__()
        states = 3 + torch.randn(n_tokens, width, generator=torch.Generator().manual_seed(0))
        self.states = nn.Parameter(states.bfloat16(), requires_grad=False)
        self.layer = nn.Identity()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.layer(self.states[: input_ids.numel()].view(*input_ids.shape, -1))


def host_seconds(width: int, n_texts: int, batch_tokens: int, folder: Path) -> dict[str, float]:
    """Seconds of processor time per token, in bfloat16: tokenising, saving (checks, statistics, writing), reading (rows
    of a batch out of the store), whitening (centring and the product with [D, D]); and "rows", how many were saved.

    Saving is that of a row more: the second half of the texts, past the rows that the covariance is made of.
    """
    tokenizer = load_tokenizer("store/embedded/model")
    texts = [str(document["text"]) for document in load_documents("store/embedded/stories/train.jsonl", limit=n_texts)]
    settings = SaveSettings(batch_tokens=batch_tokens, store_dtype="bfloat16")
    model = Nothing(width, batch_tokens)
    settings.tokens(tokenizer, texts[:64])  # sets the tokenizer up
    start = time.process_time()
    settings.tokens(tokenizer, texts)
    tokenising = time.process_time() - start
    out = Path(tempfile.mkdtemp(dir=folder))

    def save(n: int) -> tuple[Run, float]:
        start = time.process_time()
        run = save_activations(out / str(n), model, tokenizer, [resolve(model, "layer")], texts=texts[:n],
                               splits=split_texts(n, 0.1, 0), settings=settings)
        return run, time.process_time() - start

    try:
        (half, of_half), (run, of_all) = save(n_texts // 2), save(n_texts)
        clock = [time.process_time()]
        rows = rows_of_run(run, run.hooks[0])
        order = torch.randperm(run.n_rows, generator=torch.Generator().manual_seed(0)).split(BATCH_ROWS)
        batches = [read_rows(rows.shards, ids.sort().values) for ids in order]
        clock.append(time.process_time())
        transform = torch.eye(width)
        for x in batches:
            torch.mm(x - rows.mean, transform)
        clock.append(time.process_time())
    finally:
        shutil.rmtree(out)
    found = dict(zip(("tokenising", "reading", "whitening"), (tokenising, clock[1] - clock[0], clock[2] - clock[1])))
    found = {stage: seconds / run.n_rows for stage, seconds in found.items()}
    saving = (of_all - of_half) / (run.n_rows - half.n_rows) - found["tokenising"]
    return found | {"saving": saving, "rows": run.n_rows}


def in_microseconds(host: dict[str, float]) -> str:
    """The stages of host_seconds() in microseconds a token, in one line; what else it holds has other units."""
    return ", ".join(f"{stage} {1e6 * host[stage]:.3g}" for stage in STAGES)
