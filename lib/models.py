"""Language models and their tokenizers, by hub name or local directory."""
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from torch import nn

from .blocks import blocks, input_device, n_embeddings
from .distributed import LOADING, beat
from .environment import PROJECT, InputError, as_device, first_line, is_disk_full, is_out_of_memory, log
from .files import fingerprint
from .store import store_root

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
huggingface_hub.utils.logging.set_verbosity_error()  # a hub out of reach is one line of ours, not ten of retries


def local_path(name: str) -> Path | None:
    """The file or directory `name`, looked for in the working directory, then in the project.

    None if `name` can only be a hub name ("gpt2", "user/model"). Raises InputError for a path that does not exist.
    """
    for path in (Path(name).expanduser(), PROJECT / name):
        if path.exists():
            return path.resolve()
    if (name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
        or Path(name).suffix in (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet")):
        raise InputError(f"there is no file or directory {name}")
    return None


def choose_dtype(wanted: str, device: torch.device | str) -> torch.dtype:
    """The torch dtype named by `wanted`; "auto" is bfloat16 on CUDA and float32 elsewhere."""
    if wanted == "auto":
        return torch.bfloat16 if as_device(device).type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    choices = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if wanted not in choices:
        raise InputError(f"{wanted!r} is not a precision; use auto, {', '.join(choices)}")
    return choices[wanted]


def load_model(
    name: str, device: torch.device | str, dtype: torch.dtype, *, trust_remote_code: bool = False,
    bits: int | None = None, device_map: str | None = None, whole_modules: tuple[str, ...] = (),
) -> Any:
    """Load the model that the checkpoint's config names (causal LM, classifier, encoder ...), in eval mode.

    name: hub name or directory. bits: 8 or 4 quantises the linear layers, except `whole_modules` (dotted paths).
    device_map: "auto" spreads the model over all GPUs, then memory, then disk; "disk" leaves every block on the disk
    and loads it when it runs, so that memory holds one block at a time and whatever is outside the blocks.
    An encoder-decoder (T5, BART) gives its encoder. Raises InputError if the model can't be reached, is damaged or
    incomplete, does not read text, or needs a package that is not installed.
    """
    device = as_device(device)
    if bits not in (None, 4, 8):
        raise InputError(f"LOAD_BITS={bits} must be None, 4 or 8")
    if device_map not in (None, "auto", "disk"):
        raise InputError(f"DEVICE_MAP={device_map!r} must be None, 'auto' or 'disk'")
    if (path := local_path(name)) is None:
        log.info("asking the hub for %s", name)
    source = str(path or name)
    beat(LOADING)
    # _check_complete names the shapes that differ; transformers would only say that there are some.
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code, "ignore_mismatched_sizes": True}
    with _loading(name, bits or device_map):
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        kind = _class_of(config, name, trust_remote_code)
        if bits:
            options["quantization_config"] = transformers.BitsAndBytesConfig(
                load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_compute_dtype=dtype,
                llm_int8_skip_modules=[*whole_modules, "lm_head", "embed_out"],
            )
        if bits or device_map or device.type == "meta":
            options["offload_folder"] = store_root() / "offload"
            options["device_map"] = (_blocks_on_disk(kind, config, device, trust_remote_code) if device_map == "disk"
                                     else device_map or {"": device})
        model, info = kind.from_pretrained(source, config=config, output_loading_info=True, **options)
    _check_complete(name, type(model).__name__, info)
    if getattr(model.config, "is_encoder_decoder", False):
        log.info("%s has an encoder and a decoder; its encoder is used", type(model).__name__)
        model = model.get_encoder()
    if n_embeddings(model) is None:
        raise InputError(f"{type(model).__name__} does not read token ids; set MODEL to a language or text model")
    if not (bits or device_map):
        model.to(device)
    model.eval()
    log.info("model: %s, %s, %s parameters, %s on %s", name, type(model).__name__, f"{model.num_parameters():,}",
             model.dtype, input_device(model))
    return model


@contextmanager
def _loading(name: str, is_placed: Any) -> Iterator[None]:
    """Turn whatever transformers, safetensors and torch raise for what can't be loaded into one line."""
    try:
        yield
    except ImportError as error:
        how = "; for LOAD_BITS and DEVICE_MAP: pip install bitsandbytes accelerate" if is_placed else ""
        raise InputError(f"MODEL={name} needs a package that is missing ({first_line(error)}){how}") from None
    except Exception as error:
        if isinstance(error, InputError) or is_out_of_memory(error) or is_disk_full(error):
            raise
        raise InputError(_reach(f"MODEL={name}", error)) from None


def _class_of(config: Any, name: str, trust_remote_code: bool) -> Any:
    """The class of model that the config names. Raises InputError if it is unknown or does not fit."""
    if trust_remote_code and hasattr(config, "auto_map"):
        return transformers.AutoModelForCausalLM
    named = (getattr(config, "architectures", None) or [None])[0]
    if named is None:
        return transformers.AutoModel
    kind = getattr(transformers, str(named), None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise InputError(f"MODEL={name} has the architecture {named}, which transformers {transformers.__version__} "
                         "does not know; update it, or use another model")
    expected = getattr(kind, "config_class", None)
    if expected is not None and not isinstance(config, expected):
        raise InputError(f"MODEL={name}: config.json is of a {config.model_type}, but names the architecture {named}; "
                         "download it again")
    return kind


def _check_complete(name: str, kind: str, info: dict[str, Any]) -> None:
    """Raise InputError if a weight is missing from the checkpoint or has another shape: it would be random.

    A pooler may be missing: nothing reads it, and encoders are often saved without one. Surplus weights are logged.
    """
    missing = sorted(key for key in info["missing_keys"] if not re.search(r"(^|\.)pooler\.", key))
    if missing:
        raise InputError(f"MODEL={name}: {len(missing)} weights of {kind} are missing ({', '.join(missing[:3])}); "
                         "download it again, or correct config.json")
    if info["mismatched_keys"]:
        key, *shapes = min(info["mismatched_keys"])
        stored, wanted = map(tuple, shapes)
        raise InputError(f"MODEL={name}: {key} has the shape {stored}, but config.json says {wanted}; download the "
                         "model again")
    if info["unexpected_keys"]:
        extra = sorted(info["unexpected_keys"])
        log.warning("%s has no place for %d weights of the files (%s ...)", kind, len(extra), ", ".join(extra[:3]))


def _blocks_on_disk(kind: Any, config: Any, device: torch.device, trust_remote_code: bool) -> dict[str, Any]:
    """accelerate's device map that leaves the blocks on the disk and puts everything else on the device."""
    with torch.device("meta"):  # no weights
        model = (kind(config) if issubclass(kind, transformers.PreTrainedModel)
                 else kind.from_config(config, trust_remote_code=trust_remote_code))
    path, stack = blocks(model)
    weights = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    others = {name.rpartition(".")[0] for name, _ in weights if not name.startswith(f"{path}.")}
    here = torch.cuda.current_device() if device.type == "cuda" else str(device)
    return dict.fromkeys(sorted(others), here) | {f"{path}.{i}": "disk" for i in range(len(stack))}


def load_tokenizer(name: str, trust_remote_code: bool = False) -> Any:
    """Load a fast tokenizer (character offsets need one); a missing pad token becomes EOS.

    Without EOS it stays missing, as any other token is a real one (lib.texts.filler_id fills batches)."""
    source = str(local_path(name) or name)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, use_fast=True,
                                                               trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raises bare Exception, among others, for damaged files
        raise InputError(_reach(f"the tokenizer of MODEL={name}", error)) from None
    if not tokenizer.is_fast:
        raise InputError(f"the tokenizer of {name} has no fast version, so it gives no character offsets; use a model "
                         "that has one")
    if tokenizer.pad_token_id is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _reach(what: str, error: Exception) -> str:
    return (f"{what} can't be loaded ({first_line(error)}); "
            "set a local directory, or a hub name that this machine can reach")


def model_identity(model: Any, name: str) -> dict[str, Any]:
    """What identifies a model: name, place, revision, class, precision, hashes of all its weights and its config."""
    path = local_path(name)
    return {
        "name": name,
        "path": None if path is None else str(path),
        "revision": getattr(model.config, "_commit_hash", None),
        "class": type(model).__name__,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "weights": weights_of(model),
        "config": fingerprint(json.loads(model.config.to_json_string(use_diff=False)) | {"_name_or_path": None}),
    }


def weights_of(model: nn.Module) -> str:
    """Sixteen hex digits over every value of every parameter and stored buffer; 0.7 s a GB on the CPU.

    Weights on the disk are read one module at a time.
    """
    digest, seen = hashlib.sha256(), set()
    for path, module in model.named_modules():
        own = [(name, p) for name, p in module.named_parameters(recurse=False) if id(p) not in seen]
        seen |= {id(p) for _, p in own}
        own += [(name, b) for name, b in module.named_buffers(recurse=False)
                if name not in module._non_persistent_buffers_set]
        with ExitStack() as stack:
            if any(p.is_meta for _, p in own):
                from accelerate.utils import align_module_device

                stack.enter_context(align_module_device(module))
            for name, _ in own:
                digest.update(f"{path}.{name} {fingerprint(getattr(module, name))}".encode())
    return digest.hexdigest()[:16]


def tokenizer_identity(tokenizer: Any) -> dict[str, str]:
    """What identifies a tokenizer: its class, and a hash of its vocabulary, merges, rules and special tokens."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    del state["truncation"], state["padding"]  # they change with every call
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return {"class": type(tokenizer).__name__, "fingerprint": fingerprint([state, special])}


def require_same_model(model: nn.Module, saved: dict[str, Any]) -> None:
    """Raise InputError if the model's weights differ from those of `saved`, a run's meta["model"]."""
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    if "weights" not in saved:
        raise InputError("the run was saved before all weights were compared; run step 1 again")
    if dtype == saved.get("dtype", dtype) and weights_of(model) != saved["weights"]:
        raise InputError(f"the weights of {saved['name']} have changed since its activations were saved; run step 1 "
                         "again")


def source_of_run(saved: dict[str, Any]) -> str:
    """What to load for a run's meta["model"] or ["dataset"]: its hub name, or the path where it lay or now lies.

    Raises InputError for a directory that is gone: its name must not be taken for somebody's repository on the hub.
    """
    if saved.get("path") is None:
        return saved["name"]
    for path in (Path(saved["path"]), PROJECT / saved["name"]):
        if path.exists():
            return str(path)
    raise InputError(f"{saved['name']} lay in {saved['path']} when the run was saved and is gone; put it back, or run "
                     "step 1 again")
