"""What the live page asks of the model: which latents fire on a text, what an edit makes it write, what it says next.

    answer = read(live, "The dog ran.")              # plain dicts, ready for JSON
    answer = take_away(live, Place("The dog ran.", token=1), latent=460)
"""
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from concepts.continuations import continue_texts
from concepts.directions import token_text
from concepts.effects import divergence
from lib.blocks import input_device, max_positions, no_cache
from lib.encoder import LONGEST, Encoded, Encoder
from lib.environment import InputError
from lib.steering import Edit, left_out, steer
from lib.texts import Tokens, tokenise

SHOWN = 64  # latents listed for one token
NEXT_TOKENS = 6  # listed as raised, as lowered, and as likeliest
Say = Callable[[dict[str, Any]], None]  # takes what is known so far


class Live(NamedTuple):
    """A model with its SAE, and how much may be asked of it at one time."""

    encoder: Encoder
    text_tokens: int
    """Tokens of a text."""
    new_tokens: int
    """Tokens to write."""
    temperature: float
    """Of the draws; 0: greedy."""
    written: dict["Order", dict[str, Any]]
    """What the model wrote last without an edit."""


class Place(NamedTuple):
    """A token of a text."""

    text: str
    token: int
    """Counted as read() lists them, without special tokens."""


class Order(NamedTuple):
    """What is to be written, but for the edit."""

    text: str
    """The beginning, to be continued."""
    seed: int


def can_write(model: Any) -> bool:
    """Whether the model is a causal language model."""
    return hasattr(model, "generate") and model.get_output_embeddings() is not None


def about(live: Live) -> dict[str, Any]:
    """What the page tells of the model before anything is asked."""
    encoder = live.encoder
    why = None
    if not can_write(encoder.model):
        why = f"{type(encoder.model).__name__} is no causal language model: it writes nothing and has no next token"
    return {"hook": encoder.point.signature, "n_latents": encoder.sae.n_latents, "text_tokens": _longest(live),
            "new_tokens": live.new_tokens, "no_writing": why, "measured": encoder.sae.maxima is not None}


def _longest(live: Live) -> int:
    return min(live.text_tokens, max_positions(live.encoder.model) or live.text_tokens)


def _tokens(live: Live, text: str) -> Tokens:
    """The text's tokens. Raises InputError if they are too many."""
    longest = _longest(live)
    item = _tokenised(live.encoder, text, longest + 1)
    if len(item.ids) > longest:
        raise InputError(f"the text has more than {longest} tokens; shorten it")
    return item


def _tokenised(encoder: Encoder, text: str, max_length: int = LONGEST) -> Tokens:
    """The tokens of which encoder.encode() keeps the same."""
    settings = encoder.settings
    (item,) = tokenise(encoder.tokenizer, [text], 0, max_length, skip_special=settings.skip_special,
                       skip_first=settings.skip_first)
    return item


def read(live: Live, text: str, latent: int | None = None) -> dict[str, Any]:
    """Each token of the text with the latents that fire on it, strongest first, as [latent, code].

    latent: one whose code on every token is wanted as well, as "codes". "highest" has the highest code of each of these
    latents on the corpus, where it is known.
    """
    item = _tokens(live, text)
    encoded, maxima = live.encoder.encode(text), live.encoder.sae.maxima
    spans = [span for span, kept in zip(item.offsets, item.keep) if kept]
    tokens, names, seen = [], {}, set() if latent is None else {latent}
    for before, piece, latents, codes, row in zip(*_pieces(text, spans), encoded.latents.tolist(),
                                                  encoded.codes.tolist(), encoded.names):
        fired = [(i, _short(code), name) for i, code, name in zip(latents, codes, row) if code > 0]
        tokens.append({"before": before, "text": piece, "n": len(fired),
                       "latents": [[i, code] for i, code, _ in fired[:SHOWN]]})
        names.update({i: name for i, _, name in fired[:SHOWN] if name})
        seen |= {i for i, _, _ in fired[:SHOWN]}
    highest = {} if maxima is None else {i: _short(maxima[i]) for i in sorted(seen)}
    after = text[spans[-1][1]:] if spans else text
    found = {"tokens": tokens, "after": after, "names": names, "highest": highest}
    return found if latent is None else found | {"codes": codes_of(encoded, latent)}


def codes_of(encoded: Encoded, latent: int) -> list[float]:
    """The latent's code on each token."""
    return [_short(code) for code in (encoded.codes * (encoded.latents == latent)).sum(1).tolist()]


def _pieces(text: str, spans: list[tuple[int, int]]) -> tuple[list[str], list[str]]:
    """For each token what stands between it and the one before, its leading spaces included, and its own characters.

    Together they are the text up to the last token: characters that two tokens share are the first one's.
    """
    before, own, at = [], [], 0
    for start, end in spans:
        start, end = max(start, at), max(end, at)
        piece = text[start:end]
        word = piece.lstrip(" ") or piece
        before.append(text[at:start] + piece[: len(piece) - len(word)])
        own.append(word)
        at = end
    return before, own


def _short(value: float | Tensor) -> float:
    return float(f"{float(value):.4g}")


