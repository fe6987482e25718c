"""Naming by a chat model: the contexts, servers on loopback, bad answers, keys, cache, scores."""
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from conftest import PROJECT, TEXTS, WORDS, run_notebook, tiny_model
from test_concepts import planted
from test_dictionary import HEADER
from test_verify_scripts import FOLDER, SMALL, TRAIN, script, source  # noqa: F401  (two fixtures)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from concepts import chat_servers
from concepts.chat_models import ask_json, find_json, open_chat
from concepts.chat_names import (
    Contexts,
    check_name,
    check_verdict,
    cost_estimate,
    judge,
    judge_all,
    name_with,
    score_people,
    with_scores,
)
from concepts.coherence import interest
from concepts.dictionary import read_concepts, write_concepts
from concepts.formats import as_read
from concepts.names import patterns_of, score_words
from concepts.tables import concepts_from_csv, concepts_to_csv
from lib.environment import InputError

KEY = "sk-test-0123456789"
GOOD = {"name": "dogs", "description": "The word dog.", "confidence": 0.9}


class Server:
    """A server on loopback; reply(number, path, headers, body) returns the status, headers and body of its answer."""

    def __init__(self, reply):
        self.seen = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.seen.append((self.path, self.headers, body))
                status, headers, content = reply(len(outer.seen), self.path, self.headers, body)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content if isinstance(content, bytes) else json.dumps(content).encode())

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def questions(self):
        return [body["messages"][-1]["content"] for _, _, body in self.seen]


@pytest.fixture
def serve(monkeypatch):
    servers = []

    def start(reply):
        servers.append(Server(reply))
        monkeypatch.setenv("OPENAI_BASE_URL", servers[-1].url + "/v1")
        monkeypatch.setenv("ANTHROPIC_BASE_URL", servers[-1].url)
        return servers[-1]

    monkeypatch.setenv("NAMING_MODEL", "tiny")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    monkeypatch.setattr(chat_servers, "RETRIES", 2)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.0)
    yield start
    for server in servers:
        server.server.shutdown()
        server.server.server_close()


def openai(text, usage=True):
    counts = {"usage": {"prompt_tokens": 100, "completion_tokens": 7}} if usage else {}
    return 200, {}, {"choices": [{"message": {"role": "assistant", "content": text}}]} | counts


def names_and_verdicts(fires):
    """A model that calls everything dogs and then says that the lines `fires(number of lines)` fire."""

    def reply(number, path, headers, body):
        question = body["messages"][0]["content"]
        if "What do the marked tokens" in question:
            return openai("Sure! ```json\n" + json.dumps(GOOD) + "\n```")
        n = sum(line.split(".")[0].isdigit() for line in question.splitlines())
        return openai(json.dumps({"fires": fires(n)}))

    return reply


@pytest.fixture
def contexts():
    rules = [lambda s, i: 2.0 * (s[i] == "dog") + 1.0 * (s[i] == "bird"), lambda s, i: 0.0, lambda s,
             i: float(s[i] == "cat")]
    return Contexts(*planted(rules, TEXTS * 12))


def test_contexts_are_of_the_right_texts_and_tokens(contexts):
    question = contexts.for_name(0)
    firing, silent = question.split("It is silent on these:")
    marked = [line.split("<<")[1].split(">>")[0] for line in firing.splitlines() if line.startswith("[")]
    assert set(marked) == {"dog", "bird"} and marked[0] == "dog"
    strengths = [int(line[1:].split("]")[0]) for line in firing.splitlines() if line.startswith("[")]
    assert strengths == sorted(strengths, reverse=True) and strengths[0] == 10 and strengths[-1] == 5
    assert silent.count("<<") == 6 and "<<dog>>" not in silent and "<<bird>>" not in silent
    assert contexts.for_name(1) is None and question == contexts.for_name(0)
    rows, fires = contexts.for_judge(0)
    assert len(rows) == 20 and fires.sum() == 10 and contexts.is_val[rows].all()
    tokens = [contexts.codes.slice(row) for row in rows]
    assert [token in ("dog", "bird") for token in tokens] == fires.tolist()
    assert not fires[:10].all()
    assert all("<<" + token + ">>" in contexts.context(row) for token, row in zip(tokens, rows))


