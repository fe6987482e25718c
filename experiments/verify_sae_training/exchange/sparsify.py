"""SAEs in sparsify's files: TopK sparse coders."""
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from exchange.folded import Folded, normalised
from lib.files import atomic_write, read_json, read_tensors, write_json
from lib.schemas import Number, check, check_tensors

FILES = ("sae.safetensors", "cfg.json")


def read(folder: Path) -> Folded:
    """Read the SAE. Raises Misfit or InputError for what ours can't be."""
    tensors, config = read_tensors(folder / FILES[0]), read_json(folder / FILES[1])
    sizes = check_tensors(tensors, {"W_dec": "any_float F D", "encoder.weight": "any_float F D",
                                    "encoder.bias": "any_float F", "b_dec": "any_float D"}, finite=False)
    width, n_latents = sizes["D"], sizes["F"]
    check(config, {
        "activation?": "topk", "transcode?": False, "signed?": False, "skip_connection?": False,
        "k": Number(int, 1, n_latents), "d_in?": (width, None),
        "num_latents?": (n_latents, 0, None),  # 0: expansion_factor says how many
    })
    W, b, W_dec, b_dec = (tensors[name].float() for name in ("encoder.weight", "encoder.bias", "W_dec", "b_dec"))
    return normalised(folder, Folded(W, b, W_dec, b_dec, top_k=config["k"]))


def write(folder: Path, sae: Folded, about: dict[str, Any]) -> None:
    """Write what sparsify's SparseCoder.load_from_disk(folder) reads; its input is flattened to [N, D].

    about: exchange.facts.facts_of.
    """
    tensors = {"encoder.weight": sae.W, "encoder.bias": sae.b, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    # Not write_tensors: sparsify's reader wants the header that names the framework.
    atomic_write(folder / FILES[0], lambda temporary: save_file(tensors, temporary, {"format": "pt"}))
    n_latents, width = sae.W_dec.shape
    write_json(folder / FILES[1], {
        "activation": "topk", "expansion_factor": n_latents // width, "normalize_decoder": True,
        "num_latents": n_latents, "k": sae.top_k, "multi_topk": False, "skip_connection": False, "transcode": False,
        "d_in": width, "about": about,
    })
