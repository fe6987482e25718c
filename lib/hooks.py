"""Hook points of any torch model: their names, capturing what passes through them, and editing it.

A hook point is the input or the output of a module. Its name is a layer signature, in any of these spellings:

    model.layers.2                                     a module's dotted path
    llamaforcausallm_model_layers_2                    lower-cased class of the model + path with underscores
    resid_pre:2 resid_mid:2 resid_post:2 attn_out:2 mlp_out:2      by role (residual_stream.py) and number of the block
    blocks.2.hook_resid_pre ... blocks.2.hook_mlp_out              the same, as TransformerLens writes it

The first two take a suffix ":input" or ":output". Blocks count from 0, or from the end with -1; "*" stands for every
block that has the role.
"""
import difflib
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from torch import Tensor, nn

from .blocks import as_texts, block_list, blocks, can_run, hidden_argument, hidden_of, trial, with_hidden, with_output
from .environment import InputError
from .residual_stream import ROLES, roles

ROLE, BLOCK = f"(?P<role>{'|'.join(ROLES)})", r"(?P<block>-?\d+|\*)"


class HookPoint(NamedTuple):
    """A place in a model where activations can be read or changed."""

    path: str
    """Dotted path of the module, as in model.named_modules()."""
    point: str
    """"input" or "output" of that module."""
    signature: str
    """Its name on disk: lower-cased class + path with underscores, + "__input" for an input."""
    names: tuple[str, ...] = ()
    """Its short names, role and block number first; none outside the roles."""


class _Stop(Exception):
    """Ends the forward pass once the last hook point has been seen."""


def layer_signatures(model: nn.Module) -> dict[str, list[str]]:
    """Signature -> the dotted paths it may mean. More than one path makes the signature ambiguous."""
    root = type(model).__name__.lower()
    found: dict[str, list[str]] = {}
    for path in filter(None, dict(model.named_modules())):
        found.setdefault(f"{root}_{path.replace('.', '_')}", []).append(path)
    return found


def role_and_number(name: str) -> tuple[str, str] | None:
    """("resid_post", "2") for resid_post:2 or blocks.2.hook_resid_post; the number may be negative or "*"."""
    found = re.fullmatch(f"{ROLE}:{BLOCK}", name) or re.fullmatch(rf"blocks\.{BLOCK}\.hook_{ROLE}", name)
    return (found["role"], found["block"]) if found else None


def resolve_all(model: nn.Module, names: str, point: str = "output") -> list[HookPoint]:
    """The hook points that `names` mean, separated by commas, each once; see resolve()."""
    found: list[HookPoint] = []
    for name in names.split(","):
        role = role_and_number(name.strip())
        found += every(model, role[0]) if role and role[1] == "*" else [resolve(model, name.strip(), point)]
    return list(dict.fromkeys(found))


def every(model: nn.Module, role: str) -> list[HookPoint]:
    """The role at every block that has it. Raises InputError if none has."""
    places = [roles(model, i)[role] for i in range(len(blocks(model)[1]))]
    found = [_named(model, *place) for place in places if not isinstance(place, str)]
    if not found:
        raise InputError(f"there is no {role}: {places[0]}")
    return found


def resolve(model: nn.Module, name: str, point: str = "output") -> HookPoint:
    """The hook point that `name` means; `point` decides where neither the name nor its role does.

    Raises InputError for an unknown name (listing the nearest), an ambiguous one, a role that the architecture lacks,
    or a module that does not run exactly once in a pass.
    """
    if point not in ("input", "output"):
        raise InputError(f"HOOK_POINT={point!r} must be 'input' or 'output'")
    if role := role_and_number(name):
        return _named(model, *_place(model, *role))
    base, colon, suffix = name.rpartition(":")
    if colon and suffix in ("input", "output"):
        name, point = base, suffix
    elif name.endswith("__input"):
        name, point = name.removesuffix("__input"), "input"
    paths = [name] if name and name in dict(model.named_modules()) else layer_signatures(model).get(name, [])
    if len(paths) > 1:
        raise InputError(f"{name} may mean {' or '.join(paths)}; give the dotted path")
    if not paths:
        raise InputError(f"there is no layer {name} in {type(model).__name__}{_nearest(model, name)}; "
                         "LAYER_SIGNATURE='?' lists all")
    _check_runs_once(model, paths[0])
    return _named(model, paths[0], point)


def _nearest(model: nn.Module, name: str) -> str:
    """The names most like a wrong one, of the kind that was meant."""
    signatures = layer_signatures(model)
    paths = [path for several in signatures.values() for path in several]
    known = paths if "." in name else [*signatures, *ROLES, *paths]
    if by_role := re.match(r"(blocks\..*\.hook)|.*:|resid|attn_|mlp_", name):
        form = "blocks.{}.hook_{}" if by_role[1] else "{1}:{0}"
        known = [form.format(i, role) for i in range(block_list(model)[1]) for role in ROLES]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.3)
    return f"; the nearest are {', '.join(near)}" if near else ""


def _check_runs_once(model: nn.Module, path: str) -> None:
    """Raise InputError for a module that a pass never calls, or calls more than once: it has no single activation."""
    if not can_run(model) or path.rpartition(".")[0] == block_list(model)[0]:
        return
    n, kind = trial(model).calls.get(path, 0), type(model).__name__
    if n != 1:
        why = (f"runs {n} times in one pass of {kind}, so it has no single activation" if n else
               f"does not run when {kind} reads a text (it may be a list of modules)")
        raise InputError(f"{path} {why}; choose another layer")


