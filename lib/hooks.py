"""Hook points of any torch model: their names, capturing what passes through them, and editing it.

A hook point is (module path, "input" | "output"). A layer signature names one, in any of these spellings:

    model.layers.2                                     a module's dotted path
    llamaforcausallm_model_layers_2                    lower-cased class of the model + path with underscores
    resid_pre:2 resid_mid:2 resid_post:2 attn_out:2 mlp_out:2      by role and number of the block

each with an optional suffix ":input" or ":output". Block numbers count from 0.
"""
import difflib
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from lib.environment import InputError

ROLES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
_ATTENTION = ("self_attn", "attn", "attention")
_MLP = ("mlp", "feed_forward")


class HookPoint(NamedTuple):
    """One place in a model where activations can be read or changed."""

    path: str
    """Dotted path of the module, as in model.named_modules()."""
    point: str
    """"input" or "output" of that module."""
    signature: str
    """Its name on disk: lower-cased class + path with underscores, + "__input" for an input."""


class _Stop(Exception):
    """Ends the forward pass once the last hook point has been seen."""


def layer_signatures(model: nn.Module) -> dict[str, list[str]]:
    """Signature -> the dotted paths it may mean. More than one path makes the signature ambiguous."""
    root = type(model).__name__.lower()
    found: dict[str, list[str]] = {}
    for path, _ in model.named_modules():
        if path:
            found.setdefault(f"{root}_{path.replace('.', '_')}", []).append(path)
    return found


def blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Path and modules of the transformer blocks: the longest list of modules of one class."""
    lists = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and len({type(m) for m in module}) == 1
    ]
    if not lists:
        raise InputError(f"{type(model).__name__} has no list of blocks; name the layer by its dotted path")
    return max(lists, key=lambda item: len(item[1]))


def resolve(model: nn.Module, name: str, point: str = "output") -> HookPoint:
    """The hook point that `name` means; `point` is used where neither the name nor its role says.

    Raises InputError for an unknown name (with the nearest ones), an ambiguous one, or a role the architecture lacks.
    """
    if point not in ("input", "output"):
        raise InputError(f"HOOK_POINT={point!r} must be 'input' or 'output'")
    role = re.fullmatch(rf"({'|'.join(ROLES)}):(\d+)", name)
    if role:
        return _named(model, *_role(model, role[1], int(role[2])))
    base, colon, suffix = name.rpartition(":")
    if colon and suffix in ("input", "output"):
        name, point = base, suffix
    elif name.endswith("__input"):
        name, point = name.removesuffix("__input"), "input"
    if name in dict(model.named_modules()) and name:
        return _named(model, name, point)
    signatures = layer_signatures(model)
    paths = signatures.get(name, [])
    if len(paths) > 1:
        raise InputError(f"{name} may mean {' or '.join(paths)}; give the dotted path")
    if not paths:
        near = difflib.get_close_matches(name, [*signatures, *(p for ps in signatures.values() for p in ps)], n=3, cutoff=0.3)
        hint = f"; the nearest are {', '.join(near)}" if near else ""
        raise InputError(f"there is no layer {name} in {type(model).__name__}{hint}; LAYER_SIGNATURE='?' lists all")
    return _named(model, paths[0], point)


def _named(model: nn.Module, path: str, point: str) -> HookPoint:
    signature = f"{type(model).__name__.lower()}_{path.replace('.', '_')}"
    return HookPoint(path, point, signature + ("__input" if point == "input" else ""))


def _role(model: nn.Module, role: str, index: int) -> tuple[str, str]:
    path, modules = blocks(model)
    if index >= len(modules):
        raise InputError(f"{role}:{index} is beyond the last block; {type(model).__name__} has blocks 0 to {len(modules) - 1}")
    block, prefix = modules[index], f"{path}.{index}"
    if role == "resid_pre":
        return prefix, "input"
    if role == "resid_post":
        return prefix, "output"
    if role == "resid_mid":
        return f"{prefix}.{_norm_after_attention(model, block)}", "input"
    names = [child for child in (_ATTENTION if role == "attn_out" else _MLP) if hasattr(block, child)]
    # In BERT's family the attention module ends with the residual sum and a norm: that is not what the role means.
    if not names or hasattr(getattr(block, names[0]), "output"):
        raise InputError(f"{type(block).__name__} has no {role}; name the layer by its dotted path")
    return f"{prefix}.{names[0]}", "output"


def _norm_after_attention(model: nn.Module, block: nn.Module) -> str:
    """Name of the block's norm whose input is the residual stream between attention and MLP."""
    if getattr(getattr(model, "config", None), "use_parallel_residual", False):
        raise InputError(f"{type(block).__name__} runs attention and MLP in parallel: it has no resid_mid; use resid_post")
    for name in ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2"):
        if hasattr(block, name):
            return name
    raise InputError(f"{type(block).__name__} has no norm between attention and MLP, so no resid_mid; use resid_post")