def test_of_a_large_corpus_every_nth_text_is_used(contexts, monkeypatch):
    monkeypatch.setattr("concepts.names.MAX_ROWS", -(-len(contexts.codes) // 5))
    part = Contexts(contexts.codes, torch.from_numpy(contexts.is_val))
    rows, values = part.firing(0, held_out=False)
    whole, all_values = contexts.firing(0, held_out=False)
    kept = contexts.text_id[whole] % 5 == 0
    assert (0 < len(rows) < len(whole) and rows.tolist() == whole[kept].tolist()
            and values.tolist() == all_values[kept].tolist())
    assert ((contexts.text_id[part.silent(0, True, 30)] % 5 == 0).all()
            and (contexts.text_id[part.for_judge(0)[0]] % 5 == 0).all())


def test_a_context_stays_within_its_text(contexts):
    first = int(np.flatnonzero(np.diff(contexts.text_id))[0]) + 1
    assert contexts.context(first).startswith("<<a>> dog ran") and contexts.context(first - 1).endswith("mat <<.>>")


@pytest.mark.parametrize(("fires", "score"), [(lambda n: list(range(1, n + 1)), 0.5), (lambda n: [], 0.5)])
def test_verdicts_that_tell_nothing_score_chance(serve, contexts, tmp_path, fires, score):
    serve(names_and_verdicts(fires))
    named = name_with(open_chat("openai"), contexts, [0, 1, 2], tmp_path)
    assert sorted(named) == [0, 2] and all(entry["score"] == score for entry in named.values())
    assert named[0]["name"] == "dogs" and named[0]["source"] == "llm" and named[0]["backend"] == "openai"
    assert named[0]["judge"] == named[0]["model"] == "tiny" and named[0]["confidence"] == 0.9


def test_verdicts_are_scored_against_the_truth(serve, contexts, tmp_path):
    _, fires = contexts.for_judge(0)
    wrong = int(np.flatnonzero(~fires)[0])
    lines = [int(i) + 1 for i in np.flatnonzero(fires)[1:]] + [wrong + 1]  # one miss, one false alarm
    serve(lambda number, path, headers, body: openai(json.dumps({"fires": lines})))
    result = judge(open_chat("openai"), contexts, 0, {"name": "dogs"}, cache=tmp_path)
    assert result["score"] == result["recall"] == 0.9
    assert result["precision"] is result["f1"] is None  # half of the contexts fire, and of all tokens far fewer
    older = {"concepts": {"0": {"name": "dogs", "source": "human", **result, "precision": 0.9, "f1": 0.9}}}
    assert as_read(older)["concepts"][0]["f1"] is None
    assert interest(result) == pytest.approx(0.8 / 3)


def test_the_cache_answers_the_second_time(serve, contexts, tmp_path):
    server = serve(names_and_verdicts(lambda n: [1]))
    chat = open_chat("openai")
    before = cost_estimate(chat, contexts, [0, 2], tmp_path)
    first = name_with(chat, contexts, [0, 2], tmp_path)
    assert len(server.seen) == 4 and chat.calls == 4 and (chat.tokens_in, chat.tokens_out) == (400, 28)
    assert "4 questions" in before and "400 tokens read and 28 written in 4 calls" in chat.spent()
    again = open_chat("openai")
    assert name_with(again, contexts, [0, 2], tmp_path) == first
    assert len(server.seen) == 4 and again.cached == 4 and again.calls == 0
    assert "0 questions" in cost_estimate(again, contexts, [0, 2], tmp_path)
    for path in tmp_path.iterdir():  # damaged: asked again
        path.write_text("{")
    assert name_with(again, contexts, [0, 2], tmp_path) == first and len(server.seen) == 8


def test_another_model_is_asked_anew(serve, contexts, tmp_path, monkeypatch):
    server = serve(names_and_verdicts(lambda n: []))
    name_with(open_chat("openai"), contexts, [0], tmp_path)
    monkeypatch.setenv("NAMING_MODEL", "other")
    name_with(open_chat("openai"), contexts, [0], tmp_path)
    assert len(server.seen) == 4 and server.seen[-1][2]["model"] == "other"


def test_bad_answers_are_asked_again_and_told_why(serve, tmp_path):
    answers = ["no idea", '{"name": ""}', json.dumps(GOOD)]
    server = serve(lambda number, path, headers, body: openai(answers[number - 1]))
    assert ask_json(open_chat("openai"), "Name it", check_name, tmp_path) == GOOD
    roles = [[m["role"] for m in body["messages"]] for _, _, body in server.seen]
    assert roles == [["user"], ["user", "assistant", "user"], ["user", "assistant", "user", "assistant", "user"]]
    said = server.questions()
    assert "there is no JSON object" in said[1] and '"name" must be a text' in said[2]


def test_a_model_that_never_answers_well_is_given_up(serve, contexts, tmp_path):
    server = serve(lambda number, path, headers, body: openai("I would rather not."))
    assert name_with(open_chat("openai"), contexts, [0, 2], tmp_path) == {}
    assert len(server.seen) == 6 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"description": "d"}, "name"), ({"name": 3, "description": "d"}, "name"),
        ({"name": "x" * 81, "description": "d"}, "81"),
        ({"name": "x", "description": " "}, "description"), (GOOD | {"confidence": 2}, "confidence"),
        (GOOD | {"confidence": True}, "confidence"),
    ],
)
def test_names_that_break_the_schema(answer, message):
    with pytest.raises(ValueError, match=message):
        check_name(answer)


