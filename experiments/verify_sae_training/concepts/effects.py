"""What a latent does to the next token, measured by editing its code in the running model.

    drawn = draw_occurrences(encode_run(run, hook, sae), latents, n=8)
    effects = next_token_effects(model, tokenizer, point, sae, run=run, drawn=drawn, maxima=maxima)

On single tokens where the latent fires, its code is set to 0, or its highest code is added, and the logits of the next
token are compared with those of the unedited model. What the weights alone say is in concepts/directions.py.
"""
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm

from concepts.codes import Codes
from concepts.directions import direct_view, token_text
from concepts.top_texts import LATENT
from lib.blocks import input_device, no_cache
from lib.environment import InputError
from lib.files import read_json
from lib.hooks import HookPoint, edit
from lib.sae import SAE
from lib.schemas import COUNT, Schema
from lib.store import Run
from lib.texts import Tokens, length_batches, pad, tokenise

SHOWN = 6  # tokens listed as raised and as lowered
MAX_TOKENS = 8192  # tokens of one forward pass
GROUP = 64  # latents whose mean logit changes [GROUP, V] are held at one time
EDITED = {"kl": float, "raised": [[str, float]], "lowered": [[str, float]]}
EFFECTS = Schema({"sae_hash": str, "effects": {LATENT: {"n_tokens": COUNT, "ablated": EDITED, "added": EDITED,
                                                        "direct_cosine": (float, None)}}},
                 remedy="delete it and run notebook 05 again")


class Occurrences(NamedTuple):
    """Tokens on which latents fire, one per line."""

    row: Tensor
    """Row of the run, int64 [M]."""
    latent: Tensor
    """int64 [M], ascending."""
    code: Tensor
    """float32 [M], above 0."""


def draw_occurrences(
    codes: Codes, latents: Collection[int], n: int, keep: Tensor | None = None, seed: int = 0
) -> Occurrences:
    """Up to n tokens on which each of the latents fires, drawn evenly from all rows, or from those where keep holds."""
    generator = torch.Generator().manual_seed(seed)
    wanted = torch.zeros(codes.n_latents, dtype=torch.bool)
    wanted[torch.tensor(sorted(latents), dtype=torch.long)] = True
    drawn = Occurrences(torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long), torch.zeros(0))
    priority = torch.zeros(0, dtype=torch.double)
    for start, values, indices in codes:
        inside = torch.ones(len(values), dtype=torch.bool) if keep is None else keep[start : start + len(values)]
        row, slot = ((values > 0) & wanted[indices.long()] & inside[:, None]).nonzero(as_tuple=True)
        new = Occurrences(start + row, indices[row, slot].long(), values[row, slot])
        drawn = Occurrences(*(torch.cat(pair) for pair in zip(drawn, new)))
        priority = torch.cat([priority, torch.rand(len(row), generator=generator, dtype=torch.double)])
        order = (drawn.latent + priority).argsort()
        latent = drawn.latent[order]
        rank = torch.arange(len(order)) - torch.searchsorted(latent, latent)
        order = order[rank < n]
        drawn, priority = Occurrences(*(column[order] for column in drawn)), priority[order]
    return drawn


def prefixes(run: Run, tokenizer, rows: Tensor) -> list[list[int]]:
    """For each row of the run, the token ids of its text up to and including it.

    Raises InputError if the tokenizer gives other ids than those stored.
    """
    text_ids, ids_of = run.rows["text_id"][rows].tolist(), {}
    if distinct := sorted(set(text_ids)):
        tokens = tokenise(tokenizer, [run.texts[i]["text"] for i in distinct], 0, run.meta["settings"]["max_length"])
        ids_of = {text_id: item.ids for text_id, item in zip(distinct, tokens)}
    found = []
    for text_id, pos, token_id in zip(text_ids, run.rows["pos"][rows].tolist(), run.rows["token_id"][rows].tolist()):
        ids = ids_of[text_id][: pos + 1]
        if len(ids) <= pos or ids[pos] != token_id:
            raise InputError(f"the tokenizer splits text {text_id} differently than when run {run.run_id} was saved; "
                             "use the same one")
        found.append(ids)
    return found


