"""All numbers of one model and one SAE that say whether the SAE learnt something.

Everything is read from a run in the store; only loss_recovered() needs the language model.
"""
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse
import torch
from torch import Tensor, nn

from lib.files import read_json
from lib.hooks import HookPoint, edit
from lib.models import local_path
from lib.rows import Rows
from lib.sae import SAE, make_sae
from lib.sae_step import folded_weights, init_state, whitening
from lib.store import Run
from lib.texts import length_batches, load_documents, pad, tokenise
from lib.training import TrainSettings

THRESHOLDS = 14  # quantiles tried for each neuron and each principal direction
SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)  # of a latent's largest code, tried as its threshold


class RowScores(NamedTuple):
    """What an SAE does on each of N rows."""

    sse: Tensor
    """Squared error summed over dimensions, [N], raw units."""
    sst: Tensor
    """Squared distance from the mean of these rows, [N], raw units."""
    norm: Tensor
    """Norm of the row, [N], raw units."""
    l0: Tensor
    """Latents that fired, [N]."""
    fires: Tensor
    """Firings of each latent over all rows, int64 [F]."""


def row_scores(sae: SAE, run: Run, hook: str, mask: Tensor) -> RowScores:
    """Scores of the rows where `mask` (bool [n_rows]) holds, in order; streams over the shards."""
    mean = sum((x[mask[i : i + len(x)]].double().sum(0) for i, x in run.batches(hook)), torch.zeros((), dtype=torch.float64)) / mask.sum()
    parts, fires = [], torch.zeros(sae.n_latents, dtype=torch.int64)
    for i, x in run.batches(hook):
        x = x[mask[i : i + len(x)]]
        values, indices = sae.encode(x.to(sae.mean.device))
        error = x.double() - sae.decode(values, indices).cpu().double()
        fired = (values > 0).cpu()
        parts.append((error.square().sum(1), (x.double() - mean).square().sum(1), x.norm(dim=1), fired.sum(1)))
        fires += torch.bincount(indices.cpu()[fired], minlength=sae.n_latents)
    sse, sst, norm, l0 = (torch.cat(column) for column in zip(*parts))
    return RowScores(sse, sst, norm, l0, fires)


def ev(scores: RowScores, keep: Tensor | None = None) -> float:
    """Explained variance over all rows, or over those where `keep` holds; always about the mean of all rows."""
    keep = torch.ones_like(scores.sse, dtype=torch.bool) if keep is None else keep
    return float(1 - scores.sse[keep].sum() / scores.sst[keep].sum())


