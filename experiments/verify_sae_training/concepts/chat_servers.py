"""Servers of chat models, by plain HTTP: OpenAI's protocol and Anthropic's. A key goes into the request's header only.

The installed clients wait for a server that sends a byte a second, read bodies of any size and follow redirects with
the key; what is needed here is one POST, within limits.
"""
import email.utils
import http.client
import ipaddress
import json
import os
import re
import socket
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from concepts.chat_keys import Secret
from lib.environment import InputError

ANTHROPIC_URL = "https://api.anthropic.com"
ANSWER_TOKENS = 600  # of one answer, with room for a model that thinks aloud
WAITS = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0, 60.0, 60.0)  # seconds before a busy server is asked again
PATIENCE = 600.0  # seconds after which one question is given up, and the longest Retry-After that is waited for
TIMEOUT = 300.0  # seconds for one answer, from the first byte to the last; a large model on a CPU needs minutes
UNREACHABLE = (ConnectionRefusedError, socket.gaierror, ssl.SSLCertVerificationError)  # no server is there, so far
MAX_BODY = 4_000_000  # bytes of one answer
CHARS_PER_TOKEN = 4  # for estimates
Messages = list[dict[str, str]]


class Reply(NamedTuple):
    """What a chat model said."""

    text: str
    tokens_in: int
    tokens_out: int


class NoAnswer(InputError):
    """A question that a server did not answer, or not in its protocol; another one may fare better."""


class Dropped(Exception):
    """A connection that failed, or an answer that was late, too long or incomplete: (reason)."""


@dataclass
class Server:
    """Where questions go."""

    url: str
    headers: dict[str, str]
    secret: Secret
    answered: bool = False
    """It has answered once: when it can't be reached later, it is worth waiting for."""


Send = Callable[[Messages], Reply]


def openai(model: str) -> tuple[Send, Secret]:
    """A function that puts messages to `model` on the server OPENAI_BASE_URL, and the key to keep out of what it says.

    Raises InputError for wrong settings; the function raises NoAnswer.
    """
    key = _key("OPENAI_API_KEY")
    url = _address("OPENAI_BASE_URL", "", key) + "/chat/completions"
    server = Server(url, {"Authorization": f"Bearer {key}"} if key else {}, Secret(key))
    options: dict[str, Any] = {"max_tokens": ANSWER_TOKENS, "temperature": 0}

    def send(messages: Messages) -> Reply:
        data = _post(server, {"model": model, "messages": messages}, options)
        try:
            text, usage = _content(data["choices"][0]["message"].get("content")), data.get("usage")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise NoAnswer(f"{url} answers, but not in OpenAI's protocol; check OPENAI_BASE_URL") from None
        return _reply(text, messages, usage, "prompt_tokens", "completion_tokens")

    return send, server.secret


def anthropic(model: str) -> tuple[Send, Secret]:
    """The same for a server that speaks Anthropic's protocol."""
    key = _key("ANTHROPIC_API_KEY")
    url = _address("ANTHROPIC_BASE_URL", ANTHROPIC_URL, key) + "/v1/messages"
    if not key:
        raise InputError("NAME_BACKEND=anthropic needs the environment variable ANTHROPIC_API_KEY")
    headers = {"x-api-key": key, "anthropic-version": "2023-06-01"}
    server = Server(url, headers, Secret(key))
    options: dict[str, Any] = {"temperature": 0}

    def send(messages: Messages) -> Reply:
        data = _post(server, {"model": model, "max_tokens": ANSWER_TOKENS, "messages": messages}, options)
        try:
            text, usage = _content(data["content"]), data.get("usage")
        except (KeyError, TypeError, AttributeError):
            raise NoAnswer(f"{url} answers, but not in Anthropic's protocol; check ANTHROPIC_BASE_URL") from None
        return _reply(text, messages, usage, "input_tokens", "output_tokens")

    return send, server.secret


def _content(content: Any) -> str:
    """The text of a message's content: a text, nothing, or a list of parts of which those of type text count."""
    if isinstance(content, list):
        content = "".join(part["text"] for part in content if part.get("type", "text") == "text")
    if content is not None and not isinstance(content, str):
        raise TypeError("neither a text nor parts")
    return content or ""


def _reply(text: str, messages: Messages, usage: Any, tokens_in: str, tokens_out: str) -> Reply:
    """A reply whose token counts are estimated where the server does not tell them."""

    def told(name: str, characters: int) -> int:
        value = usage.get(name) if isinstance(usage, dict) else None
        return value if type(value) is int and value > 0 else characters // CHARS_PER_TOKEN

    asked = sum(len(message["content"]) for message in messages)
    return Reply(text, told(tokens_in, asked), told(tokens_out, len(text)))


