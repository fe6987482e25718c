"""Coloured tokens and the page of all concepts: nothing is lost, nothing escapes, nothing is fetched."""
import base64
import hashlib
import html
import json
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from concepts import page_files
from concepts.coherence import interest
from concepts.page import MARGIN, Piece, coloured, concept_card, example_pieces, pieces
from concepts.page_files import live_page, write_page
from concepts.page_index import DIGITS, add_words, bucket_of, packed_example, packed_latent, word_buckets
from concepts.page_map import map_positions
from lib.environment import InputError

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&amp;'\"\u2028<!--"
STATS = {"fires": 3.0, "max": 2.0, "mean_active": 1.0, "p99": 2.0, "frequency": 0.1}


def example(text, start, end, score=2.0):
    spans = [[start, end]]
    return {"text": text, "score": score, "token_str": text[start:end], "char_start": start, "char_end": end,
            "spans": spans, "acts": [score]}


def data_of(page):
    """The index, and all parts of a page of one file."""
    blocks = re.findall(r'<script type="application/json" id="([\w-]+)">(.*?)</script>', page)
    (name, index), *parts = [(name, json.loads(block)) for name, block in blocks]
    assert name == "data" and all(name.startswith("part-") for name, _ in parts)
    return index, [part for _, part in parts]


def plain(markup):
    return html.unescape(re.sub(r"<[^>]*>", "", markup))


def test_the_pieces_are_the_text():
    text = "One day, a dog ran."
    spans, acts = [(0, 3), (3, 7), (7, 8), (8, 10), (10, 14), (14, 18), (18, 19)], [0, 0, 0, 0, 1.5, 0.5, 0]
    found = pieces(text, spans, acts, peak=4)
    assert "".join(piece.text for piece in found) == text
    assert [piece for piece in found if piece.act] == [Piece("dog", 1.5, True), Piece("ran", 0.5, False)]


def test_only_the_surroundings_are_cut_and_between_words():
    text = "word " * 40 + "PEAK" + " word" * 40
    found = pieces(text, [(200, 204)], [1.0], 0)
    shown = "".join(piece.text for piece in found)
    assert shown.startswith("… word") and shown.endswith("word …") and found[1] == Piece("PEAK", 1.0, True)
    assert len(shown) <= 2 * MARGIN + 8


def test_pieces_of_one_character_and_empty_slices():
    # Two byte pieces share the character's range; a white-space token has an empty one.
    assert pieces("aé b", [(0, 1), (1, 2), (1, 2), (2, 2), (2, 4)], [0, 0.5, 2.0, 1.0, 0], 2) == [
        Piece("a", 0.0), Piece("é", 2.0, True), Piece("·", 1.0), Piece(" ", 0.0), Piece("b", 0.0),
    ]
    assert pieces("a  b", [(1, 3)], [1.0], 0, margin=5)[1] == Piece("  ", 1.0, True)
    assert pieces("a\nb", [(1, 2)], [1.0], 0, margin=5)[1] == Piece("↵", 1.0, True)
    assert pieces("no token", [], []) == [Piece("no token", 0.0)]


def test_an_old_example_without_a_window_is_shown():
    found = example_pieces({"text": "a dog", "score": 1.0, "token_str": "dog", "token_idx": 1})
    assert "".join(piece.text for piece in found) == "a dog"
    old = {"text": "a dog", "score": 1.0, "char_start": 2, "char_end": 5}
    assert Piece("dog", 1.0, True) in example_pieces(old)


def test_colour_grows_with_the_code_and_text_is_escaped():
    markup = coloured([Piece(EVIL, 1.0), Piece("<b>", 4.0, True), Piece("<i>", 0.0)], scale=4.0)
    assert plain(markup) == EVIL + "<b><i>"
    assert "<script" not in markup and "<img" not in markup and "<b>" not in markup and "<i>" not in markup
    weak, full = map(float, re.findall(r"rgba\([\d, ]+,([\d.]+)\)", markup))
    assert weak < full == 0.9 and markup.count("outline") == 1
    assert "rgba" in coloured([Piece("a", 1.0)], scale=0.0)


def test_a_card_shows_name_score_and_texts():
    entry = {"name": "<dog>", "score": 0.875}
    card = concept_card(7, entry, [example("a dog", 2, 5)], [example("the dog", 4, 7, 1.0)])
    assert "<dog>" not in card and "Latent 7: <dog> · held-out balanced accuracy 0.88" in plain(card)
    assert "a dog" in plain(card) and "the dog" in plain(card)
    assert "never fires" in concept_card(8, None, [])


