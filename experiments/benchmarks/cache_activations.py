"""SAELens' own way of saving activations, its CacheActivationsRunner; 01 runs this with the peers' Python.

    python cache_activations.py '{"model": DIRECTORY, "texts": DIRECTORY, "layer": 3, "tokens": 100000, "context": 256,
                                  "batch": 32, "threads": 2, "folder": DIRECTORY}'

Prints {"tokens", "seconds", "processor_seconds"} of its run(), which packs texts into whole contexts; the model is
loaded before.
"""
import json
import sys
import time

import torch
from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig
from transformers import AutoConfig

order = json.loads(sys.argv[1])
torch.set_num_threads(order["threads"])
per_batch = order["batch"] * order["context"]
n_tokens = order["tokens"] // per_batch * per_batch
width = AutoConfig.from_pretrained(order["model"]).hidden_size
runner = CacheActivationsRunner(CacheActivationsRunnerConfig(
    dataset_path=order["texts"], model_name=order["model"], model_class_name="AutoModelForCausalLM", d_in=width,
    hook_name=f"model.layers.{order['layer']}", context_size=order["context"], model_batch_size=order["batch"],
    training_tokens=n_tokens, buffer_size_gb=min(2.0, n_tokens * width * 4 / 2e9), device="cpu", shuffle=False,
    prepend_bos=True, new_cached_activations_path=order["folder"] + "/cached"))
start, processor = time.perf_counter(), time.process_time()
dataset = runner.run()
print(json.dumps({"tokens": len(dataset) * order["context"], "seconds": time.perf_counter() - start,
                  "processor_seconds": time.process_time() - processor}))
