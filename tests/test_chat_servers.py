"""Slow, broken, busy and hostile chat servers: a latent keeps its offline name, the run goes on, no key leaks."""
import json
import logging
import secrets
import threading
import time
import urllib.parse
from functools import partial

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_naming import GOOD, KEY, contexts, names_and_verdicts, openai, serve  # noqa: F401  (fixtures)

from concepts import chat_servers
from concepts.chat_models import ask_json, find_json, open_chat
from concepts.chat_names import check_name, check_verdict, judge_all, name_with, score_people
from concepts.chat_servers import NoAnswer, Secret
from lib.environment import InputError

ANSWER = json.dumps(GOOD)


def message(content):
    return 200, {}, {"choices": [{"message": {"content": content}}]}


@pytest.mark.parametrize(("reply", "tokens"), [
    (message([{"type": "text", "text": ANSWER[:9]}, {"type": "image_url"}, {"text": ANSWER[9:]}]),
     (1, len(ANSWER) // 4)),
    ((200, {}, message(ANSWER)[2] | {"usage": "many"}), (1, len(ANSWER) // 4)),
    ((200, {}, message(ANSWER)[2] | {"usage": [1, 2]}), (1, len(ANSWER) // 4)),
    ((200, {}, message(ANSWER)[2] | {"usage": {"prompt_tokens": "9", "completion_tokens": -4}}), (1, len(ANSWER) // 4)),
    ((200, {}, message(ANSWER)[2] | {"usage": {"prompt_tokens": True, "completion_tokens": 1e300}}),
     (1, len(ANSWER) // 4)),
])
def test_answers_of_other_shapes_are_read(serve, tmp_path, reply, tokens):
    serve(lambda *_: reply)
    chat = open_chat("openai")
    assert ask_json(chat, "Name it", check_name, tmp_path) == GOOD and (chat.tokens_in, chat.tokens_out) == tokens


@pytest.mark.parametrize("content",
                         [3, {"text": "x"}, [3], ["x"], [{"type": "text"}], [{"type": "text", "text": 3}], [[]]])
def test_answers_of_no_known_shape_are_one_line(serve, tmp_path, content):
    serve(lambda *_: message(content))
    with pytest.raises(NoAnswer, match="protocol") as error:
        ask_json(open_chat("openai"), "Name it", check_name, tmp_path)
    assert "\n" not in str(error.value)


def drip(handler, head, seconds=30):
    """A server that sends `head`, then a byte every tenth of a second."""
    handler.wfile.write(head)
    for _ in range(10 * seconds):
        try:
            handler.wfile.write(b" ")
        except OSError:
            return
        threading.Event().wait(0.1)


RAW = {
    "headers, a byte at a time": lambda handler: drip(handler, b"HTTP/1.1 200 OK\r\nX-Slow:"),
    "a body, a byte at a time": lambda handler: drip(handler, b"HTTP/1.1 200 OK\r\nContent-Length: 999999\r\n\r\n"),
    "nothing": lambda handler: threading.Event().wait(3),
    "no HTTP": lambda handler: handler.wfile.write(b"220 mail.example SMTP\r\n"),
    "a connection that ends": lambda handler: None,
    "half a body": lambda handler: handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{"),
    "half a chunk": lambda handler: handler.wfile.write(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfff\r\n{"
    ),
    "no chunk": lambda handler: handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n{"),
    "too long a body": lambda handler: handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n" + b" " * 5_000_000),
    "500 without its body": lambda handler: handler.wfile.write(b"HTTP/1.1 500 No\r\nContent-Length: 500\r\n\r\n{"),
    "500 with a late body": lambda handler: drip(handler, b"HTTP/1.1 500 No\r\nContent-Length: 500\r\n\r\n"),
    "500 that is no text": lambda handler: handler.wfile.write(
        b"HTTP/1.1 500 No\r\nContent-Length: 3\r\n\r\n\xff\xfe\x00"
    ),
}


@pytest.mark.parametrize("what", RAW)
def test_a_broken_server_costs_one_name_and_not_the_run(serve, contexts, tmp_path, monkeypatch, what, caplog):
    """The first latent is named; on the second the server breaks; the third is named again."""
    good, broken = names_and_verdicts(lambda n: [1]), contexts.for_name(2)

    def reply(number, path, headers, body):
        return RAW[what] if body["messages"][0]["content"] == broken else good(number, path, headers, body)

    server = serve(reply)
    handler = server.server.RequestHandlerClass
    whole = handler.do_POST

    def do_POST(self):
        length = int(self.headers["Content-Length"])
        body = self.rfile.peek(length)[:length]
        if len(body) == length and json.loads(body)["messages"][0]["content"] == broken:
            RAW[what](self)
            self.close_connection = True
        else:
            whole(self)

    monkeypatch.setattr(handler, "do_POST", do_POST)
    monkeypatch.setattr(chat_servers, "PATIENCE", 2.0)
    monkeypatch.setattr(chat_servers, "RETRIES", 1)
    start = time.monotonic()
    named = name_with(open_chat("openai"), contexts, [0, 2, 0], tmp_path)
    assert list(named) == [0] and time.monotonic() - start < 8 and "latent 2 keeps its offline name: " in caplog.text


def test_waiting_for_a_busy_server_as_long_as_it_asks(serve, tmp_path, monkeypatch):
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    replies = [(429, {"Retry-After": "7"}, {}), (429, {"Retry-After": "60"}, {})]
    serve(lambda number, *_: replies[number - 1] if number <= len(replies) else openai(ANSWER))
    assert ask_json(open_chat("openai"), "Name it", check_name, tmp_path) == GOOD and waited == [7, 60]
    serve(lambda *_: (429, {"Retry-After": "86400"}, {"error": "enough for today"}))
    with pytest.raises(NoAnswer, match="answers 429: .*enough for today"):
        ask_json(open_chat("openai"), "Name another", check_name, tmp_path)
    assert len(waited) == 2


def test_a_server_that_stops_answering_keeps_what_was_named(serve, contexts, tmp_path, caplog):
    good = names_and_verdicts(lambda n: [1])
    server = serve(lambda number, *rest: good(number, *rest) if number <= 2 else (503, {}, {}))
    chat = open_chat("openai")
    assert list(name_with(chat, contexts, [0, 2, 2, 2, 2, 2], tmp_path)) == [0]
    assert len(server.seen) == 2 + 3 * 3 and "no answer for 3 latents in a row" in caplog.text
    with pytest.raises(NoAnswer, match="answers 503"):  # one that never answered ends the run
        name_with(open_chat("openai"), contexts, [2, 0], tmp_path / "other")


def test_a_judge_that_stops_answering_leaves_names_unscored(serve, contexts, tmp_path, caplog):
    good = names_and_verdicts(lambda n: [1])
    serve(lambda number, *rest: good(number, *rest) if number == 1 else (503, {}, {}))
    people = {i: {"name": name, "source": "human"} for i, name in ((0, "dogs"), (2, "cats"))}
    scored = score_people(people, partial(judge_all, open_chat("openai"), contexts, cache=tmp_path))
    assert list(scored) == [0] and "1 names by people stay without a score" in caplog.text


def escapes(text):
    return "".join(f"\\u{ord(character):04x}" for character in text)


SPELLINGS = {
    "plain": lambda key: key, "escaped": escapes, "escaped twice": lambda key: escapes(key).replace("\\", "\\\\"),
    "percent": lambda key: "".join(f"%{ord(c):02x}" for c in key),
    "html": lambda key: "".join(f"&#{ord(c)};" for c in key), "partly": lambda key: key[:2] + escapes(key[2:]),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("key", [KEY, "sk-1", "k7"])
def test_no_spelling_of_a_key_is_kept_or_told(serve, contexts, tmp_path, monkeypatch, caplog, capsys, key, spelling):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("OPENAI_API_KEY", key)
    said = SPELLINGS[spelling](key)
    answers = [
        *((200, {}, json.dumps({"choices": [{"message": {"content": content}}]}).replace("KEY", said).encode())
          for content in (json.dumps(GOOD | {"name": "a KEY b"}), "KEY")),
        (404, {}, json.dumps({"error": f"key={said}"}).encode()),
        (404, {}, f'{{"error": "bad key \\"{said}\\""}}'.encode()),
    ]
    told = []
    for number, answer in enumerate(answers):
        serve(lambda *_, answer=answer: answer)
        try:
            told.append(json.dumps(ask_json(open_chat("openai"), f"Name {number}", check_name, tmp_path)))
        except InputError as error:
            told.append(str(error))
    captured = capsys.readouterr()
    everything = [*told, caplog.text, captured.out, captured.err, *(path.read_text() for path in tmp_path.iterdir())]
    for text in everything:
        for _ in range(3):
            assert key not in text
            if "\\u" in text:
                text = text.replace("\\\\", "\\").encode().decode("unicode_escape")
            text = urllib.parse.unquote(text)


def test_a_short_key_does_not_eat_words():
    said = {"name": "foxes fox", "lines": ["the fox."]}
    assert Secret("fox").removed(said) == {"name": "foxes [key]", "lines": ["the [key]."]}
    assert Secret("").removed(["fox", 1, None]) == ["fox", 1, None] and "fox" not in repr(Secret("fox"))


def test_half_a_character_is_replaced(serve, tmp_path):
    serve(lambda *_: message('{"name": "dog \\ud83d", "description": "\\ud83d\\udc36 and \\udc36"}'))
    found = ask_json(open_chat("openai"), "Name it", check_name, tmp_path)
    assert found == {"name": "dog �", "description": "🐶 and �", "confidence": None}


@pytest.mark.parametrize("body", [b"[" * 200_000, b'{"choices": ' + b'{"a":' * 100_000, b"\xff\xff", b'"text"', b"3",
                                  b"1" * 5000, b"NaN"])
def test_bodies_that_are_no_answer(serve, tmp_path, body):
    serve(lambda *_: (200, {}, body))
    with pytest.raises(NoAnswer, match="not JSON|not in OpenAI's protocol") as error:
        ask_json(open_chat("openai"), "Name it", check_name, tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("text", "found"), [
    ('<think>{"a": 1}</think>{"b": 2}', {"b": 2}), ('{"a": 1} so?</think>{"b": 2}', {"b": 2}),
    ('<THINK>x</THINK> {"b": 2}', {"b": 2}),
    ('<think>{"a": 1}</think><thinking>{"c": 1}</thinking>{"b": 2}', {"b": 2}), ('{"b": 2}<think>{"a": 1}', {"b": 2}),
    ('<think><think>{"a": 1}</think>{"b": 2}', {"b": 2}),
    ('<think>{"a": 1}', None), ('<think>{"a": 1}</think>', None), ('<think>' * 3 + '{"a": 1}', None),
])
def test_what_was_only_thought_is_no_answer(text, found):
    if found is not None:
        assert find_json(text) == found
    else:
        with pytest.raises(ValueError, match="no JSON object"):
            find_json(text)


@pytest.mark.parametrize("text",
                         ["<think>" * 100_000, "<think></think>" * 50_000, "{" * 300_000, '{"a":' * 100_000,
                          '{"a":[' * 100_000, '{"' * 200_000, "</think>" * 100_000, "a<think></think>" * 200_000])
def test_long_answers_take_no_time(text):
    start = time.monotonic()
    with pytest.raises(ValueError, match="no JSON object"):
        find_json(text)
    assert time.monotonic() - start < 2


@pytest.mark.parametrize("address", [
    "http://[::1", "http://[zz]/v1", "http://../v1", "http://a..b/v1", "http://höst/v1", "http://host:99999/v1",
    "http://host:x/v1", "http://ho st/v1",
    "http://host/v1 x", "ftp://host", "http://", "http:///v1", "host/v1", "http://" + "a" * 300, "http://host/v1#x",
    "http://@host/v1", "http://host/ü",
    f"http://host/{KEY}/v1", "http://host\\@other/v1", "file:///etc/passwd",
])
def test_odd_addresses_are_one_line(monkeypatch, address):
    monkeypatch.setenv("NAMING_MODEL", "m")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", address)
    with pytest.raises(InputError, match="OPENAI_BASE_URL") as error:
        open_chat("openai")
    assert "\n" not in str(error.value) and KEY not in str(error.value)


@pytest.mark.parametrize("address", ["http://localhost:1/v1", "https://[::1]:8000/v1/", "http://10.0.0.1",
                                     "http://my_host.local./v1"])
def test_usual_addresses_are_taken(monkeypatch, address):
    monkeypatch.setenv("NAMING_MODEL", "m")
    monkeypatch.setenv("OPENAI_BASE_URL", address)
    assert open_chat("openai").model == "m"


KEYS = st.sampled_from(["choices", "message", "content", "usage", "text", "type", "name", "fires"])
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=12)


@pytest.fixture
def nobody(monkeypatch):
    """A chat model whose server is not there."""
    monkeypatch.setenv("NAMING_MODEL", "m")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:1/v1")
    return open_chat("openai")


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(JSON, JSON)
def test_no_answer_is_a_traceback(nobody, tmp_path, monkeypatch, data, answer):
    """Whatever a server answers, at the level of its protocol and of the JSON inside."""
    inner = json.dumps(answer)
    for value in (data, {"choices": [data]}, {"choices": [{"message": {"content": inner}}], "usage": data}):
        monkeypatch.setattr(chat_servers, "_post", lambda *_, value=value: json.dumps(value).encode())
        for check in (check_name, check_verdict(3)):
            try:
                found = ask_json(nobody, "Name it", check, tmp_path / secrets.token_hex(8))
                assert found is None or set(found) <= {"name", "description", "confidence", "fires"}
            except NoAnswer as error:
                assert "\n" not in str(error)