@pytest.mark.parametrize("answer",
                         [{}, {"fires": 3}, {"fires": [0]}, {"fires": [5]}, {"fires": ["1"]}, {"fires": [True]}])
def test_verdicts_that_break_the_schema(answer):
    with pytest.raises(ValueError, match="from 1 to 4"):
        check_verdict(4)(answer)


def test_json_is_found_in_what_stands_around_it():
    assert find_json(
        '<think>{"a": 1}</think> so {this} is it: {"a": {"b": "}"}} and more {"c": 2}'
    ) == {"a": {"b": "}"}}
    for text in ("", "[1, 2]", '{"a": ', "{a: 1}"):
        with pytest.raises(ValueError, match="no JSON object"):
            find_json(text)


def test_anthropic_is_asked_at_its_compatible_address(serve, tmp_path):
    server = serve(lambda *_: openai(json.dumps(GOOD)))
    assert ask_json(open_chat("anthropic"), "Name it", check_name, tmp_path) == GOOD
    path, headers, body = server.seen[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    assert body["messages"] == [{"role": "user", "content": "Name it"}] and body["max_tokens"] > 0


def test_a_missing_client_is_named(serve, monkeypatch):
    serve(lambda *_: openai(""))
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(InputError, match=r"NAME_BACKEND=openai needs the extra chat: run pip install '\.\[chat\]'$"):
        open_chat("openai")


def test_a_server_that_takes_other_options_is_obliged(serve, tmp_path):
    def reply(number, path, headers, body):
        for word, other in (("max_tokens", "use max_completion_tokens"), ("temperature", "temperature must be 1")):
            if word in body:
                return 400, {}, {"error": other}
        return openai(json.dumps(GOOD), usage=False)

    server = serve(reply)
    chat = open_chat("openai")
    assert ask_json(chat, "Name it", check_name, tmp_path) == GOOD
    assert "max_completion_tokens" in server.seen[-1][2] and chat.tokens_in == len("Name it") // 4
    ask_json(chat, "Name it again", check_name, tmp_path)
    assert len(server.seen) == 4  # what it does not take is not offered again


def test_a_busy_server_is_waited_for(serve, tmp_path):
    server = serve(lambda number, *_: openai(json.dumps(GOOD)) if number == 3 else (503, {}, {}))
    assert ask_json(open_chat("openai"), "Name it", check_name, tmp_path) == GOOD and len(server.seen) == 3


FAULTS = [
    (lambda *_: (401, {}, {"error": "bad key " + KEY}), "refuses the key"),
    (lambda *_: (404, {}, {"error": f"no model tiny for {KEY}"}), "answers 404: .*check address and NAMING_MODEL"),
    (lambda *_: (503, {}, {}), "answers 503"),
    (lambda *_: (307, {"Location": "http://127.0.0.1:9/"}, {}), "answers 307"),
    (lambda *_: (200, {}, b"<html>"), "not JSON"),
    (lambda *_: (200, {}, {"answer": KEY}), "not in OpenAI's protocol"),
    (lambda *_: (200, {}, []), "not in OpenAI's protocol"),
]


@pytest.mark.parametrize(("reply", "message"), FAULTS, ids=[message for _, message in FAULTS])
def test_what_is_wrong_is_one_line_without_the_key(serve, tmp_path, reply, message):
    serve(reply)
    with pytest.raises(InputError, match=message) as error:
        ask_json(open_chat("openai"), "Name it", check_name, tmp_path)
    assert KEY not in str(error.value) and "\n" not in str(error.value)


def test_a_dead_server_is_one_line(serve, monkeypatch, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{port}/v1")
    with pytest.raises(InputError, match="no answer from .*start the server or set NAME_BACKEND=offline") as error:
        ask_json(open_chat("openai"), "Name it", check_name, tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("NAMING_MODEL", "", "NAMING_MODEL"), ("OPENAI_BASE_URL", "", "OPENAI_BASE_URL"),
        ("OPENAI_BASE_URL", "localhost:1", "OPENAI_BASE_URL"),
        ("OPENAI_BASE_URL", f"http://me:{KEY}@host/v1", "a key belongs in its own variable"),
        ("OPENAI_BASE_URL", f"http://host/v1?key={KEY}", "a key belongs in its own variable"),
        ("OPENAI_API_KEY", f"{KEY}\nx", "OPENAI_API_KEY"), ("OPENAI_API_KEY", f"{KEY}é", "OPENAI_API_KEY"),
    ],
)
def test_wrong_settings_are_told_before_anything_is_sent(serve, monkeypatch, variable, value, message):
    server = serve(lambda *_: openai(""))
    monkeypatch.setenv(variable, value)
    with pytest.raises(InputError, match=message) as error:
        open_chat("openai")
    assert KEY not in str(error.value) and server.seen == []
    with pytest.raises(InputError, match="must be one of offline, openai, anthropic, transformers"):
        open_chat("opanai")


def test_the_key_is_sent_and_kept_nowhere(serve, contexts, tmp_path, caplog, capsys):
    caplog.set_level(logging.DEBUG)
    echo = names_and_verdicts(lambda n: [1])

    def reply(number, path, headers, body):
        status, _, content = echo(number, path, headers, body)
        message = content["choices"][0]["message"]
        message["content"] = message["content"].replace("The word dog.", f"dog {headers['Authorization']}")
        return status, {}, content

    server = serve(reply)
    chat = open_chat("openai")
    named = name_with(chat, contexts, [0], tmp_path)
    assert server.seen[0][1]["Authorization"] == f"Bearer {KEY}"
    said = capsys.readouterr()
    everything = [json.dumps(named), caplog.text, said.out, said.err, repr(chat), chat.spent()]
    everything += [path.read_text() + path.name for path in tmp_path.iterdir()]
    assert named[0]["description"] == "dog Bearer [key]" and not any(KEY in text for text in everything)


def by_words(contexts):
    patterns, is_val = patterns_of(contexts.codes), torch.from_numpy(contexts.is_val)
    return lambda concepts: score_words(contexts.codes, patterns, is_val, concepts)


def test_a_name_without_a_rule_is_scored_by_its_words(contexts):
    names = {0: {"name": "Dog or bird?"}, 2: {"name": "a beast"}, 1: {"name": "dog"}}
    scored = by_words(contexts)(names)
    assert scored[0]["score"] == 1 and scored[0]["judge"] == "words" and scored[1]["score"] is None
    assert scored[2]["recall"] == 0 and scored[2]["score"] < 0.5


def test_what_a_person_wrote_stays_and_gets_a_score(serve, contexts, tmp_path):
    path, words = tmp_path / "concepts.json", by_words(contexts)
    old = {"name": "dog", "description": "d", "source": "offline", "score": 0.9, "scored_name": "dog",
           "rule": [["word", "dog"]], "notes": ""}
    concepts = write_concepts(path, HEADER, {0: old, 2: old | {"name": "cat", "scored_name": "cat"}})
    assert score_people(concepts, words) == {}
    concepts_to_csv(concepts, tmp_path / "t.csv")
    (tmp_path / "t.csv").write_text((tmp_path / "t.csv").read_text().replace("0,dog,d,", "0,dogs and birds,d,"))
    concepts = write_concepts(path, HEADER, concepts_from_csv(tmp_path / "t.csv", concepts))
    new = score_people(concepts, words)
    assert (list(new) == [0] and new[0]["name"] == "dogs and birds" and new[0]["judge"] == "words"
            and "rule" not in new[0])
    assert new[0]["score"] == 0.5  # its words are plurals, which the texts do not have
    serve(names_and_verdicts(lambda n: [1]))
    cache, chat = tmp_path / "cache", open_chat("openai")
    chat_judge = partial(judge_all, chat, contexts, cache=cache)
    judged = score_people(concepts, chat_judge)[0]
    assert judged["judge"] == "tiny" and judged["name"] == "dogs and birds" and judged["source"] == "human"
    named = name_with(chat, contexts, [0, 2], cache)
    meanwhile = concepts[0] | {"notes": "seen"}
    assert with_scores(named | {0: meanwhile}, {0: judged})[0] == judged | {"notes": "seen"}
    assert with_scores({0: meanwhile | {"name": "other"}}, {0: judged}) == {0: meanwhile | {"name": "other"}}
    concepts = write_concepts(path, HEADER, named | {0: judged})
    assert write_concepts(path, HEADER, named) == concepts == read_concepts(path)["concepts"]
    assert [concepts[i]["name"] for i in (0, 2)] == ["dogs and birds", "dogs"]
    assert score_people(concepts, chat_judge) == {}


def test_the_notebook_names_with_a_server_and_without(script, source, serve, monkeypatch, own_store, capsys):
    assert script("01_save_activations.py", *source, *SMALL)[0] == 0 and script("02_train_sae.py", *TRAIN)[0] == 0
    serve(names_and_verdicts(lambda n: [1]))
    monkeypatch.setenv("NAME_BACKEND", "openai")
    names = run_notebook(FOLDER / "04_name_sae_concepts.ipynb")
    assert {entry["source"] for entry in names["concepts"].values()} == {"llm"}
    assert set(names["table"]["named by"]) == {"tiny"} and "names, " in (said := capsys.readouterr().out)
    assert (KEY not in said
            and not any(KEY in path.read_text(errors="ignore") for path in own_store.rglob("*") if path.is_file()))
    monkeypatch.setenv("NAMING_MODEL", "gone")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    with pytest.raises(InputError, match="no answer from"):
        run_notebook(FOLDER / "04_name_sae_concepts.ipynb")
    monkeypatch.setenv("NAME_BACKEND", "offline")
    names = run_notebook(FOLDER / "04_name_sae_concepts.ipynb")
    assert {entry["judge"] for entry in names["concepts"].values()} == {"rule"}


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    """Directory of a chat model that answers everything with one token, the JSON that serves as name and as verdict."""
    folder = tmp_path_factory.mktemp("chat_model")
    answer = json.dumps(GOOD | {"fires": [1, 3]})
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[BOS]", "[EOS]", "[UNK]", *WORDS, answer])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]",
                                   unk_token="[UNK]")
    fast.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    fast.save_pretrained(folder)
    model = tiny_model("llama", n_blocks=1, vocab_size=len(vocabulary))
    with torch.no_grad():
        for weights in model.parameters():
            weights.zero_()
        for norm in (model.model.norm, model.model.layers[0].input_layernorm,
                     model.model.layers[0].post_attention_layernorm):
            norm.weight.fill_(1)
        said = vocabulary[answer]
        model.model.embed_tokens.weight[:, 0], model.model.embed_tokens.weight[said] = 1, torch.eye(16)[1]
        model.lm_head.weight[said, 0], model.lm_head.weight[2, 1] = 1, 1  # anything -> the answer -> the end
    model.save_pretrained(folder)
    return folder