@pytest.fixture
def page(tmp_path):
    entry = {"name": EVIL, "description": EVIL, "notes": EVIL, "score": 0.9, "precision": 0.5, "source": "human"}
    effect = {"n_tokens": 2, "ablated": {"kl": 0.5, "raised": [[EVIL, 1.5]], "lowered": []},
              "added": {"kl": 0.1, "raised": [], "lowered": [[EVIL, -1.0]]}}
    shown = {"latent": 3, "entry": entry, **STATS, "top": [example("x" + EVIL, 0, 1)], "promotes": [EVIL],
             "near": [(4, 0.51234)], "effect": effect, "token_share": [[EVIL, 1.0, 3, 1.0]]}
    write_page(tmp_path / "concepts.html", {"title": EVIL, "facts": [EVIL]}, [shown, {"latent": 4}])
    return (tmp_path / "concepts.html").read_text()


def test_the_index_has_the_interest_of_what_was_measured():
    entry = {"name": "dog", "f1": 0.8, "coherence": 0.5, "score": 0.9, "baseline": 0.6}
    effect = {"ablated": {"kl": 1e9, "raised": [], "lowered": []}}
    assert packed_latent({"latent": 1, "entry": entry})[0]["interest"] == pytest.approx(interest(entry), rel=1e-3)
    assert packed_latent({"latent": 1, "entry": entry, "effect": effect})[0]["interest"] == pytest.approx(0.3467, 1e-3)
    assert packed_latent({"latent": 1})[0]["interest"] is None


def test_who_judged_a_name_is_told():
    entry = {"name": "dogs", "source": "llm", "score": 0.9, "judge": "a <b> model", "model": "m"}
    assert "0.90, judged by a &lt;b&gt; model" in concept_card(7, entry, [example("a dog", 2, 5)])
    assert "judged" not in concept_card(7, entry | {"judge": "rule"}, [example("a dog", 2, 5)])
    _, detail, _ = packed_latent({"latent": 7, "entry": entry})
    assert (detail["judge"], detail["model"]) == ("a <b> model", "m")


def test_hostile_texts_stay_texts(page):
    assert page.count("<script") == page.count("</script>") == 1 + page.count('<script type="application/json" id="')
    assert "<img" not in page and "alert(1)</" not in page
    index, (details, *_) = data_of(page)
    columns, detail = index["columns"], details[0]
    assert columns["name"] == [EVIL, None] and index["about"]["facts"] == [EVIL]
    assert detail["description"] == detail["notes"] == detail["promotes"][0] == EVIL
    assert detail["effect"]["ablated"]["raised"][0][0] == columns["tokens"][0][0] == EVIL
    (score, peak, rest), = detail["intervals"][0]["examples"]
    assert (score, peak) == (2, ["x", 2, 1]) and rest.endswith(" …") and EVIL.startswith(rest[:-2])
    assert detail["near"] == [[4, 0.5123]] and detail["precision"] == 0.5
    assert columns["effect_kl"] == [0.5, None] and columns["score"] == [0.9, None]
    assert details[1]["intervals"] == [] and "effect" not in details[1]


def test_the_page_asks_nothing_of_the_network_and_runs_nothing_but_its_own(page):
    assert (not re.search(r"(?:src|href)\s*=\s*[\"']?(?:https?:)?//", page) and "@import" not in page
            and "url(" not in page)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "connect-src" not in policy
    script, style = (re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)[-1] for tag in ("script", "style"))
    for source in (script, style):
        assert base64.b64encode(hashlib.sha256(source.encode()).digest()).decode() in policy
    for word in ("innerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", "setAttribute(\"style"):
        assert word not in page


def test_placeholders_in_texts_stay(tmp_path):
    write_page(tmp_path / "c.html", {"title": "{{data}}", "facts": ["{{title}}"]}, [])
    page = (tmp_path / "c.html").read_text()
    assert "<h1>{{data}}</h1>" in page and data_of(page)[0]["about"]["facts"] == ["{{title}}"]


def test_numbers_are_short_and_what_is_no_number_is_absent():
    row, detail, _ = packed_latent({"latent": 1, "max": 1.23456, "f1": float("nan"), "map": (0.5, float("inf")),
                                    "histogram": {"edges": [0.0, 2.0], "counts": [3]}})
    assert (row["max"], row["f1"], row["map_x"], row["map_y"], row["source"]) == (1.235, None, 0.5, None, "none")
    assert detail["histogram"] == {"edges": [0, 2], "counts": [3]}
    with pytest.raises(ValueError, match="no place for typo"):
        packed_latent({"latent": 1, "typo": 2})


