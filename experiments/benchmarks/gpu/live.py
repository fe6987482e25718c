"""Training while the model reads: step 2 with LIVE=True, as a user starts it, for two lengths."""
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from lib.environment import PROJECT, InputError
from lib.models import load_tokenizer

from .jobs import MODELS

STEPS = PROJECT / "experiments" / "verify_sae_training"
LIMIT = 300  # seconds of one step, after which it is ended


def time_live(
    name: str, lengths: tuple[int, int], device: torch.device, *, multiplier: int = 32, k: int = 32, batch: int = 4096,
    buffer_tokens: int = 262_144
) -> dict[str, Any]:
    """Tokens per second of a random model and a TopK SAE together, from the difference of two trainings.

    lengths: tokens of the shorter and the longer one, at least buffer_tokens each: so set-up, and the filling of the
    buffer, are in both and drop out. multiplier: latents per dimension. Raises InputError where a step ends
    early, or the longer training takes no longer.
    """
    kind, config, shape, signature = MODELS[name]
    with tempfile.TemporaryDirectory() as folder:
        kind(config(**shape)).to(torch.bfloat16).save_pretrained(folder)
        load_tokenizer("store/embedded/model").save_pretrained(folder)
        store = Path(folder) / "store"
        _run(store, "01_save_activations.py", MODEL=folder, DATASET=PROJECT / "store/embedded/stories/train.jsonl",
             DATA_LIMIT=200, LAYER_SIGNATURE=signature, MODEL_DTYPE="bfloat16", STORE_DTYPE="bfloat16",
             BATCH_SIZE_SAVE=128, PREFLIGHT=False, DEVICE=device)
        few, many = (_run(store, "02_train_sae.py", LIVE=True, N_TOKENS=length, BUFFER_TOKENS=buffer_tokens, EPOCHS=1,
                          N_LATENTS_MULTIPLIER=multiplier, TOP_K=k, BATCH_SIZE_TRAIN=batch, DEVICE=device)
                     for length in lengths)
    if (seconds := many - few) <= 0:
        raise InputError("the longer live training took no longer than the shorter one; set LIVE_TOKENS further apart")
    return {"seconds": seconds, "tokens_per_s": (lengths[1] - lengths[0]) / seconds, "seconds_of_each": [few, many]}


def _run(store: Path, script: str, **constants: Any) -> float:
    """Run a step with these constants; its seconds."""
    command = [sys.executable, str(STEPS / script), *(f"{name}={value}" for name, value in constants.items())]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"STORE_DIR": str(store)},
                          timeout=LIMIT)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise InputError(f"{script} ended with code {done.returncode}: {said}")
    return time.perf_counter() - start
