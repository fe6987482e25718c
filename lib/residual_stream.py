"""Where the residual stream of a block is, and what attention and MLP add to it: resid_pre, attn_out, ... resid_post.

    roles(model, 2)["mlp_out"]      # ("model.layers.2.mlp", "output"), or a clause that says why there is none

Roles are defined by sums, not by the names of modules:

    resid_mid = resid_pre + attn_out        resid_post = resid_mid + mlp_out

Each is confirmed by running the block: the sums must hold, and a change made there must reach the sum unchanged. A
module that normalises or scales before the sum, or adds the stream itself, is passed over for the part that gives the
summand; if there is none, the role is refused. So no architecture, not even one unseen so far, can be silently wrong.
"""
from collections.abc import Callable
from contextlib import ExitStack
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .blocks import (
    Arguments,
    as_texts,
    blocks,
    can_run,
    copied,
    hidden_argument,
    hidden_of,
    quietly,
    trial,
    with_hidden,
    with_output,
)

ROLES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
Place = tuple[str, str]  # dotted path of a module, "input" | "output"
_found: WeakKeyDictionary[nn.Module, dict[int, dict[str, Place | str]]] = WeakKeyDictionary()


class _Pass(NamedTuple):
    """Hidden states seen while one block ran; only parts that ran once, in that order."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    result: Tensor | None
    """The output of the whole block."""


def _run_block(block: nn.Module, arguments: Arguments, edits: dict[Place, Callable[[Tensor], Tensor]]) -> _Pass:
    """Run the block on its stored arguments; `edits` replace inputs or outputs of its parts."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    repeated: set[str] = set()

    def noted(seen: dict[str, Tensor], place: Place, hidden: Tensor) -> Tensor:
        value = as_texts(hidden, texts)
        value = edits[place](value) if place in edits else value
        seen[place[0]] = value.clone()
        return value.reshape(hidden.shape)

    def before(name: str):
        def hook(_module, args, kwargs):
            found = hidden_argument(args, kwargs)
            repeated.update({name} & set(inputs))
            return None if found is None else with_hidden(args, kwargs, noted(inputs, (name, "input"), found[1]))

        return hook

    def after(name: str):
        def hook(_module, _args, output):
            hidden = hidden_of(output)
            new = None if hidden is None else noted(outputs, (name, "output"), hidden)
            return with_output(output, new) if new is not None and (name, "output") in edits else None

        return hook

    args, kwargs = copied(*arguments)
    hidden = hidden_argument(args, kwargs)
    texts = tuple(hidden[1].shape[:2]) if hidden else ()
    with ExitStack() as stack:
        for name, part in block.named_modules():
            if name:
                stack.callback(part.register_forward_pre_hook(before(name), with_kwargs=True).remove)
                stack.callback(part.register_forward_hook(after(name)).remove)
        result = hidden_of(block(*args, **kwargs))
    for name in repeated:
        inputs.pop(name, None), outputs.pop(name, None)
    return _Pass(inputs, outputs, result)


def roles(model: nn.Module, index: int) -> dict[str, Place | str]:
    """For each role the place in block `index` that holds it, or a clause that says why there is none.

    A model without weights can't be run: its parts are recognised by name alone.
    """
    path, modules = blocks(model)
    prefix, block = f"{path}.{index}", modules[index]
    known = _found.setdefault(model, {})
    if index not in known:
        inside = _confirmed(model, block, index) if can_run(model) else _by_name(block)
        found: dict[str, Place | str] = {"resid_pre": (prefix, "input"), "resid_post": (prefix, "output")}
        for role, place in inside.items():
            found[role] = place if isinstance(place, str) else (f"{prefix}.{place[0]}", place[1])
        known[index] = {role: found[role] for role in ROLES}
    return known[index]


def _by_name(block: nn.Module) -> dict[str, Place | str]:
    names = [name for name, _ in block.named_children()]
    attention = next((name for name in names if "att" in name and not _is_norm(block, name)), None)
    mlp = next((name for name in names if any(part in name for part in ("mlp", "feed_forward", "ffn"))), None)
    norms = ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2")
    norm = next((name for name in norms if name in names), None)
    unknown = f"{type(block).__name__} has no part known by name"
    return {
        "resid_mid": (norm, "input") if norm else unknown,
        "attn_out": (attention, "output") if attention else unknown,
        "mlp_out": (mlp, "output") if mlp else unknown,
    }


def _is_norm(block: nn.Module, name: str) -> bool:
    return "norm" in type(block.get_submodule(name)).__name__.lower()


def _is_attention(block: nn.Module, name: str) -> bool:
    """Whether a part of the block is attention, or inside it."""
    parts = name.split(".")
    above = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(
        ("att" in part.lower() or "attention" in type(block.get_submodule(path)).__name__.lower())
        and not _is_norm(block, path)
        for part, path in zip(parts, above)
    )


def _confirmed(model: nn.Module, block: nn.Module, index: int) -> dict[str, Place | str]:
    """resid_mid, attn_out and mlp_out of a block, found among its parts and confirmed by running it."""
    kind = type(block).__name__
    plain = f"{kind} adds no sum to the stream that can be read; use resid_pre or resid_post"
    everywhere: dict[str, Place | str] = dict.fromkeys(("resid_mid", "attn_out", "mlp_out"), plain)
    arguments = trial(model).arguments
    if index >= len(arguments) or hidden_argument(*arguments[index]) is None:
        return everywhere
    with quietly(model):
        return everywhere | _Confirm(block, arguments[index]).roles(kind)


