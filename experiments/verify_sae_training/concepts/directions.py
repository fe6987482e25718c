"""What a latent's dictionary row says by itself: the tokens it promotes, and the rows closest to it.

Read from the weights alone: the row through the final norm's gain and the unembedding, without the blocks between.
"""
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lib.sae import SAE

UNREADABLE = re.compile("[\ufffd\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
BYTE = re.compile("<0x[0-9A-F]{2}>")  # a byte as SentencePiece writes it
# Byte-level BPE writes each byte as one visible letter (Radford et al. 2019): itself, or from U+0100 on.
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
HIDDEN = sorted(set(range(256)) - set(VISIBLE))
BYTES = {chr(byte): byte for byte in VISIBLE} | {chr(256 + place): byte for place, byte in enumerate(HIDDEN)}


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


def logit_effects(sae: SAE, view: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """What each dictionary row does to the logits: ids int32 and changes float32, both [F, 2, n].

    First the n tokens that it raises most, then the n that it lowers most, strongest first. view: of direct_view(),
    [V, D]; a change is that of a unit row before the final norm's scale.
    """
    n = min(n, len(view))
    ids = torch.empty(sae.n_latents, 2, n, dtype=torch.int32)
    changes = torch.empty(sae.n_latents, 2, n)
    parts = torch.arange(sae.n_latents).split(256)
    for part in tqdm(parts, unit="group", desc="tokens raised and lowered", disable=len(parts) < 40):
        logits = sae.W_dec[part].to(view) @ view.T
        for side, largest in enumerate((True, False)):
            found = logits.topk(n, dim=1, largest=largest)
            ids[part, side], changes[part, side] = found.indices.int().cpu(), found.values.cpu()
    return ids, changes


def token_text(tokenizer, token_id: int) -> str:
    """A token of the vocabulary as a reader sees it, with its leading space if it has one.

    A piece of a character, or a control character, is written byte by byte, such as <0xE2>.
    """
    piece = tokenizer.convert_ids_to_tokens(token_id)
    if piece is None:
        return f"[{token_id}]"  # the unembedding may have more rows than the tokenizer has tokens
    text = " " + piece[1:] if piece.startswith("▁") else tokenizer.convert_tokens_to_string([piece])
    if not UNREADABLE.search(text) or "\ufffd" in piece:
        return text
    return piece if BYTE.fullmatch(piece) else "".join(f"<0x{BYTES.get(letter, 0):02X}>" for letter in piece)


def closest_directions(
    W: Tensor, latents: Tensor, n: int, least: float, chunk: int = 256
) -> list[list[tuple[int, float]]]:
    """For each of `latents` int64 [L], up to n (row, cosine) of the other rows of W whose cosine exceeds `least`.

    Highest first. W: [F, D], rows of unit norm. Holds at most chunk x F cosines at a time.
    """
    found = []
    parts = latents.split(chunk)
    for part in tqdm(parts, unit="group", desc="closest directions", disable=len(parts) < 40):
        cosines = W[part] @ W.T
        cosines[torch.arange(len(part)), part] = -1
        best = cosines.topk(min(n, len(W)), dim=1)
        for values, rows in zip(best.values.tolist(), best.indices.tolist()):
            found.append([(row, value) for row, value in zip(rows, values) if value > least])
    return found
