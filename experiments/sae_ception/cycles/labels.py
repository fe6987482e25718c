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

from lib.environment import InputError

SHOWN_ROWS = 5  # row numbers named in a message


def classes(values: list[Any], where: list[str], field: str, trained_on: bool = True) -> tuple[Tensor, list[str]]:
    """Classes 0..C-1 of the values, int64 [N], in the order of the sorted values, and their names.

    where: the split of each value, in the order of its data set; field: what messages call the values. The classes are
    the training examples' values, or with trained_on=False all values. Raises InputError for missing values (None, NaN,
    blank), for values that can't be labels (lists, dicts ...), for mixed kinds, and for held-out values that no
    training example has.
    """
    values = [value.item() if hasattr(value, "item") and not hasattr(value, "__len__") else value for value in values]
    refuse = partial(_refuse, values, where, field)
    refuse(_is_missing, "no value in", "give them a label or leave them out")
    refuse(_is_no_label, "no plain label (a list, dict or date) in", "set a field of words or numbers")
    kinds = [_kind(value) for value in values]
    other = next((i for i, kind in enumerate(kinds) if kind != kinds[0]), None)
    if other is not None:
        raise InputError(f"{field} mixes {kinds[0]} and {kinds[other]} (row {_row(other, where)}: {values[other]!r}); "
                         "write all labels alike")
    known = sorted({value for value, w in zip(values, where) if w == "train" or not trained_on})
    number = {value: i for i, value in enumerate(known)}
    remedy = "hidden test labels can't be used: set TEST_SPLIT or TEST_DATASET"
    refuse(lambda value: value not in number, "a value that no training example has in", remedy)
    return torch.tensor([number[value] for value in values]), [str(value) for value in known]


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
    """How many of the examples each class has, as in "sad 12, happy 30"; only the 12 largest of many classes."""
    sizes = torch.bincount(y[ids], minlength=len(names)).tolist()
    order = range(len(names)) if len(names) <= 12 else sorted(range(len(names)), key=lambda c: -sizes[c])[:12]
    return ", ".join(f"{names[c]} {sizes[c]:,}" for c in order) + (" ..." if len(names) > 12 else "")
