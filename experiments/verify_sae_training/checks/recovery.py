"""How well one unit tells a concept's tokens from all others: latents, neurons, directions, tokens; and what a table of
tokens tells.

    rows = recover_concepts(saes, run, hook, truth, principal)      # one dict a concept

A unit and its threshold are chosen by F1 on the rows of training texts and scored on those of held-out texts, in the
same way for every kind. A table is no unit: it is fitted to the labels, and says what the token alone, or with the one
before it, gives away. Concepts that the token table finds are *word* concepts, the others *context* concepts.
"""
from collections.abc import Iterable
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from checks.ground_truth import Truth
from concepts.codes import Codes
from lib.batches import read_rows
from lib.sae import SAE
from lib.store import Run

THRESHOLDS = 14  # quantiles tried for each neuron and each principal direction
SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)  # of a latent's largest code, tried as its threshold
SAMPLE = 4_000_000  # activations, evenly thinned, that quantiles are taken of
WORD_F1 = 0.8  # of the token table on training rows: from here on a concept is one of words
# held-out tokens with the concept (of a sense also without it), below which it is left out
MIN_TOKENS, MIN_SENSE = 20, 5
KINDS = {
    "latent": "latent of the SAE", "firing": "the same, firing at all",
    "frozen_decoder": "latent, decoder frozen at random", "frozen_encoder": "latent, encoder frozen at random",
    "untrained": "latent of the untrained SAE",
    "neuron": "neuron", "pca": "principal direction", "token": "single token", "table": "token table (fitted)",
    "pairs": "token-pair table (fitted)",
}
BASELINES = ("frozen_decoder", "frozen_encoder", "untrained", "neuron", "pca", "token")  # units, as latents are
Counts = Iterable[tuple[Tensor, Tensor]]
Scores = dict[str, Any]


