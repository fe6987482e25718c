"""The numbers that say whether an SAE learnt something: reconstruction against baselines, language-model loss.

Only loss_recovered() needs the language model; the rest reads a run in the store.
"""
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lib.activations import SaveSettings
from lib.batches import Rows, batches_in_order
from lib.blocks import input_device, no_cache
from lib.environment import InputError
from lib.hooks import HookPoint, edit
from lib.metrics.reconstruction import ev_of_sums, explained_variance
from lib.sae import SAE, make_sae
from lib.store import Run
from lib.texts import Tokens, filler_id, length_batches, pad
from lib.training.loop import TrainSettings
from lib.training.step import folded_weights, init_state, whitening


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
    shards = run.shards(hook)
    mean = sum((x.double().sum(0) for _, x in batches_in_order(shards, mask)),
               torch.zeros((), dtype=torch.float64)) / mask.sum()
    parts, fires = [], torch.zeros(sae.n_latents, dtype=torch.int64)
    for _, x in batches_in_order(shards, mask):
        values, indices = sae.encode(x.to(sae.mean.device))
        error = x.double() - sae.decode(values, indices).cpu().double()
        fired = (values > 0).cpu()
        parts.append((error.square().sum(1), (x.double() - mean).square().sum(1), x.norm(dim=1), fired.sum(1)))
        fires += torch.bincount(indices.cpu()[fired], minlength=sae.n_latents)
    sse, sst, norm, l0 = (torch.cat(column) for column in zip(*parts))
    return RowScores(sse, sst, norm, l0=l0, fires=fires)


def ev(scores: RowScores, keep: Tensor | None = None) -> float:
    """Explained variance about the mean of all rows, over all of them or over those where `keep` holds."""
    keep = torch.ones_like(scores.sse, dtype=torch.bool) if keep is None else keep
    return ev_of_sums(float(scores.sse[keep].sum()), float(scores.sst[keep].sum()))


def ev_by(scores: RowScores, by: Tensor, n_bins: int = 12) -> list[tuple[float, float, float, int]]:
    """EV in bins of about equally many rows, by a quantity [N]: (lower edge, upper edge, EV, rows)."""
    edges = torch.quantile(by.double()[:: max(1, len(by) // 1_000_000)],
                           torch.linspace(0, 1, n_bins + 1, dtype=torch.float64)).unique()
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
    return explained_variance(centred, centred @ directions @ directions.T)


def untrained_sae(rows: Rows, settings: TrainSettings) -> SAE:
    """The SAE that training with these settings started from."""
    state = init_state(whitening(rows.covariance, settings.whiten), settings.n_latents, settings.seed, settings.aligned)
    return make_sae(**folded_weights(state, rows.scale), mean=rows.mean, scale=rows.scale, top_k=settings.top_k)


def shuffled(x: Tensor, seed: int = 0) -> Tensor:
    """x [N, D] with each dimension shuffled over the rows on its own: the same values, no structure between them."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(x.shape, generator=generator).argsort(0)
    return x.gather(0, order)


def held_out_tokens(run: Run, tokenizer, limit: int) -> list[Tokens]:
    """The first `limit` validation texts of a run, tokenised as it has them; `keep` holds where it stored a token."""
    chosen = [text for text in run.texts if text["split"] == "val"][:limit]
    settings = SaveSettings(**run.meta["settings"])
    tokens = settings.tokens(tokenizer, [text["text"] for text in chosen])
    if settings.max_norm_multiple is None:  # then the settings tell what was stored
        return tokens
    stored: dict[int, set[int]] = {text["text_id"]: set() for text in chosen}
    for text_id, pos in zip(run.rows["text_id"].tolist(), run.rows["pos"].tolist()):
        if text_id in stored:
            stored[text_id].add(pos)
    return [item._replace(keep=[pos in kept for pos in range(len(item.ids))])
            for item, kept in zip(tokens, stored.values())]


def loss_recovered(
    model: nn.Module, tokenizer, point: HookPoint, sae: SAE, *, tokens: list[Tokens], mean: Tensor,
    max_tokens: int = 8192
) -> dict[str, float]:
    """Language-model loss in nats per token: clean, with the SAE spliced in, with the mean in its place.

    loss_recovered = (mean_ablated - spliced) / (mean_ablated - clean); nan where the mean in its place does no damage,
    of which there is no share to recover. Only positions that `tokens` keep are replaced,
    as held_out_tokens() gives them: BOS and outliers that were never stored keep their activations. At resid_mid the
    residual stream itself is replaced (see lib.hooks.edit). max_tokens: of one forward pass.
    """
    device = input_device(model)
    tokens = [t for t in tokens if len(t.ids) > 1]
    changes: dict[str, Callable[[Tensor], Tensor] | None] = {
        "clean": None,
        "spliced": lambda x: sae.decode(*sae.encode(x)),
        "mean_ablated": lambda x: mean.to(x).expand_as(x),
    }
    if not tokens:
        raise InputError("no text has two tokens, so there is no next token to predict; use longer texts")
    totals, count = dict.fromkeys(changes, 0.0), 0
    for batch in length_batches(tokens, max_tokens):
        ids, mask = (tensor.to(device) for tensor in pad(batch, filler_id(tokenizer)))
        keep = torch.zeros_like(mask, dtype=torch.bool)
        for row, item in enumerate(batch):
            keep[row, : len(item.keep)] = torch.tensor(item.keep, device=device)
        for name, change in changes.items():
            with nullcontext() if change is None else edit(model, point, _where(keep, change)):
                totals[name] += _next_token_loss(model, ids, mask)
        count += int(mask[:, 1:].sum())
    losses = {f"ce_{name}": total / count for name, total in totals.items()}
    damage = losses["ce_mean_ablated"] - losses["ce_clean"]
    share = (losses["ce_mean_ablated"] - losses["ce_spliced"]) / damage if damage > 0 else math.nan
    return losses | {"loss_recovered": share, "n_tokens": count}


def _where(keep: Tensor, change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A function that applies change(x) [n, D] to the rows of a hidden state [B, T, D] where keep [B, T] holds."""

    def replace(hidden: Tensor) -> Tensor:
        new, here = hidden.clone(), keep.to(hidden.device)  # a model may be spread over several devices
        new[here] = change(hidden[here].float()).to(hidden)
        return new

    return replace


@torch.inference_mode()
def _next_token_loss(model: nn.Module, ids: Tensor, mask: Tensor) -> float:
    """Sum of the cross-entropies of real next tokens."""
    logits = model(input_ids=ids, attention_mask=mask, **no_cache(model)).logits
    each = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten().to(logits.device),
                                       reduction="none")
    return float(each.cpu().double() @ mask[:, 1:].flatten().cpu().double())