def check_protocol(backend, contexts, cache):
    chat = open_chat(backend)
    entry = name_with(chat, contexts, [0], cache)[0]
    _, fires = contexts.for_judge(0)
    hits = fires[[0, 2]].sum()
    assert entry["name"] == "dogs" and entry["score"] == pytest.approx((hits / 10 + 1 - (2 - hits) / 10) / 2)
    assert chat.calls == 2 and chat.tokens_in > 100 and chat.tokens_out in (2, 4)


def test_a_chat_model_in_this_process(chat_model, contexts, tmp_path, monkeypatch, saved_model):
    monkeypatch.setenv("NAMING_MODEL", str(chat_model))
    check_protocol("transformers", contexts, tmp_path / "cache")
    monkeypatch.setenv("NAMING_MODEL", str(saved_model[0]))
    with pytest.raises(InputError, match="has no chat template; choose"):
        open_chat("transformers")


@pytest.mark.parametrize("template", ["{% for", "{{ raise_exception('never\\nmind') }}", "{{ messages[3]['content'] }}",
                                      "{{ 1 / 0 }}"])
def test_a_broken_chat_template_is_one_line(chat_model, tmp_path, monkeypatch, template):
    shutil.copytree(chat_model, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    monkeypatch.setenv("NAMING_MODEL", str(tmp_path / "model"))
    with pytest.raises(InputError, match="its chat template fails") as error:
        open_chat("transformers")
    assert "\n" not in str(error.value)


SERVING = PROJECT / ".venv-serve"  # made by `make serving`


@pytest.mark.skipif(not SERVING.exists(), reason="needs the packages of `make serving`")
def test_a_real_server(chat_model, contexts, tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # `transformers serve`, behind the import guards
    start = "import lib.environment; from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", start, "serve", str(chat_model), "--host", "127.0.0.1", "--port", str(port),
               "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": f"{SERVING}{os.pathsep}{PROJECT}", "OMP_NUM_THREADS": "1"}
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{port}/v1")
    monkeypatch.setenv("NAMING_MODEL", str(chat_model))
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except OSError:
                assert server.poll() is None, (tmp_path / "log").read_text()[-2000:]
                time.sleep(0.5)
        check_protocol("openai", contexts, tmp_path / "cache")
    finally:
        server.terminate()
        server.wait()
    with pytest.raises(InputError, match="no answer from"):
        ask_json(open_chat("openai"), "Are you there?", check_name, tmp_path / "other")
