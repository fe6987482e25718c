"""Changing what a live model does, by editing the codes of single latents while it runs.

    edits = [Edit(17, "add", 1.0), Edit(40, "ablate")]
    with steer(model, point, sae, edits, maxima):
        model.generate(...)

Only the difference is added to the activation,

    x_new = x + scale * sum over edited latents i of (z'_i - z_i) d_i

so what the SAE can't rebuild stays, a latent that is not edited keeps its code, and an edit that changes no code
leaves the activation as it is, bit for bit. Strengths are in units of the latent's own highest code on its corpus.
"""
import inspect
import math
from collections.abc import Collection, Container, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional

from .blocks import input_device, n_embeddings, no_cache
from .environment import InputError
from .hooks import HookPoint, capture, edit
from .sae import SAE
from .texts import control_ids, filler_id

_padding_tried: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
MODES = ("add", "scale", "clamp", "ablate")


class Edit(NamedTuple):
    """What happens to one latent's code z, m being its highest code on the corpus."""

    latent: int
    mode: str
    """add: z + strength * m; scale: z * strength; clamp: strength * m; ablate: 0."""
    strength: float = 0.0


def new_codes(codes: Tensor, edits: Sequence[Edit], maxima: Tensor) -> Tensor:
    """Codes [N, E] of the edited latents after their edits; codes: before, maxima: [F], the highest of every latent."""
    columns = []
    for z, (latent, mode, strength) in zip(codes.T, edits):
        unit = maxima[latent].to(z)
        columns.append({"add": z + strength * unit, "scale": z * strength, "clamp": (strength * unit).expand_as(z),
                        "ablate": torch.zeros_like(z)}[mode])
    return torch.stack(columns, 1)


@torch.no_grad()
def steered(x: Tensor, sae: SAE, edits: Sequence[Edit], maxima: Tensor) -> Tensor:
    """Activations x [N, D] with the edits made; a row whose codes stay the same is returned as it is."""
    values, indices = sae.encode(x.float())
    latents = torch.tensor([e.latent for e in edits], device=indices.device)
    codes = (values[:, :, None] * (indices[:, :, None] == latents)).sum(1)
    change = new_codes(codes, edits, maxima) - codes
    delta = sae.scale * change @ sae.W_dec[latents]
    return torch.where((change != 0).any(1, keepdim=True), x + delta.to(x), x)


def _check(sae: SAE, edits: Sequence[Edit], maxima: Tensor) -> None:
    latents = [e.latent for e in edits]
    if len(set(latents)) < len(latents):
        raise InputError(f"latent {max(latents, key=latents.count)} is edited twice; one edit a latent")
    for latent, mode, strength in edits:
        if mode not in MODES:
            raise InputError(f"MODE={mode!r} is none of {', '.join(MODES)}")
        if not 0 <= latent < sae.n_latents:
            raise InputError(f"LATENT={latent}: the SAE has latents 0 to {sae.n_latents - 1}")
        if not math.isfinite(strength):
            raise InputError(f"STRENGTH={strength} must be a finite number")
        if mode in ("add", "clamp") and maxima[latent] <= 0:
            raise InputError(f"latent {latent} never fires, so it has no highest code to measure a strength by")


@contextmanager
def steer(
    model: Any, point: HookPoint, sae: SAE, edits: Sequence[Edit], maxima: Tensor,
    positions: Container[int] | None = None, skip_ids: Collection[int] = (),
) -> Iterator[None]:
    """Make the edits at `point` in every forward pass of `model` inside the block, generate() with its cache included.

    maxima: highest code of each latent, [F] (latent_stats.safetensors, "max"). positions: numbers of the tokens to
    edit, counted in each text from 0, special tokens included and padding left out; None: all. skip_ids: token ids
    that are never edited, those that the SAE was not trained on. Padding is never edited; it is known from a 2-D
    attention mask.

    Raises InputError for a latent, mode or strength that makes no sense.
    """
    _check(sae, edits, maxima)
    seen: dict[str, Any] = {}

    def note_tokens(_module, args, kwargs):
        seen.update(_tokens_of_pass(args[0] if args else kwargs.get("input_ids"), kwargs))

    def change(hidden: Tensor) -> Tensor:
        chosen = _chosen(hidden, seen, positions, skip_ids)
        new = hidden.clone()
        new[chosen] = steered(hidden[chosen], sae, edits, maxima)
        return new

    if not edits:
        yield
        return
    handle = model.register_forward_pre_hook(note_tokens, with_kwargs=True)
    try:
        with edit(model, point, change):
            yield
    finally:
        handle.remove()