def _unwrap(value: Any) -> Tensor:
    """The hidden states in what a module takes or gives: the tensor itself, or the first item of a tuple."""
    return value if isinstance(value, Tensor) else value[0]


def _rewrap(value: Any, new: Tensor) -> Any:
    return new if isinstance(value, Tensor) else (new, *value[1:])


def _hook(model: nn.Module, point: HookPoint, see: Callable[[Tensor], Tensor | None]):
    """Register see(hidden states) at the hook point; a tensor that it returns replaces them."""
    module = model.get_submodule(point.path)
    if point.point == "output":

        def after(_module, _args, output):
            new = see(_unwrap(output))
            return None if new is None else _rewrap(output, new)

        return module.register_forward_hook(after)

    def before(_module, args, kwargs):
        if args:
            new = see(args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        new = see(kwargs["hidden_states"])
        return None if new is None else (args, kwargs | {"hidden_states": new})

    return module.register_forward_pre_hook(before, with_kwargs=True)


@contextmanager
def capture(model: nn.Module, points: list[HookPoint], stop: bool = True) -> Iterator[dict[str, Tensor]]:
    """Collect the hidden states at `points` during one forward pass inside the block.

    Yields a dict signature -> tensor that the pass fills. With stop, the pass ends as soon as every point
    was seen, whatever their order in the list: deeper layers and the head are never computed. The hooks are
    removed when the block ends. The tensors keep their graph; use torch.no_grad() where none is wanted.

    Raises RuntimeError if the pass ends without reaching some point.
    """
    seen: dict[str, Tensor] = {}

    def collect(point: HookPoint):
        def see(hidden: Tensor) -> None:
            seen[point.signature] = hidden
            if stop and len(seen) == len(points):
                raise _Stop

        return see

    with ExitStack() as stack:
        for point in points:
            stack.callback(_hook(model, point, collect(point)).remove)
        try:
            yield seen
        except _Stop:
            pass
    missing = [point.path for point in points if point.signature not in seen]
    if missing:
        raise RuntimeError(f"the forward pass never reached {', '.join(missing)}")


@contextmanager
def edit(model: nn.Module, point: HookPoint, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace the hidden states x at `point` by change(x) in every forward pass inside the block.

    At a resid_mid point the residual stream itself is changed: a norm's input feeds the MLP branch only,
    because the block has already kept the old value for the residual sum. So the difference change(x) - x is
    added to the attention's output, which enters the sum and the norm alike. At any other input point only
    what that module reads is changed.
    """
    block_path, _, child = point.path.rpartition(".")
    block = model.get_submodule(block_path)
    attention = next((name for name in _ATTENTION if hasattr(block, name)), None)
    with ExitStack() as stack:
        if point.point == "input" and attention and _is_resid_mid(model, block, child):
            stream: list[Tensor] = []
            before, after = _named(model, block_path, "input"), _named(model, f"{block_path}.{attention}", "output")

            def remember(hidden: Tensor) -> None:
                stream[:] = [hidden]

            def add_difference(attended: Tensor) -> Tensor:
                x = stream[0] + attended
                return attended + (change(x) - x)

            stack.callback(_hook(model, before, remember).remove)
            stack.callback(_hook(model, after, add_difference).remove)
        else:
            stack.callback(_hook(model, point, change).remove)
        yield


def _is_resid_mid(model: nn.Module, block: nn.Module, child: str) -> bool:
    try:
        return _norm_after_attention(model, block) == child
    except InputError:
        return False
