"""Where a model's blocks are, which tensors are the input and output of a module, and a trial pass of the model."""
import inspect
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .environment import InputError, first_line

TEXTS, TOKENS = 2, 6  # of the trial pass
Arguments = tuple[tuple, dict[str, Any]]


def blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Path and modules of the text model's blocks, which may be of several classes.

    With a transformers config: the list that is as long as the config says, outside any other list (experts, parts of a
    block) and any part with a config of its own (a vision tower). Without: the longest list of modules of one class.
    Raises InputError if there is none, as in ALBERT, which runs one block repeatedly, or in XLM, which lists its
    attentions and its MLPs apart.
    """
    lists = [(path, module) for path, module in model.named_modules()
             if isinstance(module, nn.ModuleList) and len(module)]
    lists = [(path, module) for path, module in lists if not any(path.startswith(f"{outer}.") for outer, _ in lists)]
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        text = config.get_text_config()
        n, kinds = getattr(text, "num_hidden_layers", None), (type(text), type(config))
        lists = [(path, module) for path, module in lists
                 if len(module) == n and isinstance(_config_at(model, path), kinds)]
    else:
        lists = [(path, module) for path, module in lists if len({type(m) for m in module}) == 1]
    if not lists:
        raise InputError(f"{type(model).__name__} has no list of blocks; name the layer by its dotted path")
    sizes = {path: sum(p.numel() for p in module.parameters()) for path, module in lists}
    path, stack = max(lists, key=lambda item: (len(item[1]), sizes[item[0]]))
    beside = [other for other, module in lists
              if len(module) == len(stack) and other.rpartition(".")[0] == path.rpartition(".")[0]]
    if any(other != path and sizes[other] > sizes[path] / 10 for other in beside):
        raise InputError(f"{type(model).__name__} keeps the parts of its blocks apart ({', '.join(beside)}); name the "
                         "layer by its dotted path")
    return path, stack


def block_list(model: nn.Module) -> tuple[str | None, int]:
    """Path and length of the list of blocks; (None, 0) for a model without one."""
    try:
        path, modules = blocks(model)
    except InputError:
        return None, 0
    return path, len(modules)


def _config_at(model: nn.Module, path: str) -> Any:
    """The config of the innermost module on the way to `path` that has one."""
    found, module = getattr(model, "config", None), model
    for name in path.split("."):
        module = getattr(module, name)
        found = getattr(module, "config", found)
    return found


def hidden_of(value: Any) -> Tensor | None:
    """The hidden states in a module's output: the tensor itself, or the first item of a tuple or model output."""
    if isinstance(value, tuple | list | dict) and len(value):
        value = value[0]
    return value if isinstance(value, Tensor) else None


def hidden_argument(args: tuple, kwargs: dict[str, Any]) -> tuple[str | int, Tensor] | None:
    """Key and value of the argument that carries the hidden states: the first floating-point tensor with a width."""
    numbered: list[tuple[str | int, Any]] = [*enumerate(args), *kwargs.items()]
    for key, value in numbered:
        if isinstance(value, Tensor) and value.ndim >= 2 and value.is_floating_point():
            return key, value
    return None


def with_hidden(args: tuple, kwargs: dict[str, Any], new: Tensor) -> Arguments:
    """The arguments with `new` in place of the hidden states."""
    found = hidden_argument(args, kwargs)
    if found is None:
        return args, kwargs
    if isinstance(found[0], str):
        return args, {**kwargs, found[0]: new}
    return (*args[: found[0]], new, *args[found[0] + 1 :]), kwargs


def with_output(output: Any, new: Tensor) -> Any:
    """A module's output with `new` in place of the hidden states."""
    if isinstance(output, Tensor):
        return new
    if isinstance(output, dict):  # transformers' model outputs
        return type(output)(**{**output, next(iter(output)): new})
    return type(output)([new, *output[1:]])


def as_texts(value: Tensor, texts: tuple[int, ...]) -> Tensor:
    """Hidden states as [B, T, D], with texts = (B, T): OPT's blocks flatten them to [B * T, D] half-way."""
    is_flat = value.ndim == 2 and len(texts) == 2 and len(value) == texts[0] * texts[1]
    return value.view(*texts, -1) if is_flat else value


def _embedding(model: Any) -> Any:
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # no transformers model, or one of two towers such as CLIP
        return None


def n_embeddings(model: Any) -> int | None:
    """How many token ids the model has embeddings for; None for a model that does not read token ids."""
    if "input_ids" not in inspect.signature(model.forward).parameters:
        return None
    embedding = _embedding(model)
    return (getattr(embedding, "num_embeddings", None)
            or getattr(getattr(embedding, "weight", None), "shape", (None,))[0])


