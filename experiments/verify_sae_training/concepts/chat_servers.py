"""Servers of chat models, asked through the `openai` client: any that speaks OpenAI's protocol.

Anthropic's is asked at its OpenAI-compatible address. The client brings the connection, the retries and Retry-After.
Added here: redirects are not followed, no question takes longer than PATIENCE however slowly the bytes come, and the
key is removed from everything a server says.
"""
import html
import json
import os
import re
import threading
import urllib.parse
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple

from lib.environment import InputError

DEFAULT_ADDRESS = {"openai": "", "anthropic": "https://api.anthropic.com/v1"}
HOST = r"[\w-]{1,63}(\.[\w-]{1,63})*\.?|\[[0-9A-Fa-f:.]+\]"
PLAIN_ADDRESS = re.compile(rf"https?://({HOST})(:[0-9]+)?(/[\w.~%:+/-]*)?", re.ASCII)
ANSWER_TOKENS = 600  # of one answer, with room for a model that thinks aloud
FIRST_RETRIES, RETRIES = 2, 36  # before a server's first answer, and after it: about four minutes, 8 seconds apart
TIMEOUT = 300.0  # seconds without a byte; a large model on a CPU thinks for minutes
PATIENCE = 600.0  # seconds for one question, retries included
CHARS_PER_TOKEN = 4  # for estimates
Messages = list[dict[str, str]]


class Reply(NamedTuple):
    """What a chat model said."""

    text: str
    tokens_in: int
    tokens_out: int


class NoAnswer(InputError):
    """A question that got no answer, or none in the server's protocol; another question may fare better."""


Send = Callable[[Messages], Reply]


def connect(backend: str, model: str) -> tuple[Send, "Secret"]:
    """A function that sends messages to `model`, and the key to keep out of the replies; nothing is sent yet.

    backend: one of DEFAULT_ADDRESS. Raises InputError for wrong settings and a missing client; the function raises
    NoAnswer.
    """
    variable = f"{backend.upper()}_API_KEY"
    key = os.environ.get(variable, "").strip()
    if not key.isascii() or not key.isprintable():
        raise InputError(f"{variable} has characters that no key has; set it again")
    url = _address(backend, key)
    if backend == "anthropic" and not key:
        raise InputError(f"NAME_BACKEND=anthropic needs the environment variable {variable}")
    try:
        import openai
    except ImportError:
        raise InputError(f"NAME_BACKEND={backend} needs the extra chat: run pip install '.[chat]'") from None
    http = openai.DefaultHttpxClient(follow_redirects=False)  # a redirect could take the question elsewhere
    client = openai.OpenAI(api_key=key or "none", base_url=url, timeout=TIMEOUT, http_client=http)
    client.max_retries = FIRST_RETRIES
    secret, options = Secret(key), {"max_tokens": ANSWER_TOKENS, "temperature": 0}

    def send(messages: Messages) -> Reply:
        try:
            body = _in_time(lambda: _post(client, {"model": model, "messages": messages}, options))
        except openai.APIStatusError as error:
            if error.status_code in (401, 403):
                what = f"{url} refuses the key ({error.status_code}); check {variable}"
            else:
                said = secret.quoted(error.response.text)
                what = f"{url} answers {error.status_code}: {said}; check address and NAMING_MODEL"
            raise NoAnswer(what) from None
        except (openai.OpenAIError, OSError, ValueError) as error:
            why = secret.quoted(str(error.__cause__ or error))
            raise NoAnswer(f"no answer from {url} ({why}); start the server or set NAME_BACKEND=offline") from None
        client.max_retries = RETRIES  # it is there, so it is worth waiting for
        return _reply(body, messages, url)

    return send, secret


def _address(backend: str, key: str) -> str:
    """The address from the environment; a key in it would show up in messages."""
    variable = f"{backend.upper()}_BASE_URL"
    url = os.environ.get(variable, DEFAULT_ADDRESS[backend]).strip().rstrip("/")
    if backend == "anthropic":
        url = url.removesuffix("/v1") + "/v1"
    try:
        plain = PLAIN_ADDRESS.fullmatch(url) and urllib.parse.urlsplit(url).port != 0
    except ValueError:
        plain = False
    if not plain or len(key) >= 8 and key in urllib.parse.unquote(url):
        raise InputError(f"set the environment variable {variable} to a plain address such as "
                         "http://localhost:11434/v1; a key belongs in its own variable")
    return url


