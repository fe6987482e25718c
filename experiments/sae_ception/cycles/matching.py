"""Which latents of one SAE live on in the next one."""
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from lib.environment import InputError


def match_latents(
    a: Tensor, b: Tensor, alive_a: Tensor, alive_b: Tensor, *, kept_above: float = 0.9, moved_above: float = 0.5,
    family_above: float = 0.7,
) -> dict[str, Any]:
    """Which latents of dictionary b [F_b, D] are those of dictionary a [F_a, D] (unit rows), one to one.

    Hungarian matching of alive latents by the cosine of their dictionary rows. kept: cosine >= kept_above;
    moved: >= moved_above; the other latents of a died, those of b were born. split: latents of a with two or more of b
    above family_above; merged: latents of b with two or more of a above it. Returns pairs (a, b, cosine) and counts.
    """
    rows_a, rows_b = alive_a.nonzero()[:, 0], alive_b.nonzero()[:, 0]
    if not len(rows_a) or not len(rows_b):
        raise InputError("one of the two SAEs has no latent alive: there is nothing to match")
    cosine = a[rows_a].double() @ b[rows_b].double().T
    i, j, found = one_to_one(cosine)
    pairs = [(int(rows_a[x]), int(rows_b[y]), float(c)) for x, y, c in zip(i, j, found) if c >= moved_above]
    kept = sum(c >= kept_above for _, _, c in pairs)
    close = cosine > family_above
    return {
        "pairs": sorted(pairs, key=lambda pair: -pair[2]), "kept": kept, "moved": len(pairs) - kept,
        "died": len(rows_a) - len(pairs), "born": len(rows_b) - len(pairs),
        "split": int((close.sum(1) >= 2).sum()), "merged": int((close.sum(0) >= 2).sum()),
    }


def one_to_one(cosine: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and columns of cosine [A, B] that the Hungarian method pairs, and the cosines of the pairs: [min(A, B)]."""
    i, j = (torch.from_numpy(place) for place in linear_sum_assignment(-cosine.numpy()))
    return i, j, cosine[i, j]
