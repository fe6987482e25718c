"""The layers of a model that activations can be saved at: what LAYER_SIGNATURE='?' prints."""
from typing import Any

from torch import nn

from lib.blocks import blocks, trial
from lib.environment import InputError
from lib.hooks import HookPoint, every, layer_signatures
from lib.residual_stream import ROLES, roles


def list_layers(model: nn.Module) -> None:
    """Print the short names with their widths, then every module's path, signature and class."""
    for row in short_names(model) if every_block(model) else []:
        where = (f"N = {', '.join(map(str, row['blocks']))}   width {row['width']}   such as {row['example']}"
                 if row["blocks"] else "")
        why = f"refused: {'; '.join(row['refused'])}" if row["refused"] else ""
        print(f"{row['role'] + ':N':<13}", "   ".join(part for part in (where, why) if part))
    print()
    for signature, paths in layer_signatures(model).items():
        for path in paths:
            print(f"{path:<44} {signature:<64} {type(model.get_submodule(path)).__name__}")


def every_block(model: nn.Module) -> list[HookPoint]:
    """resid_post of every block; empty for a model without a list of blocks."""
    try:
        return every(model, "resid_post")
    except InputError:
        return []


def short_names(model: nn.Module) -> list[dict[str, Any]]:
    """One dict a role: role; blocks, the numbers of those that have it; width of the stream there; example, a place;
    refused, why the other blocks lack it."""
    path, stack = blocks(model)
    table = []
    for role in ROLES:
        places = [roles(model, i)[role] for i in range(len(stack))]
        found = {i: place for i, place in enumerate(places) if not isinstance(place, str)}
        refused = list(dict.fromkeys(place for place in places if isinstance(place, str)))
        first = next(iter(found), None)
        width = None if first is None else trial(model).widths.get(f"{path}.{first}")
        example = "" if first is None else ":".join(found[first])
        table.append({"role": role, "blocks": list(found), "width": width, "example": example, "refused": refused})
    return table
