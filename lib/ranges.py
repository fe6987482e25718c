"""What values a constant may have: declared with it, checked before anything is loaded, shown by --help.

    TOP_K: Count = 8                                          # a whole number, at least 1
    LR: Rate | None = None                                    # above 0 and at most 10, or None
    WHITEN: Annotated[float, at_least(0), at_most(1)] = 1 / 8
    KIND: Literal["topk", "jumprelu"] = "topk"
    KS: tuple[Count, ...] = (2, 4)                            # one or more; KS=4 on the command line means (4,)
    METRICS: tuple[str, ...] | tuple[()] = ()                 # or none at all

The types are Python's own. A tuple may be empty only if `tuple[()]` allows it. Numbers are finite, text holds no NUL
and no lone surrogate, and True is not a number.
"""
import difflib
import math
import os
import re
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

MAX_TEXT = 10_000  # characters; longer text was pasted by mistake
MAX_NAME, MAX_PATH = 255, 4000  # bytes that file systems allow in a name and in a path
SHOWN_BELOW = 10**6  # larger upper bounds only keep nonsense out; --help does not show them


class Unfit(ValueError):
    """A value outside its constant's range; the message completes "NAME=value "."""


class Rule(NamedTuple):
    """A condition on a value, beyond its type."""

    text: str
    """Completes "must be "."""
    holds: Callable[[Any], bool]
    shown: bool = True
    """Whether --help shows it."""


def at_least(bound: float) -> Rule:
    return Rule(f"at least {_number(bound)}", lambda value: value >= bound)


def above(bound: float) -> Rule:
    return Rule(f"above {_number(bound)}", lambda value: value > bound)


def at_most(bound: float) -> Rule:
    return Rule(f"at most {_number(bound)}", lambda value: value <= bound, bound < SHOWN_BELOW)


def below(bound: float) -> Rule:
    return Rule(f"below {_number(bound)}", lambda value: value < bound, bound < SHOWN_BELOW)


def like(pattern: str, text: str) -> Rule:
    """Text that a regular expression matches whole; `text` puts it in words."""
    return Rule(text, lambda value: re.fullmatch(pattern, value) is not None)


def _number(bound: float) -> str:
    return f"{bound:,}"


def _fits_on_disk(value: str) -> bool:
    return len(os.fsencode(value)) <= MAX_PATH and all(len(os.fsencode(part)) <= MAX_NAME for part in value.split("/"))


Count = Annotated[int, at_least(1), at_most(10**12)]
NotNegative = Annotated[int, at_least(0), at_most(10**12)]
Size = Annotated[int, at_least(1), at_most(10**6)]  # of what is held in memory: a batch, a text, a layer
Positive = Annotated[float, above(0), at_most(10**30)]
Rate = Annotated[float, above(0), at_most(10)]  # a learning rate; beyond 10 nothing learns
Share = Annotated[float, above(0), below(1)]
Amount = Annotated[float, at_least(0), at_most(10**30)]
Percent = Annotated[float, above(0), at_most(100)]
Part = Annotated[float, at_least(0), at_most(1)]
Seed = Annotated[int, at_least(0), below(2**32)]  # what every random generator accepts
Threads = Annotated[int, at_least(1), at_most(1024)]
Name = Annotated[str, Rule("not empty", lambda value: value.strip() != "", False)]
Location = Annotated[  # a file, a directory, or a name on the hub
    Name,
    Rule("a path that a file system can hold: it is too long", _fits_on_disk, False),
    Rule("a path without an unknown user's ~", lambda value: not os.path.expanduser(value).startswith("~"), False),
]
FileName = Annotated[str,
                     like(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,200}", "a file name of letters, digits, '_', '-' and '.'")]
Device = Annotated[str, like(r"auto|cpu|mps|cuda(:\d{1,3})?", "one of auto, cpu, mps, cuda, cuda:N")]
Precision = Literal["auto", "float32", "bfloat16", "float16"]
Tracker = Literal["local", "tensorboard", "wandb", "trackio", "mlflow"]

WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "text", types.NoneType: "None"}


def fit(value: Any, kind: Any) -> Any:
    """`value` in the form of its kind: a whole number becomes a float, a single value a tuple of one, where wanted.

    Raises Unfit, which says what the value must be.
    """
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _fit_one_of(value, parts)
    if origin is Annotated:
        value = fit(value, parts[0])
        for rule in parts[1:]:
            if not rule.holds(value):
                raise Unfit(f"must be {rule.text}")
        return value
    if origin is Literal:
        if not any(type(value) is type(choice) and value == choice for choice in parts):
            raise Unfit(f"must be {words(kind)}{nearest(str(value), [str(choice) for choice in parts])}")
        return value
    if origin is tuple:
        return _fit_tuple(value, parts)
    if origin is dict or typing.is_typeddict(kind):
        return _fit_dict(value, kind)
    return _fit_plain(value, kind)