def _named(model: nn.Module, path: str, point: str) -> HookPoint:
    signature = f"{type(model).__name__.lower()}_{path.replace('.', '_')}"
    return HookPoint(path, point, signature + ("__input" if point == "input" else ""), _names(model, path, point))


def _names(model: nn.Module, path: str, point: str) -> tuple[str, ...]:
    """The short names of a place: by role, counted from the front and from the end, and TransformerLens'."""
    prefix, n = block_list(model)
    number, _, inner = path.removeprefix(f"{prefix}.").partition(".")
    if prefix is None or not path.startswith(f"{prefix}.") or not number.isdigit():
        return ()
    i = int(number)
    places = roles(model, i) if inner else {"resid_pre": (path, "input"), "resid_post": (path, "output")}
    return tuple(name for role, place in places.items() if place == (path, point)
                 for name in (f"{role}:{i}", f"{role}:{i - n}", f"blocks.{i}.hook_{role}"))


def _place(model: nn.Module, role: str, number: str) -> tuple[str, str]:
    if number == "*":
        raise InputError(f"{role}:* means several layers, but one is needed; give a number")
    path, modules = blocks(model)
    index, n = int(number), len(modules)
    if not -n <= index < n:
        raise InputError(f"{role}:{number} is beyond the last block; {type(model).__name__} has blocks 0 to {n - 1}")
    if role in ("resid_pre", "resid_post"):  # known without a pass
        return f"{path}.{index % n}", "input" if role == "resid_pre" else "output"
    place = roles(model, index % n)[role]
    if isinstance(place, str):
        raise InputError(f"there is no {role}:{number}: {place}")
    return place


def _block_of(model: nn.Module, point: HookPoint) -> str:
    """Path of the block that a point with a role belongs to."""
    return f"{blocks(model)[0]}.{point.names[0].rpartition(':')[2]}"


def _hook(model: nn.Module, point: HookPoint, see: Callable[[Tensor], Tensor | None]) -> ExitStack:
    """Call see(hidden states) at the hook point until the stack is closed; a tensor that it returns replaces them.

    Inside a block that flattens its texts (OPT), see() still gets and gives [B, T, D].
    """
    stack, module, texts = ExitStack(), model.get_submodule(point.path), list[int]()
    if point.names and point.path != (block := _block_of(model, point)):

        def note(_module, args, kwargs):
            found = hidden_argument(args, kwargs)
            texts[:] = [] if found is None else found[1].shape[:2]

        stack.callback(model.get_submodule(block).register_forward_pre_hook(note, with_kwargs=True).remove)

    def look(hidden: Tensor | None) -> Tensor | None:
        if hidden is None:
            raise InputError(f"the {point.point} of {point.path} is not a tensor of activations; choose another layer")
        new = see(as_texts(hidden, tuple(texts)))
        return None if new is None else new.reshape(hidden.shape)

    def before(_module, args, kwargs):
        found = hidden_argument(args, kwargs)
        new = look(None if found is None else found[1])
        return None if new is None else with_hidden(args, kwargs, new)

    def after(_module, _args, output):
        new = look(hidden_of(output))
        return None if new is None else with_output(output, new)

    handle = (module.register_forward_hook(after) if point.point == "output"
              else module.register_forward_pre_hook(before, with_kwargs=True))
    stack.callback(handle.remove)
    return stack


@contextmanager
def capture(model: nn.Module, points: list[HookPoint], stop: bool = True) -> Iterator[dict[str, Tensor]]:
    """Collect the hidden states at `points` during one forward pass inside the block.

    Yields a dict signature -> tensor that the pass fills. With stop, pass and block end as soon as every point has been
    seen: deeper layers and the head are never computed. The hooks are removed when the block ends. The tensors keep
    their graph; use torch.no_grad() where none is wanted. Raises InputError if the pass never reaches some point.
    """
    seen: dict[str, Tensor] = {}

    def collect(point: HookPoint):
        def see(hidden: Tensor) -> None:
            seen[point.signature] = hidden
            if stop and len(seen) == len(points):
                raise _Stop
            seen[point.signature] = hidden.clone()  # some blocks (Falcon's) add to it in place later

        return see

    with ExitStack() as stack:
        for point in points:
            stack.enter_context(_hook(model, point, collect(point)))
        try:
            yield seen
        except _Stop:
            pass  # every point has been seen
    if missing := [point.path for point in points if point.signature not in seen]:
        raise InputError(f"the forward pass never reached {', '.join(missing)}; choose another layer")


@contextmanager
def edit(model: nn.Module, point: HookPoint, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace the hidden states x at `point` by change(x) in every forward pass inside the block.

    At a resid_mid point the residual stream itself is changed: the norm reads change(x), and because the block has
    already kept x for its sum, change(x) - x is added to the block's output. At any other input point only what that
    module reads is changed.
    """
    differences: list[Tensor] = []

    def change_stream(x: Tensor) -> Tensor:
        new = change(x)
        differences[:] = [new - x]
        return new

    with ExitStack() as stack:
        if point.names and point.names[0].startswith("resid_mid:"):
            block = _named(model, _block_of(model, point), "output")
            stack.enter_context(_hook(model, point, change_stream))
            stack.enter_context(_hook(model, block, lambda y: y + differences[0].to(y)))
        else:
            stack.enter_context(_hook(model, point, change))
        yield
