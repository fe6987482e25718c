"""Chat models behind one function: a server of OpenAI's protocol, Anthropic's, or a model in this process.

    chat = open_chat("openai")
    answer = ask_json(chat, "Name a colour as {\"colour\": ...}", check, cache_folder)

| backend      | from the environment                                                                        |
|--------------|---------------------------------------------------------------------------------------------|
| openai       | OPENAI_BASE_URL (such as http://localhost:11434/v1), NAMING_MODEL, OPENAI_API_KEY if needed |
| anthropic    | ANTHROPIC_API_KEY, NAMING_MODEL; ANTHROPIC_BASE_URL for another address                     |
| transformers | NAMING_MODEL: hub name or directory of a chat model                                         |

openai and anthropic need the extra `chat`. A key goes into the request's header and nowhere else: not into messages,
the cache or any output, even if the server repeats it.
"""
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from concepts.chat_servers import ANSWER_TOKENS, DEFAULT_ADDRESS, Messages, NoAnswer, Reply, Secret, Send, connect
from lib.environment import InputError, choose_device, first_line, is_out_of_memory
from lib.files import fingerprint, read_json, write_json

BACKENDS = (*DEFAULT_ADDRESS, "transformers")
ATTEMPTS = 3  # at one valid answer
MAX_BRACES = 1000  # of one answer, at which JSON may begin


@dataclass
class Chat:
    """A chat model, and what it has cost so far."""

    backend: str
    model: str
    send: Send
    """Messages by user and assistant in turns -> the next reply; raises NoAnswer."""
    secret: Secret = field(default_factory=lambda: Secret(""), repr=False)
    """The key, to take out of replies."""
    calls: int = 0
    cached: int = 0
    tokens_in: int = 0
    tokens_out: int = 0

    def ask(self, messages: Messages) -> str:
        """The reply's text without the key; its tokens are counted."""
        reply = self.send(messages)
        self.calls += 1
        self.tokens_in += reply.tokens_in
        self.tokens_out += reply.tokens_out
        return self.secret.removed(reply.text)

    def spent(self) -> str:
        """What has been used so far, in one line."""
        used = f"{self.tokens_in:,} tokens read and {self.tokens_out:,} written in {self.calls} calls"
        return f"{self.model}: {used}; {self.cached} answers from the cache"


def open_chat(backend: str) -> Chat:
    """The chat model that the environment describes (see above); nothing is sent yet.

    Raises InputError for an unknown backend, a missing client, and settings that are missing or can't work.
    """
    if backend not in BACKENDS:
        raise InputError(f"NAME_BACKEND={backend!r} must be one of offline, {', '.join(BACKENDS)}")
    model = os.environ.get("NAMING_MODEL", "").strip()
    if not model:
        raise InputError(f"NAME_BACKEND={backend} needs a model: set the environment variable NAMING_MODEL")
    if not model.isprintable() or len(model) > 400:
        raise InputError("NAMING_MODEL has characters that no name has; set it again")
    if backend == "transformers":
        return Chat(backend, model, _in_this_process(model))
    send, secret = connect(backend, model)
    return Chat(backend, model, send, secret)


def ask_json(
    chat: Chat, question: str, check: Callable[[dict[str, Any]], dict[str, Any]], cache: Path
) -> dict[str, Any] | None:
    """The first answer that is a JSON object and passes `check`, or None after ATTEMPTS.

    check: returns the cleaned object, or raises ValueError with what is wrong, which the model is then told.
    cache: folder of answers by hash of question and model; a question answered before is not sent again.
    Raises NoAnswer if the server does not answer.
    """
    path = cache / f"{question_key(chat, question)}.json"
    if path.exists():
        try:
            answer = check(dict(chat.secret.removed(read_json(path)["answer"])))
            chat.cached += 1
            return answer
        except (ValueError, KeyError, TypeError, RecursionError):  # damaged, or valid only by older rules: ask again
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
    """Sixteen hex digits that stand for a question and the model asked."""
    return fingerprint([chat.backend, chat.model, question])


def find_json(text: str) -> dict[str, Any]:
    """The first JSON object in a text, whatever surrounds it, except in what the model thinks aloud.

    Raises ValueError if there is none.
    """
    said = _aloud(text)
    for brace in islice(re.finditer("{", said), MAX_BRACES):
        try:
            return json.JSONDecoder().raw_decode(said, brace.start())[0]
        except (ValueError, RecursionError):
            continue  # no object begins here; the next brace may begin one
    raise ValueError("there is no JSON object in it")


def _aloud(text: str) -> str:
    """A text without what stands between <think> and </think>, or after a <think> that never ends.

    Some servers put the <think> into the prompt: then everything before the first </think> was thought too.
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


def _in_this_process(name: str) -> Send:
    from lib.models import choose_dtype, load_model, load_tokenizer  # slow to import, needed only here
    from lib.texts import filler_id

    device = choose_device("auto")
    model: Any = load_model(name, device, choose_dtype("auto", device))
    tokenizer = load_tokenizer(name)
    if not tokenizer.chat_template or not model.can_generate():
        raise InputError(f"NAMING_MODEL={name} has no chat template; choose an instruction-tuned model")

    def template(messages: Messages) -> Any:
        try:
            return tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            ).to(device)
        except Exception as error:  # a template is a program, and raises what it likes
            raise _failed(name, "its chat template fails", error) from None

    def send(messages: Messages) -> Reply:
        inputs = template(messages)
        n_in, pad = inputs["input_ids"].shape[1], filler_id(tokenizer)
        try:
            said = model.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False, pad_token_id=pad)[0, n_in:]
        except (IndexError, ValueError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            raise _failed(name, f"it can't answer {n_in} tokens", error) from None
        return Reply(tokenizer.decode(said, skip_special_tokens=True), n_in, len(said))

    template([{"role": "user", "content": "Hello"}])
    return send


def _failed(name: str, what: str, error: Exception) -> NoAnswer:
    return NoAnswer(f"NAMING_MODEL={name}: {what} ({first_line(error)}); choose another model")
