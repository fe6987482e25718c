"""What a latent does to the next token: measured by editing its code in the running model, and read from the weights.

    rows, latents, codes = draw_firings(encode_run(run, hook, sae), wanted, n=8)
    effects = next_token_effects(model, tokenizer, point, sae, run, ...)

Measured: on single tokens where the latent fires, its code is set to 0, or its highest code is added, and the
logits of that token's successor are compared with the untouched ones. Read from the weights: the dictionary row
through the final norm's gain and the unembedding, without the blocks between.
"""
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm

from concepts.firings import Codes
from lib.blocks import input_device, no_cache
from lib.environment import InputError
from lib.hooks import HookPoint, edit
from lib.sae import SAE
from lib.store import Run
from lib.texts import Tokens, length_batches, pad, tokenise

SHOWN = 6  # tokens listed as raised and as lowered
MAX_TOKENS = 8192  # tokens of one forward pass
GROUP = 64  # latents whose mean logit changes [GROUP, V] exist at one time


class Firings(NamedTuple):
    """Tokens on which latents fire, one line each."""

    row: Tensor
    """Number of the row in its run, int64 [M]."""
    latent: Tensor
    """int64 [M], ascending."""
    code: Tensor
    """float32 [M], above 0."""


def draw_firings(codes: Codes, latents: Collection[int], n: int, keep: Tensor | None = None, seed: int = 0) -> Firings:
    """For each of the latents up to n tokens on which it fires, drawn evenly from all (of the rows where `keep`
    holds).
    """
    generator = torch.Generator().manual_seed(seed)
    wanted = torch.zeros(codes.n_latents, dtype=torch.bool)
    wanted[torch.tensor(sorted(latents), dtype=torch.long)] = True
    drawn = Firings(torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long), torch.zeros(0))
    priority = torch.zeros(0, dtype=torch.double)
    for start, values, indices in codes:
        inside = torch.ones(len(values), dtype=torch.bool) if keep is None else keep[start : start + len(values)]
        row, slot = ((values > 0) & wanted[indices.long()] & inside[:, None]).nonzero(as_tuple=True)
        new = Firings(start + row, indices[row, slot].long(), values[row, slot])
        drawn = Firings(*(torch.cat(pair) for pair in zip(drawn, new)))
        priority = torch.cat([priority, torch.rand(len(row), generator=generator, dtype=torch.double)])
        order = (drawn.latent + priority).argsort()
        latent = drawn.latent[order]
        rank = torch.arange(len(order)) - torch.searchsorted(latent, latent)
        order = order[rank < n]
        drawn, priority = Firings(*(column[order] for column in drawn)), priority[order]
    return drawn


def contexts(run: Run, tokenizer, rows: Tensor) -> list[list[int]]:
    """For each row of the run the token ids of its text up to and including it.

    Raises InputError if the tokenizer gives other ids than those stored.
    """
    settings, found = run.meta["settings"], []
    text_ids = run.rows["text_id"][rows].tolist()
    distinct = sorted(set(text_ids))
    tokens = (tokenise(tokenizer, [run.texts[i]["text"] for i in distinct], 0, settings["max_length"]) if distinct
              else [])
    of_text = {text_id: item.ids for text_id, item in zip(distinct, tokens)}
    for text_id, pos, token_id in zip(text_ids, run.rows["pos"][rows].tolist(), run.rows["token_id"][rows].tolist()):
        ids = of_text[text_id][: pos + 1]
        if len(ids) <= pos or ids[pos] != token_id:
            raise InputError(f"the tokenizer cuts text {text_id} in another way than when run {run.run_id} was saved; "
                             "use the same one")
        found.append(ids)
    return found


