"""What a latent's dictionary row says by itself: the tokens it promotes, and the rows closest to it.

Read from the weights alone: the row through the final norm's gain and the unembedding, without the blocks between.
"""
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lib.blocks import blocks, input_device, no_cache
from lib.environment import InputError
from lib.sae import SAE

UNREADABLE = re.compile("[\ufffd\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
BYTE = re.compile("<0x[0-9A-F]{2}>")  # a byte as SentencePiece writes it
# Byte-level BPE writes each byte as one visible letter (Radford et al. 2019): itself, or from U+0100 on.
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
HIDDEN = sorted(set(range(256)) - set(VISIBLE))
BYTES = {chr(byte): byte for byte in VISIBLE} | {chr(256 + place): byte for place, byte in enumerate(HIDDEN)}


def direct_view(model: Any, width: int) -> Tensor | None:
    """The unembedding as seen from the residual stream, float32 [V, width]; None without one of this width, or where
    more than a norm stands between it and the last block.

    d @ view.T is proportional to the change of the logits, about their mean, when d is added before the final norm and
    is too small to change its scale. The final norm's gain, and a LayerNorm's centring, are folded in.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None or head.weight.shape[1] != width:
        return None
    try:
        norm = _final_norm(model, head)
    except (LookupError, InputError):
        return None
    view = head.weight.detach().float()
    if norm is not None:
        gain, is_centred = _gain(norm, next(norm.parameters(), head.weight), width)
        view = view * gain
        view = view - view.mean(1, keepdim=True) if is_centred else view
    return view - view.mean(0)


@torch.no_grad()
def _final_norm(model: Any, head: nn.Module) -> nn.Module | None:
    """What stands between the last block and the unembedding, as a forward pass shows; None: nothing.

    Raises LookupError if it is more than one module, and InputError for a model without a list of blocks.
    """
    last, made, read = blocks(model)[1][-1], list[tuple[nn.Module, Any, Tensor]](), list[Tensor]()

    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        if isinstance(output, Tensor):
            made.append((module, args[0] if args else None, output))

    handles = [module.register_forward_hook(note) for module in model.modules()]
    handles.append(head.register_forward_pre_hook(lambda module, args: read.append(args[0])))
    try:
        model(input_ids=torch.tensor([[0, 1]], device=input_device(model)), **no_cache(model))
    finally:
        for handle in handles:
            handle.remove()
    stream = next(_whole(output) for module, _, output in reversed(made) if module is last)
    if _whole(read[-1]) == stream:
        return None
    for module, x, output in made:
        mixes = any(weight.ndim > 1 for weight in module.parameters())  # dimensions with one another, as no norm does
        if _whole(output) == _whole(read[-1]) and isinstance(x, Tensor) and _whole(x) == stream and not mixes:
            return module
    raise LookupError(f"{type(model).__name__} has more than a norm between its last block and its unembedding")


def _whole(x: Tensor) -> int:
    """Which tensor this one is, or is a view of."""
    return id(x if x._base is None else x._base)


@torch.no_grad()
def _gain(norm: nn.Module, like: Tensor, width: int) -> tuple[Tensor, bool]:
    """What a norm multiplies each dimension by, float32 [width], and whether it takes off the mean.

    Measured, because some multiply by their weight and some by 1 + weight.
    """
    x = torch.ones(1, 1, width, dtype=like.dtype, device=like.device)
    at_zero, at_ones = norm(torch.zeros_like(x)), norm(x)
    x[..., 1::2] = -1
    if width % 2:
        x[..., -3:] = x.new_tensor([1, 1, -2])
    x /= x.square().mean().sqrt()  # mean 0 and mean square 1: it passes through the norm as it is, but for the gain
    gain = (norm(x) - at_zero) / x
    return gain[0, 0].float(), bool((at_ones - at_zero).abs().max() < 0.01 * gain.abs().max())


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
