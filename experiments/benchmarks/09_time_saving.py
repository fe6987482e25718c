"""Processor time of each stage of saving activations, with a model that costs nothing: what remains is the saving.

    python 09_time_saving.py
    python 09_time_saving.py WIDTH=4096 DTYPES="('bfloat16',)"

Rows/s are of one core that does nothing else; stages overlap in threads, so with two cores the clock shows about half
of their sum. torch has one thread here, so that a stage's time is its thread's; tokenizers' threads count to the rest.
Writes store/benchmarks/saving_speed.json
"""
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal

import checkout  # noqa: F401  (first: finds lib)
from lib.constants import override
from lib.ranges import Location, Size, at_least, at_most

Dtype = Literal["float32", "bfloat16", "float16"]
WIDTH: Size = 1536                        # of the activations
N_TEXTS: Annotated[int, at_least(2), at_most(5376)] = 2250  # stories; 200,000 tokens
DTYPES: tuple[Dtype, ...] = ("bfloat16", "float32")  # of model and store
BATCH_TOKENS: Size = 2048                 # tokens of one forward pass, padding included
DATASET: Location = "store/embedded/stories/train.jsonl"
TOKENIZER: Location = "store/embedded/model"
ROUNDS: Size = 3                          # turns of each precision; medians count
CONSTANTS = override(globals())

import pandas
import torch
from torch import Tensor, nn

import lib.activations as activations
import lib.saving as saving
import lib.summaries as summaries
from lib.environment import run
from lib.files import write_json
from lib.hooks import resolve
from lib.models import load_tokenizer
from lib.store import experiment_dir, provenance
from lib.texts import load_documents

# Stage -> module and name of the function that is it.
STAGES: dict[str, tuple[Any, str]] = {
    "tokenising": (activations, "_tokens"), "model, rows out of it": (activations, "run_block"),
    "all finite?": (activations, "finite_states"), "rows into the shard": (saving.ShardWriter, "_collect"),
    "sums and norms": (saving, "summary"), "writing": (saving, "write_rows"), "checksums": (saving, "checksum"),
    "table of rows": (saving, "write_tensors"), "covariance": (summaries, "covariance"),
}


class Nothing(nn.Module):
    """A model that takes its hidden states from memory, whatever it reads."""

    def __init__(self, width: int, n_tokens: int, dtype: torch.dtype):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        states = 3 + torch.randn(n_tokens, width, generator=generator)
        self.states = nn.Parameter(states.to(dtype), requires_grad=False)
        self.layer = nn.Identity()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.layer(self.states[: input_ids.numel()].view(*input_ids.shape, -1))


def timed(function: Callable[..., Any], seconds: dict[str, float], stage: str) -> Callable[..., Any]:
    """The function, which adds its thread's processor time to seconds[stage]."""
    @wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        start = time.thread_time()
        try:
            return function(*args, **options)
        finally:
            seconds[stage] += time.thread_time() - start

    return call


def save_once(model: nn.Module, tokenizer, texts: list[str], dtype: Dtype) -> tuple[int, float, dict[str, float]]:
    """Rows saved, processor seconds of it all, and of each stage."""
    seconds: dict[str, float] = dict.fromkeys(STAGES, 0.0)
    for stage, (place, name) in STAGES.items():
        setattr(place, name, timed(getattr(place, name), seconds, stage))
    splits = ["val" if i % 10 == 0 else "train" for i in range(len(texts))]
    settings = activations.SaveSettings(batch_tokens=BATCH_TOKENS, store_dtype=dtype)
    folder = Path(tempfile.mkdtemp(dir=experiment_dir("benchmarks")))
    try:
        start = time.process_time()
        found = activations.save_activations(folder / "run", model, tokenizer, [resolve(model, "layer")], texts=texts,
                                             splits=splits, settings=settings)
        return found.n_rows, time.process_time() - start, seconds
    finally:
        shutil.rmtree(folder)
        for place, name in STAGES.values():
            setattr(place, name, getattr(place, name).__wrapped__)


def main() -> None:
    torch.set_num_threads(1)
    experiment_dir("benchmarks").mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(TOKENIZER)
    texts = [str(document["text"]) for document in load_documents(DATASET, limit=N_TEXTS)]
    most = max(BATCH_TOKENS, activations.SaveSettings().max_length)  # a text longer than a batch is one
    models = {dtype: Nothing(WIDTH, most, activations.STORE_DTYPES[dtype]) for dtype in DTYPES}
    turns: dict[Dtype, list[dict[str, float]]] = {dtype: [] for dtype in DTYPES}
    for _ in range(ROUNDS):
        for dtype, model in models.items():
            n_rows, total, seconds = save_once(model, tokenizer, texts, dtype)
            seconds["writing"] -= seconds["checksums"]  # which are taken there
            stages = seconds | {"rest": total - sum(seconds.values()), "together": total}
            turns[dtype].append({stage: 1e6 * spent / n_rows for stage, spent in stages.items()})
    medians = {dtype: pandas.DataFrame(of_dtype).median() for dtype, of_dtype in turns.items()}
    shown = {f"{dtype}, {unit}": (of_dtype if unit == "us a row" else 1e6 / of_dtype)
             for dtype, of_dtype in medians.items() for unit in ("us a row", "rows/s")}
    print(f"width {WIDTH}, {n_rows:,} rows; processor time, medians of {ROUNDS}")
    print(pandas.DataFrame(shown).to_string(float_format=lambda x: f"{x:,.2f}" if x < 100 else f"{x:,.0f}"))
    for dtype, of_dtype in medians.items():
        print(f"{dtype}: {2e6 / of_dtype['together']:,.0f} rows/s on two cores at most")
    write_json(experiment_dir("benchmarks") / "saving_speed.json",
               {"constants": CONSTANTS, "made_with": provenance(), "rows": n_rows, "us_a_row": turns})


if __name__ == "__main__":
    run(main)
