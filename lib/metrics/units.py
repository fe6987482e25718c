"""How well one unit tells the tokens of a concept from all others: a latent, a dimension, a token; and what a table of
tokens tells.

Every kind is scored in the same way: unit and threshold are chosen by F1 on the rows of training texts, and scored on
those of held-out texts. Everywhere labels are bool [N, C], one column a concept, and is_val is bool [N].
"""
from collections.abc import Iterable
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from ..sae import SAE

THRESHOLDS = 14  # quantiles tried for each dimension
SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)  # of a latent's largest code, tried as its threshold
SAMPLE = 4_000_000  # activations, evenly thinned, that quantiles are taken of
Scores = dict[str, Any]
"""unit; precision, recall and f1, held out; f1_train."""
Counts = Iterable[tuple[Tensor, Tensor]]
"""For training rows, then for held-out rows: firings of each unit [U], and those on each concept's rows [C, U]."""


def recovery(
    saes: dict[str, SAE], x: Tensor, labels: Tensor, is_val: Tensor, *, principal: Tensor, ids: Tensor, before: Tensor
) -> list[dict[str, Scores]]:
    """For each concept, a column of labels (bool [N, C]): kind -> scores of its best unit, and of the tables.

    saes: kind -> SAE; "latent" is the trained one, which is also scored by firing at all. x: rows [N, D]. is_val: bool
    [N]. principal: directions [D, P]. ids, before: token ids of the rows, and of the token before each (-1: none).
    """
    kinds: dict[str, list[Scores]] = {}
    for kind, sae in saes.items():
        codes = sae.encode(x.to(sae.mean.device))
        kinds[kind] = best_latents(codes, sae.n_latents, labels, is_val)
        if kind == "latent":
            kinds["firing"] = best_latents(codes, sae.n_latents, labels, is_val, shares=(0.0,))
    kinds["neuron"] = best_dimensions(x, labels, is_val)
    kinds["pca"] = best_dimensions((x - x.mean(0)) @ principal, labels, is_val)
    kinds["token"] = best_tokens(ids, labels, is_val)
    kinds["table"], kinds["pairs"] = token_tables(ids, before, labels, is_val)
    return [{kind: column[c] for kind, column in kinds.items()} for c in range(labels.shape[1])]


def best_latents(
    codes: tuple[Tensor, Tensor], n_latents: int, labels: Tensor, is_val: Tensor, shares: tuple[float, ...] = SHARES
) -> list[Scores]:
    """For each concept the best latent by codes (values, indices) [N, k] above one of `shares` of its largest training
    code.

    F1 = 2 hits / (firings + tokens of the concept). Latent and share are those of the highest F1 on training rows, the
    scores are of held-out rows. Range: 0 to 1. Source: this project, after Gao et al. (2024).
    """
    counts = _latent_counts(codes, n_latents, labels, is_val, shares=shares)
    return _best_units(counts, labels, is_val, len(shares))


def best_dimensions(x: Tensor, labels: Tensor, is_val: Tensor) -> list[Scores]:
    """For each concept the column of x [N, D] that tells most by lying above, or below, one of THRESHOLDS quantiles.

    F1, chosen and scored as best_latents does. Range: 0 to 1. Source: this project.
    """
    return _best_units(_threshold_counts(x, labels, is_val), labels, is_val, 2 * THRESHOLDS)


def best_tokens(ids: Tensor, labels: Tensor, is_val: Tensor) -> list[Scores]:
    """For each concept the best token; ids: int64 [N].

    F1, chosen and scored as best_latents does. Range: 0 to 1. Source: this project.
    """
    tokens, which = ids.unique(return_inverse=True)
    found = _best_units(_token_counts(which, len(tokens), labels, is_val), labels, is_val)
    return [scores | {"unit": int(tokens[scores["unit"]])} for scores in found]


def token_tables(ids: Tensor, before: Tensor, labels: Tensor, is_val: Tensor) -> tuple[list[Scores], list[Scores]]:
    """Scores by the table of tokens, and by that of pairs, whose rare entries are drawn to the share of their token.

    ids, before: token ids of the rows, and of the token before each (-1: none), int64 [N]. An entry's share is
    (concept rows + prior) / (rows + 1) on training rows, and all entries above the cut of the highest F1 there count.
    Range: 0 to 1. Source: this project.
    """
    share, single = token_table(ids, labels, is_val)
    _, which = ids.unique(return_inverse=True)
    pairs, pair = torch.stack([before, which]).unique(dim=1, return_inverse=True)
    return single, table_scores(pair, labels, is_val, share[pairs[1]])[1]


def token_table(ids: Tensor, labels: Tensor, is_val: Tensor) -> tuple[Tensor, list[Scores]]:
    """table_scores() of the table of tokens; its entries are those that occur, ascending. ids: int64 [N].

    A token that training rows lack has the share of all of them. Range: 0 to 1. Source: this project.
    """
    tokens, which = ids.unique(return_inverse=True)
    base = labels[~is_val].float().mean(0, keepdim=True)
    return table_scores(which, labels, is_val, base.expand(len(tokens), -1))


