"""What is timed on a GPU, each by itself: a training step of ours or of a peer, and the saving of activations."""
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from side_by_side import Trainer
from torch.profiler import ProfilerActivity, profile

from lib.activations import SaveSettings, forward, save_activations
from lib.hooks import resolve
from lib.models import load_tokenizer
from lib.texts import filler_id, length_batches, load_documents, split_texts
from lib.training.fast_step import fast_step
from lib.training.step import init_state
from lib.training.workspace import Workspace

from .clock import synchronize, time_steps
from .roofline import Peaks, encoder_floor, step_floor

POOL = 4  # batches of rows that the steps take in turns
NEVER = 10**9  # tokens of silence after which a latent is dead: none is, as the peers count too
SHOWN_KERNELS = 8
# Random weights in bfloat16, and the block whose output is saved, in the middle.
MODELS = {
    "gpt2": (transformers.GPT2LMHeadModel, transformers.GPT2Config, {}, "resid_post:5"),
    # the shape of Llama 3.2 1B
    "llama_1b": (transformers.LlamaForCausalLM, transformers.LlamaConfig,
                 {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
                  "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
                  "tie_word_embeddings": True}, "resid_post:7"),
    "tiny": (transformers.LlamaForCausalLM, transformers.LlamaConfig,  # to see that everything runs
             {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
             "resid_post:0"),
}


def random_rows(n: int, width: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Rows [n, width] of mean squared norm 1."""
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(n, width, generator=generator, device=device) / width**0.5


def time_sae(
    shape: tuple[int, int, int], batch: int, kind: str, *, device: torch.device, seconds: float, peaks: Peaks
) -> dict[str, Any]:
    """A training step of ours; shape: (width, latents, k). Names the kernels that take most of it."""
    width, n_latents, k = shape
    rows = random_rows(POOL * batch, width, device).split(batch)
    state = init_state(torch.eye(width, device=device), n_latents, 0, kind=kind)
    work = Workspace(state, kind=kind)

    def step(i: int) -> None:
        fast_step(state, rows[i % POOL], k=k, lr=1e-4, dead_after=NEVER, work=work)

    timed = time_steps(step, device, seconds)
    floor = step_floor(width, n_latents, k, batch, peaks=peaks)
    return timed._asdict() | {"tokens_per_s": batch / timed.seconds, "of_roofline": floor / timed.seconds,
                              "over_product": timed.seconds / encoder_floor(width, n_latents, batch, peaks),
                              "precision": work.precision, "kernels": kernels_of(step, device)}


def kernels_of(step: Any, device: torch.device) -> list[dict[str, Any]]:
    """The kernels that take most of a step: name, share of the time of all, calls; over three steps.

    None of them where the profiler is not allowed to look.
    """
    on_cuda = device.type == "cuda"
    try:
        with profile(activities=[ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU]) as seen:
            for i in range(3):
                step(i)
            synchronize(device)
    except RuntimeError:
        return []
    found = [(event.key, event.self_device_time_total if on_cuda else event.self_cpu_time_total, event.count)
             for event in seen.key_averages()]
    total = sum(taken for _, taken, _ in found) or 1
    found.sort(key=lambda each: -each[1])
    return [{"name": name[:120], "share": taken / total, "calls": count / 3}
            for name, taken, count in found[:SHOWN_KERNELS]]


def time_peer(
    name: str, shape: tuple[int, int, int], batch: int, *, device: torch.device, seconds: float, limit: float,
    peaks: Peaks
) -> dict[str, Any]:
    """A training step of a peer, in its own environment, a few steps after those that set it up.

    limit: seconds after which its process is ended. Raises InputError where it dies, out of memory for instance.
    """
    width, n_latents, k = shape
    settings = {"n_latents": n_latents, "k": k, "batch": batch, "lr": 1e-4, "n_steps": 10_000, "seed": 0, "threads": 4,
                "dead_after": 10_000_000, "device": str(device)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.safetensors"
        save_file({"x": random_rows(2 * batch, width)}, path)
        trainer = Trainer(name, path, settings)
        timer = threading.Timer(limit, trainer.process.kill)
        timer.start()
        try:
            trainer.ask(steps=3)  # the first steps pay for set-up
            n = max(3, int(seconds / max(1e-6, trainer.ask(steps=1)["seconds"])))
            taken = trainer.ask(steps=min(n, 100))["seconds"] / min(n, 100)
        finally:
            timer.cancel()
            trainer.process.kill()
            trainer.close()
    floor = step_floor(width, n_latents, k, batch, peaks=peaks)
    return {"seconds": taken, "tokens_per_s": batch / taken, "of_roofline": floor / taken,
            "over_product": taken / encoder_floor(width, n_latents, batch, peaks)}


def time_saving(name: str, n_texts: int, batch_tokens: int, device: torch.device) -> dict[str, Any]:
    """Saving one layer of a random model, statistics included, and the model's passes alone."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # of what ran before
    kind, config, shape, signature = MODELS[name]
    tokenizer = load_tokenizer("store/embedded/model")
    with torch.device(device):
        model = kind(config(**shape)).to(torch.bfloat16).eval()
    points = [resolve(model, signature)]
    texts = [document["text"] for document in load_documents("store/embedded/stories/train.jsonl", limit=n_texts)]
    settings = SaveSettings(batch_tokens=batch_tokens, store_dtype="bfloat16")
    batches = list(length_batches(settings.tokens(tokenizer, texts), batch_tokens))
    n_tokens = sum(len(item.ids) for batch in batches for item in batch)

    def only_model() -> None:
        for batch in batches:
            forward(model, points, batch, filler_id(tokenizer))

    def save() -> None:
        with tempfile.TemporaryDirectory() as folder:
            save_activations(Path(folder), model, tokenizer, points, texts=texts,
                             splits=split_texts(len(texts), 0.2, 0), settings=settings)

    alone, saving = second_time(only_model, device), second_time(save, device)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {"seconds": saving, "tokens_per_s": n_tokens / saving, "n_tokens": n_tokens, "peak_bytes": peak,
            "model_tokens_per_s": n_tokens / alone, "parameters": sum(p.numel() for p in model.parameters())}


def second_time(work: Callable[[], None], device: torch.device) -> float:
    """Seconds of the second of two runs: the first pays for set-up."""
    for _ in range(2):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
    return time.perf_counter() - start