class _Confirm:
    """Runs one block on its stored arguments, with edits, and compares."""

    def __init__(self, block: nn.Module, arguments: Arguments):
        self.block, self.arguments = block, arguments
        found = hidden_argument(*arguments)
        assert found is not None
        self.x, self.clean = found[1], self.run({})
        fits = lambda states: [name for name, value in states.items() if value.shape == self.x.shape]  # noqa: E731
        self.read, self.given = fits(self.clean.inputs), fits(self.clean.outputs)
        # A module and its last part often give the same output; the shorter name is the module's.
        self.given.sort(key=lambda name: name.count("."))
        generator = torch.Generator().manual_seed(0)
        self.delta = torch.randn(self.x.shape, generator=generator).to(self.x)

    def run(self, edits: dict[Place, Callable[[Tensor], Tensor]]) -> _Pass:
        return _run_block(self.block, self.arguments, edits)

    def same(self, a: Tensor, b: Tensor, *terms: Tensor) -> bool:
        """Whether a and b are equal up to rounding, relative to the size of the terms that they are sums of.

        A few numbers may be further off: matrix products over different rows are summed in a different order.
        """
        a, b = a.float(), b.float()
        size = torch.stack([x.float().to(a.device).abs() for x in (a, b, *terms)]).sum(0)
        close = (a - b).abs() <= max(2 * torch.finfo(self.x.dtype).eps, 2e-5) * (size + size.median())
        return bool(close.float().mean() >= 0.95)

    def roles(self, kind: str) -> dict[str, Place | str]:
        result = self.clean.result
        if result is None or result.shape != self.x.shape:
            return {}
        norm = next((name for name in reversed(self.read) if _is_norm(self.block, name) and self.is_mid(name)), None)
        attention, mlp = self.summands(norm)
        no_mid = f"{kind} has no norm between attention and MLP that reads the stream; use resid_post"
        if not norm and attention and mlp and self.is_parallel(attention, mlp):
            no_mid = f"{kind} runs attention and MLP in parallel, so there is no stream between them; use resid_post"
        nothing = f"no part of {kind} gives what {{}} adds to the stream"
        return {
            "attn_out": (attention, "output") if attention else nothing.format("attention"),
            "mlp_out": (mlp, "output") if mlp else nothing.format("the MLP"),
            "resid_mid": (norm, "input") if norm else no_mid,
        }

    def is_mid(self, name: str) -> bool:
        """Whether the rest of the block depends on the input of `name` alone, and is added to it.

        If so, swapping the two texts there, and adding the difference to the block's result, swaps the result.
        """
        stream, result = self.clean.inputs[name], self.clean.result
        assert result is not None
        if self.same(stream, self.x):  # the stream before the block
            return False
        moved = self.run({(name, "input"): lambda m: m.flip(0)}).result
        difference = stream.flip(0) - stream
        # Tokens that are alike in both texts say nothing: Longformer pads its texts to whole windows.
        tells = difference.abs().amax(-1) > 0.01 * stream.abs().amax(-1)
        if moved is None or not tells.any():
            return False
        return self.same(*(x[tells] for x in (moved + difference, result.flip(0), stream, stream.flip(0))))

    def summands(self, norm: str | None) -> tuple[str | None, str | None]:
        """The parts whose outputs attention and the MLP add to the stream; None where there is no such part."""
        attentive = [name for name in self.given if _is_attention(self.block, name)]
        if not attentive and norm is None:
            return None, None
        # The output of a norm may be what attention adds, or what the MLP adds.
        norms = [name for name in self.given if _is_norm(self.block, name)]
        others = [name for name in self.given if name not in attentive]
        x, clean = self.x, self.clean
        assert clean.result is not None
        if norm is not None:
            mid = clean.inputs[norm]
            first = [name for name in [*attentive, *norms] if attentive and self.same(x + clean.outputs[name], mid, x)]
            second = [name for name in others if self.same(mid + clean.outputs[name], clean.result, mid)]
            attention = next((name for name in first if self.arrives(name, lambda p: p.inputs[norm])), None)
            return attention, next((name for name in second if self.arrives(name, lambda p: p.result)), None)
        for attention in [*attentive, *norms]:
            for mlp in others:
                total = x + clean.outputs[attention] + clean.outputs[mlp]
                if mlp == attention or not self.same(total, clean.result, x, clean.outputs[mlp]):
                    continue
                rest = lambda p, mlp=mlp: p.result - p.outputs[mlp]  # noqa: E731
                if self.arrives(attention, rest) and self.arrives(mlp, lambda p: p.result):
                    return attention, mlp
        return None, None

    def arrives(self, name: str, where: Callable[[_Pass], Tensor | None]) -> bool:
        """Whether something added to the output of `name` reaches `where` neither scaled nor normalised."""
        delta = self.delta * max(float(self.clean.outputs[name].abs().max()), float(self.x.abs().max()))
        before, after = where(self.clean), where(self.run({(name, "output"): lambda a: a + delta.to(a)}))
        return before is not None and after is not None and self.same(after - before, delta, before, after)

    def is_parallel(self, attention: str, mlp: str) -> bool:
        """Whether the MLP does not read what attention gives."""
        moved = self.run({(attention, "output"): lambda a: a + self.delta.to(a)})
        return self.same(moved.outputs[mlp], self.clean.outputs[mlp])
