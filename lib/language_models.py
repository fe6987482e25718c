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
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lib.environment import InputError, choose_device
from lib.store import fingerprint, read_json, write_json

BACKENDS = ("openai", "anthropic", "transformers")
ANTHROPIC_URL = "https://api.anthropic.com"
ANSWER_TOKENS = 600  # of one answer, with room for a model that thinks aloud
ATTEMPTS = 3  # answers that are asked for until one is valid
WAITS = (1.0, 4.0, 16.0)  # seconds before a busy server is asked again
TIMEOUT = 300.0  # seconds for one answer; a large model on a CPU needs minutes
CHARS_PER_TOKEN = 4  # for estimates
Messages = list[dict[str, str]]


class Reply(NamedTuple):
    """What a chat model said."""

    text: str
    tokens_in: int
    tokens_out: int


class Refused(Exception):
    """An HTTP status that is not success: (status, body)."""


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
    make = {"openai": _openai, "anthropic": _anthropic, "transformers": _transformers}[backend]
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


def _openai(model: str) -> Callable[[Messages], Reply]:
    url = _address("OPENAI_BASE_URL", "") + "/chat/completions"
    key = _key("OPENAI_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    options: dict[str, Any] = {"max_tokens": ANSWER_TOKENS, "temperature": 0}

    def send(messages: Messages) -> Reply:
        data = _post(url, headers, key, {"model": model, "messages": messages}, options)
        try:
            text, usage = data["choices"][0]["message"].get("content") or "", data.get("usage") or {}
        except (KeyError, IndexError, TypeError, AttributeError):
            raise InputError(f"{url} answers, but not in OpenAI's protocol; check OPENAI_BASE_URL") from None
        return _reply(text, messages, usage.get("prompt_tokens"), usage.get("completion_tokens"))

    return send


def _anthropic(model: str) -> Callable[[Messages], Reply]:
    url = _address("ANTHROPIC_BASE_URL", ANTHROPIC_URL) + "/v1/messages"
    key = _key("ANTHROPIC_API_KEY")
    if not key:
        raise InputError("NAME_BACKEND=anthropic needs the environment variable ANTHROPIC_API_KEY")
    headers = {"x-api-key": key, "anthropic-version": "2023-06-01"}
    options: dict[str, Any] = {"temperature": 0}

    def send(messages: Messages) -> Reply:
        content = {"model": model, "max_tokens": ANSWER_TOKENS, "messages": messages}
        data = _post(url, headers, key, content, options)
        try:
            text = "".join(block["text"] for block in data["content"] if block["type"] == "text")
            usage = data.get("usage") or {}
        except (KeyError, TypeError, AttributeError):
            raise InputError(f"{url} answers, but not in Anthropic's protocol; check ANTHROPIC_BASE_URL") from None
        return _reply(text, messages, usage.get("input_tokens"), usage.get("output_tokens"))

    return send


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


def _reply(text: str, messages: Messages, tokens_in: int | None, tokens_out: int | None) -> Reply:
    """A reply whose token counts are estimated where the server does not tell them."""
    asked = sum(len(message["content"]) for message in messages)
    return Reply(text, tokens_in or asked // CHARS_PER_TOKEN, tokens_out or len(text) // CHARS_PER_TOKEN)


def _address(variable: str, default: str) -> str:
    url = os.environ.get(variable, default).strip().rstrip("/")
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(f"set the environment variable {variable} to an address such as http://localhost:11434/v1")
    if parts.username or parts.password or parts.query:
        raise InputError(f"{variable} holds more than an address; a key belongs in its own environment variable")
    return url


def _key(variable: str) -> str:
    key = os.environ.get(variable, "").strip()
    if not key.isascii() or not key.isprintable():
        raise InputError(f"{variable} has characters that no key has; set it again")
    return key


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would take the key to another host."""

    def redirect_request(self, *args):
        return None


def _post(
    url: str, headers: dict[str, str], key: str, content: dict[str, Any], options: dict[str, Any]
) -> dict[str, Any]:
    """POST JSON, get JSON. `options` loses for good what the server does not take; a busy server is waited for.

    Raises InputError, without the key even where the server repeats it.
    """
    waits = list(WAITS)
    while True:
        try:
            return _post_once(url, headers, key, content | options)
        except Refused as refused:
            status, said = refused.args
        if status in (400, 422) and "max_completion_tokens" in said and "max_tokens" in options:
            options["max_completion_tokens"] = options.pop("max_tokens")
        elif status in (400, 422) and "temperature" in said and "temperature" in options:
            del options["temperature"]
        elif (status == 429 or status >= 500) and waits:
            time.sleep(waits.pop(0))
        elif status in (401, 403):
            raise InputError(f"{url} refuses the key ({status}); check the environment variable that holds it")
        else:
            raise InputError(f"{url} answers {status}: {' '.join(said.split())[:200]}; check address and NAMING_MODEL")


def _post_once(url: str, headers: dict[str, str], key: str, content: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        url, json.dumps(content).encode(), headers | {"Content-Type": "application/json"}, method="POST"
    )
    status = 200
    try:
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=TIMEOUT) as response:
            said = response.read()
    except urllib.error.HTTPError as error:
        status, said = error.code, error.read(2000)
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or type(error).__name__
        raise InputError(f"no answer from {url} ({reason}); start the server or set NAME_BACKEND=offline") from None
    text = said.decode(errors="replace")
    if len(key) >= 8:  # a server that repeats the key must not get it into messages or the cache
        text = text.replace(key, "[key]")
    if status != 200:
        raise Refused(status, text)
    try:
        return json.loads(text)
    except ValueError:
        raise InputError(f"{url} answers with something that is not JSON; check the address") from None
