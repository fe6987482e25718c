"""Coloured tokens and the page of all concepts: nothing is lost, nothing escapes, nothing is fetched."""
import html
import json
import re
import shutil
import subprocess

import pytest

from concepts.page import MARGIN, Piece, coloured, concept_card, example_pieces, page_concept, pieces, write_page

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&amp;'\"\u2028<!--"
STATS = {"fires": 3.0, "max": 2.0, "mean_active": 1.0, "p99": 2.0, "frequency": 0.1}


def example(text, start, end, score=2.0):
    spans = [[start, end]]
    return {"text": text, "score": score, "token_str": text[start:end], "char_start": start, "char_end": end,
            "spans": spans, "acts": [score]}


def data_of(page):
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)[1])


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
    shown = page_concept(3, entry, STATS, [example("x" + EVIL, 0, 1)], [], promotes=[EVIL], near=[(4, 0.51234)],
                         effect=effect)
    bare = page_concept(4, None, STATS, [], [])
    write_page(tmp_path / "concepts.html", EVIL, [EVIL], [shown, bare])
    return (tmp_path / "concepts.html").read_text()


def test_who_judged_a_name_is_told():
    entry = {"name": "dogs", "source": "llm", "score": 0.9, "judge": "a <b> model", "model": "m"}
    assert "0.90, judged by a &lt;b&gt; model" in concept_card(7, entry, [example("a dog", 2, 5)])
    assert "judged" not in concept_card(7, entry | {"judge": "rule"}, [example("a dog", 2, 5)])
    packed = page_concept(7, entry, STATS, [], [])
    assert (packed["judge"], packed["model"]) == ("a <b> model", "m")


def test_hostile_texts_stay_texts(page):
    assert page.count("<script") == 2 and page.count("</script>") == 2
    assert "<img" not in page and "alert(1)</" not in page
    data = data_of(page)
    concept = data["concepts"][0]
    assert concept["name"] == concept["description"] == concept["notes"] == data["facts"][0] == concept[
        "promotes"
    ][0] == concept["effect"]["ablated"]["raised"][0][0] == EVIL
    (score, peak, rest), = concept["top"]
    assert (score, peak) == (2.0, ["x", 2.0, 1]) and rest.endswith(" …") and EVIL.startswith(rest[:-2])
    assert concept["near"] == [[4, 0.5123]] and concept["precision"] == 0.5
    assert (data["concepts"][1]["effect"] is None and data["concepts"][1]["top"] == []
            and data["concepts"][1]["score"] is None)


def test_the_page_asks_nothing_of_the_network(page):
    assert (not re.search(r"(?:src|href)\s*=\s*[\"']?(?:https?:)?//", page) and "@import" not in page
            and "url(" not in page)
    assert "default-src 'none'" in page
    assert "innerHTML" not in page and "insertAdjacentHTML" not in page and "document.write" not in page


def test_placeholders_in_texts_stay(tmp_path):
    write_page(tmp_path / "c.html", "{{data}}", ["{{title}}"], [])
    page = (tmp_path / "c.html").read_text()
    assert "<h1>{{data}}</h1>" in page and data_of(page)["facts"] == ["{{title}}"]


def test_the_page_is_the_same_every_time(tmp_path, page):
    data = data_of(page)
    for name in ("a.html", "b.html"):
        write_page(tmp_path / name, "t", data["facts"], data["concepts"])
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


NODE = shutil.which("node")
# As much of a browser as the page's script asks for; prints the texts of the detail at each hash.
BROWSER = """
class Element {
  constructor(tag) { this.tag = tag; this.children = [];
    this.style = { setProperty() {} }; this.classList = { toggle() {} }; this.value = "best F1"; }
  append(...more) { this.children.push(...more); }
  replaceChildren(...more) { this.children = more; }
  toggleAttribute() {} focus() {} contains() { return false; }
  get text() { return this.children.map(c => c instanceof Element ? c.text : String(c))
    .join(" ") + (this.textContent || ""); }
}
const ids = { data: new Element("script"), search: new Element("input") };
ids.data.textContent = DATA; ids.search.value = "";
globalThis.document = { body: new Element("body"), getElementById: id => ids[id] ??= new Element("div"),
  createElement: tag => new Element(tag), querySelectorAll: () => [] };
globalThis.location = { hash: "", pathname: "", search: "" }; globalThis.addEventListener = () => {};
globalThis.Option = function () {};
SCRIPT
console.log(JSON.stringify(HASHES.map(hash => { location.hash = hash; route(); return ids.detail.text; })));
"""


@pytest.mark.skipif(NODE is None, reason="node is not installed")
def test_an_address_of_a_latent_that_is_not_there_says_so(tmp_path, page):
    script = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)[-1]
    data = json.dumps(json.dumps(data_of(page)))
    hashes = ["", "#3", "#4", "#48", "#x", "#3x", "#-1", "#1e0", "#0x3", "#%33", "#99999999999999999999"]
    source = BROWSER.replace("DATA", data).replace("HASHES", json.dumps(hashes)).replace("SCRIPT", script)
    (tmp_path / "page.js").write_text(source)
    done = subprocess.run([NODE, str(tmp_path / "page.js")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, three, four, *missing = json.loads(done.stdout)
    assert "latent 3" in three and "latent 4" in four and EVIL in three and first in (three, four)
    assert ("Latent 48 is not on this page" in missing[0]
            and not any("strongest" in text.lower() or "latent 3" in text for text in missing))
    assert all("not on this page" in text or "no such latent" in text for text in missing)