def _fit_plain(value: Any, kind: Any) -> Any:
    if kind is float and type(value) is int:
        value = float(value) if abs(value) < 10**300 else math.inf
    if kind is not Any and type(value) is not kind:
        raise Unfit(f"must be {words(kind)}")
    if kind is float and not math.isfinite(value):
        raise Unfit("must be a finite number")
    if kind is str and ("\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value)):
        raise Unfit("must be text without NUL and lone surrogates")
    if kind is str and len(value) > MAX_TEXT:
        raise Unfit(f"must be at most {MAX_TEXT:,} characters long")
    return value


def _fit_one_of(value: Any, kinds: tuple[Any, ...]) -> Any:
    close = []  # what is wrong where the type is right and the range is not
    for kind in kinds:
        try:
            return fit(value, kind)
        except Unfit as error:
            plain = _plain(kind)
            if plain is type(value) or (plain, type(value)) == (float, int) or plain is tuple and kind != tuple[()]:
                close.append(str(error))
    if close:
        must, question, suggestion = close[0].partition("; did you mean")
        raise Unfit(f"{must}{' or None' if types.NoneType in kinds else ''}{question}{suggestion}")
    raise Unfit("must be " + " or ".join(dict.fromkeys(words(kind) for kind in kinds)))


def _plain(kind: Any) -> Any:
    """int for Annotated[int, ...], tuple for tuple[int, ...]."""
    origin = typing.get_origin(kind)
    if origin is Literal:
        return type(typing.get_args(kind)[0])
    return _plain(typing.get_args(kind)[0]) if origin is Annotated else origin or kind


def _fit_tuple(value: Any, parts: tuple[Any, ...]) -> tuple:
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    if parts == ():
        if values:
            raise Unfit("must be empty")
        return values
    each = parts[:1] * len(values) if parts[1:] == (...,) else parts
    if not values:
        raise Unfit("must hold at least one value")
    if len(each) != len(values):
        raise Unfit(f"must hold {len(each)} values")
    found = []
    for member, kind in zip(values, each):
        try:
            found.append(fit(member, kind))
        except Unfit as error:
            raise Unfit(f"holds {shown(member)}, which {error}" if isinstance(value, list | tuple)
                        else str(error)) from None
    return tuple(found)


def _fit_dict(value: Any, kind: Any) -> dict:
    if type(value) is not dict:
        raise Unfit(f"must be {words(kind)}")
    kinds = typing.get_type_hints(kind, include_extras=True) if typing.is_typeddict(kind) else None
    key_kind, value_kind = (Literal[tuple(kinds)], None) if kinds is not None else typing.get_args(kind)
    found = {}
    for key, content in value.items():
        try:
            key = fit(key, key_kind)
        except Unfit as error:
            raise Unfit(f"holds {shown(key)}, which {error}") from None
        try:
            found[key] = fit(content, kinds[key] if kinds is not None else value_kind)
        except Unfit as error:
            raise Unfit(f"holds {shown(key)}={shown(content)}, which {error}") from None
    return found


def is_tuple(kind: Any) -> bool:
    """Whether a kind holds several values."""
    origin = typing.get_origin(kind)
    return (origin is tuple or origin in (typing.Union, types.UnionType)
            and any(is_tuple(part) for part in typing.get_args(kind)))


def words(kind: Any) -> str:
    """A kind in words, without its range: "a whole number or None"."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(words(part) for part in parts))
    if origin is Annotated:
        return words(parts[0])
    if origin is Literal:
        return ("one of " if len(parts) > 1 else "") + ", ".join(map(str, parts))
    if origin is tuple:
        return "values separated by commas" if parts else "()"
    return "a dictionary, {name: value}" if origin is dict or typing.is_typeddict(kind) else WORDS.get(kind, str(kind))


def range_of(kind: Any) -> str:
    """A kind's range as --help shows it: "at least 1", "one of add, scale"; empty if it has none."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return "; or ".join(filter(None, (range_of(part) for part in parts)))
    if origin is Annotated:
        return ", ".join(filter(None, [range_of(parts[0]), *(rule.text for rule in parts[1:] if rule.shown)]))
    if origin is Literal:
        return words(kind)
    if origin is tuple and parts:
        inner = dict.fromkeys(filter(None, (range_of(part) for part in parts if part is not ...)))
        return "; ".join(f"each {text}" for text in inner)
    return ""


def nearest(name: str, names: list[str]) -> str:
    """"; did you mean ...?" if one of the names is close."""
    close = difflib.get_close_matches(name[:200], names, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def shown(value: Any) -> str:
    """A value as one short printable line."""
    text = value if isinstance(value, str) else repr(value)
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 80 else text[:77] + "..."
