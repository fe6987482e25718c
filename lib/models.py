"""Language models and their tokenizers, by hub name or local directory."""
import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from torch import Tensor, nn

from lib.environment import PROJECT, InputError, log
from lib.files import fingerprint
from lib.hooks import HookPoint, blocks
from lib.store import Run, store_root

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


def load_model(
    name: str, device: torch.device, dtype: torch.dtype, trust_remote_code: bool = False, bits: int | None = None,
    device_map: str | None = None, whole_modules: tuple[str, ...] = (),
) -> Any:
    """Load the model that the checkpoint's config names (causal LM, classifier, encoder ...), in eval mode.

    name: hub name or directory. bits: 8 or 4 quantises the linear layers, but for `whole_modules` (dotted paths).
    device_map: "auto" spreads the model over all GPUs, then memory, then disk; "disk" leaves every block on the disk
    and loads it when it runs, so that memory holds one block and what stands outside the blocks.
    Raises InputError if the model can't be reached, is no transformers model, or needs a package that is not installed.
    """
    if bits not in (None, 4, 8):
        raise InputError(f"LOAD_BITS={bits} must be None, 4 or 8")
    if device_map not in (None, "auto", "disk"):
        raise InputError(f"DEVICE_MAP={device_map!r} must be None, 'auto' or 'disk'")
    source = str(local_path(name) or name)
    if local_path(name) is None:
        log.info("asking the hub for %s", name)
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    try:
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        kind = getattr(transformers, (config.architectures or [""])[0], transformers.AutoModel)
        if trust_remote_code and hasattr(config, "auto_map"):
            kind = transformers.AutoModelForCausalLM
        if bits:
            options["quantization_config"] = transformers.BitsAndBytesConfig(
                load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_compute_dtype=dtype,
                llm_int8_skip_modules=[*whole_modules, "lm_head", "embed_out"],
            )  # fmt: skip
        if bits or device_map:
            with torch.device("meta"):
                empty = kind(config)
            places = blocks_on_disk(empty, device) if device_map == "disk" else device_map or {"": device}
            options |= {"device_map": places, "offload_folder": store_root() / "offload"}
        model = kind.from_pretrained(source, config=config, **options)
    except ImportError as error:
        first = str(error).strip().splitlines()[0][:120]
        raise InputError(f"LOAD_BITS and DEVICE_MAP need more ({first}); pip install bitsandbytes accelerate") from None
    except (OSError, ValueError, KeyError) as error:
        raise InputError(_reach(f"MODEL={name}", error)) from None
    if not (bits or device_map):
        model.to(device)
    model.eval()
    found = next(model.parameters())
    if found.device.type != device.type:
        raise RuntimeError(f"the model is on {found.device}, not on {device}")
    log.info("model: %s, %s, %s parameters, %s on %s", name, type(model).__name__, f"{model.num_parameters():,}", found.dtype, found.device)
    return model


def blocks_on_disk(model: nn.Module, device: torch.device) -> dict[str, Any]:
    """accelerate's device map that leaves the transformer blocks on the disk and puts everything else on the device."""
    path, stack = blocks(model)
    weights = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    others = {name.rpartition(".")[0] for name, _ in weights if not name.startswith(f"{path}.")}
    here = torch.cuda.current_device() if device.type == "cuda" else str(device)
    return dict.fromkeys(sorted(others), here) | {f"{path}.{i}": "disk" for i in range(len(stack))}


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
    return {
        "name": name,
        "revision": getattr(model.config, "_commit_hash", None),
        "class": type(model).__name__,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "fingerprint": fingerprint(torch.cat(list(_first_values(model)))),
        "config": fingerprint(json.loads(model.config.to_json_string(use_diff=False)) | {"_name_or_path": None}),
    }


def _first_values(model: nn.Module) -> Iterator[Tensor]:
    """The first 64 values of every parameter, float32; weights that lie on the disk are read one module at a time."""
    seen = set()
    for module in model.modules():
        own = [(name, p) for name, p in module.named_parameters(recurse=False) if id(p) not in seen]
        seen |= {id(p) for _, p in own}
        with ExitStack() as stack:
            if any(p.is_meta for _, p in own):
                from accelerate.utils import align_module_device

                stack.enter_context(align_module_device(module))
            yield from (getattr(module, name).detach().flatten()[:64].float().cpu() for name, _ in own)


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
    dtype = choose_dtype(constants["MODEL_DTYPE"], device)
    model = load_model(name, device, dtype, constants["TRUST_REMOTE_CODE"], constants.get("LOAD_BITS"), constants.get("DEVICE_MAP"))
    require_same_model(model, run.meta["model"])
    return model, load_tokenizer(name, constants["TRUST_REMOTE_CODE"]), hook_of_run(run, hook)


def hook_of_run(run: Run, hook: str) -> HookPoint:
    """The hook point of that name, as the run's meta.json tells it."""
    return next(HookPoint(**saved) for saved in run.meta["hooks"] if saved["signature"] == hook)
