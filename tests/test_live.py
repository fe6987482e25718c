"""The live page's server: who is let in, what is refused, and what the model answers."""
import http.client
import json
import re
import threading
import time
from dataclasses import replace
from urllib.parse import parse_qs, urlsplit

import pytest
import torch
from conftest import tiny_model, word_tokenizer
from live_site import N_LATENTS, TEXT, live_of, make_products, served

from concepts import page_files
from concepts.continuations import continue_texts
from lib.activations import SaveSettings
from lib.encoder import Encoder
from lib.environment import InputError
from lib.hooks import resolve
from lib.sae import make_sae
from lib.steering import Edit, steer
from live.access import NOT_FRAMED
from live.answers import Live, Order, Place, _pieces, about, read, take_away, write
from live.server import LARGEST_BODY, LONGEST_TEXT, Site, take_port
from live.worker import MOST_WAITING

WRITE = {"text": "One day", "latent": 2, "strength": 1.0, "seed": 0}
READ = {"text": TEXT, "latent": None}
WITHOUT = {"text": TEXT, "token": 2, "latent": 2, "everywhere": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("live") / "sae"
    folder.mkdir()
    make_products(folder)
    return folder


@pytest.fixture(scope="module")
def live(folder):
    return live_of(folder)


class Client:
    """Asks a server as a browser would that has opened the page."""

    def __init__(self, url, worker, live):
        self.url, self.worker, self.live = url, worker, live
        self.port, self.token = urlsplit(url).port, parse_qs(urlsplit(url).query)["token"][0]
        self.cookie = f"explore_{self.port}={self.token}"

    def ask(self, path, body=None, method=None, **headers):
        """(status, headers, body) of an answer; header names are written with _ for -."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        given = {"Cookie": self.cookie, "Content-Type": "application/json"}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        data = body if body is None or isinstance(body, bytes) else json.dumps(body)
        connection.request(method or ("GET" if body is None else "POST"), path, data,
                           {name: value for name, value in given.items() if value is not None})
        answer = connection.getresponse()
        found = answer.status, answer.headers, answer.read()
        connection.close()
        return found

    def error(self, path, body=None, **options):
        status, headers, said = self.ask(path, body, **options)
        assert headers["Content-Type"].startswith("application/json")
        line = json.loads(said)["error"]
        assert "\n" not in line
        return status, line

    def lines(self, body):
        return [json.loads(line) for line in self.ask("/write", body)[2].splitlines()]


@pytest.fixture(scope="module")
def client(folder, live):
    with served(Site(live, folder, 60)) as (url, worker):
        yield Client(url, worker, live)


EVERY = [("/", None), ("/concepts.html", None), ("/about", None), ("/live.js", None), ("/concepts_data/a.json", None),
         ("/read", READ), ("/write", WRITE), ("/without", WITHOUT), ("/nothing", None)]


@pytest.mark.parametrize("path, body", EVERY)
def test_nobody_is_let_in_without_the_token(client, path, body):
    for cookie in (None, "", f"explore_{client.port}=", f"explore_{client.port}=x" + client.token,
                   f"explore_1={client.token}", f"explore_{client.port}=\xfc"):
        status, line = client.error(path, body, Cookie=cookie)
        assert status == 403 and "token" in line, cookie
    for query in ("?token=", "?token=wrong", "?token=%ff", "?TOKEN=" + client.token):
        assert client.ask(path + query, body, Cookie=None)[0] == 403
    if path != "/":  # in other addresses a token would stay in the history
        assert client.ask(f"{path}?token={client.token}", body, Cookie=None)[0] == 403


@pytest.mark.parametrize("path, body", EVERY)
def test_no_other_site_is_let_in(client, path, body):
    """With the cookie, as if the browser had sent it: by another name for this machine, or from another page."""
    here = f"127.0.0.1:{client.port}"
    port = client.port
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1", "127.0.0.1:1", f"127.0.0.1.x:{port}"):
        assert client.error(path, body, Host=host)[0] == 403, host
    for origin in ("http://evil.example", "null", f"https://{here}", "http://127.0.0.1:1", f"http://{here}.x", ""):
        assert client.error(path, body, Origin=origin)[0] == 403, origin
    if path != "/":
        for site in ("cross-site", "same-site", "x"):
            assert client.error(path, body, Sec_Fetch_Site=site)[0] == 403, site
    headers = client.ask(path, body)[1]
    assert not [name for name in headers if name.lower().startswith("access-control")]
    assert headers["X-Content-Type-Options"] == "nosniff" and headers["Cache-Control"] == "no-store"
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin" and headers["Referrer-Policy"] == "no-referrer"


def test_a_form_of_another_page_can_not_post(client):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "application/jsonx", None):
        assert client.error("/read", READ, Content_Type=kind)[0] == 403
    assert client.error("/read", READ, Content_Type="multipart/form-data")[0] == 400  # it has no parts
    for method in ("PUT", "DELETE", "OPTIONS", "PATCH"):
        assert client.error("/read", READ, method=method)[0] == 405
    assert client.ask("/read")[0] == client.ask("/about", READ)[0] == 405


def test_the_token_becomes_a_cookie(client):
    status, headers, body = client.ask("/?token=" + client.token, Cookie=None, Sec_Fetch_Site="cross-site")
    cookie = headers["Set-Cookie"]
    assert status == 200 and cookie.startswith(f"{client.cookie};") and client.token not in body.decode()
    assert {"HttpOnly", "Path=/", "SameSite=Strict"} == {part.strip() for part in cookie.split(";")[1:]}
    status, headers, body = client.ask("/concepts.html", Host=f"localhost:{client.port}", Sec_Fetch_Site="same-origin",
                                       Origin=f"http://localhost:{client.port}")
    assert status == 200 and client.token not in body.decode() + str(headers)


def test_pages_say_what_they_may_load_and_are_never_framed(client):
    for path in ("/concepts.html", "/?token=" + client.token):
        _, headers, body = client.ask(path)
        assert headers["Content-Security-Policy"] == NOT_FRAMED and headers["X-Frame-Options"] == "DENY"
        said, = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', body.decode())
        rules = dict(rule.strip().split(" ", 1) for rule in said.split(";"))
        assert rules["default-src"] == "'none'" and "unsafe" not in rules.get("script-src", "")
    assert client.ask("/about")[1]["Content-Security-Policy"].startswith("default-src 'none'; ")


def test_only_the_pages_own_files_are_sent(client, folder, tmp_path):
    data = folder / "concepts_data"
    data.mkdir()
    (data / "chunk_0.json").write_text("[]")
    (data / "notes.txt").write_text("x")
    (data / "link.json").symlink_to(folder / "concepts.json")
    status, headers, body = client.ask("/concepts_data/chunk_0.json")
    assert (status, body, headers["Content-Type"]) == (200, b"[]", "application/json; charset=utf-8")
    for path in ("/concepts_data/../concepts.json", "/concepts_data/%2e%2e/concepts.json", "/concepts_data/link.json",
                 "/concepts_data/..%2fconcepts.json", "/concepts_data/notes.txt", "/concepts_data/", "/server.py",
                 "/live.py", "/concepts.json", "/topk_sae.pt", "//live.js", "/concepts_data/.hidden.json"):
        assert client.error(path) == (404, "there is no such page"), path
    assert client.ask("/live.js")[1]["Content-Type"] == "text/javascript; charset=utf-8"


def test_a_page_of_many_latents_gets_its_data(client, tmp_path, monkeypatch):
    monkeypatch.setattr(page_files, "INLINE_LATENTS", 2)
    written = page_files.write_page(tmp_path / "concepts.html", {"title": "Many"}, [{"latent": i} for i in range(5)])
    with served(Site(client.live, tmp_path, 60)) as (url, worker):
        many = Client(url, worker, client.live)
        assert many.ask("/concepts.html")[0] == 200
        data = [path for folder in written if folder.is_dir() for path in folder.iterdir()]
        assert data and all(many.ask(f"/concepts_data/{path.name}")[2] == path.read_bytes() for path in data)


def test_an_older_page_is_refused_in_one_line(client, tmp_path):
    (tmp_path / "concepts.html").write_text("<html><title>old</title>")
    with served(Site(client.live, tmp_path, 60)) as (url, worker):
        status, line = Client(url, worker, client.live).error("/concepts.html")
    assert status == 500 and line.endswith("was written by older code; run notebook 05 again")


def test_what_is_no_request_is_refused_in_one_line(client):
    for body in (b"", b"{", b"\xff", b"[" * 100_000, b'{"text": "\\ud800", "latent": null}'):
        assert client.error("/read", body) == (400, "the request is no JSON text"), body[:9]
    for change, said in (({"text": 5}, "text must be text, not 5"), ({"latent": 256}, "from 0 to 255 or null, not 256"),
                         ({"latent": -1}, "from 0 to 255"), ({"latent": True}, "from 0 to 255")):
        status, line = client.error("/read", READ | change)
        assert status == 400 and said in line
    for change in ({"strength": "1"}, {"strength": 101}, {"strength": float("nan")}, {"strength": float("inf")},
                   {"seed": -1}, {"seed": 2**32}, {"latent": None}):
        assert client.error("/write", WRITE | change)[0] == 400
    assert client.error("/write", {"text": "a"})[1] == "it must be a dict with 'latent', not a dict of 1"
    assert client.error("/without", WITHOUT | {"token": 99})[1].endswith("there is no token 99")
    too_many = "the text has more than 64 tokens; shorten it"
    assert client.error("/read", READ | {"text": "100 %s %d " * 30}) == (400, too_many)
    assert client.error("/write", WRITE | {"text": "the " * 99}) == (400, too_many)


def test_long_texts_are_refused_before_they_are_read(client):
    status, line = client.error("/read", READ | {"text": "x" * (LONGEST_TEXT + 1)})
    assert status == 413 and "20,000 characters" in line
    for path, body, headers in (("/read", b"x" * (LARGEST_BODY + 1), {}), ("/about", None, {"Extra": "x" * 20_000})):
        try:
            assert client.ask(path, body, **headers)[0] == 400
        except (ConnectionError, http.client.HTTPException):
            pass  # the server hangs up while this is being sent
    assert client.ask("/about")[0] == 200


def test_each_token_has_the_latents_that_the_encoder_finds(client):
    encoded = client.live.encoder.encode(TEXT)
    found = json.loads(client.ask("/read", READ | {"latent": 2})[2])
    tokens = found["tokens"]
    assert "".join(each["before"] + each["text"] for each in tokens) + found["after"] == TEXT
    assert [each["text"] for each in tokens] == [token.strip() for token in encoded.tokens]
    for each, latents, codes in zip(tokens, encoded.latents.tolist(), encoded.codes.tolist()):
        fired = [(i, code) for i, code in zip(latents, codes) if code > 0]
        assert [i for i, _ in each["latents"]] == [i for i, _ in fired] and each["n"] == len(fired) > 0
        assert [code for _, code in each["latents"]] == pytest.approx([code for _, code in fired], rel=1e-3)
    assert found["codes"][2] == tokens[2]["latents"][0][1] > 0 and tokens[2]["latents"][0][0] == 2
    assert found["names"]["2"] == "dog <b>&" and found["highest"].keys() == {str(i) for each in tokens
                                                                                   for i, _ in each["latents"]}
    assert found["highest"]["2"] == pytest.approx(float(client.live.encoder.sae.maxima[2]), rel=1e-3)
    silent = json.loads(client.ask("/read", {"text": "The", "latent": 9})[2])
    assert silent["codes"] == [0.0] and "9" in silent["highest"]
    empty = json.loads(client.ask("/read", READ | {"text": "", "latent": 3})[2])
    assert empty["tokens"] == empty["codes"] == [] and empty["after"] == ""


def test_pieces_are_the_text_whatever_the_tokenizer_does():
    # Two byte tokens share the é; the space before a word is not its own; a token may have no characters.
    text, spans = "aé b\n c", [(0, 1), (1, 2), (1, 2), (2, 4), (4, 4), (4, 5), (6, 7)]
    before, own = _pieces(text, spans)
    assert own == ["a", "é", "", "b", "", "\n", "c"] and before == ["", "", "", " ", "", "", " "]
    assert _pieces("a  b", [(0, 1), (1, 3), (3, 4)]) == (["", "", ""], ["a", "  ", "b"])


def test_a_strength_of_zero_changes_nothing_and_others_do(client):
    found = {strength: {row["which"]: row for row in client.lines(WRITE | {"strength": strength})}
             for strength in (0, -1, 3)}
    assert found[0]["plain"]["text"] == found[0]["steered"]["text"] != ""
    assert found[0]["plain"]["perplexity"] == found[0]["steered"]["perplexity"]
    for strength in (-1, 3):
        assert found[strength]["plain"] == found[0]["plain"] and found[strength]["steered"] != found[0]["steered"]
    assert client.lines(WRITE)[-1] == client.lines(WRITE)[-1] != client.lines(WRITE | {"seed": 1})[-1]


def test_what_is_written_is_what_the_steered_model_writes(client):
    live = client.live
    encoder, rows = live.encoder, client.lines(WRITE)
    steering = encoder.steer(2, 1.0)
    whole = continue_texts(encoder.model, encoder.tokenizer, ["One day"], 12, steering=steering, temperature=0.7)
    steered = [row for row in rows if row["which"] == "steered"]
    assert "One day" + steered[-1]["text"] == whole.texts[0]
    assert steered[-1]["perplexity"] == pytest.approx(float(whole.perplexity[0]), rel=1e-3)
    assert len(steered) == 13 and all(whole.texts[0].startswith("One day" + row["text"]) for row in steered)
    pieces = steered[-1]["pieces"]
    assert "".join(before + piece for before, piece, _ in pieces) == steered[-1]["text"]
    encoded = encoder.encode(whole.texts[0])
    codes = (encoded.codes * (encoded.latents == 2)).sum(1)
    assert [code for _, _, code in pieces] == pytest.approx(codes[-len(pieces):].tolist(), rel=1e-3)


def test_taking_a_latent_away_by_hand(live):
    encoder = live.encoder
    ids = torch.tensor([encoder.tokenizer(TEXT)["input_ids"]])
    offset = ids.shape[1] - len(encoder.encode(TEXT).tokens)  # special tokens stand first
    latent, token = 2, 2

    def logits(**options):
        with torch.no_grad(), steer(encoder.model, encoder.point, encoder.sae, [Edit(latent, "ablate")],
                                    torch.zeros(N_LATENTS), **options):
            return encoder.model(input_ids=ids).logits[0, token + offset].double()

    clean, edited = logits(positions=()).log_softmax(0), logits(positions={token + offset}).log_softmax(0)
    found = take_away(live, Place(TEXT, token), latent, everywhere=False)
    assert found["kl"] == pytest.approx(float((clean.exp() * (clean - edited)).sum()), rel=1e-2) and found["kl"] > 0
    change = edited.exp() - clean.exp()
    assert found["raised"][0][2] - found["raised"][0][1] == pytest.approx(float(change.max()), rel=1e-2)
    assert found["lowered"][0][2] - found["lowered"][0][1] == pytest.approx(float(change.min()), rel=1e-2)
    assert found["likely"][0][1] == pytest.approx(float(clean.exp().max()), rel=1e-3)
    assert found["fires"] == 1 and found["code"] > 0


def test_a_silent_latent_changes_nothing_and_earlier_tokens_count(live):
    codes = read(live, TEXT, 2)["codes"]
    token = codes.index(0.0, 2)  # after "dog", on which it fires
    silent = take_away(live, Place(TEXT, token), 2, everywhere=False)
    assert (silent["kl"], silent["fires"], silent["raised"], silent["lowered"]) == (0.0, 0, [], [])
    before = take_away(live, Place(TEXT, token), 2, everywhere=True)
    assert before["fires"] == sum(code > 0 for code in codes[:token]) > 0 and before["kl"] > 0


def test_tokens_that_training_left_out_are_never_edited(live):
    """Those at the start too (SKIP_FIRST): a latent that fires on them alone changes nothing."""
    settings = replace(live.encoder.settings, skip_first=live.encoder.settings.skip_first + 2)
    later, changed = live._replace(encoder=live.encoder._replace(settings=settings)), 0
    for latent in range(N_LATENTS):
        found = take_away(later, Place(TEXT, 1), latent, everywhere=True)
        assert found["fires"] > 0 or found["kl"] == 0
        changed += found["fires"] == 0 < take_away(live, Place(TEXT, 2), latent, everywhere=True)["kl"]
    assert changed


def test_watching_ends_a_text_early(live):
    encoder, seen = live.encoder, []

    def watch(ids):
        seen.append(ids.shape[1])
        return len(seen) == 5

    whole = continue_texts(encoder.model, encoder.tokenizer, ["One day"], 12)
    part = continue_texts(encoder.model, encoder.tokenizer, ["One day"], 12, watch=watch)
    assert len(seen) == 5 and int(part.written.sum()) == 5 and whole.texts[0].startswith(part.texts[0])


def blocked(client, monkeypatch, pause=0.2):
    """Make each forward pass take `pause` seconds."""
    forward = client.live.encoder.model.forward
    monkeypatch.setattr(client.live.encoder.model, "forward",
                        lambda *args, **kwargs: (time.sleep(pause), forward(*args, **kwargs))[1])


def test_a_newer_text_ends_the_writing(client, monkeypatch):
    client.lines(WRITE)  # what is tried only once
    blocked(client, monkeypatch)
    rows = []
    writing = threading.Thread(target=lambda: rows.extend(client.lines(WRITE | {"seed": 7})))
    writing.start()
    time.sleep(0.7)
    start = time.monotonic()
    assert client.ask("/read", READ)[0] == 200
    writing.join(30)
    assert rows[-1] == {"stopped": "stopped: there is a newer request"} and time.monotonic() - start < 2.5
    assert not any("perplexity" in row for row in rows) and Order("One day", 7) not in client.live.written


def test_a_reader_who_leaves_ends_the_writing(client, monkeypatch):
    client.lines(WRITE)
    blocked(client, monkeypatch)
    connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=30)
    connection.request("POST", "/write", json.dumps(WRITE | {"seed": 8}),
                       {"Cookie": client.cookie, "Content-Type": "application/json"})
    connection.getresponse().readline()
    connection.close()
    start = time.monotonic()
    assert client.ask("/without", WITHOUT)[0] == 200  # waits its turn, which comes after at most two more tokens
    assert time.monotonic() - start < 2.5


def test_the_time_limit_ends_the_writing(folder, live, monkeypatch):
    with served(Site(live._replace(written={}), folder, 0.5)) as (url, worker):
        client = Client(url, worker, live)
        client.lines(WRITE)
        blocked(client, monkeypatch)
        rows = client.lines(WRITE | {"seed": 9})
    assert rows[-1] == {"stopped": "stopped after 0.5 seconds"} and 1 < len(rows) < 8


def test_more_than_may_wait_are_turned_away(client, monkeypatch):
    blocked(client, monkeypatch, pause=0.1)
    answers = []
    asked = [threading.Thread(target=lambda: answers.append(client.ask("/without", WITHOUT)[0]))
             for _ in range(MOST_WAITING + 3)]
    for each in asked:
        each.start()
    for each in asked:
        each.join(60)
    assert sorted(set(answers)) == [200, 503] and 1 <= answers.count(503) <= 3
    monkeypatch.undo()
    assert client.ask("/without", WITHOUT)[0] == 200


def test_a_port_that_is_taken_is_named(client):
    with pytest.raises(InputError, match=rf"^PORT={client.port} can't be used \(.*\); set another, or PORT=0"):
        take_port(client.port)


def test_an_unknown_error_is_one_line_and_the_server_goes_on(client, monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("a bug\nof many lines")

    monkeypatch.setattr("live.server.read", fail)
    assert client.error("/read", READ) == (500, "the server failed: a bug")
    assert "a request failed" in caplog.text
    monkeypatch.undo()
    assert client.ask("/read", READ)[0] == 200


def test_an_error_in_the_middle_of_a_text_is_told(client, monkeypatch):
    def fail(*_):
        raise RuntimeError("no memory, or a bug")

    monkeypatch.setattr("live.answers._coloured", fail)
    assert client.lines(WRITE | {"seed": 11})[-1] == {"error": "the server failed: no memory, or a bug"}


def test_without_step_4_latents_are_shown_and_no_strength_is_invented(live, tmp_path):
    sae = live.encoder.sae.to("cpu")
    sae.maxima = None
    bare = live._replace(encoder=live.encoder._replace(sae=sae), written={})
    with served(Site(bare, tmp_path, 60)) as (url, worker):
        client = Client(url, worker, bare)
        page = client.ask("/concepts.html")[2].decode()
        assert "04_name_sae_concepts" in page and 'id="live"' in page
        assert json.loads(client.ask("/about")[2])["measured"] is False
        assert json.loads(client.ask("/read", READ)[2])["highest"] == {}
        assert json.loads(client.ask("/without", WITHOUT)[2])["kl"] > 0
        assert client.error("/write", WRITE)[1].startswith("the highest codes of this SAE's latents")


def test_a_model_that_writes_nothing_still_shows_latents():
    model, tokenizer = tiny_model("bert"), word_tokenizer()
    W = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    sae = make_sae(W, torch.zeros(32), W, torch.zeros(16), scale=4.0, top_k=3)
    encoder = Encoder(sae, model, tokenizer, resolve(model, "resid_post:1"), {}, SaveSettings())
    live = Live(encoder, text_tokens=64, new_tokens=5, temperature=0, written={})
    assert about(live)["no_writing"].startswith("BertModel is no causal language model")
    assert [each["text"] for each in read(live, "the cat sat")["tokens"]] == ["the", "cat", "sat"]
    with pytest.raises(InputError, match="no causal language model"):
        take_away(live, Place("the cat", 0), 1, everywhere=True)
    with pytest.raises(InputError, match="no causal language model"):
        write(live, Order("the cat", 0), 1, 1.0, stop=lambda: False, say=print)


def test_a_text_may_fill_the_model_but_not_more(live, monkeypatch):
    n_tokens = len(live.encoder.tokenizer(TEXT)["input_ids"])
    rows = []
    for places, n_new in ((n_tokens + 3, 3), (n_tokens, 0)):
        monkeypatch.setattr(live.encoder.model.config, "max_position_embeddings", places)
        order = Order(TEXT, places)
        if n_new:
            write(live, order, 2, 0.0, stop=lambda: False, say=rows.append)
            assert sum("perplexity" not in row for row in rows) == 2 * n_new
        else:
            with pytest.raises(InputError, match="fills all the places"):
                write(live, order, 2, 0.0, stop=lambda: False, say=rows.append)
