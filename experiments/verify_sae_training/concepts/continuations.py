"""What a model writes after prompts while it is steered, judged by the unsteered model.

    with_more = steer(model, point, sae, [Edit(17, "add", 0.5)], maxima)
    done = continue_texts(model, tokenizer, ["Once upon a time"], 40, steering=with_more, temperature=0.7)

What steering gains and costs is measured in concepts/steered_texts.py.
"""
import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional

from lib.blocks import input_device, n_embeddings, no_cache
from lib.environment import InputError
from lib.steering import plain_writing
from lib.texts import filler_id

_padding_tried: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


class Continuation(NamedTuple):
    """Texts that a model wrote after prompts."""

    texts: list[str]
    """Prompt and continuation."""
    perplexity: Tensor
    """exp of the mean cross-entropy of the continuation under the unsteered model, [B]; nan where it is empty."""
    ids: Tensor
    """int64 [B, T], prompts padded on the left."""
    mask: Tensor
    """int64 [B, T], 0 for padding and for what follows the end of a text."""
    written: Tensor
    """bool [B, T]: whether the token belongs to the continuation, before its end."""
    starts: list[int]
    """Character of each text at which its continuation begins."""

    @property
    def ids_written(self) -> list[list[int]]:
        """The token ids of each continuation."""
        return [ids[keep].tolist() for ids, keep in zip(self.ids, self.written)]


@torch.no_grad()
def continue_texts(
    model: Any, tokenizer, prompts: Sequence[str], n_tokens: int, steering=None, temperature: float = 0.0,
    seed: int = 0, watch: Callable[[Tensor], bool] | None = None,
) -> Continuation:
    """Let the steered model write n_tokens after each prompt, and the unsteered one judge them.

    steering: a context manager from steer(), or None. temperature: 0 is greedy; the same seed draws the same noise.
    watch: called with the ids so far, [B, T], after each token; True ends the writing. Raises InputError if the model
    can't write.
    """
    if not hasattr(model, "generate") or model.get_output_embeddings() is None:
        raise InputError(f"{type(model).__name__} writes no text; steering needs a causal language model")
    ids, mask = _left_padded(tokenizer, prompts, input_device(model))
    together = _reads_left_padding(model)  # tried before anything is steered
    arguments: dict[str, Any] = {"max_new_tokens": n_tokens, "pad_token_id": filler_id(tokenizer)}
    if watch is not None:
        arguments["stopping_criteria"] = [lambda ids, _scores: ids.new_full((len(ids),), watch(ids), dtype=torch.bool)]
    with plain_writing(model, temperature, seed) as how, steering or nullcontext():
        whole = (model.generate(ids, attention_mask=mask, **arguments, **how) if together
                 else _generated_one_by_one(model, ids, mask, arguments | how))
    new = whole[:, ids.shape[1] :]
    given = model.generation_config.eos_token_id  # some models end a text at any of several tokens
    ends = {tokenizer.eos_token_id, *(given if isinstance(given, list) else [given])} - {None}
    ended = torch.isin(new, torch.tensor(sorted(ends), dtype=new.dtype, device=new.device))
    written = torch.cat([torch.zeros_like(mask, dtype=torch.bool), ended.cumsum(1) - ended.long() == 0], 1)
    full = torch.cat([mask, written[:, ids.shape[1] :].to(mask)], 1)
    texts = [tokenizer.decode(row[keep.bool()], skip_special_tokens=True) for row, keep in zip(whole, full)]
    starts = [len(tokenizer.decode(row[keep.bool()], skip_special_tokens=True)) for row, keep in zip(ids, mask)]
    return Continuation(texts, perplexities(model, whole, full, written), ids=whole, mask=full, written=written,
                        starts=starts)


def _generated_one_by_one(model: Any, ids: Tensor, mask: Tensor, arguments: dict[str, Any]) -> Tensor:
    """What generate() gives, [B, T + new], one prompt at a time, without padding and without kept states."""
    new = ids.new_full((len(ids), arguments["max_new_tokens"]), arguments["pad_token_id"])
    for row, (prompt, real) in enumerate(zip(ids, mask.bool())):
        alone = prompt[real][None]
        written = model.generate(alone, attention_mask=torch.ones_like(alone), use_cache=False, **arguments)[0]
        written = written[alone.shape[1] :]
        new[row, : len(written)] = written
    return torch.cat([ids, new], 1)


@torch.no_grad()
def _reads_left_padding(model: Any) -> bool:
    """Whether padding on the left changes nothing. It does in RWKV and RecurrentGemma, whose states run through it.

    In transformers 5.23 RWKV also mixes up the states of a batch that it continues, and RecurrentGemma starts a prompt
    of one token from the state of the prompt before. Such models continue one prompt at a time, without kept states.
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
    """ids and mask [B, T] of the prompts, without the end-of-text token that some tokenizers append."""
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
    """exp of the mean cross-entropy of the judged tokens given all before them, [B]; nan for a row without any.

    ids, mask int64 [B, T], padded on either side; judged bool [B, T], never the first token.
    """
    ids, mask, judged = padded_right(mask, ids, mask, judged)
    logits = model(input_ids=ids, attention_mask=mask, **no_cache(model)).logits[:, :-1].float()
    losses = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten().to(logits.device),
                                      reduction="none").view(len(ids), -1)
    keep = judged[:, 1:].to(losses)
    return ((losses * keep).sum(1) / keep.sum(1)).exp().cpu()


def padded_right(mask: Tensor, *tensors: Tensor) -> list[Tensor]:
    """The tensors [B, T] with padding moved behind the text, where no model reads it."""
    order = (1 - mask).argsort(dim=1, stable=True)
    return [x.gather(1, order) for x in tensors]
