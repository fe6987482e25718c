"""Descriptions of nested values and tensors, and the check that a value fits one. lib/schemas.py describes each file.

A description is made of Python's own words:

    int, float, str, bool        a value of that type; numbers are finite, an int is also a float, a bool is neither
    Number(int, 1), Text("a+")   a number within bounds, a string that a pattern matches whole
    "train", 1, None             just that value
    ("train", "val")             one of these
    [int], [int, str]            a list of such values; a list of just these two
    {"a": int, "b?": int}        a dict with these keys, "?" may be missing; others hold what they like
    {Text("a+"): int}            a dict whose other keys are like this
    Columns("step", "loss")      a dict of lists of numbers, all of one length
    Any                          what JSON can hold, not deeper than DEEPEST

Tensors are described by "int64 N" or "float32 F D": a letter stands for one size wherever it comes.
"""
import math
import re
import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

DEEPEST = 32  # lists and dicts inside each other
LARGEST = 2**63  # of a whole number
DTYPES = {
    "float32": (torch.float32,), "int64": (torch.int64,), "int32": (torch.int32,),
    "float": (torch.float32, torch.bfloat16, torch.float16),
    "any_float": (torch.float64, torch.float32, torch.bfloat16, torch.float16),
    "sums": (torch.float64, torch.float32),
}


class Misfit(Exception):
    """A value that is not as described."""

    def __init__(self, wanted: str, value: Any):
        self.place: list[str] = []  # from the inside out
        self.wanted, self.value = wanted, value

    def __str__(self) -> str:
        place = ".".join(reversed(self.place))[:120]
        return f"{place or 'it'} must be {self.wanted}, not {_short(self.value)}"


@dataclass(frozen=True)
class Number:
    """A finite number from low to high."""

    kind: type
    low: float = -LARGEST
    high: float = LARGEST


@dataclass(frozen=True)
class Text:
    """A string that matches the pattern whole."""

    pattern: str


@dataclass(frozen=True)
class Columns:
    """Lists of numbers by name, as long as each other."""

    names: tuple[str, ...]

    def __init__(self, *names: str):
        object.__setattr__(self, "names", names)


class Schema(NamedTuple):
    """What a JSON file must hold."""

    content: Any
    """See the module."""
    sealed: bool = False
    """Written with write_json(sealed=True); without its seal it is refused."""
    remedy: str = "delete it and run its step again"
    """What to do about one that does not fit."""
    limit: int = 1 << 28
    """Bytes."""


def check(value: Any, wanted: Any) -> None:
    """Raise Misfit, which names the place, if the value is not as described."""
    if wanted is Any:
        _plain(value, DEEPEST)
    elif isinstance(wanted, tuple):
        if not any(_fits(value, one) for one in wanted):
            raise Misfit(" or ".join(map(describe, wanted)), value)
    elif isinstance(wanted, list):
        if type(value) is not list or len(wanted) not in (1, len(value)):
            raise Misfit(describe(wanted), value)
        if len(wanted) > 1:
            _each(enumerate(value), wanted.__getitem__)
        elif not (wanted[0] is float and _all_finite(value)):
            _each(enumerate(value), lambda _: wanted[0])
    elif isinstance(wanted, dict):
        _dict(value, wanted)
    elif isinstance(wanted, Columns):
        _dict(value, dict.fromkeys(wanted.names, [float]))
        if len({len(value[name]) for name in wanted.names}) > 1:
            raise Misfit("lists of one length", value)
    elif not _is(value, wanted):
        raise Misfit(describe(wanted), value)


def _fits(value: Any, wanted: Any) -> bool:
    try:
        check(value, wanted)
    except Misfit:
        return False
    return True


def _is(value: Any, wanted: Any) -> bool:
    """Whether a value that holds no others is as described."""
    if wanted is int or wanted is float:
        wanted = Number(wanted) if wanted is int else Number(float, -math.inf, math.inf)
    if isinstance(wanted, Number):
        kinds = (int,) if wanted.kind is int else (int, float)
        return type(value) in kinds and abs(value) <= sys.float_info.max and wanted.low <= value <= wanted.high
    if isinstance(wanted, Text):
        return type(value) is str and re.fullmatch(wanted.pattern, value) is not None
    return type(value) is wanted if isinstance(wanted, type) else type(value) is type(wanted) and value == wanted


