"""What the metrics are computed from: the examples of one split, and what a model and its SAE give for them."""
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cycles.examples import make_batch
from cycles.session import Session
from lib.sae import SAE

Scores = dict[str, float]


@dataclass(frozen=True)
class Scored:
    """The examples of one split that are scored, and what the session's model and an SAE give for them."""

    session: Session
    sae: SAE
    split: str
    ids: Tensor
    """[N]."""
    y: Tensor
    h: Tensor
    """[N, D]."""
    logits: Tensor
    codes: Tensor
    """Dense, [N, F]."""
    train_ids: Tensor
    """Examples that thresholds and probes are made from."""
    h_train: Tensor


def dense_codes(sae: SAE, h: Tensor) -> Tensor:
    """Codes of h [N, D] as a dense float32 [N, F]."""
    values, indices = sae.encode(h.to(sae.mean.device))
    # Added, not written: a slot that did not fire may name a latent that another slot of its row gives.
    return torch.zeros(len(h), sae.n_latents).scatter_add_(1, indices.cpu(), values.cpu())


def token_rows(session: Session, ids: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(example id, activations [T, D] of its kept tokens at the target layer), batch by batch."""
    model, task = session.model, session.task
    device = next(model.parameters()).device
    model.eval()
    for part in ids.split(session.c["BATCH_SIZE"]):
        batch = make_batch(task, part, device, session.entries)
        for i, states in zip(part.tolist(), model.token_states(batch, model.target)):
            yield i, states[torch.tensor(task.tokens[i].keep)].float()


def named(prefix: str, scores: Scores) -> Scores:
    """The scores with the prefix before each key."""
    return {f"{prefix}_{name}": value for name, value in scores.items()}
