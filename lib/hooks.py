"""Hook points of any torch model: their names, capturing what passes through them, and editing it.

A hook point is (module path, "input" | "output"). A layer signature names one, in any of these spellings:

    model.layers.2                                     a module's dotted path
    llamaforcausallm_model_layers_2                    lower-cased class of the model + path with underscores
    resid_pre:2 resid_mid:2 resid_post:2 attn_out:2 mlp_out:2      by role and number of the block (lib/roles.py)
    blocks.2.hook_resid_pre ... blocks.2.hook_mlp_out              the same, as TransformerLens writes it

The first two take a suffix ":input" or ":output". Blocks count from 0, or from the end with -1; "*" stands for every
block that has the role.
"""
import difflib
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from .blocks import as_texts, blocks, can_run, hidden_argument, hidden_of, trial, with_hidden, with_output
from .environment import InputError
from .roles import ROLES, roles

_ROLE = re.compile(
    rf"(?:({'|'.join(ROLES)}):|blocks\.(?=(?:-?\d+|\*)\.hook_))(-?\d+|\*)(?:\.hook_({'|'.join(ROLES)}))?"
)


class HookPoint(NamedTuple):
    """One place in a model where activations can be read or changed."""

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
    for path, _ in model.named_modules():
        if path:
            found.setdefault(f"{root}_{path.replace('.', '_')}", []).append(path)
    return found


def role_and_number(name: str) -> tuple[str, str] | None:
    """("resid_post", "2") for resid_post:2 or blocks.2.hook_resid_post; the number may be negative or "*"."""
    found = _ROLE.fullmatch(name)
    if found is None or bool(found[1]) == bool(found[3]):
        return None
    return found[1] or found[3], found[2]


def resolve_all(model: nn.Module, names: str, point: str = "output") -> list[HookPoint]:
    """The hook points that `names` mean, separated by commas, each once; see resolve()."""
    found: list[HookPoint] = []
    for name in names.split(","):
        role = role_and_number(name.strip())
        found += every(model, role[0]) if role and role[1] == "*" else [resolve(model, name.strip(), point)]
    return list(dict.fromkeys(found))


def every(model: nn.Module, role: str) -> list[HookPoint]:
    """The role at every block that has it. Raises InputError where no block has."""
    places = [roles(model, i)[role] for i in range(len(blocks(model)[1]))]
    found = [_named(model, *place) for place in places if not isinstance(place, str)]
    if not found:
        raise InputError(f"there is no {role}: {places[0]}")
    return found


def resolve(model: nn.Module, name: str, point: str = "output") -> HookPoint:
    """The hook point that `name` means; `point` is used where neither the name nor its role says.

    Raises InputError for an unknown name (with the nearest ones), an ambiguous one, a role that the architecture lacks,
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
    """The names most like a wrong one, of the kind that was meant: short, TransformerLens', dotted, or with
    underscores.
    """
    signatures = layer_signatures(model)
    try:
        numbers = range(len(blocks(model)[1]))
    except InputError:
        numbers = range(0)
    if name.startswith("blocks.") and ".hook" in name:
        known = [f"blocks.{i}.hook_{role}" for i in numbers for role in ROLES]
    elif ":" in name or re.match("resid|attn_|mlp_", name):
        known = [f"{role}:{i}" for i in numbers for role in ROLES]
    elif "." in name:
        known = [path for paths in signatures.values() for path in paths]
    else:
        known = [*signatures, *ROLES, *(path for paths in signatures.values() for path in paths)]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.3)
    return f"; the nearest are {', '.join(near)}" if near else ""


def _check_runs_once(model: nn.Module, path: str) -> None:
    """Raise InputError for a module that a pass never calls, or calls more than once: there is no one state to read."""
    if not can_run(model) or _is_block(model, path):
        return
    n = trial(model).calls.get(path, 0)
    if not n:
        raise InputError(f"{path} does not run when {type(model).__name__} reads a text (it may be a list of modules); "
                         "choose another layer")
    if n > 1:
        raise InputError(f"{path} runs {n} times in one pass of {type(model).__name__}, so it has no one activation; "
                         "choose another layer")


def _is_block(model: nn.Module, path: str) -> bool:
    try:
        return path.rpartition(".")[0] == blocks(model)[0]
    except InputError:
        return False


def _named(model: nn.Module, path: str, point: str) -> HookPoint:
    signature = f"{type(model).__name__.lower()}_{path.replace('.', '_')}"
    return HookPoint(path, point, signature + ("__input" if point == "input" else ""), _names(model, path, point))


def _names(model: nn.Module, path: str, point: str) -> tuple[str, ...]:
    """The short names of a place: by role, from the front and from the end, and TransformerLens'."""
    try:
        prefix, stack = blocks(model)
    except InputError:
        return ()
    number = path.removeprefix(f"{prefix}.").partition(".")[0]
    if not path.startswith(f"{prefix}.") or not number.isdigit():
        return ()
    i, inner = int(number), path != f"{prefix}.{number}"
    place_of = roles(model, i) if inner else {"resid_pre": (path, "input"), "resid_post": (path, "output")}
    found = [role for role, place in place_of.items() if place == (path, point)]
    return tuple(name for role in found
                 for name in (f"{role}:{i}", f"{role}:{i - len(stack)}", f"blocks.{i}.hook_{role}"))