@torch.no_grad()
def take_away(live: Live, place: Place, latent: int, everywhere: bool) -> dict[str, Any]:
    """What setting the latent's code to 0 does to the token after a place: KL in nats, and probabilities before, after.

    everywhere: on all tokens up to the place; False: on its own token alone. "fires": on how many of the edited tokens
    the latent fires; if on none, nothing changes, bit for bit.
    """
    encoder, item = live.encoder, _tokens(live, place.text)
    _require_writing(live)
    kept = [number for number, keep in enumerate(item.keep) if keep]
    if not place.token < len(kept):
        raise InputError(f"the text has {len(kept)} tokens; there is no token {place.token}")
    position = kept[place.token]
    codes = codes_of(encoder.encode(place.text), latent)[: place.token + 1]
    ids = torch.tensor([item.ids[: position + 1]], device=input_device(encoder.model))

    def logits() -> Tensor:
        return encoder.model(input_ids=ids, **no_cache(encoder.model)).logits[:, -1].float().cpu()

    before = logits()
    unit = torch.zeros(encoder.sae.n_latents)  # nothing is added, so there is nothing to measure by
    with steer(encoder.model, encoder.point, encoder.sae, [Edit(latent, "ablate")], maxima=unit,
               positions=None if everywhere else {position},
               spare=left_out(encoder.tokenizer, asdict(encoder.settings))):
        after = logits()
    edited = codes if everywhere else codes[-1:]
    return {"kl": _short(divergence(before, after)[0]), "code": codes[-1],
            "fires": sum(code > 0 for code in edited), **_next_tokens(encoder, before[0], after[0])}


def _next_tokens(encoder: Encoder, before: Tensor, after: Tensor) -> dict[str, list[list[Any]]]:
    """The likeliest next tokens, and those whose probabilities rise and fall most: [token, before, after]."""
    p, q = before.double().softmax(0), after.double().softmax(0)

    def rows(values: Tensor, least: float | None = None) -> list[list[Any]]:
        top = values.topk(min(NEXT_TOKENS, len(values)))
        return [[token_text(encoder.tokenizer, i), _short(p[i]), _short(q[i])]
                for i, value in zip(top.indices.tolist(), top.values.tolist()) if least is None or value > least]

    return {"likely": rows(p), "raised": rows(q - p, 0.0), "lowered": rows(p - q, 0.0)}


def _require_writing(live: Live) -> None:
    if why := about(live)["no_writing"]:
        raise InputError(why)


def write(live: Live, order: Order, latent: int, strength: float, stop: Callable[[], bool], say: Say) -> None:
    """Let the model write on as it is, then steered, from the same seed; say() each text while it grows.

    say() gets {"which": "plain" or "steered", "text": what is written so far}, and at the end of each text also
    "perplexity" under the unedited model, and "pieces": [text between, token, the latent's code when the unedited model
    reads it]. stop: asked after each token; once it says yes, the writing ends.
    """
    encoder = live.encoder
    _require_writing(live)
    prompt = _tokens(live, order.text)
    n_left = (max_positions(encoder.model) or live.new_tokens + len(prompt.ids)) - len(prompt.ids)
    if n_left < 1:
        raise InputError("the text fills all the places that the model has; shorten it")
    with encoder.steer(latent, strength):
        pass  # an edit that makes no sense is refused before anything is written
    decode = partial(encoder.tokenizer.decode, skip_special_tokens=True)
    shown = decode(prompt.ids)
    for which in ("plain", "steered"):
        if which == "plain" and order in live.written:
            say(live.written[order] | _coloured(encoder, order.text, live.written[order]["text"], latent))
            continue

        def watch(ids: Tensor, which: str = which) -> bool:
            say({"which": which, "text": decode(ids[0]).removeprefix(shown)})
            return stop()

        done = continue_texts(encoder.model, encoder.tokenizer, [order.text], min(live.new_tokens, n_left),
                              steering=encoder.steer(latent, strength) if which == "steered" else None,
                              temperature=live.temperature, seed=order.seed, watch=watch)
        if stop():
            return
        written = done.texts[0].removeprefix(shown)
        found = {"which": which, "text": written, "perplexity": _short(done.perplexity[0])}
        say(found | _coloured(encoder, order.text, written, latent))
        if which == "plain":  # only the last one is kept
            live.written.clear()
            live.written[order] = found


def _coloured(encoder: Encoder, prompt: str, written: str, latent: int) -> dict[str, Any]:
    """What is written, in pieces [text between, token, code]; none if the two together are too long to be read."""
    text = prompt + written
    try:
        codes = codes_of(encoder.encode(text), latent)
    except InputError:
        return {}
    item = _tokenised(encoder, text)
    spans = [span for span, kept in zip(item.offsets, item.keep) if kept]
    first = next((number for number, (_, end) in enumerate(spans) if end > len(prompt)), len(spans))
    before, own = _pieces(written, [(max(start - len(prompt), 0), end - len(prompt)) for start, end in spans[first:]])
    return {"pieces": [list(row) for row in zip(before, own, codes[first:])]}