def test_a_near_miss_frames_the_token_looked_at_and_says_what_was_needed():
    silent = {"text": "a dog ran", "score": 0.25, "needed": 0.5, "char_start": 2, "char_end": 5,
              "spans": [[0, 1], [2, 5], [6, 9]], "acts": [0, 0, 0]}
    assert packed_example(silent) == [[0.25, 0.5], "a ", ["dog", 0.0, 1], " ran"]
    drawn = silent | {"acts": [0.0, 0.2, 0.9], "score": 0.2, "needed": None}
    assert packed_example(drawn) == [0.2, "a ", ["dog", 0.2, 1], " ", ["ran", 0.9]]


def decoded(gaps):
    rows, row, gap, shift = [], -1, 0, 1
    for five in map(DIGITS.index, gaps):
        gap += five % 32 * shift
        shift *= 32
        if five < 32:
            row, gap, shift = row + gap, 0, 1
            rows.append(row)
    return rows


@given(st.lists(st.sets(st.sampled_from(["dog", "do", "Dog's", "été", "日本", "x" * 50, "x" * 60, "7"])), max_size=40),
       st.integers(1, 70000))
def test_the_word_index_finds_the_rows_of_each_word(texts, step):
    words = {}
    for number, chosen in enumerate(texts):
        add_words(words, number * step, [f"«{word}»" for word in chosen])
    buckets = word_buckets(words)
    found = {word: decoded(gaps) for bucket in buckets for word, gaps in bucket.items()}
    assert all(word in buckets[bucket_of(word[:2])] for word in found)
    expected = {"dog": {"dog", "Dog's"}, "do": {"do"}, "été": {"été"}, "日": {"日本"}, "本": {"日本"},
                "x" * 40: {"x" * 50, "x" * 60}, "7": {"7"}, "s": {"Dog's"}}
    for word, forms in expected.items():
        assert found.get(word, []) == [number * step for number, chosen in enumerate(texts) if chosen & forms]


def test_silent_texts_are_not_searched():
    parts = [{"kind": kind, "examples": [example(kind, 0, 1)]} for kind in ("top", "near_miss", "zero")]
    assert packed_latent({"latent": 1, "intervals": parts})[2] == ["top"]


def test_many_latents_go_into_a_folder_and_come_back(tmp_path, monkeypatch):
    monkeypatch.setattr(page_files, "INLINE_LATENTS", 100)
    path = tmp_path / "concepts.html"
    latents = [{"latent": 3 * i, "top": [example(f"word{i}", 0, 4)]} for i in range(200)]
    page, folder = write_page(path, {"title": "t"}, iter(latents))
    index, none = data_of(path.read_text())
    names = index["parts"]["names"]
    assert none == [] and folder.name == index["parts"]["folder"] == "concepts_data"
    assert set(names) == {file.stem for file in folder.iterdir()} and len(names) == 4 + page_files.N_BUCKETS
    texts = [(folder / f"{name}.js").read_text() for name in names[:4]]
    assert texts[0].startswith('page.part("texts_') and '"63"' in texts[0]
    before = path.read_bytes(), set(names)
    write_page(path, {"title": "t"}, latents)
    assert (path.read_bytes(), {file.stem for file in folder.iterdir()}) == before
    write_page(path, {"title": "t"}, latents[:90])
    assert not folder.exists() and len(data_of(path.read_text())[1]) == 2 + 1  # of details, and the bucket of "wo"


def test_the_page_is_the_same_every_time(tmp_path, page):
    latents = [{"latent": i, "top": [example("a b c d", 0, 1)]} for i in range(3)]
    for name in ("a.html", "b.html"):
        write_page(tmp_path / name, {"title": "t"}, latents)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_a_live_page_may_talk_to_its_server_alone(tmp_path, page):
    text = live_page(tmp_path / "concepts.html", ["live.js"], ["live.css?a=1&b=2"])
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    assert "connect-src 'self'" in policy and "script-src 'self' 'sha256-" in policy and "style-src 'self'" in policy
    assert '<script src="live.js" defer></script>' in text and 'href="live.css?a=1&amp;b=2"' in text
    (tmp_path / "old.html").write_text("<title>old</title>")
    for missing in ("old.html", "none.html"):
        with pytest.raises(InputError, match="run notebook 05 again"):
            live_page(tmp_path / missing, [])


def test_the_map_of_a_flat_dictionary_is_the_dictionary():
    generator = torch.Generator().manual_seed(0)
    angle = torch.rand(50, generator=generator) * 6.28
    flat = torch.stack([angle.cos(), 0 * angle, angle.sin()], 1)
    found, how = map_positions(3 * flat)
    assert "100 %" in how
    assert torch.allclose(torch.pdist(found), torch.pdist(flat), atol=1e-4)
    assert map_positions(torch.ones(5, 3))[0].abs().max() == 0
