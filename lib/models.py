"""Language models and their tokenizers, by hub name or local directory."""
import json
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from torch import nn

from lib.environment import PROJECT, InputError, log
from lib.hooks import HookPoint
from lib.store import Run, fingerprint

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
huggingface_hub.utils.logging.set_verbosity_error()  # a hub out of reach is one line of ours, not ten of retries


def local_path(name: str) -> Path | None:
    """The file or directory that `name` means, seen from the working directory, then from the project.

    None if `name` can only be a hub name ("gpt2", "user/model"). Raises InputError for a path that is not there.
    """
    for path in (Path(name).expanduser(), PROJECT / name):
        if path.exists():
            return path.resolve()
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name or Path(name).suffix in (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet"):
        raise InputError(f"there is no file or directory {name}")
    return None


def choose_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """The torch dtype named by `wanted`; "auto" is bfloat16 on CUDA and float32 elsewhere."""
    if wanted == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    choices = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if wanted not in choices:
        raise InputError(f"{wanted!r} is no precision; use auto, {', '.join(choices)}")
    return choices[wanted]


def load_model(name: str, device: torch.device, dtype: torch.dtype, trust_remote_code: bool = False) -> transformers.PreTrainedModel:
    """Load the model that the checkpoint's config names (causal LM, classifier, encoder ...), in eval mode.

    name: hub name or directory. Raises InputError if it can't be reached or is no transformers model.
    """
    source = str(local_path(name) or name)
    if local_path(name) is None:
        log.info("asking the hub for %s", name)
    try:
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        kind = getattr(transformers, (config.architectures or [""])[0], transformers.AutoModel)
        if trust_remote_code and hasattr(config, "auto_map"):
            kind = transformers.AutoModelForCausalLM
        model = kind.from_pretrained(source, config=config, dtype=dtype, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(_reach(f"MODEL={name}", error)) from None
    model.to(device).eval()
    found = next(model.parameters())
    if found.device.type != device.type:
        raise RuntimeError(f"the model is on {found.device}, not on {device}")
    log.info("model: %s, %s, %s parameters, %s on %s", name, type(model).__name__, f"{model.num_parameters():,}", found.dtype, found.device)
    return model


def load_tokenizer(name: str, trust_remote_code: bool = False) -> Any:
    """Load a fast tokenizer (character offsets need one); a missing pad token becomes EOS, else 0.

    The pad id is only a filler: which tokens are real is told by the attention mask.
    """
    source = str(local_path(name) or name)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, use_fast=True, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(_reach(f"the tokenizer of MODEL={name}", error)) from None
    if not tokenizer.is_fast:
        raise InputError(f"the tokenizer of {name} has no fast version, so no character offsets; use a model that has one")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def _reach(what: str, error: Exception) -> str:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return f"{what} can't be loaded ({first[:160]}); set a local directory, or a hub name that this machine can reach"


def model_identity(model: Any, name: str) -> dict[str, Any]:
    """What tells this model from another one: name, revision, class, precision, fingerprint of its weights."""
    sample = torch.cat([p.detach().flatten()[:64].float().cpu() for p in model.parameters()])
    return {
        "name": name,
        "revision": getattr(model.config, "_commit_hash", None),
        "class": type(model).__name__,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "fingerprint": fingerprint(sample),
        "config": fingerprint(json.loads(model.config.to_json_string(use_diff=False)) | {"_name_or_path": None}),
    }


def require_same_model(model: nn.Module, saved: dict[str, Any]) -> None:
    """Raise InputError if the model's weights are others than those of `saved`, a run's meta["model"]."""
    present = model_identity(model, saved["name"])
    if present["dtype"] == saved["dtype"] and present["fingerprint"] != saved["fingerprint"]:
        raise InputError(f"the weights of {saved['name']} have changed since its activations were saved; run step 1 again")


def model_of_run(run: Run, hook: str, device: torch.device) -> tuple[Any, Any, HookPoint]:
    """The model and tokenizer that a run was saved from, and its hook point of that name.

    Raises InputError if they can't be reached or the weights have changed since.
    """
    name, constants = run.meta["model"]["name"], run.meta["constants"]
    model = load_model(name, device, choose_dtype(constants["MODEL_DTYPE"], device), constants["TRUST_REMOTE_CODE"])
    require_same_model(model, run.meta["model"])
    return model, load_tokenizer(name, constants["TRUST_REMOTE_CODE"]), hook_of_run(run, hook)


def hook_of_run(run: Run, hook: str) -> HookPoint:
    """The hook point of that name, as the run's meta.json tells it."""
    return next(HookPoint(**saved) for saved in run.meta["hooks"] if saved["signature"] == hook)
