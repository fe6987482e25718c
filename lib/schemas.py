"""What a file must hold when it is read back: descriptions of nested values and tensors, and the check against one.

    int, float, str, bool        a value of that type; numbers are finite, an int passes as a float, a bool as neither
    Number(int, 1), Text("a+")   a number within bounds, a string that a pattern matches whole
    "train", 1, None             this value
    ("train", "val")             one of these
    [int], [int, str]            a list of such values; a list of exactly these two
    {"a": int, "b?": int}        a dict with these keys, "?" marks an optional one; further keys may hold anything
    {Text("a+"): int}            a dict whose further keys match the pattern and hold such a value
    Columns(("step", "loss"))    a dict of lists of numbers, all of one length
    Any                          what JSON can hold, at most DEEPEST levels deep

A tensor is described by "int64 N" or "float32 F D": a letter stands for one size wherever it appears. The description
of a file stands beside the code that reads it; words that several need, and an SAE's file, are at the end of this one.
"""
import math
import re
import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

DEEPEST = 32  # levels of lists and dicts inside one another
LARGEST = 2**63  # whole number
DTYPES = {
    "float32": (torch.float32,), "int64": (torch.int64,), "int32": (torch.int32,), "uint8": (torch.uint8,),
    "float": (torch.float32, torch.bfloat16, torch.float16), "sums": (torch.float64, torch.float32),
    "any_float": (torch.float64, torch.float32, torch.bfloat16, torch.float16),
}
WORDS = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false", None: "null",
         Any: "anything"}


class Misfit(Exception):
    """A value that does not match its description."""

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
    """Lists of numbers by name, all of one length."""

    names: tuple[str, ...]


class Schema(NamedTuple):
    """A JSON file."""

    content: Any
    """The description of its value."""
    sealed: bool = False
    """Whether it was written with write_json(sealed=True) and is refused without its seal."""
    remedy: str = "delete it and run its step again"
    """What a user can do about a file that does not match."""
    limit: int = 1 << 28
    """Bytes that are read at most."""


def check(value: Any, wanted: Any) -> None:
    """Raise Misfit, which names the place, if the value does not match the description."""
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
    """Whether a value that holds no others matches its description."""
    if wanted is int or wanted is float:
        wanted = Number(wanted) if wanted is int else Number(float, -math.inf, math.inf)
    if isinstance(wanted, Number):
        kinds = (int,) if wanted.kind is int else (int, float)
        return type(value) in kinds and abs(value) <= sys.float_info.max and wanted.low <= value <= wanted.high
    if isinstance(wanted, Text):
        return type(value) is str and re.fullmatch(wanted.pattern, value) is not None
    return type(value) is wanted if isinstance(wanted, type) else type(value) is type(wanted) and value == wanted


def _dict(value: Any, wanted: dict[Any, Any]) -> None:
    if not isinstance(value, dict):  # or a subclass, as a state_dict is
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
    """Whether a list holds only finite numbers; long ones are common, and this runs at the speed of C."""
    if not set(map(type, values)) <= {int, float}:
        return False
    most = sys.float_info.max
    return not values or (max(values) <= most and min(values) >= -most and not any(map(math.isnan, values)))


def describe(wanted: Any) -> str:
    """A description in words."""
    if isinstance(wanted, Number):
        name = "a whole number" if wanted.kind is int else "a number"
        low, high = (None if abs(bound) >= LARGEST else f"{bound:g}" for bound in (wanted.low, wanted.high))
        bounds = f" from {low} to {high}" if low and high else f" from {low} up" if low else f" up to {high}"
        return name + (bounds if low or high else "")
    if isinstance(wanted, Text):
        return f"text like {wanted.pattern}"
    if isinstance(wanted, dict | Columns):
        return "a dict"
    if isinstance(wanted, list):
        return "a list" if len(wanted) == 1 else f"a list of {len(wanted)}"
    return WORDS.get(wanted) or repr(wanted)


def _short(value: Any) -> str:
    if isinstance(value, list | dict):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}".removeprefix("torch.")
    if type(value) is int and abs(value) > LARGEST:
        return "a number of many digits"
    return ascii(value[:40] if isinstance(value, str | bytes) else value)[:60]


def check_tensors(tensors: Any, wanted: dict[str, str], finite: bool = True, **sizes: int) -> dict[str, int]:
    """Raise Misfit if a dict's tensors don't match their descriptions; returns the size of each letter.

    sizes: letters whose size is known. finite: whether values must be finite, which reads them all.
    """
    if not isinstance(tensors, dict):
        raise Misfit("a dict of tensors", tensors)
    for name, description in wanted.items():
        optional, name = name.endswith("?"), name.removesuffix("?")
        if name not in tensors and optional:
            continue
        tensor, (dtype, *letters) = tensors.get(name), description.split()
        try:
            # A tensor that repeats a small storage could claim any size.
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


COUNT, POSITIVE, POSITIVE_NUMBER = Number(int, 0), Number(int, 1), Number(float, 1e-30)
NAME = Text(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")
# Relative, and no part begins with a dot, so that it can't leave its folder.
PATH = Text(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*(/[A-Za-z0-9_][A-Za-z0-9_.\-]*)*")
SHORT_HASH, SHA256 = Text("[0-9a-f]{16}"), Text("[0-9a-f]{64}")
CONSTANTS = {Text("[A-Z][A-Z0-9_]*"): Any}
NUMBERS = {Text(".+"): float}
FILES = [{"file": PATH, "bytes": COUNT, "sha256": SHA256}]

SAE_CONFIG = {
    "n_inputs": POSITIVE, "n_latents": POSITIVE, "top_k": POSITIVE, "hook?": str, "run_id?": NAME, "data_digest?": str,
    "constants?": CONSTANTS, "final?": NUMBERS, "tokens_trained?": (POSITIVE, None), "steps?": POSITIVE,
    "provenance?": {"git": (str, None)}, "imported?": {"format": str, "source": str}, "origin?": {},
}
SAE_STATE = {"W_enc": "float32 F D", "b_enc": "float32 F", "W_dec": "float32 F D", "mean": "float32 D",
             "scale": "float32", "threshold?": "float32 F", "threshold_first?": "float32 F", "refine?": "float32"}
SAE_PROBE = {"x": "float32 N D", "values": "float32 N K", "indices": "int64 N K"}
SAE_SIDECAR = Schema(SAE_CONFIG | {"schema_version": 1, "sae_hash": SHORT_HASH}, sealed=True,
                     remedy="run 02_train_sae.py again")