def _dict(value: Any, wanted: dict[Any, Any]) -> None:
    if not isinstance(value, dict):  # a state_dict is an ordered one
        raise Misfit(describe(wanted), value)
    known = {name.removesuffix("?"): inner for name, inner in wanted.items() if isinstance(name, str)}
    others = [(key, inner) for key, inner in wanted.items() if not isinstance(key, str)]
    for name in wanted:
        if isinstance(name, str) and not name.endswith("?") and name not in value:
            raise Misfit(f"a dict with {name!r}", value)

    def of(name: str) -> Any:
        if name in known:
            return known[name]
        fitting = [inner for key, inner in others if _is(name, key)]
        if others and not fitting:
            raise Misfit(f"named {describe(others[0][0])}", name)
        return fitting[0] if fitting else Any

    _each(value.items(), of)


def _each(items: Any, of: Any) -> None:
    for name, inner in items:
        try:
            check(inner, of(name))
        except Misfit as misfit:
            misfit.place.append(str(name)[:60])
            raise


def _plain(value: Any, depth: int) -> None:
    if isinstance(value, list | dict):
        if not depth:
            raise Misfit(f"nested at most {DEEPEST} deep", value)
        if not (isinstance(value, list) and _all_finite(value)):
            for inner in value.values() if isinstance(value, dict) else value:
                _plain(inner, depth - 1)
    elif isinstance(value, float) and not math.isfinite(value) or type(value) is int and abs(value) > LARGEST:
        raise Misfit("a finite number of at most 19 digits", value)


def _all_finite(values: list[Any]) -> bool:
    """Whether a list holds nothing but finite numbers, at the speed of C."""
    if not set(map(type, values)) <= {int, float}:
        return False
    most = sys.float_info.max
    return not values or (max(values) <= most and min(values) >= -most and not any(map(math.isnan, values)))


def describe(wanted: Any) -> str:
    """A description in words."""
    if isinstance(wanted, Number):
        name = "a whole number" if wanted.kind is int else "a number"
        low, high = (None if abs(bound) >= LARGEST else f"{bound:g}" for bound in (wanted.low, wanted.high))
        return (name
                + (f" from {low} to {high}" if low and high else f" from {low} up" if low else f" up to {high}" if high
                   else ""))
    if isinstance(wanted, Text):
        return f"text like {wanted.pattern}"
    if isinstance(wanted, dict | Columns):
        return "a dict"
    words = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false", None: "null",
             Any: "anything"}
    if isinstance(wanted, list):
        return "a list" if len(wanted) == 1 else f"a list of {len(wanted)}"
    return words.get(wanted) or repr(wanted)


def _short(value: Any) -> str:
    if isinstance(value, list | dict):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}".removeprefix("torch.")
    if type(value) is int and abs(value) > LARGEST:
        return "a number of many digits"
    return ascii(value[:40] if isinstance(value, str | bytes) else value)[:60]


def check_tensors(tensors: Any, wanted: dict[str, str], finite: bool = True, **sizes: int) -> dict[str, int]:
    """Raise Misfit if a dict's tensors are not as described; returns what the letters stand for.

    sizes: letters that are known. finite: values must be finite, which reads them all.
    """
    if not isinstance(tensors, dict):
        raise Misfit("a dict of tensors", tensors)
    for name, description in wanted.items():
        optional, name = name.endswith("?"), name.removesuffix("?")
        if name not in tensors and optional:
            continue
        tensor, (dtype, *letters) = tensors.get(name), description.split()
        try:
            # A tensor that repeats a small storage can have any size on paper.
            if (not isinstance(tensor, Tensor) or tensor.layout != torch.strided
                or tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes()):
                raise Misfit("a tensor", tensor)
            if tensor.dtype not in DTYPES[dtype] or tensor.ndim != len(letters):
                raise Misfit(f"a tensor {description}", tensor)
            for letter, size in zip(letters, tensor.shape):
                if sizes.setdefault(letter, size) != size:
                    raise Misfit(f"a tensor {description} with {letter}={sizes[letter]}", tensor)
            if finite and tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise Misfit("finite", tensor)
        except Misfit as misfit:
            misfit.place.append(name)
            raise
    return sizes
