"""Changing what a live model does, by editing the codes of single latents while it runs.

    edits = [Edit(17, "add", 1.0), Edit(40, "ablate")]
    with steer(model, point, sae, edits, maxima):
        model.generate(...)

Only the difference is added to the activation,

    x_new = x + scale * sum over edited latents i of (z'_i - z_i) d_i

so what the SAE can't reconstruct stays, other latents keep their codes, and an edit that changes no code leaves the
activation as it is, bit for bit. Strengths are in units of the latent's own highest code on its corpus.
"""
import math
from collections.abc import Collection, Container, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig

from .blocks import input_device
from .environment import InputError
from .hooks import HookPoint, edit
from .sae import SAE
from .texts import control_ids

MODES = ("add", "scale", "clamp", "ablate")


@contextmanager
def plain_writing(model: Any, temperature: float, seed: int) -> Iterator[dict[str, Any]]:
    """Within, model.generate() with these arguments draws from the model's own distribution, or at temperature 0 takes
    its likeliest token, whatever penalties, top_p or beams the model's files ask for; a seed draws the same noise.
    """
    given = model.generation_config
    ids = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    model.generation_config = GenerationConfig(**{name: getattr(given, name, None) for name in ids})
    how = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    device = input_device(model)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)  # generate() has no generator of its own
            yield how
    finally:
        model.generation_config = given


class Edit(NamedTuple):
    """What happens to one latent's code z; m is its highest code on the corpus."""

    latent: int
    mode: str
    """add: z + strength * m; scale: z * strength; clamp: strength * m; ablate: 0."""
    strength: float = 0.0


class Spare(NamedTuple):
    """Tokens that are not to be edited."""

    ids: Collection[int] = ()
    """Token ids, wherever they stand."""
    first: int = 0
    """So many at the start of each text, special tokens included."""


EDIT_ALL = Spare()


def new_codes(codes: Tensor, edits: Sequence[Edit], maxima: Tensor) -> Tensor:
    """Codes [N, E] of the edited latents after their edits; codes: before; maxima: each latent's highest code, [F]."""
    columns = []
    for z, (latent, mode, strength) in zip(codes.T, edits):
        unit = maxima[latent].to(z)
        columns.append({"add": z + strength * unit, "scale": z * strength, "clamp": (strength * unit).expand_as(z),
                        "ablate": torch.zeros_like(z)}[mode])
    return torch.stack(columns, 1)


@torch.no_grad()
def steered(x: Tensor, sae: SAE, edits: Sequence[Edit], maxima: Tensor) -> Tensor:
    """Activations x [N, D] after the edits; a row whose codes stay the same is returned as it is."""
    values, indices = sae.encode(x.float())
    latents = torch.tensor([e.latent for e in edits], device=indices.device)
    codes = (values[:, :, None] * (indices[:, :, None] == latents)).sum(1)
    change = new_codes(codes, edits, maxima) - codes
    delta = sae.scale * change @ sae.W_dec[latents]
    return torch.where((change != 0).any(1, keepdim=True), x + delta.to(x), x)


def _check(sae: SAE, edits: Sequence[Edit], maxima: Tensor) -> None:
    latents = [e.latent for e in edits]
    if len(set(latents)) < len(latents):
        raise InputError(f"latent {max(latents, key=latents.count)} is edited twice; edit a latent once")
    for latent, mode, strength in edits:
        if mode not in MODES:
            raise InputError(f"MODE={mode!r} is unknown; choose one of {', '.join(MODES)}")
        if not 0 <= latent < sae.n_latents:
            raise InputError(f"LATENT={latent}: the SAE has latents 0 to {sae.n_latents - 1}")
        if not math.isfinite(strength):
            raise InputError(f"STRENGTH={strength} must be a finite number")
        if mode in ("add", "clamp") and maxima[latent] <= 0:
            raise InputError(f"latent {latent} never fires, so it has no highest code to measure a strength by")


@contextmanager
def steer(
    model: Any, point: HookPoint, sae: SAE, edits: Sequence[Edit], maxima: Tensor,
    positions: Container[int] | None = None, spare: Spare = EDIT_ALL,
) -> Iterator[None]:
    """Make the edits at `point` in every forward pass of `model` inside the block, also in generate() with its cache.

    maxima: highest code of each latent, [F] (latent_stats.safetensors, "max"). positions: which tokens of each text to
    edit, counted from 0 with special tokens and without padding; None: all. spare: tokens never to edit, because the
    SAE was not trained on them. Padding, which a 2-D attention mask tells, is never edited.

    Raises InputError for a latent, mode or strength that makes no sense.
    """
    _check(sae, edits, maxima)
    seen: dict[str, Any] = {}

    def note_tokens(_module, args, kwargs):
        seen.update(_tokens_of_pass(args[0] if args else kwargs.get("input_ids"), kwargs, seen.get("end", 0)))

    def change(hidden: Tensor) -> Tensor:
        chosen = _chosen(hidden, seen, positions, spare)
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


def _tokens_of_pass(ids: Tensor | None, kwargs: dict[str, Any], end: int) -> dict[str, Any]:
    """ids [B, T] and attention mask [B, past + T] of one forward pass, how many tokens the model keeps from before, and
    where this pass ends. end: where the pass before ended, for models whose states don't count (Mamba, RWKV).
    """
    mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
    if mask is not None and mask.dim() != 2:
        raise RuntimeError("steering reads padding from a 2-D attention mask; use generate() with its default cache")
    goes_on = mask is None and any(kwargs.get(name) is not None for name in ("cache_params", "state"))
    past = cache.get_seq_length() if cache is not None else end if goes_on else 0
    n_tokens = 0 if ids is None else ids.shape[1]
    return {"ids": ids, "mask": mask, "past": past, "end": past + n_tokens if mask is None else mask.shape[1]}


def _chosen(
    hidden: Tensor, seen: dict[str, Any], positions: Container[int] | None, spare: Spare
) -> Tensor:
    """Which tokens of this pass are edited, bool [B, T]."""
    n_texts, n_tokens = hidden.shape[:2]
    if seen["mask"] is None:
        number = (seen["past"] + torch.arange(n_tokens, device=hidden.device)).expand(n_texts, -1)
        chosen = torch.ones_like(number, dtype=torch.bool)
    else:
        mask = seen["mask"].to(hidden.device)
        number, chosen = (mask.cumsum(1) - 1)[:, -n_tokens:], mask[:, -n_tokens:].bool()
    chosen = chosen & (number >= spare.first)
    if positions is not None:
        wanted = torch.tensor([i in positions for i in range(int(number.max()) + 1)], device=hidden.device)
        chosen = chosen & wanted[number.clamp(min=0)]
    if len(spare.ids) and seen["ids"] is not None:
        never = torch.tensor(list(spare.ids), device=hidden.device)
        chosen = chosen & ~torch.isin(seen["ids"].to(hidden.device), never)
    return chosen


def left_out(tokenizer, settings: dict[str, Any]) -> Spare:
    """The tokens that a run left out, by its meta["settings"]: special ones, if it skipped them, and the first ones."""
    return Spare(control_ids(tokenizer) if settings["skip_special"] else set(), settings["skip_first"])
