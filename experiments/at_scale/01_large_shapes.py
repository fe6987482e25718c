"""Memory and tokens/s that large shapes take on this machine: the model, the saving beside it, reading, SAE steps.

    python 01_large_shapes.py                       # Bielik-1.5B whole, three layers of GPT-NeoX-20B, two SAEs: 10 GB
    python 01_large_shapes.py MODELS="('bielik_1.5b',)" SAES="()"

Each measurement runs in its own process, with one thread, so that peak memory is its own. Times are processor times.
The models have the true shapes, random weights and bfloat16: their activations mean nothing, but cost as much.
Writes store/at_scale/measured.json and the random models in store/at_scale/models/
"""
import multiprocessing
import resource
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Literal

import checkout  # noqa: F401  (first: finds lib)
from lib.constants import override
from lib.ranges import Size, at_least, at_most

Shape = Literal["bielik_1.5b", "gpt_neox_20b_3_layers"]
MODELS: tuple[Shape, ...] | tuple[()] = ("bielik_1.5b", "gpt_neox_20b_3_layers")
SAES: tuple[tuple[Size, Size, Size], ...] | tuple[()] = ((1536, 6144, 8), (6144, 24576, 64))  # width, latents, k
N_TEXTS: Annotated[int, at_least(2), at_most(5376)] = 24  # stories of at most 128 tokens
BATCH_TOKENS: Size = 2048                 # tokens of one forward pass
SAE_BATCH: Size = 4096                    # tokens of one SAE step
SAE_STEPS: Size = 3                       # timed steps, after one that is not
HOST_WIDTH: Size = 1536                   # of the activations whose saving and reading is timed without a model
HOST_TEXTS: Annotated[int, at_least(20), at_most(5376)] = 2400  # stories of at most 128 tokens; two savings
CONSTANTS = override(globals())

import torch
import transformers
from host_stages import host_seconds, in_microseconds

from lib.activations import SaveSettings, save_activations
from lib.environment import run, say_next
from lib.files import write_json
from lib.hooks import resolve
from lib.models import load_model, load_tokenizer
from lib.store import experiment_dir
from lib.texts import load_documents, split_texts
from lib.training.fast_step import fast_step
from lib.training.step import init_state
from lib.training.workspace import Workspace

SHAPES = {
    # speakleash/Bielik-1.5B-v3.0-Instruct; activations are saved in the middle, as by PRESET=bielik
    "bielik_1.5b": (
        transformers.LlamaConfig(hidden_size=1536, intermediate_size=8960, num_hidden_layers=32, num_attention_heads=12,
                                 num_key_value_heads=2, vocab_size=32000, max_position_embeddings=8192),
        "resid_mid:16",
    ),
    # EleutherAI/gpt-neox-20b has 44 such layers
    "gpt_neox_20b_3_layers": (
        transformers.GPTNeoXConfig(hidden_size=6144, intermediate_size=24576, num_hidden_layers=3,
                                   num_attention_heads=64, vocab_size=50432),
        "resid_post:2",
    ),
}


def fresh(function, **arguments):
    """The dict that a function returns in a new process, with "peak_gb": the most memory that the process held."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(with_peak, function, arguments).result()


def with_peak(function, arguments):
    torch.set_num_threads(1)
    found = function(**arguments)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS and in KiB on Linux
    return found | {"peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9}


def build(name: str, folder: Path) -> dict:
    """Write a model of that shape with random weights in bfloat16."""
    config, _ = SHAPES[name]
    kind = transformers.LlamaForCausalLM if config.model_type == "llama" else transformers.GPTNeoXForCausalLM
    torch.set_default_dtype(torch.bfloat16)
    kind(config).save_pretrained(folder)
    return {}


def save(name: str, folder: Path, device_map: str | None, n_texts: int, batch_tokens: int) -> dict:
    """Save the activations of some stories; tokens/s include reading what weights lie on disk."""
    model = load_model(str(folder), torch.device("cpu"), torch.bfloat16, device_map=device_map)
    tokenizer = load_tokenizer("store/embedded/model")
    texts = [document["text"] for document in load_documents("store/embedded/stories/train.jsonl", limit=n_texts)]
    settings = SaveSettings(batch_tokens=batch_tokens, store_dtype="bfloat16")
    with tempfile.TemporaryDirectory(dir=folder.parent) as out:
        start = time.process_time()
        saved = save_activations(Path(out), model, tokenizer, [resolve(model, SHAPES[name][1])], texts=texts,
                                 splits=split_texts(n_texts, 0.2, 0), settings=settings)
        seconds = time.process_time() - start
    n = sum(p.numel() for p in model.parameters())
    return {"parameters": n, "device_map": device_map, "tokens": saved.n_rows, "seconds": seconds,
            "tokens_per_s": saved.n_rows / seconds}


def train(width: int, n_latents: int, k: int, batch: int, n_steps: int) -> dict:
    """Time the steps of an SAE of that shape on normally distributed rows."""
    state = init_state(torch.eye(width), n_latents, seed=0)
    work = Workspace(state)
    x = torch.randn(batch, width) / width**0.5
    for step in range(n_steps + 1):
        if step == 1:  # the first one sets up buffers
            start = time.process_time()
        fast_step(state, x, k=k, lr=1e-4, dead_after=10**9, work=work)
    seconds = (time.process_time() - start) / n_steps
    return {"width": width, "n_latents": n_latents, "top_k": k, "batch": batch, "precision": work.precision,
            "tokens_per_s": batch / seconds}


def main():
    root = experiment_dir("at_scale")
    measured: dict = {"models": {}, "saes": []}
    root.mkdir(parents=True, exist_ok=True)
    measured["host"] = fresh(host_seconds, width=HOST_WIDTH, n_texts=HOST_TEXTS, batch_tokens=BATCH_TOKENS, folder=root)
    print(f"beside the model, width {HOST_WIDTH}, us a token: {in_microseconds(measured['host'])}; "
          f"peak {measured['host']['peak_gb']:.2f} GB", flush=True)
    for name in MODELS:
        folder = root / "models" / name
        if not (folder / "config.json").exists():
            fresh(build, name=name, folder=folder)
        for device_map in (None, "disk"):
            found = fresh(save, name=name, folder=folder, device_map=device_map, n_texts=N_TEXTS,
                          batch_tokens=BATCH_TOKENS)
            measured["models"][f"{name}{' from disk' if device_map else ''}"] = found
            where = "blocks on disk" if device_map else "in memory"
            print(f"{name:<22} {where:<15} {found['parameters'] / 1e9:5.2f} B parameters {found['tokens']:6,} tokens "
                  f"{found['tokens_per_s']:8.1f} tokens/s  peak {found['peak_gb']:5.2f} GB", flush=True)
        shutil.rmtree(folder)
    for width, n_latents, k in SAES:
        found = fresh(train, width=width, n_latents=n_latents, k=k, batch=SAE_BATCH, n_steps=SAE_STEPS)
        measured["saes"].append(found)
        print(f"SAE {found['width']} -> {found['n_latents']}, k={found['top_k']}, {found['precision']:<9} "
              f"{found['tokens_per_s']:8.1f} tokens/s  peak {found['peak_gb']:5.2f} GB", flush=True)
    write_json(root / "measured.json", measured)
    say_next("02_plan.py")


if __name__ == "__main__":
    run(main)
