"""Servers of chat models, by plain HTTP: OpenAI's protocol and Anthropic's. A key goes into the request's header only."""
import http.client
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import Any, NamedTuple

from lib.environment import InputError

ANTHROPIC_URL = "https://api.anthropic.com"
ANSWER_TOKENS = 600  # of one answer, with room for a model that thinks aloud
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


def openai(model: str) -> Callable[[Messages], Reply]:
    """A function that puts messages to `model` on the server OPENAI_BASE_URL. Raises InputError for wrong settings."""
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


def anthropic(model: str) -> Callable[[Messages], Reply]:
    """The same for a server that speaks Anthropic's protocol."""
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
