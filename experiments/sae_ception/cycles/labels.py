"""Labels: a data set's values as classes, the values that are refused, and samples with each class's share.

    y, names = classes(values, where, "LABEL_FIELD=mood")
    ids = draw(ids, y, limit, seed)
"""
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lib.environment import InputError, log

SHOWN_ROWS = 5  # row numbers named in a message


def classes(values: list[Any], where: list[str], field: str, trained_on: bool = True) -> tuple[Tensor, list[Any]]:
    """Classes 0..C-1 of the values, int64 [N], in the order of the sorted values, and the value of each.

    where: the split of each value, in the order of its data set; field: what messages call the values. The classes are
    the training examples' values, or with trained_on=False all values. Blanks around words do not count; 1.0 is 1. A
    held-out word that differs only in case from one class is read as it, and the log says so. Raises InputError for
    missing values (None, NaN, blank), for values that can't be labels (lists, dicts, fractions ...), for mixed kinds,
    for nearly as many values as examples, and for held-out values that no training example has.
    """
    values = [_plain(value) for value in values]
    refuse = partial(_refuse, values, where, field)
    refuse(_is_missing, "no value in", f"give them a label, leave them out, or set {_constant(field)}")
    refuse(_is_no_label, "no plain label (a list, dict or date) in", f"set {_constant(field)} to words or numbers")
    kinds = [_kind(value) for value in values]
    other = next((i for i, kind in enumerate(kinds) if kind != kinds[0]), None)
    if other is not None:
        raise InputError(f"{field} mixes {kinds[0]} and {kinds[other]} (row {_row(other, where)}: {values[other]!r}); "
                         f"write all labels alike, or set {_constant(field)} to another column")
    refuse(lambda value: isinstance(value, float), "a number that is no class in",
           f"set {_constant(field)} to a column of words or whole numbers")
    known = sorted({value for value, w in zip(values, where) if w == "train" or not trained_on})
    n_known_from = sum(w == "train" or not trained_on for w in where)
    if trained_on and n_known_from >= 10 and len(known) > n_known_from / 2:
        raise InputError(f"{field} has {len(known):,} values in {n_known_from:,} training examples (e.g. "
                         f"{str(known[0])[:40]!r}); set {_constant(field)} to a column of classes")
    values = _read_alike(values, known, field)
    refuse = partial(_refuse, values, where, field)
    number = {value: i for i, value in enumerate(known)}
    remedy = (f"set {_constant(field)} or DATASET so that training has every class; hidden test labels can't be used: "
              "set TEST_SPLIT or TEST_DATASET")
    refuse(lambda value: value not in number, "a value that no training example has in", remedy)
    return torch.tensor([number[value] for value in values]), known


def in_words(known: list[Any], called: list[str] | None) -> list[str]:
    """The names of classes with these values; called: what the numbers 0, 1 ... are called, if anybody says so."""
    is_called = all(isinstance(value, int) and 0 <= value < len(called or ()) for value in known)
    return [called[value] if called and is_called else str(value) for value in known]


def _plain(value: Any) -> Any:
    """A label without what does not belong to it: numpy's type, a whole number's ".0", blanks around a word."""
    if hasattr(value, "item") and not hasattr(value, "__len__"):
        value = value.item()
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value.strip() if isinstance(value, str) else value


def _constant(field: str) -> str:
    """The constant that a field's name in messages begins with."""
    return field.partition("=")[0]


def _read_alike(values: list[Any], known: list[Any], field: str) -> list[Any]:
    """Held-out words that differ only in case from exactly one known class become it. The log names what was done."""
    spelt: dict[str, list[str]] = {}
    for name in known:
        if isinstance(name, str):
            spelt.setdefault(name.casefold(), []).append(name)
    for names in spelt.values():
        if len(names) > 1:
            log.warning("%s: %s are different classes; write them alike in DATASET if they are one", field,
                        " and ".join(map(repr, names)))
    read = {value: names[0] for value in dict.fromkeys(values)
            if isinstance(value, str) and value not in known and len(names := spelt.get(value.casefold(), [])) == 1}
    for value, name in read.items():
        log.warning("%s: %r is read as %r", field, value, name)
    return [read.get(value, value) if isinstance(value, str) else value for value in values]


def smallest_class(y: Tensor, names: list[str]) -> str:
    """The class with the fewest examples, in words."""
    sizes = torch.bincount(y, minlength=len(names))
    return f"{names[int(sizes.argmin())]!r} has {int(sizes.min()):,} of {len(y):,} examples"


def _is_missing(value: Any) -> bool:
    if isinstance(value, str):
        return not value.strip()
    return (value is None or type(value).__name__ in ("NAType", "NaTType")
            or (isinstance(value, float) and math.isnan(value)))


def _is_no_label(value: Any) -> bool:
    return not isinstance(value, str | bool | int | float)


def _kind(value: Any) -> str:
    return "words" if isinstance(value, str) else "true or false" if isinstance(value, bool) else "numbers"


def _row(i: int, where: list[str]) -> str:
    """Example i's number in its split, from 1, and the split."""
    return f"{where[:i].count(where[i]) + 1} of {where[i]}"


def _refuse(
    values: list[Any], where: list[str], field: str, wrong: Callable[[Any], bool], what: str, remedy: str
) -> None:
    found = [i for i, value in enumerate(values) if wrong(value)]
    if found:
        rows = ", ".join(_row(i, where) for i in found[:SHOWN_ROWS]) + (" ..." if len(found) > SHOWN_ROWS else "")
        example = "" if _is_missing(values[found[0]]) else f", e.g. {str(values[found[0]])[:40]!r}"
        raise InputError(f"{field} has {what} {len(found):,} of {len(values):,} examples (rows {rows}{example}); "
                         f"{remedy}")


def draw(ids: Tensor, y: Tensor, limit: int | None, seed: int) -> Tensor:
    """`limit` of the example ids [N] (None: all), in their order, drawn by `seed` with each class's share.

    y [all examples]: their classes. Shares are rounded by largest remainder; if the limit allows, every class keeps at
    least one example.
    """
    if limit is None or len(ids) <= limit:
        return ids
    labels = y[ids]
    sizes = torch.bincount(labels)
    take = _shares(sizes, limit)
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for c in sizes.nonzero()[:, 0].tolist():
        members = ids[labels == c]
        chosen.append(members[torch.randperm(len(members), generator=generator)[: take[c]]])
    wanted = torch.cat(chosen)
    return ids[torch.isin(ids, wanted)]


def _shares(sizes: Tensor, limit: int) -> list[int]:
    """How many of each class a sample of `limit` takes."""
    exact = sizes.double() * limit / sizes.sum()
    take = exact.floor().long()
    by_remainder = (exact - take).argsort(descending=True, stable=True)
    take[by_remainder[: limit - int(take.sum())]] += 1
    for c in ((take == 0) & (sizes > 0)).nonzero()[:, 0].tolist():
        if int(take.max()) > 1:
            take[take.argmax()] -= 1
            take[c] = 1
    return take.tolist()


def counts(ids: Tensor, y: Tensor, names: list[str]) -> str:
    """How many of the examples each class has, as in "sad (12), happy (30)"; only the 12 largest of many classes."""
    sizes = torch.bincount(y[ids], minlength=len(names)).tolist()
    order = range(len(names)) if len(names) <= 12 else sorted(range(len(names)), key=lambda c: -sizes[c])[:12]
    return ", ".join(f"{names[c]} ({sizes[c]:,})" for c in order) + (" ..." if len(names) > 12 else "")