def ev_by(scores: RowScores, by: Tensor, n_bins: int = 12) -> list[tuple[float, float, float, int]]:
    """EV in bins of a quantity [N] with about equal numbers of rows: (lower edge, upper edge, EV, rows)."""
    edges = torch.quantile(by.double()[:: max(1, len(by) // 1_000_000)], torch.linspace(0, 1, n_bins + 1, dtype=torch.float64)).unique()
    found = []
    for low, high in zip(edges[:-1], edges[1:]):
        keep = (by >= low) & ((by < high) | (high == edges[-1]))
        if keep.any():
            found.append((float(low), float(high), ev(scores, keep), int(keep.sum())))
    return found


def pca_ev(rows: Rows, x: Tensor, k: int) -> float:
    """EV on x [N, D] of the best k-dimensional linear reconstruction of the training rows."""
    directions = torch.linalg.eigh(rows.covariance.double()).eigenvectors[:, -k:]
    centred = x.double() - rows.mean
    rebuilt = centred @ directions @ directions.T
    return float(1 - (centred - rebuilt).square().sum() / (x.double() - x.double().mean(0)).square().sum())


def untrained_sae(rows: Rows, settings: TrainSettings) -> SAE:
    """The SAE that training with these settings started from."""
    state = init_state(whitening(rows.covariance, settings.whiten), settings.n_latents, settings.seed, settings.aligned)
    return make_sae(*folded_weights(state, rows.scale), rows.mean, rows.scale, settings.top_k)


def shuffled(x: Tensor, seed: int = 0) -> Tensor:
    """x [N, D] with each dimension permuted over the rows by itself: the same values, no structure between them."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(x.shape, generator=generator).argsort(0)
    return x.gather(0, order)


def loss_recovered(
    model: nn.Module, tokenizer, point: HookPoint, sae: SAE, texts: list[str], mean: Tensor, settings: dict[str, Any], max_tokens: int = 8192
) -> dict[str, float]:
    """Language-model loss in nats per token: clean, with the SAE spliced in, with the mean in its place.

    loss_recovered = (mean_ablated - spliced) / (mean_ablated - clean). The stored positions only are replaced: BOS and
    padding keep their activations. At resid_mid the residual stream itself is replaced (see lib.hooks.edit).
    settings: max_length, skip_special, skip_first of the run.
    """
    device = next(model.parameters()).device
    tokens = [t for t in tokenise(tokenizer, texts, 0, settings["max_length"], settings["skip_special"], settings["skip_first"]) if len(t.ids) > 1]
    changes: dict[str, Callable[[Tensor], Tensor] | None] = {
        "clean": None,
        "spliced": lambda x: sae.decode(*sae.encode(x)),
        "mean_ablated": lambda x: mean.to(x).expand_as(x),
    }
    totals, count = dict.fromkeys(changes, 0.0), 0
    for batch in length_batches(tokens, max_tokens):
        ids, mask = (tensor.to(device) for tensor in pad(batch, tokenizer.pad_token_id))
        keep = torch.zeros_like(mask, dtype=torch.bool)
        for row, item in enumerate(batch):
            keep[row, : len(item.keep)] = torch.tensor(item.keep, device=device)
        for name, change in changes.items():
            totals[name] += _next_token_loss(model, ids, mask, point, keep, change)
        count += int(mask[:, 1:].sum())
    losses = {f"ce_{name}": total / count for name, total in totals.items()}
    damage = losses["ce_mean_ablated"] - losses["ce_clean"]
    return losses | {"loss_recovered": (losses["ce_mean_ablated"] - losses["ce_spliced"]) / damage, "n_tokens": count}


@torch.inference_mode()
def _next_token_loss(model: nn.Module, ids: Tensor, mask: Tensor, point: HookPoint, keep: Tensor, change: Callable[[Tensor], Tensor] | None) -> float:
    """Sum of cross-entropies over real next tokens, with change(x) [n, D] in place of the kept rows at the point."""

    def replace(hidden: Tensor) -> Tensor:
        assert change is not None
        new = hidden.clone()
        new[keep] = change(hidden[keep].float()).to(hidden)
        return new

    if change is None:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    else:
        with edit(model, point, replace):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    each = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    return float(each.cpu().double() @ mask[:, 1:].flatten().cpu().double())


def concept_recovery(sae: SAE, x: Tensor, labels: Tensor, is_val: Tensor, principal: Tensor) -> list[dict[str, dict[str, float]]]:
    """How well single units tell each ground-truth concept's tokens from all others.

    x: rows [N, D]; labels: bool [N, C]; is_val: bool [N]; principal: directions [D, P]. For each concept the unit with
    the highest F1 on training rows is chosen; its precision, recall and F1 on validation rows are returned. Units:
    "firing", a latent firing at all; "latent", a latent over one of SHARES of its largest training code; "neuron" and
    "pca", a dimension or a principal direction, either sign, over one of 14 quantiles.
    """
    values, indices = sae.encode(x)
    kinds = {
        "firing": (_latent_counts(values, indices, labels, is_val, sae.n_latents, (0.0,)), 1),
        "latent": (_latent_counts(values, indices, labels, is_val, sae.n_latents, SHARES), len(SHARES)),
        "neuron": (_threshold_counts(x, labels, is_val), 2 * THRESHOLDS),
        "pca": (_threshold_counts((x - x.mean(0)) @ principal, labels, is_val), 2 * THRESHOLDS),
    }
    result: list[dict[str, dict[str, float]]] = [{} for _ in range(labels.shape[1])]
    for kind, (counts, n_thresholds) in kinds.items():
        for row, (unit, scores) in zip(result, _best_units(counts, labels, is_val)):
            row[kind] = {"unit": unit // n_thresholds, **scores}
    return result


def _latent_counts(
    values: Tensor, indices: Tensor, labels: Tensor, is_val: Tensor, n_latents: int, shares: tuple[float, ...]
) -> Iterable[tuple[Tensor, Tensor]]:
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


def _threshold_counts(x: Tensor, labels: Tensor, is_val: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    """The same counts for units "dimension d is above (below) its quantile q", 2 * THRESHOLDS of them a dimension."""
    levels = torch.cat([torch.linspace(0.5, 0.95, THRESHOLDS // 2), 1 - torch.logspace(-1.5, -3.5, THRESHOLDS - THRESHOLDS // 2)])
    sample = x[~is_val][: 16_000_000 // x.shape[1]]  # torch.quantile takes no more than 16 million numbers
    cuts = torch.cat([torch.quantile(sample, levels, dim=0), torch.quantile(-sample, levels, dim=0)])
    for rows in (~is_val, is_val):
        part, concept = x[rows], labels[rows].float()
        fires, hits = [], []
        for i, cut in enumerate(cuts):
            on = ((part if i < THRESHOLDS else -part) > cut).float()
            fires.append(on.sum(0))
            hits.append(concept.T @ on)
        # unit number = dimension * 2 * THRESHOLDS + threshold
        yield torch.stack(fires, 1).flatten(), torch.stack(hits, 2).flatten(1)


def _best_units(counts: Iterable[tuple[Tensor, Tensor]], labels: Tensor, is_val: Tensor) -> list[tuple[int, dict[str, float]]]:
    """For each concept: the unit with the best training F1, and its scores on validation rows."""
    (train_fires, train_hits), (val_fires, val_hits) = counts
    train_total, val_total = labels[~is_val].sum(0), labels[is_val].sum(0)
    f1 = 2 * train_hits / (train_fires + train_total[:, None]).clamp(min=1)
    best = f1.argmax(1)
    found = []
    for c, unit in enumerate(best.tolist()):
        hit, fires, total = float(val_hits[c, unit]), float(val_fires[unit]), float(val_total[c])
        f1_here = 2 * hit / (fires + total) if fires + total else 0.0
        scores = {"precision": hit / fires if fires else 0.0, "recall": hit / total if total else 0.0, "f1": f1_here}
        found.append((unit, scores))
    return found


def ground_truth(run: Run, folder: Path) -> tuple[list[str], list[str], Tensor] | None:
    """The concepts that the embedded stories carry: (names of all, names of the leaves, labels bool [n_rows, C]).

    A name is the path of a leaf or of a node above it; a word belongs to its leaf and to every node above. None where
    the data set has no concepts.json beside it. folder: where the data set's name is looked for last.
    """
    truth = (local_path(run.meta["dataset"]["name"]) or folder).parent / "concepts.json"
    if not truth.exists():
        return None
    leaves = read_json(truth)["leaves"]
    paths = {leaf["number"]: leaf["path"].split("/") for leaf in leaves}
    above = {leaf: ["/".join(path[:depth]) for depth in range(1, len(path) + 1)] for leaf, path in paths.items()}
    names = sorted({name for found in above.values() for name in found})
    column = {name: i for i, name in enumerate(names)}
    spans = []
    for text_id, story in enumerate(load_documents(run.meta["dataset"]["name"], limit=run.meta["dataset"]["limit"])):
        words = zip(re.finditer("[A-Za-z]+", story["text"]), story["concepts"])
        spans += [(text_id, *word.span(), column[name]) for word, leaf in words if leaf for name in above[leaf]]
    return names, [leaf["path"] for leaf in leaves], label_rows(run, torch.tensor(spans), len(names))


def label_rows(run: Run, spans: Tensor, n_concepts: int) -> Tensor:
    """Which concepts each row's token belongs to, bool [n_rows, n_concepts].

    spans: int64 [n, 4], (text_id, char_start, char_end, concept); a token belongs to every concept it overlaps.
    """
    width = 1 << 32  # of a text in the common order of all characters
    text_id, start, end = (run.rows[name].long() for name in ("text_id", "char_start", "char_end"))
    first = torch.searchsorted(text_id * width + end, spans[:, 0] * width + spans[:, 1], right=True)
    last = torch.searchsorted(text_id * width + start, spans[:, 0] * width + spans[:, 2])
    labels = torch.zeros(run.n_rows, n_concepts, dtype=torch.bool)
    for offset in range(int((last - first).max()) if len(spans) else 0):
        inside = first + offset < last
        labels[first[inside] + offset, spans[inside, 3]] = True
    return labels
