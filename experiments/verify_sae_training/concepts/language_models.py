"""Chat models behind one function: a server that speaks OpenAI's protocol or Anthropic's, or a model in this process.

    chat = open_chat("openai")
    answer = ask_json(chat, "Name a colour as {\"colour\": ...}", check, cache_folder)

| backend      | from the environment                                                                        |
|--------------|---------------------------------------------------------------------------------------------|
| openai       | OPENAI_BASE_URL (such as http://localhost:11434/v1), NAMING_MODEL, OPENAI_API_KEY if needed |
| anthropic    | ANTHROPIC_API_KEY, NAMING_MODEL; ANTHROPIC_BASE_URL for another address                     |
| transformers | NAMING_MODEL: hub name or directory of a chat model                                         |

A key goes into the request's header and nowhere else: not into messages, the cache or any output, even where a server
repeats it.
"""
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from concepts import chat_servers
from concepts.chat_keys import Secret
from concepts.chat_servers import ANSWER_TOKENS, Messages, NoAnswer, Reply
from lib.environment import InputError, choose_device, first_line, is_out_of_memory
from lib.files import fingerprint, read_json, write_json

BACKENDS = ("openai", "anthropic", "transformers")
ATTEMPTS = 3  # answers that are asked for until one is valid
MAX_BRACES = 1000  # in one answer, from each of which JSON is tried


@dataclass
class Chat:
    """A chat model and what has been asked of it."""

    backend: str
    model: str
    send: Callable[[Messages], Reply]
    """Messages of the roles user and assistant, in turns -> the next reply; raises NoAnswer."""
    secret: Secret = field(default_factory=lambda: Secret(""), repr=False)
    """The key, to be taken out of replies."""
    calls: int = 0
    cached: int = 0
    tokens_in: int = 0
    tokens_out: int = 0

    def ask(self, messages: Messages) -> str:
        """The reply's text, without the key; counts its tokens."""
        reply = self.send(messages)
        self.calls += 1
        self.tokens_in += reply.tokens_in
        self.tokens_out += reply.tokens_out
        return self.secret.removed(reply.text)

    def spent(self) -> str:
        """One line for people: what has been used so far."""
        used = f"{self.tokens_in:,} tokens read and {self.tokens_out:,} written in {self.calls} calls"
        return f"{self.model}: {used}; {self.cached} answers from the cache"


def open_chat(backend: str) -> Chat:
    """The chat model that the environment describes (see above). Nothing is sent yet.

    Raises InputError for an unknown backend and for settings that are missing or can't work.
    """
    if backend not in BACKENDS:
        raise InputError(f"NAME_BACKEND={backend!r} must be one of offline, {', '.join(BACKENDS)}")
    model = os.environ.get("NAMING_MODEL", "").strip()
    if not model:
        raise InputError(f"NAME_BACKEND={backend} needs a model: set the environment variable NAMING_MODEL")
    if not model.isprintable() or len(model) > 400:
        raise InputError("NAMING_MODEL has characters that no name has; set it again")
    make = {"openai": chat_servers.openai, "anthropic": chat_servers.anthropic, "transformers": _transformers}[backend]
    send, secret = make(model)
    return Chat(backend, model, send, secret=secret)


def ask_json(
    chat: Chat, question: str, check: Callable[[dict[str, Any]], dict[str, Any]], cache: Path
) -> dict[str, Any] | None:
    """The first answer that is a JSON object and passes `check`, or None if ATTEMPTS answers did not.

    check: returns the object, cleaned, or raises ValueError with what is wrong, which the model is then told.
    cache: folder of answers by the hash of question and model; a question that was answered is not sent again.
    Raises NoAnswer if the server gives none.
    """
    path = cache / f"{question_key(chat, question)}.json"
    if path.exists():
        try:
            answer = check(dict(chat.secret.removed(read_json(path)["answer"])))
            chat.cached += 1
            return answer
        except (ValueError, KeyError, TypeError, RecursionError):  # damaged, or valid by older rules only: ask again
            pass
    messages: Messages = [{"role": "user", "content": question}]
    for _ in range(ATTEMPTS):
        text = chat.ask(messages)
        try:
            answer = check(chat.secret.removed(find_json(text)))
        except ValueError as error:
            again = f"That can't be used: {error}. Answer with the one JSON object alone."
            messages += [{"role": "assistant", "content": text[:500] or "-"}, {"role": "user", "content": again}]
            continue
        write_json(path, {"model": chat.model, "answer": answer})
        return answer
    return None


def question_key(chat: Chat, question: str) -> str:
    """Sixteen hex digits of a question and the model that it is put to."""
    return fingerprint([chat.backend, chat.model, question])


def find_json(text: str) -> dict[str, Any]:
    """The first JSON object in a text, whatever stands around it; what a model thinks aloud is passed over.

    Raises ValueError if there is none.
    """
    said = _aloud(text)
    for brace in islice(re.finditer("{", said), MAX_BRACES):
        try:
            return json.JSONDecoder().raw_decode(said, brace.start())[0]
        except (ValueError, RecursionError):
            continue
    raise ValueError("there is no JSON object in it")


def _aloud(text: str) -> str:
    """A text without what stands between <think> and </think>, or behind a <think> that never ends.

    Some servers put the <think> into the prompt, so that all before a </think> alone was thought too.
    """
    parts: list[str] = []
    at, thinking = 0, False
    for tag in re.finditer(r"<(/?)think(?:ing)?>", text, re.IGNORECASE):
        if tag[1]:
            if not thinking:
                parts.clear()
            at, thinking = tag.end(), False
        elif not thinking:
            parts.append(text[at : tag.start()])
            thinking = True
    return "".join(parts if thinking else [*parts, text[at:]])


def _transformers(name: str) -> tuple[Callable[[Messages], Reply], Secret]:
    from lib.models import choose_dtype, load_model, load_tokenizer  # slow to import, and only needed here
    from lib.texts import filler_id

    device = choose_device("auto")
    model: Any = load_model(name, device, choose_dtype("auto", device))
    tokenizer = load_tokenizer(name)
    if not tokenizer.chat_template or not model.can_generate():
        raise InputError(f"NAMING_MODEL={name} is no chat model (no chat template); choose an instruction-tuned one")

    def template(messages: Messages) -> Any:
        try:
            return tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            ).to(device)
        except Exception as error:  # a template is a program of its own, and raises what it likes
            raise _failed(name, "its chat template fails", error) from None

    def send(messages: Messages) -> Reply:
        inputs = template(messages)
        n_in = inputs["input_ids"].shape[1]
        pad = filler_id(tokenizer)
        try:
            said = model.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False, pad_token_id=pad)[0, n_in:]
        except (IndexError, ValueError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            raise _failed(name, f"it can't answer {n_in} tokens", error) from None
        return Reply(tokenizer.decode(said, skip_special_tokens=True), n_in, len(said))

    template([{"role": "user", "content": "Hello"}])
    return send, Secret("")


def _failed(name: str, what: str, error: Exception) -> NoAnswer:
    return NoAnswer(f"NAMING_MODEL={name}: {what} ({first_line(error)}); choose another model")
