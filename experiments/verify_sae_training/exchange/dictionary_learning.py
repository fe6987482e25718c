"""SAEs in the files of dictionary_learning, which SAEBench reads too: AutoEncoderTopK."""
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exchange.folded import Folded, normalised
from lib.files import atomic_write, read_json, read_torch, write_json
from lib.schemas import Number, check, check_tensors

FILES = ("ae.pt", "config.json")


def read(folder: Path) -> Folded:
    """Read the SAE. Raises Misfit or InputError for what ours can't be."""
    state, config = read_torch(folder / FILES[0], "fetch it again"), read_json(folder / FILES[1])
    sizes = check_tensors(state, {"decoder.weight": "any_float D F", "encoder.weight": "any_float F D",
                                  "encoder.bias": "any_float F", "b_dec": "any_float D"}, finite=False)
    width, n_latents = sizes["D"], sizes["F"]
    check(config, {"trainer": {"dict_class": "AutoEncoderTopK", "dict_size?": (n_latents, None),
                               "activation_dim?": (width, None)}})
    k = state.get("k", config["trainer"].get("k"))
    top_k: Any = k.item() if isinstance(k, Tensor) and k.numel() == 1 else k
    check({"k": top_k}, {"k": Number(int, 1, n_latents)})
    W, b, W_dec, b_dec = (state[name].float() for name in ("encoder.weight", "encoder.bias", "decoder.weight", "b_dec"))
    return normalised(folder, Folded(W, b, W_dec.T, b_dec, top_k=top_k))


def write(folder: Path, sae: Folded, about: dict[str, Any]) -> None:
    """Write what dictionary_learning's load_dictionary(folder, device) reads. about: exchange.facts.facts_of."""
    state = {
        "encoder.weight": sae.W, "encoder.bias": sae.b, "decoder.weight": sae.W_dec.T.contiguous(), "b_dec": sae.b_dec,
        "k": torch.tensor(sae.top_k, dtype=torch.int), "threshold": torch.tensor(-1.0),
    }
    atomic_write(folder / FILES[0], lambda temporary: torch.save(state, temporary))
    n_latents, width = sae.W_dec.shape
    layer = re.search(r"\d+", about["hook_name"])
    trainer = {
        "trainer_class": "TopKTrainer", "dict_class": "AutoEncoderTopK", "activation_dim": width,
        "dict_size": n_latents, "k": sae.top_k, "layer": int(layer[0]) if layer else None,
        "lm_name": about["model_name"], "submodule_name": about["hf_module_path"],
        "lr": about["lr"], "steps": about["steps"], "seed": about["seed"],
    }
    write_json(folder / FILES[1], {"trainer": trainer, "buffer": {"ctx_len": about["context_size"]}, "about": about})