def _place(model: nn.Module, role: str, number: str) -> tuple[str, str]:
    if number == "*":
        raise InputError(f"{role}:* means several layers, and one is asked for; give a number")
    path, modules = blocks(model)
    index, n = int(number), len(modules)
    if not -n <= index < n:
        raise InputError(f"{role}:{number} is beyond the last block; {type(model).__name__} has blocks 0 to {n - 1}")
    if role == "resid_pre" or role == "resid_post":  # known without a pass
        return f"{path}.{index % n}", "input" if role == "resid_pre" else "output"
    place = roles(model, index % n)[role]
    if isinstance(place, str):
        raise InputError(f"there is no {role}:{number}: {place}")
    return place


class _Handles:
    """Several hooks that are removed together."""

    def __init__(self, *handles: Any):
        self.handles = handles

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def _hook(model: nn.Module, point: HookPoint, see: Callable[[Tensor], Tensor | None]) -> _Handles:
    """Register see(hidden states) at the hook point; a tensor that it returns replaces them.

    Inside a block that flattens its texts (OPT) see() gets and gives [B, T, D] all the same.
    """
    module = model.get_submodule(point.path)
    texts: list[int] = []
    handles = []
    if point.names and not point.path.endswith(f".{_number(point)}"):

        def note(_module, args, kwargs):
            found = hidden_argument(args, kwargs)
            texts[:] = [] if found is None else found[1].shape[:2]

        handles.append(model.get_submodule(_block_path(model, point)).register_forward_pre_hook(note, with_kwargs=True))

    def look(hidden: Tensor | None) -> Tensor | None:
        if hidden is None:
            raise InputError(f"the {point.point} of {point.path} is no tensor of activations; choose another layer")
        new = see(as_texts(hidden, tuple(texts)))
        return None if new is None else new.reshape(hidden.shape)

    if point.point == "output":

        def after(_module, _args, output):
            new = look(hidden_of(output))
            return None if new is None else with_output(output, new)

        return _Handles(*handles, module.register_forward_hook(after))

    def before(_module, args, kwargs):
        found = hidden_argument(args, kwargs)
        new = look(None if found is None else found[1])
        return None if new is None else with_hidden(args, kwargs, new)

    return _Handles(*handles, module.register_forward_pre_hook(before, with_kwargs=True))


def _number(point: HookPoint) -> int:
    return int(point.names[0].rpartition(":")[2])


def _block_path(model: nn.Module, point: HookPoint) -> str:
    return f"{blocks(model)[0]}.{_number(point)}"


@contextmanager
def capture(model: nn.Module, points: list[HookPoint], stop: bool = True) -> Iterator[dict[str, Tensor]]:
    """Collect the hidden states at `points` during one forward pass inside the block.

    Yields a dict signature -> tensor that the pass fills. With stop, the pass ends as soon as every point
    was seen, whatever their order in the list: deeper layers and the head are never computed. The hooks are
    removed when the block ends. The tensors keep their graph; use torch.no_grad() where none is wanted.

    Raises InputError if the pass ends without reaching some point.
    """
    seen: dict[str, Tensor] = {}

    def collect(point: HookPoint):
        def see(hidden: Tensor) -> None:
            seen[point.signature] = hidden
            if stop and len(seen) == len(points):
                raise _Stop
            seen[point.signature] = hidden.clone()  # some blocks (Falcon's) go on to add in place

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
        raise InputError(f"the forward pass never reached {', '.join(missing)}; choose another layer")


@contextmanager
def edit(model: nn.Module, point: HookPoint, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace the hidden states x at `point` by change(x) in every forward pass inside the block.

    At a resid_mid point the residual stream itself is changed: the norm reads change(x), and because the block has
    already kept x for its sum, the difference change(x) - x is added to what the block gives. At any other input point
    only what that module reads is changed.
    """
    differences: list[Tensor] = []

    def change_stream(x: Tensor) -> Tensor:
        new = change(x)
        differences[:] = [new - x]
        return new

    with ExitStack() as stack:
        if point.names and point.names[0].startswith("resid_mid:"):
            block = _named(model, _block_path(model, point), "output")
            stack.callback(_hook(model, point, change_stream).remove)
            stack.callback(_hook(model, block, lambda y: y + differences[0].to(y)).remove)
        else:
            stack.callback(_hook(model, point, change).remove)
        yield
