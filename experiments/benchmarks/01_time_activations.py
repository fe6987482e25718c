"""Tokens per second of saving a layer's activations: the naive way, ours in two precisions and SAELens', in turns.

    python 01_time_activations.py
    python 01_time_activations.py MODEL=path/to/a/model DATASET=texts.jsonl LAYER=3

A turn tokenises, runs the model, which is loaded before, and writes the activations. Padding does not count as tokens.
Rates are by the clock; the ratio to SAELens also by processor time, which another process's work does not change.
What bfloat16 costs is printed as the relative error of the activations. `make peers` installs SAELens.
Writes store/benchmarks/activations_speed.json
"""
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkout  # noqa: F401  (first: finds lib)
from lib.constants import override, refuse
from lib.ranges import Location, NotNegative, Size, Threads

MODEL: Location | None = None             # directory of a model; None: random weights of the shape below
WIDTH: Size = 288                         # this and the next four: the shape of a 15M Llama
DEPTH: Size = 6                           # its blocks
HEADS: Size = 6                           # its attention heads per block
MLP: Size = 768                           # width inside its blocks' MLPs
VOCABULARY: Size = 32_000                 # rows of its embedding and its head
LAYER: NotNegative = 3                    # block whose output is saved
DATASET: Location = "store/embedded/stories/train.jsonl"
N_TEXTS: Size = 2000
CONTEXT: Size = 256                       # tokens of a text at most; the naive way pads to it
NAIVE_BATCH: Size = 32                    # texts of a batch, for the naive way and SAELens
ROUNDS: Size = 3                          # turns of each way; medians count
THREADS: Threads = 2
CONSTANTS = override(globals())
if MODEL is None and LAYER >= DEPTH:
    refuse(f"LAYER={LAYER} must be below DEPTH={DEPTH}")

import torch
from side_by_side import ask_peers, peers_python
from transformers import LlamaConfig, LlamaForCausalLM

from lib.activations import SaveSettings, save_activations
from lib.environment import run, say_next
from lib.files import write_json, write_text
from lib.hooks import resolve
from lib.models import load_model, load_tokenizer
from lib.store import Run, experiment_dir, provenance
from lib.texts import load_documents


def naive(model, tokenizer, texts: list[str], folder: Path) -> int:
    """All batches padded to the context, the whole model with its head, every layer's output kept, one file per batch.
    """
    n_tokens = 0
    for i in range(0, len(texts), NAIVE_BATCH):
        batch = tokenizer(texts[i : i + NAIVE_BATCH], padding="max_length", truncation=True, max_length=CONTEXT,
                          return_tensors="pt")
        with torch.no_grad():
            hidden = model(**batch, output_hidden_states=True).hidden_states[LAYER + 1]
        torch.save(hidden[batch["attention_mask"].bool()].clone(), folder / f"{i}.pt")
        n_tokens += int(batch["attention_mask"].sum())
    return n_tokens


def ours(model, tokenizer, texts: list[str], folder: Path) -> Run:
    points = [resolve(model, f"resid_post:{LAYER}")]
    splits = ["val" if i % 10 == 0 else "train" for i in range(len(texts))]
    return save_activations(folder / "run", model, tokenizer, points, texts=texts, splits=splits,
                            settings=SaveSettings(max_length=CONTEXT, skip_special=False))


def sae_lens(directory: Path, texts: Path, n_tokens: int, folder: Path) -> dict:
    """SAELens' CacheActivationsRunner; {"tokens", "seconds", "processor_seconds"} of its run()."""
    return ask_peers("cache_activations.py", {
        "model": str(directory), "texts": str(texts), "layer": LAYER, "tokens": n_tokens, "context": CONTEXT,
        "batch": NAIVE_BATCH, "threads": THREADS, "folder": str(folder)})


def make_model(tokenizer, folder: Path) -> Path:
    """The directory of MODEL, or of a new model with random weights."""
    if MODEL:
        return Path(MODEL)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=MLP, num_hidden_layers=DEPTH,
                         num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=CONTEXT)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder / "model"


def take_turns(tokenizer, texts: list[str], folder: Path) -> tuple[dict, dict, dict, float]:
    """Tokens of each way, seconds and processor seconds of its turns, and the relative error of bfloat16 activations.
    """
    directory = make_model(tokenizer, folder)
    float32, bfloat16 = (load_model(str(directory), torch.device("cpu"), dtype)
                         for dtype in (torch.float32, torch.bfloat16))
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    write_text(folder / "texts" / "train.jsonl", lines)
    target = folder / "out"
    ways: dict[str, Callable[[], Any]] = {
        "naive": lambda: naive(float32, tokenizer, texts, target),
        "ours, float32": lambda: ours(float32, tokenizer, texts, target),
        "ours, bfloat16": lambda: ours(bfloat16, tokenizer, texts, target),
        "SAELens": lambda: sae_lens(directory, folder / "texts", tokens["naive"], target),
    }
    tokens: dict[str, int] = {}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    processor: dict[str, list[float]] = {way: [] for way in ways}
    saved: dict[str, torch.Tensor] = {}
    for _ in range(ROUNDS):
        for way, save in ways.items():
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir()
            start, before = time.perf_counter(), time.process_time()
            found = save()
            took, used = time.perf_counter() - start, time.process_time() - before
            if isinstance(found, Run):
                tokens[way] = found.n_rows
                saved[way] = torch.cat(found.shards(found.hooks[0])).float()
            elif way == "SAELens":  # its process also loads the model, outside of its own seconds
                tokens[way], took, used = found["tokens"], found["seconds"], found["processor_seconds"]
            else:
                tokens[way] = found
            seconds[way].append(took)
            processor[way].append(used)
    exact, low = saved["ours, float32"], saved["ours, bfloat16"]
    return tokens, seconds, processor, float((low - exact).norm() / (exact - exact.mean(0)).norm())


def main() -> None:
    peers_python()  # refuses now what would only fail after the first round
    torch.set_num_threads(THREADS)
    tokenizer = load_tokenizer(MODEL or "store/embedded/model")
    texts = [str(document["text"]) for document in load_documents(DATASET, limit=N_TEXTS)]
    with tempfile.TemporaryDirectory() as folder:
        tokens, seconds, processor, error = take_turns(tokenizer, texts, Path(folder))
    rates = {way: tokens[way] / statistics.median(taken) for way, taken in seconds.items()}
    for way, rate in rates.items():
        print(f"{way:15s} {rate:10,.0f} tokens/s, {rate / rates['naive']:5.1f} x naive, {tokens[way]:,} tokens")
    own = {way: tokens[way] / statistics.median(used) for way, used in processor.items()}
    for way in ("ours, float32", "ours, bfloat16"):
        print(f"{way} against SAELens: {rates[way] / rates['SAELens']:.1f} x by the clock, "
              f"{own[way] / own['SAELens']:.1f} x by processor time")
    print(f"bfloat16 changes the activations by {error:.1e} of their spread")
    write_json(experiment_dir("benchmarks") / "activations_speed.json",
               {"constants": CONSTANTS, "made_with": provenance(), "tokens": tokens, "seconds": seconds,
                "processor_seconds": processor, "error_of_bfloat16": error})
    say_next("04_show_benchmarks.ipynb")


if __name__ == "__main__":
    run(main)