def _tokens_of_pass(ids: Tensor | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What one forward pass says about its tokens: ids [B, T], attention mask [B, past + T], tokens in the cache."""
    mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
    if mask is not None and mask.dim() != 2:
        raise RuntimeError("steering reads padding from a 2-D attention mask; use generate() with its default cache")
    return {"ids": ids, "mask": mask, "past": cache.get_seq_length() if cache is not None else 0}


def _chosen(
    hidden: Tensor, seen: dict[str, Any], positions: Container[int] | None, skip_ids: Collection[int]
) -> Tensor:
    """Which tokens of this pass are edited, bool [B, T]."""
    n_texts, n_tokens = hidden.shape[:2]
    if seen["mask"] is None:
        number = (seen["past"] + torch.arange(n_tokens, device=hidden.device)).expand(n_texts, -1)
        chosen = torch.ones_like(number, dtype=torch.bool)
    else:
        mask = seen["mask"].to(hidden.device)
        number, chosen = (mask.cumsum(1) - 1)[:, -n_tokens:], mask[:, -n_tokens:].bool()
    if positions is not None:
        wanted = torch.tensor([i in positions for i in range(int(number.max()) + 1)], device=hidden.device)
        chosen = chosen & wanted[number.clamp(min=0)]
    if len(skip_ids) and seen["ids"] is not None:
        chosen = chosen & ~torch.isin(seen["ids"].to(hidden.device), torch.tensor(list(skip_ids), device=hidden.device))
    return chosen


def skipped_ids(tokenizer, settings: dict[str, Any]) -> set[int]:
    """The token ids that a run left out (its meta["settings"]): special tokens, if it skipped them."""
    return control_ids(tokenizer) if settings["skip_special"] else set()


class Continuation(NamedTuple):
    """Texts that a model wrote after prompts."""

    texts: list[str]
    """Prompt and continuation."""
    perplexity: Tensor
    """exp of the mean cross-entropy of the continuation under the unsteered model, [B]."""
    ids: Tensor
    """int64 [B, T], prompts padded on the left."""
    mask: Tensor
    """int64 [B, T], 0 for padding and for what follows the end of a text."""
    written: Tensor
    """bool [B, T]: the token belongs to the continuation and not to what follows its end."""


@torch.no_grad()
def continue_texts(
    model: Any, tokenizer, prompts: Sequence[str], n_tokens: int, steering=None, temperature: float = 0.0, seed: int = 0
) -> Continuation:
    """Let the model write n_tokens after each prompt, steered, and judge what it wrote unsteered.

    steering: a context manager from steer(), or None. temperature: 0 is greedy; the same seed draws the same noise.
    Raises InputError if the model can't write.
    """
    if not hasattr(model, "generate") or model.get_output_embeddings() is None:
        raise InputError(f"{type(model).__name__} writes no text; steering needs a causal language model")
    ids, mask = _left_padded(tokenizer, prompts, input_device(model))
    together = _reads_left_padding(model)  # tried before anything is steered
    how = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    arguments = dict(max_new_tokens=n_tokens, pad_token_id=filler_id(tokenizer), **how)
    with torch.random.fork_rng(devices=[ids.device] if ids.device.type == "cuda"
                               else []), nullcontext() if steering is None else steering:
        torch.manual_seed(seed)  # generate() has no generator of its own
        whole = (model.generate(ids, attention_mask=mask, **arguments) if together
                 else _generated_one_by_one(model, ids, mask, arguments))
    new = whole[:, ids.shape[1] :]
    ended = ((new == tokenizer.eos_token_id) if tokenizer.eos_token_id is not None
             else torch.zeros_like(new, dtype=torch.bool))
    written = torch.cat([torch.zeros_like(mask, dtype=torch.bool), ended.cumsum(1) - ended.long() == 0], 1)
    full = torch.cat([mask, written[:, ids.shape[1] :].to(mask)], 1)
    texts = [tokenizer.decode(row[keep.bool()], skip_special_tokens=True) for row, keep in zip(whole, full)]
    return Continuation(texts, perplexities(model, whole, full, written), whole, full, written)


def _generated_one_by_one(model: Any, ids: Tensor, mask: Tensor, arguments: dict[str, Any]) -> Tensor:
    """What generate() would give, [B, T + new], from one prompt at a time, without padding and without states kept."""
    new = ids.new_full((len(ids), arguments["max_new_tokens"]), arguments["pad_token_id"])
    for row, (prompt, real) in enumerate(zip(ids, mask.bool())):
        alone = prompt[real][None]
        written = model.generate(alone, attention_mask=torch.ones_like(alone), use_cache=False,
                                 **arguments)[0, alone.shape[1] :]
        new[row, : len(written)] = written
    return torch.cat([ids, new], 1)


@torch.no_grad()
def _reads_left_padding(model: Any) -> bool:
    """Whether padding on the left changes nothing: not so in RWKV and RecurrentGemma, whose states run through it.

    In transformers 5.23 RWKV also mixes up the states of a batch that it continues, and RecurrentGemma begins a prompt
    of
    one token with the state of the prompt before: such models continue one prompt at a time, without states.
    """
    if model not in _padding_tried:
        ids = torch.arange(3, 7, device=input_device(model))[None] % (n_embeddings(model) or 7)
        padded, mask = (functional.pad(x, (3, 0)) for x in (ids, torch.ones_like(ids)))
        places = ({"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
                  if "position_ids" in inspect.signature(model.forward).parameters else {})
        alone = model(input_ids=ids, **no_cache(model)).logits[0, -1].float()
        beside = model(input_ids=padded, attention_mask=mask, **places, **no_cache(model)).logits[0, -1].float()
        _padding_tried[model] = bool((alone - beside).abs().max() <= 0.05 * alone.std())
    return _padding_tried[model]


def _left_padded(tokenizer, prompts: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
    """ids and mask [B, T] of the prompts, without an end-of-text token that the tokenizer may have put behind them."""
    rows = [[*ids] for ids in tokenizer(list(prompts))["input_ids"]]
    rows = [ids[:-1] if len(ids) > 1 and ids[-1] in (tokenizer.eos_token_id, tokenizer.sep_token_id) else ids
            for ids in rows]
    if not all(rows):
        raise InputError("a prompt holds no token; give it a word")
    length = max(map(len, rows))
    ids = torch.tensor([[filler_id(tokenizer)] * (length - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def perplexities(model: Any, ids: Tensor, mask: Tensor, judged: Tensor) -> Tensor:
    """exp of the mean cross-entropy of the judged tokens given all before them, [B].

    ids, mask int64 [B, T], padded on either side; judged bool [B, T], never the first token.
    """
    ids, mask, judged = _padded_right(mask, ids, mask, judged)
    logits = model(input_ids=ids, attention_mask=mask, **no_cache(model)).logits[:, :-1].float()
    losses = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten().to(logits.device),
                                      reduction="none").view(len(ids), -1)
    keep = judged[:, 1:].to(losses)
    return ((losses * keep).sum(1) / keep.sum(1).clamp(min=1)).exp().cpu()


def _padded_right(mask: Tensor, *tensors: Tensor) -> list[Tensor]:
    """The tensors [B, T] with what the mask takes for padding moved behind the rest: there no model reads it."""
    order = (1 - mask).argsort(dim=1, stable=True)
    return [x.gather(1, order) for x in tensors]


def sweep(
    model: Any, tokenizer, point: HookPoint, sae: SAE, edits: Sequence[Edit], maxima: Tensor,
    strengths: Sequence[float],
    prompts: Sequence[str], n_tokens: int, skip_ids: Collection[int] = (), favoured: Collection[int] = (),
    temperature: float = 0.0, seed: int = 0,
) -> list[dict[str, Any]]:
    """Continuations of the prompts at several strengths, what they gained and what they cost.

    Each strength takes the place of that of every edit. One dict a strength: "texts"; "fires", the share of written
    tokens on which one of the edited latents fires when the unsteered model reads the text; "favoured", the share of
    written tokens whose ids are in `favoured`; "perplexity", of the written tokens under the unsteered model, median
    over the prompts; "repeated", the share of written three-token sequences that were written before in the same text.
    """
    latents = torch.tensor([e.latent for e in edits], device=sae.mean.device)
    liked = torch.tensor(sorted(favoured), dtype=torch.long, device=sae.mean.device)
    found = []
    for strength in strengths:
        steering = steer(model, point, sae, [e._replace(strength=strength) for e in edits], maxima, skip_ids=skip_ids)
        done = continue_texts(model, tokenizer, prompts, n_tokens, steering, temperature, seed)
        ids, mask, written = _padded_right(done.mask, done.ids, done.mask, done.written)
        with torch.no_grad(), capture(model, [point]) as seen:
            model(input_ids=ids, attention_mask=mask, **no_cache(model))
        hidden = seen[point.signature]
        values, indices = sae.encode(hidden[written.to(hidden.device)].float())
        fires = (torch.isin(indices, latents) & (values > 0)).any(1)
        repeated = [_repeated(ids[keep].tolist()) for ids, keep in zip(done.ids, done.written)]
        found.append({
            "strength": strength, "fires": float(fires.float().mean()),
            "favoured": float(torch.isin(done.ids[done.written], liked).float().mean()),
            "perplexity": float(done.perplexity.median()),
            "repeated": sum(repeated) / len(repeated), "texts": done.texts,
        })
    return found


def _repeated(ids: list[int]) -> float:
    triples = list(zip(ids, ids[1:], ids[2:]))
    return 1 - len(set(triples)) / len(triples) if triples else 0.0