def _post(client: Any, question: dict[str, Any], options: dict[str, Any]) -> bytes:
    """The body of the server's answer. `options` loses for good what the server rejects."""
    while True:
        try:
            return client.chat.completions.with_raw_response.create(**question, **options).content
        except Exception as error:
            answer: Any = getattr(error, "response", None)
            complaint = answer.text if getattr(answer, "status_code", None) in (400, 422) else ""
            if "max_completion_tokens" in complaint and "max_tokens" in options:
                options["max_completion_tokens"] = options.pop("max_tokens")
            elif "temperature" in complaint and "temperature" in options:
                del options["temperature"]
            else:
                raise


def _in_time(ask: Callable[[], bytes]) -> bytes:
    """The result of ask(), which runs in a thread of its own: the client's timeout starts again with each byte."""
    found: Future[bytes] = Future()

    def work() -> None:
        try:
            found.set_result(ask())
        except Exception as error:
            found.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        return found.result(PATIENCE)
    except TimeoutError:
        raise OSError(f"it took more than {PATIENCE:.0f} seconds") from None


def _reply(body: bytes, messages: Messages, url: str) -> Reply:
    """The reply in a body; token counts are estimated where the server does not give them."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        raise NoAnswer(f"{url} answers with something that is not JSON; check the address") from None
    try:
        content, usage = data["choices"][0]["message"].get("content"), data.get("usage")
        if isinstance(content, list):  # of parts
            content = "".join(part["text"] for part in content if part.get("type", "text") == "text")
        if content is not None and not isinstance(content, str):
            raise TypeError
    except (KeyError, IndexError, TypeError, AttributeError):
        raise NoAnswer(f"{url} answers, but not in OpenAI's protocol; check the address") from None

    def count(name: str, text: str) -> int:
        told = usage.get(name) if isinstance(usage, dict) else None
        return told if type(told) is int and told > 0 else len(text) // CHARS_PER_TOKEN

    asked = "".join(message["content"] for message in messages)
    return Reply(content or "", count("prompt_tokens", asked), count("completion_tokens", content or ""))


class Secret:
    """A key, and how it is taken out of what a server says, however the server writes it."""

    def __init__(self, key: str):
        self._key = key
        # A short key may be part of an ordinary word, so it counts only where it stands by itself.
        whole = re.escape(key)
        self._found = re.compile(whole if len(key) >= 8 else rf"(?<![^\W_]){whole}(?![^\W_])") if key else None

    def __repr__(self) -> str:
        return "Secret()"

    def removed(self, value: Any) -> Any:
        """A text, or a JSON value with all its texts, without the key in any spelling.

        Halves of surrogate pairs, which no file can hold, are joined or replaced.
        """
        if isinstance(value, dict):
            return {self.removed(name): self.removed(inner) for name, inner in value.items()}
        if isinstance(value, list):
            return [self.removed(inner) for inner in value]
        return self._without(_whole(value)) if isinstance(value, str) else value

    def _without(self, text: str) -> str:
        if self._found is None:
            return text
        for _ in range(3):  # escapes within escapes
            text = self._found.sub("[key]", text)
            for unescaped in (urllib.parse.unquote(text), html.unescape(text), _unescaped(text)):
                if self._found.search(unescaped):
                    text = self._found.sub("[key]", unescaped)
        return text

    def quoted(self, text: str) -> str:
        """A server's words for a message: at most one line, and nothing if a short key may be in it."""
        clean = " ".join(self.removed(text).split())[:200]
        return "(an answer that repeats the key)" if self._key and self._key in clean else clean


def _whole(text: str) -> str:
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _unescaped(text: str) -> str:
    return _whole(re.sub(r"\\+u([0-9a-fA-F]{4})", lambda found: chr(int(found[1], 16)), text))