@torch.no_grad()
def next_logits(
    model: Any, point: HookPoint, texts: Sequence[list[int]], deltas: Sequence[Tensor | None]
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Logits of the token after each text, for each of `deltas` added to its last token's activation at `point`.

    texts: token ids without padding. deltas: each [N, D], or None for no change. Yields, for batches of texts of
    similar length, the numbers of the texts [n] and the logits float32 [n, V] of each delta.
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
    """What setting the code of latents[m] to 0 adds to activation x[m]: [M, D], raw units; 0 where it does not fire."""
    latents = latents.to(x.device)
    values, indices = sae.encode(x)
    code = (values * (indices == latents[:, None])).sum(1)
    return -sae.scale * code[:, None] * sae.W_dec[latents]


def of_length(directions: Tensor, length: Tensor) -> Tensor:
    """Nonzero directions [M, D], rescaled to the given lengths [M]."""
    return functional.normalize(directions, dim=1) * length[:, None]


def divergence(clean: Tensor, edited: Tensor) -> Tensor:
    """KL(clean || edited) of the two next-token distributions in nats, float64 [N] on the CPU; logits: [N, V]."""
    found = []
    for part in zip(clean.split(GROUP), edited.split(GROUP)):  # on the CPU: not every device has float64
        before, after = (logits.cpu().double().log_softmax(1) for logits in part)
        found.append((before.exp() * (before - after)).sum(1))
    return torch.cat(found)


def next_token_effects(
    model: Any, tokenizer, point: HookPoint, sae: SAE, run: Run, drawn: Occurrences, maxima: Tensor
) -> dict[int, dict[str, Any]]:
    """The measured effect of every latent in `drawn`, a mean over its tokens there.

    maxima: highest code of each latent, [F]. For "ablated" (code set to 0) and "added" (highest code added) it has
    "kl", the mean KL(unedited || edited) in nats, and the tokens whose logits, relative to the mean over the
    vocabulary, are "raised" and "lowered" most, as [token, difference]. "direct_cosine" is the cosine over the
    vocabulary of the added effect with the dictionary row's direct view; None without such a view.
    """
    texts, view = prefixes(run, tokenizer, drawn.row), direct_view(model, len(sae.mean))
    effects: dict[int, dict[str, Any]] = {}
    for group in tqdm(drawn.latent.unique().split(GROUP), unit="group", desc="effects of concepts"):
        lines = torch.isin(drawn.latent, group).nonzero()[:, 0]
        latents, codes = drawn.latent[lines], drawn.code[lines]
        place, rows = torch.searchsorted(group, latents), sae.scale * sae.W_dec[latents.to(sae.mean.device)]
        amounts = {"ablated": -codes, "added": maxima[latents].to(codes)}
        deltas = [None, *(amount.to(rows)[:, None] * rows for amount in amounts.values())]
        batches = next_logits(model, point, [texts[i] for i in lines.tolist()], deltas)
        found = dict(zip(amounts, _means(batches, place)))
        for i, latent in enumerate(group.tolist()):
            entry = {name: {"kl": _short(kl[i]), **_extremes(tokenizer, change[i])}
                     for name, (change, kl) in found.items()}
            cosine = None
            if view is not None:
                direct, added = sae.W_dec[latent].to(view) @ view.T, found["added"][0][i].to(view)
                cosine = _short(functional.cosine_similarity(direct, added, dim=0))
            effects[latent] = {"n_tokens": int((place == i).sum()), **entry, "direct_cosine": cosine}
    return effects


def read_effects(path: Path, sae_hash: str) -> dict[int, dict[str, Any]]:
    """What next_token_effects() measured, from notebook 05's concept_effects.json.

    Raises InputError if it is damaged or about another SAE.
    """
    content = read_json(path, EFFECTS)
    if content["sae_hash"] != sae_hash:
        raise InputError(f"{path} is about another SAE; {EFFECTS.remedy}")
    return {int(latent): effect for latent, effect in content["effects"].items()}


def _means(batches: Iterator[tuple[Tensor, list[Tensor]]], place: Tensor) -> list[tuple[Tensor, Tensor]]:
    """For each edit, means over each latent's tokens of the logits' changes [G, V] and of the divergences [G].

    batches: of next_logits, the unedited logits first. place: which of the G latents each token belongs to, [M].
    """
    count = torch.bincount(place)
    sums: list[tuple[Tensor, Tensor]] = []
    for lines, (clean, *edited) in batches:
        if not sums:
            sums = [(torch.zeros(len(count), clean.shape[1]), torch.zeros(len(count), dtype=torch.double))
                    for _ in edited]
        for (changes, kl), logits in zip(sums, edited):
            change = (logits - clean).cpu()
            changes.index_add_(0, place[lines], change - change.mean(1, keepdim=True))
            kl.index_add_(0, place[lines], divergence(clean, logits))
    return [(changes / count[:, None], kl / count) for changes, kl in sums]


def _short(value: Tensor) -> float:
    return float(f"{float(value):.4g}")


def _extremes(tokenizer, change: Tensor) -> dict[str, list[list[Any]]]:
    """The tokens whose logits rise and fall most, with the change; change: [V]."""

    def highest(values: Tensor) -> list[tuple[int, Tensor]]:
        top = values.topk(min(SHOWN, len(values)))
        return [(i, value) for i, value in zip(top.indices.tolist(), top.values) if value > 0]

    return {
        "raised": [[token_text(tokenizer, i), _short(value)] for i, value in highest(change)],
        "lowered": [[token_text(tokenizer, i), _short(-value)] for i, value in highest(-change)],
    }
