"""SAEs of Gemma Scope: params.npz (Gemma 2), and params.safetensors with config.json (Gemma 3); JumpReLU."""
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..environment import InputError, first_line
from ..files import read_json, read_tensors, require_file
from ..schemas import check, check_tensors
from .folded import Folded, bias_without_centring, normalised, thresholded

FILES, FILES_3 = ("params.npz",), ("params.safetensors", "config.json")
UNPACKED = 32  # times its size on the disk: the most that an archive may unpack to
MODELS = ("2b", "9b", "27b")
SIDES = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z"}


def read(folder: Path, where: str) -> tuple[Folded, dict[str, Any]]:
    """The SAE in params.npz, and what its repository and folder say of it.

    Raises Misfit or InputError for what ours can't be.
    """
    return _sae(folder, _read_npz(folder / FILES[0])), _facts(where)


def read_3(folder: Path, where: str) -> tuple[Folded, dict[str, Any]]:
    """The SAE in params.safetensors, and what config.json says of it. Raises Misfit or InputError likewise."""
    config = read_json(folder / FILES_3[1])
    check(config, {"architecture": "jump_relu", "affine_connection?": (False, None), "model_name?": str,
                   "hf_hook_point_in?": str, "hf_hook_point_out?": str})
    point, out = config.get("hf_hook_point_in"), config.get("hf_hook_point_out")
    if point != out:
        raise InputError(f"{folder}: it reads {point!r} and writes {out!r}, so it is a transcoder, which is no SAE")
    model = config.get("model_name")
    facts = {"kind": "jumprelu", "model_name": model and model.replace("-v3", "-3"), "hook_name": point}
    sae = _sae(folder, {name.replace("w_", "W_"): t for name, t in read_tensors(folder / FILES_3[0]).items()})
    return sae, {name: value for name, value in facts.items() if value}


def _sae(folder: Path, tensors: dict[str, Tensor]) -> Folded:
    if "affine_skip_connection" in tensors or tensors.get("W_dec", torch.zeros(1, 1)).ndim != 2:
        raise InputError(f"{folder}: it is a transcoder, which is no SAE")
    check_tensors(tensors, {"W_enc": "any_float D F", "W_dec": "any_float F D", "b_enc": "any_float F",
                            "b_dec": "any_float D", "threshold": "any_float F"}, finite=False)
    t = {name: tensor.float() for name, tensor in tensors.items()}
    b = bias_without_centring(t["W_enc"].T, t["b_enc"], t["b_dec"])
    sae = thresholded(t["W_enc"].T, b, t["W_dec"], t["b_dec"], threshold=t["threshold"])
    return normalised(folder, sae, move_norms=True)


def _read_npz(path: Path) -> dict[str, Tensor]:
    """The arrays of an archive that holds nothing else; nothing is unpickled."""
    require_file(path, remedy="fetch it again")
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > UNPACKED * path.stat().st_size:
                raise ValueError("it unpacks to far more than its size")
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except Exception as error:  # numpy and zipfile raise types of their own
        raise InputError(f"{path} is damaged ({first_line(error)}); fetch it again") from None


def _facts(where: str) -> dict[str, Any]:
    """From google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71: model and hook point."""
    facts = {"kind": "jumprelu"}
    release = re.search(r"gemma-scope-(2b|9b|27b)-(pt|it)-(res|mlp|att)", where)
    layer = re.search(r"layer_(\d+)[/\\]", where)
    if "transcoder" in where:  # the same arrays as an SAE's; only its name tells
        raise InputError(f"{where}: it is a transcoder, which is no SAE")
    if "embedding" in where:
        raise InputError(f"{where}: an SAE on token embeddings, which no LAYER_SIGNATURE names")
    if release:
        facts["model_name"] = f"google/gemma-2-{release[1]}" + ("-it" if release[2] == "it" else "")
        if layer:
            facts["hook_name"] = f"blocks.{layer[1]}.{SIDES[release[3]]}"
    return facts
