"""SAEs in sparsify's files: TopK sparse coders."""
import re
from pathlib import Path
from typing import Any

from ..files import read_json, read_tensors
from ..schemas import Number, check, check_tensors
from .folded import Folded, normalised

FILES = ("sae.safetensors", "cfg.json")


def read(folder: Path, where: str) -> tuple[Folded, dict[str, Any]]:
    """The SAE, and what its folder's name says of it. Raises Misfit or InputError for what ours can't be."""
    config = read_json(folder / FILES[1])
    check(config, {"activation?": "topk", "transcode?": False, "signed?": False, "skip_connection?": False,
                   "about?": {"hook_name?": str, "model_name?": str}})
    tensors = read_tensors(folder / FILES[0])
    sizes = check_tensors(tensors, {"W_dec": "any_float F D", "encoder.weight": "any_float F D",
                                    "encoder.bias": "any_float F", "b_dec": "any_float D"}, finite=False)
    width, n_latents = sizes["D"], sizes["F"]
    check(config, {
        "k": Number(int, 1, n_latents), "d_in?": (width, None),
        "num_latents?": (n_latents, 0, None),  # 0: expansion_factor says how many
    })
    W, b, W_dec, b_dec = (tensors[name].float() for name in ("encoder.weight", "encoder.bias", "W_dec", "b_dec"))
    about = config.get("about", {})  # in a file of ours
    facts = {"kind": "topk"} | {name: about[name] for name in ("model_name", "hook_name") if name in about}
    # Folders are named by the module, as a path inside the base model.
    if "hook_name" not in facts and (found := re.search(r"(?:^|[/\\])((?:layers|h)\.\d+(?:\.\w+)*)[/\\]*$", where)):
        facts["hook_name"] = found[1]
    return normalised(folder, Folded(W, b, W_dec, b_dec, top_k=config["k"])), facts
