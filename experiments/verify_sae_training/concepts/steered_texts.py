"""What steering gains and costs: texts that the model writes with and without it, compared pair by pair.

    writing = Writing(["Once upon a time"] * 8, n_tokens=40, rule=rule_of(concepts[17]), temperature=0.7)
    measure = measuring(model, tokenizer, point, sae, edits=[Edit(17, "add")], maxima=maxima, writing=writing)
    row = measure(0.5)              # measure(None): the unsteered texts themselves
"""
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from concepts.appearance import distinct, repeated, share_of_words, share_shown
from concepts.continuations import Continuation, continue_texts, padded_right
from lib.blocks import no_cache
from lib.hooks import HookPoint, capture
from lib.sae import SAE
from lib.statistics import interval
from lib.steering import Edit, Spare, steer

Measure = Callable[[float | None], dict[str, Any]]


class Writing(NamedTuple):
    """What is written, and what is sought in it."""

    prompts: Sequence[str]
    n_tokens: int
    """New tokens after each prompt."""
    spare: Spare = Spare()
    """Tokens never to edit (lib.steering)."""
    favoured: Collection[int] = ()
    """Token ids to count in what is written."""
    rule: Sequence[tuple[str, str]] = ()
    """What the latent stands for: patterns to seek in what is written (concepts/appearance.py)."""
    words: Mapping[str, Collection[str]] = {}
    """Other things to seek: a key of the result -> its words, in lower case."""
    temperature: float = 0.0
    seed: int = 0


def sweep(
    model: Any, tokenizer, point: HookPoint, sae: SAE, *, edits: Sequence[Edit], maxima: Tensor,
    strengths: Sequence[float | None], writing: Writing,
) -> list[dict[str, Any]]:
    """What measuring() finds with all edits at each strength; None: without them."""
    measure = measuring(model, tokenizer, point, sae, edits=edits, maxima=maxima, writing=writing)
    return [measure(strength) for strength in strengths]


def measuring(
    model: Any, tokenizer, point: HookPoint, sae: SAE, *, edits: Sequence[Edit], maxima: Tensor, writing: Writing
) -> Measure:
    """A function that lets the model write with all edits at a strength (None: unsteered), and compares.

    The other side of each pair is what the unsteered model writes after the same prompt with the same seed. Intervals
    {mean, low, high} are 95 % t intervals over the pairs, bounds None for one pair; they tell nothing of other prompts.
    The function returns a dict:

    "strength", "texts"
    "concept"     share of written tokens on which the rule holds, a mean over texts; "concept_rise": the mean
                  difference of the pairs; "shown": each text's share, None where nothing was written; "shown_in": share
                  of texts in which the rule holds at least once
    <a key of words>   share of written words and punctuation marks that are in these words; <key>_rise, as above
    "fires"       share of written tokens on which one of the edited latents fires when the unsteered model reads
    "favoured"    share of written tokens with ids in `favoured`
    "perplexity"  of the written tokens under the unsteered model, the geometric mean over texts; "cost": its ratio to
                  that of the unsteered texts, an interval
    "repeated"    share of written three-token sequences that occurred before in the same text, a mean over texts
    "distinct"    distinct two-token sequences over all of them, in all texts together
    """
    plain = _write(model, tokenizer, writing, None)

    def measure(strength: float | None) -> dict[str, Any]:
        done = plain
        if strength is not None:
            changed = [each._replace(strength=strength) for each in edits]
            steering = steer(model, point, sae, changed, maxima=maxima, spare=writing.spare)
            done = _write(model, tokenizer, writing, steering)
        fires = _share_firing(model, point, sae, latents=[each.latent for each in edits], done=done)
        return {"strength": strength, **compare(tokenizer, done, plain, writing), "fires": fires, "texts": done.texts}

    return measure


def _write(model: Any, tokenizer, writing: Writing, steering) -> Continuation:
    return continue_texts(model, tokenizer, writing.prompts, writing.n_tokens, steering=steering,
                          temperature=writing.temperature, seed=writing.seed)


def compare(tokenizer, done: Continuation, plain: Continuation, writing: Writing) -> dict[str, Any]:
    """What measuring() says of texts, by themselves and against the unsteered ones, pair by pair."""
    liked = torch.tensor(sorted(writing.favoured), dtype=torch.long, device=done.ids.device)
    shown, usual = (share_shown(tokenizer, side.texts, side.starts, [*writing.rule]) for side in (done, plain))
    found = {"concept": _mean(shown), "concept_rise": _interval(shown - usual),
             "shown": [None if math.isnan(share) else share for share in shown.tolist()],
             "shown_in": _mean(np.where(np.isnan(shown), np.nan, shown > 0))}
    for key, words in writing.words.items():
        shown, usual = (share_of_words(side.texts, side.starts, words) for side in (done, plain))
        found |= {key: _mean(shown), f"{key}_rise": _interval(shown - usual)}
    losses, usual = (side.perplexity.double().log().numpy() for side in (done, plain))
    cost = {key: None if x is None else math.exp(x) for key, x in _interval(losses - usual).items()}
    ids, perplexity = done.ids_written, _mean(losses)
    return found | {
        "favoured": _mean(torch.isin(done.ids[done.written], liked).cpu().numpy()),
        "perplexity": None if perplexity is None else math.exp(perplexity), "cost": cost,
        "repeated": _mean(np.array([repeated(text) for text in ids])), "distinct": distinct(ids),
    }


def _interval(values: np.ndarray) -> dict[str, float | None]:
    """The mean of the values that are not nan with its interval; None for what is not known."""
    found = interval(values[~np.isnan(values)])._asdict()
    return {key: None if math.isnan(value) else value for key, value in found.items()}


def _mean(values: np.ndarray) -> float | None:
    return _interval(values.astype(float))["mean"]


@torch.no_grad()
def _share_firing(model: Any, point: HookPoint, sae: SAE, latents: list[int], done: Continuation) -> float | None:
    """Share of the written tokens on which one of the latents fires."""
    ids, mask, written = padded_right(done.mask, done.ids, done.mask, done.written)
    with capture(model, [point]) as seen:
        model(input_ids=ids, attention_mask=mask, **no_cache(model))
    hidden = seen[point.signature]
    values, indices = sae.encode(hidden[written.to(hidden.device)].float())
    fires = (torch.isin(indices, torch.tensor(latents, device=indices.device)) & (values > 0)).any(1)
    return _mean(fires.cpu().numpy())
