"""Chat models behind one function: a server that speaks OpenAI's protocol or Anthropic's, or a model in this process.

    chat = open_chat("openai")
    answer = ask_json(chat, "Name a colour as {\"colour\": ...}", check, cache_folder)

| backend      | from the environment                                                                        |
|--------------|---------------------------------------------------------------------------------------------|
| openai       | OPENAI_BASE_URL (such as http://localhost:11434/v1), NAMING_MODEL, OPENAI_API_KEY if needed |
| anthropic    | ANTHROPIC_API_KEY, NAMING_MODEL; ANTHROPIC_BASE_URL for another address                     |
| transformers | NAMING_MODEL: hub name or directory of a chat model                                         |

A key goes into the request's header and nowhere else: not into messages, the cache or any output.
"""
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib import chat_servers
from lib.chat_servers import ANSWER_TOKENS, Messages, Reply
from lib.environment import InputError, choose_device
from lib.files import fingerprint, read_json, write_json

BACKENDS = ("openai", "anthropic", "transformers")
ATTEMPTS = 3  # answers that are asked for until one is valid


@dataclass
class Chat:
    """A chat model and what has been asked of it."""

    backend: str
    model: str
    send: Callable[[Messages], Reply]
    """Messages of the roles user and assistant, in turns -> the next reply."""
    calls: int = 0
    cached: int = 0
    tokens_in: int = 0
    tokens_out: int = 0

    def ask(self, messages: Messages) -> str:
        """The reply's text; counts its tokens."""
        reply = self.send(messages)
        self.calls += 1
        self.tokens_in += reply.tokens_in
        self.tokens_out += reply.tokens_out
        return reply.text

    def spent(self) -> str:
        """One line for people: what has been used so far."""
        used = f"{self.tokens_in:,} tokens read and {self.tokens_out:,} written in {self.calls} calls"
        return f"{self.model}: {used}; {self.cached} answers from the cache"


def open_chat(backend: str) -> Chat:
    """The chat model that the environment describes (see above). Nothing is sent yet.

    Raises InputError for an unknown backend and for settings that are missing or can't work.
    """
    if backend not in BACKENDS:
        raise InputError(f"NAME_BACKEND={backend!r} is none of offline, {', '.join(BACKENDS)}")
    model = os.environ.get("NAMING_MODEL", "").strip()
    if not model:
        raise InputError(f"NAME_BACKEND={backend} needs a model: set the environment variable NAMING_MODEL")
    make = {"openai": chat_servers.openai, "anthropic": chat_servers.anthropic, "transformers": _transformers}[backend]
    return Chat(backend, model, make(model))


def ask_json(
    chat: Chat, question: str, check: Callable[[dict[str, Any]], dict[str, Any]], cache: Path
) -> dict[str, Any] | None:
    """The first answer that is a JSON object and passes `check`, or None if ATTEMPTS answers did not.

    check: returns the object, cleaned, or raises ValueError with what is wrong, which the model is then told.
    cache: folder of answers by the hash of question and model; a question that was answered is not sent again.
    """
    path = cache / f"{question_key(chat, question)}.json"
    if path.exists():
        try:
            answer = check(read_json(path)["answer"])
            chat.cached += 1
            return answer
        except (ValueError, KeyError, TypeError):  # damaged, or valid by older rules only: ask again
            pass
    messages: Messages = [{"role": "user", "content": question}]
    for _ in range(ATTEMPTS):
        text = chat.ask(messages)
        try:
            answer = check(find_json(text))
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
    text = re.sub(r"(?s)<think>.*?</think>", "", text)
    for brace in re.finditer("{", text):
        try:
            return json.JSONDecoder().raw_decode(text, brace.start())[0]
        except ValueError:
            continue
    raise ValueError("there is no JSON object in it")


def _transformers(name: str) -> Callable[[Messages], Reply]:
    from lib.models import choose_dtype, load_model, load_tokenizer  # slow to import, and only needed here

    device = choose_device("auto")
    model: Any = load_model(name, device, choose_dtype("auto", device))
    tokenizer = load_tokenizer(name)
    if not tokenizer.chat_template or not model.can_generate():
        raise InputError(f"NAMING_MODEL={name} is no chat model (no chat template); choose an instruction-tuned one")

    def send(messages: Messages) -> Reply:
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(device)
        n_in = inputs["input_ids"].shape[1]
        pad = tokenizer.pad_token_id
        said = model.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False, pad_token_id=pad)[0, n_in:]
        return Reply(tokenizer.decode(said, skip_special_tokens=True), n_in, len(said))

    return send