def _address(variable: str, default: str, key: str) -> str:
    url = os.environ.get(variable, default).strip().rstrip("/")
    wrong = InputError(f"set the environment variable {variable} to an address such as http://localhost:11434/v1")
    if not url.isascii() or not url.isprintable() or re.search(r"[\s\\<>\"^`{|}]", url):
        raise wrong
    try:
        parts = urllib.parse.urlsplit(url)
        host, _ = parts.hostname or "", parts.port
        if ":" in host:
            ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        raise wrong from None
    labels = host.removesuffix(".").split(".")
    is_name = all(re.fullmatch("[A-Za-z0-9_-]{1,63}", label) for label in labels) and len(host) < 254
    if parts.scheme not in ("http", "https") or not (":" in host or is_name):
        raise wrong
    more = parts.username is not None or parts.password is not None or parts.query or parts.fragment
    if more or (len(key) >= 8 and key in urllib.parse.unquote(parts.path)):
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


def _post(server: Server, content: dict[str, Any], options: dict[str, Any]) -> Any:
    """POST JSON, get JSON. `options` loses for good what the server does not take; a busy server is waited for.

    Raises NoAnswer, without the key even where the server repeats it.
    """
    url, quoted = server.url, server.secret.quoted  # the address in messages can't hold the key: see _address
    waits, begun = list(WAITS), time.monotonic()
    while True:
        status, headers, said, error = _answer(server, content | options)
        if status == 200:
            server.answered = True
            return _parsed(said, url)
        if status in (400, 422) and "max_completion_tokens" in said and "max_tokens" in options:
            options["max_completion_tokens"] = options.pop("max_tokens")
            continue
        if status in (400, 422) and "temperature" in said and "temperature" in options:
            del options["temperature"]
            continue
        if status in (401, 403):
            raise NoAnswer(f"{url} refuses the key ({status}); check the environment variable that holds it")
        if error:
            what = f"no answer from {url} ({quoted(str(error))}); start the server or set NAME_BACKEND=offline"
        else:
            what = f"{url} answers {status}: {quoted(said)}; check address and NAMING_MODEL"
        after, over = _retry_after(headers), not waits or time.monotonic() - begun > PATIENCE
        hopeless = isinstance(error, UNREACHABLE) and not server.answered or not error and not _busy(status)
        if hopeless or over or after > PATIENCE:
            raise NoAnswer(what)
        time.sleep(max(waits.pop(0), after))


def _busy(status: int) -> bool:
    return status in (408, 425, 429) or status >= 500


def _parsed(said: str, url: str) -> Any:
    try:
        return json.loads(said)
    except (ValueError, RecursionError):
        raise NoAnswer(f"{url} answers with something that is not JSON; check the address") from None


def _retry_after(headers: Any) -> float:
    """Seconds that the server asks to be left alone; it says them, or a time."""
    value = str((headers or {}).get("Retry-After") or "").strip()
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", value):
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError, IndexError):
        return 0.0


def _answer(server: Server, content: dict[str, Any]) -> tuple[int, Any, str, Exception | None]:
    """Status, headers, body of one POST, and None; or what went wrong. Takes TIMEOUT at most, whatever comes when.

    In a thread: sockets limit the time between two bytes only. One that is late is left to end by itself.
    """
    found: list[tuple[int, Any, str, Exception | None]] = []

    def post() -> None:
        try:
            found.append((*_fetch(server, content), None))
        except urllib.error.URLError as error:
            reason = error.reason
            found.append((0, None, "", reason if isinstance(reason, Exception) else Dropped(str(reason))))
        except (Dropped, OSError, http.client.HTTPException, ValueError) as error:
            found.append((0, None, "", error if str(error) else Dropped(type(error).__name__)))

    thread = threading.Thread(target=post, daemon=True)
    thread.start()
    thread.join(TIMEOUT)
    return found[0] if found else (0, None, "", Dropped(f"it took more than {TIMEOUT:.0f} seconds"))


def _fetch(server: Server, content: dict[str, Any]) -> tuple[int, Any, str]:
    data = json.dumps(content).encode()
    headers = server.headers | {"Content-Type": "application/json"}
    request = urllib.request.Request(server.url, data, headers, method="POST")
    end = time.monotonic() + TIMEOUT
    try:
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=TIMEOUT) as response:
            return response.status, response.headers, _body(response, end)
    except urllib.error.HTTPError as error:
        with error:
            try:
                said = _body(error, end)
            except (Dropped, OSError, http.client.HTTPException, ValueError):
                said = ""  # the status says enough
            return error.code, error.headers, said


def _body(response: Any, end: float) -> str:
    """The whole body, read piece by piece. Raises Dropped if it is late, too long or shorter than it said."""
    pieces, size, expected = [], 0, response.headers.get("Content-Length", "")
    while piece := response.read1(65536):
        pieces.append(piece)
        size += len(piece)
        if size > MAX_BODY:
            raise Dropped(f"more than {MAX_BODY:,} bytes")
        if time.monotonic() > end:
            raise Dropped("too slow")
    if expected.isdecimal() and expected.isascii() and size < int(expected[:12]):
        raise Dropped("the connection ended in the middle of the answer")
    return b"".join(pieces).decode(errors="replace")