def table_scores(which: Tensor, labels: Tensor, is_val: Tensor, prior: Tensor) -> tuple[Tensor, list[Scores]]:
    """(share [V, C], scores) of a table that gives each entry its share of concept rows, fitted on training rows.

    which: entry of each row, int64 [N]. prior: share [V, C] that an entry starts from, with the weight of one row. All
    rows whose entry's share reaches a cut count as the concept; the cut is that of the highest F1 on training rows.
    """
    n_entries, n_concepts = prior.shape
    concept = labels.float()
    counts, hits = [], []
    for rows in (~is_val, is_val):
        counts.append(torch.bincount(which[rows], minlength=n_entries).float())
        hits.append(torch.zeros(n_entries, n_concepts).index_add_(0, which[rows], concept[rows]))
    share = (hits[0] + prior) / (counts[0][:, None] + 1)
    found = []
    for c in range(n_concepts):
        order = share[:, c].argsort(descending=True, stable=True)
        on, fires = hits[0][order, c].double().cumsum(0), counts[0][order].double().cumsum(0)
        f1 = 2 * on / (fires + on[-1]).clamp(min=1)
        # a cut takes all entries of one share or none
        ends = torch.cat([share[order, c].diff() != 0, torch.tensor([True])])
        best = int(f1.where(ends, -1).argmax())
        taken = share[:, c] >= share[order[best], c]
        total = float(hits[1][:, c].sum())
        scores = _scores(float(hits[1][taken, c].sum()), float(counts[1][taken].sum()), total)
        found.append({"unit": None, **scores, "f1_train": float(f1[best])})
    return share, found


def _scores(hit: float, fires: float, total: float) -> Scores:
    return {
        "precision": hit / fires if fires else 0.0, "recall": hit / total if total else 0.0,
        "f1": 2 * hit / (fires + total) if fires + total else 0.0,
    }


def _latent_counts(
    codes: tuple[Tensor, Tensor], n_latents: int, labels: Tensor, is_val: Tensor, *, shares: tuple[float, ...]
) -> Counts:
    """Of the units "latent above a share of its largest training code", numbered latent * len(shares) + share."""
    values, indices = (part.cpu() for part in codes)
    train = values * ~is_val[:, None]
    largest = torch.zeros(n_latents).scatter_reduce_(0, indices.flatten(), train.flatten(), "amax")
    concepts = scipy.sparse.csr_matrix(labels.numpy().T, dtype=np.int32)
    for rows in (~is_val, is_val):
        fires, hits = [], []
        for share in shares:
            row, slot = ((values > share * largest[indices]) & (values > 0) & rows[:, None]).nonzero(as_tuple=True)
            place = row.numpy(), indices[row, slot].numpy()
            fired = scipy.sparse.csr_matrix((np.ones(len(row), np.int32), place), (len(rows), n_latents))
            fires.append(torch.from_numpy(fired.sum(0).A1))
            hits.append(torch.from_numpy((concepts @ fired).toarray()))
        yield torch.stack(fires, 1).flatten(), torch.stack(hits, 2).flatten(1)


def _threshold_counts(x: Tensor, labels: Tensor, is_val: Tensor) -> Counts:
    """Of the units "dimension d is above (not above) its quantile q", 2 * THRESHOLDS of them a dimension.

    One pass over the labels that are on counts rows in the bins between cuts; sums of bins give what lies beyond a cut.
    """
    high = torch.cat([torch.linspace(0.5, 0.95, THRESHOLDS // 2),
                      1 - torch.logspace(-1.5, -3.5, THRESHOLDS - THRESHOLDS // 2)])
    sample = x[~is_val]
    sample = sample[:: -(-sample.numel() // SAMPLE)]
    cuts = torch.quantile(sample, torch.cat([1 - high.flip(0), high]), dim=0).T.contiguous()
    n_bins = 2 * THRESHOLDS + 1
    for rows in (~is_val, is_val):
        row, concept = (place.numpy() for place in labels[rows].nonzero(as_tuple=True))
        bins = torch.searchsorted(cuts, x[rows].T.contiguous()).numpy()
        fires = np.stack([np.bincount(place, minlength=n_bins) for place in bins])
        cells = [np.bincount(concept * n_bins + place[row], minlength=labels.shape[1] * n_bins) for place in bins]
        hits = np.stack(cells, 1).reshape(labels.shape[1], n_bins, len(bins)).transpose(0, 2, 1)
        yield _beyond(fires).flatten(), _beyond(hits).flatten(1)


def _beyond(counts: np.ndarray) -> Tensor:
    """Counts [..., 2 T] below each of the first T cuts and above each of the last T, from those in 2 T + 1 bins."""
    below = torch.from_numpy(counts).cumsum(-1)
    return torch.cat([below[..., :THRESHOLDS], below[..., -1:] - below[..., THRESHOLDS:-1]], -1).float()


def _token_counts(which: Tensor, n_tokens: int, labels: Tensor, is_val: Tensor) -> Counts:
    """Of the units "the row's token is t"."""
    for rows in (~is_val, is_val):
        hits = torch.zeros(n_tokens, labels.shape[1]).index_add_(0, which[rows], labels[rows].float())
        yield torch.bincount(which[rows], minlength=n_tokens).float(), hits.T


def _best_units(counts: Counts, labels: Tensor, is_val: Tensor, n_thresholds: int = 1) -> list[Scores]:
    """For each concept the unit with the best training F1, and its scores on held-out rows."""
    (train_fires, train_hits), (val_fires, val_hits) = counts
    train_total, val_total = labels[~is_val].sum(0), labels[is_val].sum(0)
    f1 = 2 * train_hits / (train_fires + train_total[:, None]).clamp(min=1)
    found = []
    for c, unit in enumerate(f1.argmax(1).tolist()):
        scores = _scores(float(val_hits[c, unit]), float(val_fires[unit]), float(val_total[c]))
        found.append({"unit": unit // n_thresholds, **scores, "f1_train": float(f1[c, unit])})
    return found