def input_device(model: Any) -> torch.device:
    """Where token ids and masks go: the embedding's device. A model on several devices moves the rest itself."""
    weight = getattr(_embedding(model), "weight", None)
    device = next(model.parameters()).device if weight is None else weight.device
    return torch.device("cpu") if device.type == "meta" else device


def max_positions(model: Any) -> int | None:
    """How many tokens of a text the model can read; None: any number (recurrent models, ALiBi, T5)."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        return None
    text = config.get_text_config()
    found = [getattr(text, name, None) for name in ("max_position_embeddings", "max_seq_len")]
    for path, module in model.named_modules():
        named = re.search(r"(^|\.)(wpe|\w*position\w*)$", path)
        if (named and isinstance(module, nn.Embedding)
            and isinstance(_config_at(model, path), (type(text), type(config)))):
            # RoBERTa counts from its padding id + 1, OPT and BART from 2.
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            found.append(module.num_embeddings - getattr(module, "offset", first))
    limits = [limit for limit in found if isinstance(limit, int) and limit > 0]
    return min(limits) if limits else None


def require_positions(model: Any, max_length: int) -> None:
    """Raise InputError if texts of MAX_LENGTH tokens are longer than the model can read."""
    limit = max_positions(model)
    if limit is not None and max_length > limit:
        raise InputError(f"MAX_LENGTH={max_length} is beyond the {limit} positions of {type(model).__name__}; set "
                         f"MAX_LENGTH={limit} or less")


class Trial(NamedTuple):
    """What a pass of a few tokens through the whole model showed."""

    calls: dict[str, int]
    """How often each module ran, by its dotted path."""
    arguments: list[Arguments]
    """The arguments of each block."""
    widths: dict[str, int]
    """Size of the last dimension of each module's output."""


_trials: WeakKeyDictionary[nn.Module, Trial] = WeakKeyDictionary()


def can_run(model: nn.Module) -> bool:
    """Whether a trial pass is possible: the model reads token ids and has its weights, in memory or on the disk."""
    empty = (any(p.is_meta for p in model.parameters())
             and not any(hasattr(module, "_hf_hook") for module in model.modules()))
    return hasattr(model, "get_input_embeddings") and not empty


@contextmanager
def quietly(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside the block; every module's mode is restored after it."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def trial(model: Any) -> Trial:
    """The model's trial pass, made once. Raises InputError if the model can't run on token ids alone."""
    if model in _trials:
        return _trials[model]
    calls: dict[str, int] = {}
    widths: dict[str, int] = {}
    arguments: list[Arguments] = []
    device, n_ids = input_device(model), n_embeddings(model)
    if n_ids is None:
        raise InputError(f"{type(model).__name__} does not read token ids; use a language model or a text encoder")
    ids = ((torch.arange(TEXTS * TOKENS) + 3) % n_ids).view(TEXTS, TOKENS).to(device)

    def note(path: str):
        def after(_module, _args, output):
            calls[path] = calls.get(path, 0) + 1
            hidden = hidden_of(output)
            if hidden is not None and hidden.ndim:
                widths[path] = hidden.shape[-1]

        return after

    with ExitStack() as stack:
        for path, module in model.named_modules():
            stack.callback(module.register_forward_hook(note(path)).remove)
        stack_path = block_list(model)[0]
        for block in [] if stack_path is None else model.get_submodule(stack_path):
            keep = block.register_forward_pre_hook(lambda _, args, kwargs: arguments.append(copied(args, kwargs)),
                                                   with_kwargs=True)
            stack.callback(keep.remove)
        stack.enter_context(quietly(model))
        try:
            model(input_ids=ids, attention_mask=torch.ones_like(ids), **no_cache(model))
        except Exception as error:  # whatever the architecture raises
            raise InputError(f"{type(model).__name__} can't run on token ids alone ({first_line(error)}); "
                             "use a language model or a text encoder") from None
    _trials[model] = Trial(calls, arguments, widths)
    return _trials[model]


def copied(args: tuple, kwargs: dict[str, Any]) -> Arguments:
    """The arguments, with the hidden states copied: a block may change them in place."""
    found = hidden_argument(args, kwargs)
    return (args, kwargs) if found is None else with_hidden(args, kwargs, found[1].clone())


def no_cache(model: Any) -> dict[str, Any]:
    """The argument that turns the model's cache off, where it has one."""
    accepted = inspect.signature(model.forward).parameters.values()
    passed_on = (any(p.kind is p.VAR_KEYWORD for p in accepted) and hasattr(model, "config")
                 and hasattr(model.config.get_text_config(), "use_cache"))
    return {"use_cache": False} if passed_on or any(p.name == "use_cache" for p in accepted) else {}