@torch.no_grad()
def next_logits(
    model: Any, point: HookPoint, texts: Sequence[list[int]], deltas: Sequence[Tensor | None]
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Logits of the token after each text, without and with something added to its last token's activation at `point`.

    texts: token ids without padding. deltas: each [N, D], or None for nothing. Yields for batches of like length the
    numbers of the texts [n] and, for each delta, float32 [n, V].
    """
    device = input_device(model)
    for batch in length_batches([Tokens(i, ids, [], []) for i, ids in enumerate(texts)], MAX_TOKENS):
        ids, mask = (tensor.to(device) for tensor in pad(batch, 0))
        last, lines = mask.sum(1) - 1, torch.tensor([item.text_id for item in batch])
        numbers = torch.arange(len(batch), device=device)
        found = []
        for delta in deltas:

            def add(hidden: Tensor, delta=delta) -> Tensor:
                new, at = hidden.clone(), (numbers.to(hidden.device), last.to(hidden.device))
                if delta is not None:
                    new[at] += delta[lines.to(delta.device)].to(hidden)
                return new

            with edit(model, point, add):
                logits = model(input_ids=ids, attention_mask=mask, **no_cache(model)).logits
            found.append(logits[numbers.to(logits.device), last.to(logits.device)].float())
        yield lines, found


def ablation(sae: SAE, x: Tensor, latents: Tensor) -> Tensor:
    """What setting the code of latents[m] to 0 adds to activation x[m], [M, D] in raw units; zeros where it does not
    fire.
    """
    latents = latents.to(x.device)
    values, indices = sae.encode(x)
    code = (values * (indices == latents[:, None])).sum(1)
    return -sae.scale * code[:, None] * sae.W_dec[latents]


def of_length(directions: Tensor, length: Tensor) -> Tensor:
    """Directions [M, D], none of them 0, at the given lengths [M]."""
    return functional.normalize(directions, dim=1) * length[:, None]


def divergence(clean: Tensor, edited: Tensor) -> Tensor:
    """KL(clean || edited) of the two next-token distributions in nats, float64 [N] on the CPU; logits [N, V] each."""
    found = []
    for part in zip(clean.split(GROUP), edited.split(GROUP)):  # in float64, which only the CPU is sure to have
        before, after = (logits.cpu().double().log_softmax(1) for logits in part)
        found.append((before.exp() * (before - after)).sum(1))
    return torch.cat(found)


def next_token_effects(
    model: Any, tokenizer, point: HookPoint, sae: SAE, run: Run, firings: Firings, maxima: Tensor, progress: bool = True
) -> dict[int, dict[str, Any]]:
    """The measured effect of every latent in `firings`, a mean over its tokens there.

    maxima: highest code of each latent, [F]. For "ablated" (its code set to 0) and "added" (its highest code added):
    "kl", mean KL(untouched || edited) in nats, and the tokens whose logit, taken about the mean over the vocabulary,
    "raised" and "lowered" most, as [token, difference]. "direct_cosine": cosine over the vocabulary of the added
    effect with the direct view of the dictionary row; None where there is no such view.
    """
    texts, straight = contexts(run, tokenizer, firings.row), direct_view(model, len(sae.mean))
    effects: dict[int, dict[str, Any]] = {}
    for group in tqdm(firings.latent.unique().split(GROUP), unit="group", desc="effects of concepts",
                      disable=not progress):
        lines = torch.isin(firings.latent, group).nonzero()[:, 0]
        here = Firings(*(column[lines] for column in firings))
        place = torch.searchsorted(group, here.latent)
        count = torch.bincount(place, minlength=len(group))
        sums, kl = _sums(model, point, sae, [texts[i] for i in lines.tolist()], here, place, maxima)
        for i, latent in enumerate(group.tolist()):
            entry = {name: {"kl": _short(kl[name][i] / count[i]), **_extremes(tokenizer, total[i] / count[i])}
                     for name, total in sums.items()}
            cosine = None
            if straight is not None:
                direct = sae.W_dec[latent].to(straight) @ straight.T
                cosine = _short(functional.cosine_similarity(direct, sums["added"][i].to(straight), dim=0))
            effects[latent] = {"n_tokens": int(count[i]), **entry, "direct_cosine": cosine}
    return effects


def _sums(
    model: Any, point: HookPoint, sae: SAE, texts: list[list[int]], firings: Firings, place: Tensor, maxima: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Sums over each latent's tokens of the logits' changes [G, V] and of the divergences [G], for each kind of edit.

    place: the latent's number among the G latents of the group, [M].
    """
    amounts = {"ablated": -firings.code, "added": maxima[firings.latent].to(firings.code)}
    rows = sae.scale * sae.W_dec[firings.latent.to(sae.mean.device)]
    deltas = [None, *(amount.to(rows)[:, None] * rows for amount in amounts.values())]
    n_latents = int(place.max()) + 1
    kl = {name: torch.zeros(n_latents, dtype=torch.double) for name in amounts}
    sums: dict[str, Tensor] = {}
    for lines, (clean, *edited) in next_logits(model, point, texts, deltas):
        for name, logits in zip(amounts, edited):
            change = (logits - clean).cpu()
            total = sums.setdefault(name, torch.zeros(n_latents, change.shape[1]))
            total.index_add_(0, place[lines], change - change.mean(1, keepdim=True))
            kl[name].index_add_(0, place[lines], divergence(clean, logits))
    return sums, kl


def _short(value: Tensor) -> float:
    return float(f"{float(value):.4g}")


def _extremes(tokenizer, change: Tensor) -> dict[str, list[list[Any]]]:
    """The tokens with the largest and the smallest change of logit [V]."""
    top, low = change.topk(min(SHOWN, len(change))), (-change).topk(min(SHOWN, len(change)))
    return {
        "raised": [[token_text(tokenizer, i), _short(value)] for value, i in zip(top.values, top.indices.tolist())
                   if value > 0],
        "lowered": [[token_text(tokenizer, i), _short(-value)] for value, i in zip(low.values, low.indices.tolist())
                    if value > 0],
    }


def direct_view(model: Any, width: int) -> Tensor | None:
    """The unembedding as a vector in the residual stream meets it, float32 [V, width]: d @ view.T is proportional to
    the change of the logits, about their mean, when d is added before the final norm and leaves its size as it is.

    The final norm's gain is folded in; a LayerNorm's centring too. None where the model has no unembedding, or one of
    another width.
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
        # Gemma's norm multiplies by 1 + weight
        view = view * (1 + gain if type(norm).__name__.startswith("Gemma") else gain)
    if isinstance(norm, nn.LayerNorm):
        view = view - view.mean(1, keepdim=True)
    return view - view.mean(0)


def promoted_ids(sae: SAE, view: Tensor, latents: Tensor, n: int) -> Tensor:
    """Ids [L, n] of the vocabulary tokens whose logit the dictionary rows of the latents [L] raise most by the direct
    view.
    """
    parts = [(sae.W_dec[some].to(view) @ view.T).topk(min(n, len(view)), dim=1).indices
             for some in latents.to(sae.mean.device).split(256)]
    return torch.cat(parts)


def promoted_tokens(sae: SAE, model: Any, tokenizer, n: int = 8) -> list[list[str]]:
    """For each latent its promoted_ids as texts. Empty lists where there is no direct view."""
    view = direct_view(model, len(sae.mean))
    if view is None:
        return [[] for _ in range(sae.n_latents)]
    ids = promoted_ids(sae, view, torch.arange(sae.n_latents), n)
    return [[token_text(tokenizer, token) for token in row] for row in ids.tolist()]


def token_text(tokenizer, token_id: int) -> str:
    """A token of the vocabulary as a reader sees it, with the space that it may begin with."""
    piece = tokenizer.convert_ids_to_tokens(token_id)
    if piece is None:
        return f"[{token_id}]"  # the unembedding may have more rows than the tokenizer has tokens
    return " " + piece[1:] if piece.startswith("▁") else tokenizer.convert_tokens_to_string([piece])
