"""What a latent's dictionary row says by itself: the tokens it promotes, and the rows closest to it.

Read from the weights alone: the row through the final norm's gain and the unembedding, without the blocks between.
"""
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lib.sae import SAE


def direct_view(model: Any, width: int) -> Tensor | None:
    """The unembedding as seen from the residual stream, float32 [V, width]; None without one of this width.

    d @ view.T is proportional to the change of the logits, about their mean, when d is added before the final norm and
    is too small to change its scale. The final norm's gain, and a LayerNorm's centring, are folded in.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None or head.weight.shape[1] != width:
        return None
    inner = getattr(model, model.base_model_prefix, model)
    norms = (getattr(inner, name, None) for name in ("norm", "ln_f", "final_layer_norm"))
    norm = next((found for found in norms if found is not None), None)
    view = head.weight.detach().float()
    gain = getattr(norm, "weight", None)
    if gain is not None:
        gain = gain.detach().float()
        view = view * (1 + gain if type(norm).__name__.startswith("Gemma") else gain)  # Gemma multiplies by 1 + weight
    if isinstance(norm, nn.LayerNorm):
        view = view - view.mean(1, keepdim=True)
    return view - view.mean(0)


def promoted_ids(sae: SAE, model: Any, latents: Sequence[int], n: int) -> list[list[int]]:
    """For each latent, ids of the n tokens whose logits its dictionary row raises most; none without a direct view."""
    view = direct_view(model, len(sae.mean))
    if view is None:
        return [[] for _ in latents]
    parts = torch.tensor(latents, device=sae.mean.device).split(256)
    tops = [(sae.W_dec[part].to(view) @ view.T).topk(min(n, len(view)), dim=1).indices for part in parts]
    return torch.cat(tops).tolist()


def promoted_tokens(sae: SAE, model: Any, tokenizer, n: int = 8) -> list[list[str]]:
    """The promoted_ids of every latent as texts."""
    ids = promoted_ids(sae, model, range(sae.n_latents), n)
    return [[token_text(tokenizer, token) for token in row] for row in ids]


def token_text(tokenizer, token_id: int) -> str:
    """A token of the vocabulary as a reader sees it, with its leading space if it has one."""
    piece = tokenizer.convert_ids_to_tokens(token_id)
    if piece is None:
        return f"[{token_id}]"  # the unembedding may have more rows than the tokenizer has tokens
    return " " + piece[1:] if piece.startswith("▁") else tokenizer.convert_tokens_to_string([piece])


def closest_directions(
    W: Tensor, latents: Tensor, n: int, least: float, chunk: int = 256
) -> list[list[tuple[int, float]]]:
    """For each of `latents` int64 [L], up to n (row, cosine) of the other rows of W whose cosine exceeds `least`.

    Highest first. W: [F, D], rows of unit norm. Holds at most chunk x F cosines at a time.
    """
    found = []
    for part in latents.split(chunk):
        cosines = W[part] @ W.T
        cosines[torch.arange(len(part)), part] = -1
        best = cosines.topk(min(n, len(W)), dim=1)
        for values, rows in zip(best.values.tolist(), best.indices.tolist()):
            found.append([(row, value) for row, value in zip(rows, values) if value > least])
    return found