def recover_concepts(
    saes: dict[str, SAE], run: Run, hook: str, truth: Truth, principal: Tensor, n_rows: int = 120_000
) -> list[dict[str, Any]]:
    """For every concept with enough held-out tokens: {"concept", "part", "context", "n_val", kind: scores, ...}.

    saes: kind -> SAE; the kind "latent" is the trained one, which is also scored by firing at all. principal:
    directions [D, P]. n_rows: about so many rows, evenly thinned, are searched for concepts that are asked for among
    all tokens.
    """
    ids = run.rows["token_id"].long()
    before = torch.where(run.rows["text_id"].diff(prepend=torch.tensor([-1])) == 0, ids.roll(1), -1)
    every = torch.arange(run.n_rows) % max(1, run.n_rows // n_rows) == 0
    with_senses = torch.stack([torch.zeros_like(every), *truth.words.values()]).any(0)
    x_all, x_senses = (read_rows(run.shards(hook), wanted) for wanted in (every, with_senses))
    found = []
    for word in (None, *truth.words):
        rows = every if word is None else truth.words[word]
        x = x_all if word is None else x_senses[rows[with_senses]]
        columns = [i for i, concept in enumerate(truth.concepts) if concept.word == word]
        labels, is_val = truth.labels[rows][:, columns], run.is_val[rows]
        n_val = labels[is_val].sum(0)
        enough = (n_val >= MIN_TOKENS if word is None
                  else (n_val >= MIN_SENSE) & (int(is_val.sum()) - n_val >= MIN_SENSE))
        if not enough.any() or not labels[~is_val].any():
            continue
        scores = recovery(saes, x, labels[:, enough], is_val, principal, ids[rows], before[rows])
        chosen = [(column, n) for column, n, is_enough in zip(columns, n_val.tolist(), enough) if is_enough]
        for (column, n), row in zip(chosen, scores):
            concept = truth.concepts[column]
            context = row["table"]["f1_train"] < WORD_F1
            found.append({"concept": concept.name, "part": concept.part, "context": context, "n_val": n, **row})
    return found


def gains(rows: list[dict[str, Any]]) -> dict[str, float]:
    """What checks.verification asks of recover_concepts' rows, by the name of the check; without those that no concept
    speaks to.
    """
    found = {}
    for name, context in (("concept_gain", False), ("context_gain", True)):
        part = [row for row in rows if row["context"] == context]
        mean = {kind: float(np.mean([row[kind]["f1"] for row in part])) for kind in KINDS if part and kind in part[0]}
        if mean:
            found[name] = mean["latent"] - max(mean[kind] for kind in BASELINES if kind in mean)
        if mean and context:
            found["context_table"] = mean["latent"] - mean["table"]
    return found


def compositions(codes: Codes, truth: Truth | None, latents: list[int], share: float = 0.8) -> dict[str, list[int]]:
    """The latents by what makes up at least `share` of their firings: "one token", else "one leaf concept" (with a
    truth), else "neither".
    """
    ids = codes.rows["token_id"].long()
    values, indices = (torch.cat(parts) for parts in list(zip(*codes))[1:])
    found: dict[str, list[int]] = {"one token": [], "one leaf concept": [], "neither": []}
    leaves = [i for i, concept in enumerate(truth.concepts) if concept.part == "leaf"] if truth else []
    row, slot = (values > 0).nonzero(as_tuple=True)
    latent = indices[row, slot].long()
    order = latent.argsort(stable=True)
    row, counts = row[order], torch.bincount(latent, minlength=codes.n_latents)
    ends = counts.cumsum(0)
    for i in latents:
        rows = row[ends[i] - counts[i] : ends[i]]
        if torch.bincount(ids[rows]).max() >= share * len(rows):
            found["one token"].append(i)
        elif truth and truth.labels[rows][:, leaves].sum(0).max() >= share * len(rows):
            found["one leaf concept"].append(i)
        else:
            found["neither"].append(i)
    return found


def recovery(
    saes: dict[str, SAE], x: Tensor, labels: Tensor, is_val: Tensor, principal: Tensor, ids: Tensor, before: Tensor
) -> list[dict[str, Scores]]:
    """Scores of each concept's best unit of every kind: {"unit", "precision", "recall", "f1"} held out, and "f1_train".

    x: rows [N, D]; labels: bool [N, C]; is_val: bool [N]; ids, before: token ids of the rows and of the rows before, -1
    for none. Kinds: those of `saes` by thresholds, "firing", "neuron", "pca", "token", and the tables "table", "pairs"
    (unit None).
    """
    kinds: dict[str, list[Scores]] = {}
    for kind, sae in saes.items():
        codes = sae.encode(x.to(sae.mean.device))
        kinds[kind] = recovery_by_latents(codes, sae.n_latents, labels, is_val)
        if kind == "latent":
            kinds["firing"] = recovery_by_latents(codes, sae.n_latents, labels, is_val, (0.0,))
    for kind, places in (("neuron", x), ("pca", (x - x.mean(0)) @ principal)):
        kinds[kind] = _best_units(_threshold_counts(places, labels, is_val), labels, is_val, 2 * THRESHOLDS)
    tokens, which = ids.unique(return_inverse=True)
    kinds["token"] = _best_units(_token_counts(which, len(tokens), labels, is_val), labels, is_val)
    for scores in kinds["token"]:
        scores["unit"] = int(tokens[scores["unit"]])
    base = labels[~is_val].float().mean(0, keepdim=True)
    share, kinds["table"] = table_scores(which, labels, is_val, base.expand(len(tokens), -1))
    pairs, pair = torch.stack([before, which]).unique(dim=1, return_inverse=True)
    _, kinds["pairs"] = table_scores(pair, labels, is_val, share[pairs[1]])
    return [{kind: column[c] for kind, column in kinds.items()} for c in range(labels.shape[1])]


def recovery_by_latents(
    codes: tuple[Tensor, Tensor], n_latents: int, labels: Tensor, is_val: Tensor, shares: tuple[float, ...] = SHARES
) -> list[Scores]:
    """The same for the latents of one SAE, by its codes (values, indices) [N, k], over one of `shares` of their largest
    training code.
    """
    values, indices = (part.cpu() for part in codes)
    return _best_units(_latent_counts(values, indices, labels, is_val, n_latents, shares), labels, is_val, len(shares))


def table_scores(which: Tensor, labels: Tensor, is_val: Tensor, prior: Tensor) -> tuple[Tensor, list[Scores]]:
    """(share [V, C], scores): a table entry -> concept look-up, fitted on training rows.

    which: entry of each row, int64 [N]. prior: share [V, C] that an entry starts from with the weight of one row. A row
    is taken for the concept where its entry's share reaches a cut, that of the highest F1 on training rows.
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
    values: Tensor, indices: Tensor, labels: Tensor, is_val: Tensor, n_latents: int, shares: tuple[float, ...]
) -> Counts:
    """For training and validation rows: firings [U] and firings on each concept's rows [C, U] of the units
    "latent over a share of its largest training code", numbered latent * len(shares) + share."""
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
    """The same counts for units "dimension d is above (not above) its quantile q", 2 * THRESHOLDS of them a dimension.

    One pass over the labels that are on puts each row into its bin between cuts; sums of bins are what lies beyond a
    cut.
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
    """From counts in bins [..., 2 T + 1]: those below each of the first T cuts and above each of the last T, [..., 2
    T].
    """
    below = torch.from_numpy(counts).cumsum(-1)
    return torch.cat([below[..., :THRESHOLDS], below[..., -1:] - below[..., THRESHOLDS:-1]], -1).float()


def _token_counts(which: Tensor, n_tokens: int, labels: Tensor, is_val: Tensor) -> Counts:
    """The same counts for units "the row's token is t"."""
    for rows in (~is_val, is_val):
        hits = torch.zeros(n_tokens, labels.shape[1]).index_add_(0, which[rows], labels[rows].float())
        yield torch.bincount(which[rows], minlength=n_tokens).float(), hits.T


def _best_units(counts: Counts, labels: Tensor, is_val: Tensor, n_thresholds: int = 1) -> list[Scores]:
    """For each concept: the unit with the best training F1, and its scores on validation rows."""
    (train_fires, train_hits), (val_fires, val_hits) = counts
    train_total, val_total = labels[~is_val].sum(0), labels[is_val].sum(0)
    f1 = 2 * train_hits / (train_fires + train_total[:, None]).clamp(min=1)
    found = []
    for c, unit in enumerate(f1.argmax(1).tolist()):
        scores = _scores(float(val_hits[c, unit]), float(val_fires[unit]), float(val_total[c]))
        found.append({"unit": unit // n_thresholds, **scores, "f1_train": float(f1[c, unit])})
    return found
