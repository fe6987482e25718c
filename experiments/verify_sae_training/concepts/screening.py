"""Which latents may make a model write what they stand for, by their effect on the next token: before any is written.

    found = screen(model, tokenizer, point, sae, rules=rules, maxima=maxima, writing=writing, limit=1.5)   # best first

Two steps, each cheaper than what it spares. The direct view (concepts/directions.py) keeps the latents whose
dictionary row raises the logits of their own words most; in one forward pass for each of these, the edit is made along
texts that the unsteered model wrote, and the probability of those words is read off.
"""
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from concepts.appearance import words_of
from concepts.continuations import continue_texts, padded_right
from concepts.directions import direct_view
from concepts.patterns import Rule
from concepts.steered_texts import Writing
from lib.blocks import no_cache
from lib.hooks import HookPoint
from lib.sae import SAE
from lib.steering import Edit, steer

STRENGTHS = (0.25, 0.5, 1.0)  # added, in units of the latent's highest code
DIRECT = 128  # latents kept by the direct view
COMMON = 0.02  # probability of a latent's words in unsteered texts beyond which they are nothing special


class Screened(NamedTuple):
    """What one latent does to the next token along unsteered texts."""

    latent: int
    rise: float
    """Of the probability of its own words, a mean over the written tokens, at the best of STRENGTHS."""
    before: float
    """That probability without the edit."""


def vocabulary_of(tokenizer, size: int) -> dict[str, list[int]]:
    """Text of a token, in lower case and without spaces -> the ids of the tokens that have it."""
    found: dict[str, list[int]] = {}
    for i, text in enumerate(tokenizer.batch_decode([[i] for i in range(size)])):
        found.setdefault(text.strip().lower(), []).append(i)
    return found


def own_ids(tokenizer, rule: Rule, vocabulary: dict[str, list[int]]) -> list[int]:
    """Ids of the tokens that are words of the rule or, where no token is the whole word, begin them."""
    found: set[int] = set()
    for word in words_of(rule):
        found |= set(vocabulary.get(word) or tokenizer(word, add_special_tokens=False)["input_ids"][:1])
    return sorted(found)


@torch.no_grad()
def screen(
    model: Any, tokenizer, point: HookPoint, sae: SAE, *, rules: dict[int, Rule], maxima: Tensor, writing: Writing,
    limit: float,
) -> list[Screened]:
    """The latents of `rules` that raise the probability of their own words, the largest rise first.

    Counts strengths at which an edit's cost, the mean KL(edited || unedited) of the next token, is at most log(limit):
    by so much the unedited model's loss on the edited model's tokens exceeds the edited model's own. Leaves out words
    that the unsteered texts are full of (COMMON). maxima: highest code of each latent, [F]. writing: the texts, and the
    tokens never to edit.
    """
    texts = continue_texts(model, tokenizer, writing.prompts, writing.n_tokens, temperature=writing.temperature,
                           seed=writing.seed)
    vocabulary = vocabulary_of(tokenizer, model.get_output_embeddings().weight.shape[0])
    own = {latent: chosen for latent, rule in rules.items() if (chosen := own_ids(tokenizer, rule, vocabulary))}
    ids, mask, written = padded_right(texts.mask, texts.ids, texts.mask, texts.written)
    before = written.roll(-1, 1)  # a token's logits stand at the one before it
    before[:, -1] = False

    def next_log_probabilities() -> Tensor:
        logits = model(input_ids=ids, attention_mask=mask, **no_cache(model)).logits
        return logits[before.to(logits.device)].float().log_softmax(1)

    clean = next_log_probabilities()
    usual = clean.exp().mean(0)
    rare = {latent: chosen for latent, chosen in own.items() if float(usual[chosen].sum()) <= COMMON}
    found = []
    for latent in tqdm(_by_direct_view(sae, model, rare)[:DIRECT], desc="screening", unit="latent"):
        chosen, best = rare[latent], 0.0
        for strength in STRENGTHS:
            with steer(model, point, sae, [Edit(latent, "add", strength)], maxima=maxima, spare=writing.spare):
                edited = next_log_probabilities()
            if float((edited.exp() * (edited - clean)).sum(1).mean()) > math.log(limit):
                break
            best = max(best, float(edited.exp()[:, chosen].sum(1).mean() - usual[chosen].sum()))
        if best > 0:
            found.append(Screened(latent, best, float(usual[chosen].sum())))
    return sorted(found, key=lambda each: (-each.rise, each.latent))


def _by_direct_view(sae: SAE, model: Any, own: dict[int, list[int]]) -> list[int]:
    """The latents by how far the logits of their own tokens rise, in standard deviations over the vocabulary."""
    view = direct_view(model, len(sae.mean))
    if view is None:
        return list(own)
    effects = {latent: sae.W_dec[latent].to(view) @ view.T for latent in own}
    return sorted(own, key=lambda latent: -float(effects[latent][own[latent]].mean() / effects[latent].std()))
