"""Names in words: what a person reads of patterns of pieces, whatever the tokenizer; how names are counted."""
import numpy as np
import pytest
import torch
from test_concepts import TEXTS, planted

from checks.naming import affixes, fragments, naming_report
from concepts.codes import Codes
from concepts.names import name_latents, patterns_of
from concepts.patterns import find_patterns
from concepts.unseen import name_unseen
from concepts.wording import describe, short_name, words_of

STORIES = [
    "Mary decided to go. The marble was red, and Mary decided to stay.",
    "Mary was playing. Tom was going home, singing and jumping. Mary decided to be calling.",
    "Tom decided. Mary found a marble at the market. Unhappy Tom was sleeping.",
]
CUTS = {"Mary": [3], "marble": [3], "market": [3], "decided": [3], "playing": [4], "going": [2], "singing": [4],
        "jumping": [4], "calling": [4], "sleeping": [5]}


def pieces(texts, spaces):
    """Rows of words cut into pieces: Mar|y, dec|ided, play|ing; spaces: whether tokens have the space before them."""
    columns = []
    for number, text in enumerate(texts):
        at = 0
        for word in text.split(" "):
            core = word.rstrip(".,")
            marks = range(at + len(core) + 1, at + len(word) + 1)
            ends = [*(at + cut for cut in CUTS.get(core, [])), at + len(core), *marks]
            for start, end in zip([at, *ends], ends):
                columns.append((number, start - (spaces and start == at and at > 0), end))
            at += len(word) + 1
    return dict(zip(("text_id", "char_start", "char_end"), torch.tensor(columns, dtype=torch.int32).T))


def fires_on(texts, rows, pieces_):
    slices = [texts[t][a:b].strip() for t, a, b in zip(*(rows[key].tolist() for key in rows))]
    return np.array([float(piece in pieces_) for piece in slices], np.float32)


@pytest.mark.parametrize("spaces", [True, False])  # as byte-level BPE has them, and as wordpiece and sentencepiece
def test_a_piece_is_named_by_the_words_it_fires_in(spaces):
    rows = pieces(STORIES, spaces)
    patterns = find_patterns(STORIES, rows)
    for fired, kind, name, short, long in (
        (["dec"], "word", "dec-", ["decided"], "words that begin with “dec” (decided)"),
        (["Mar", "mar"], "start", "mar", ["Mary", "marble", "market"][:2],
         "words that begin with “mar” (Mary, marble)"),
        (["ing"], "token", "ing", None, None), (["ing"], "ending", "ing", None, None),
        (["y"], "token", "y", ["Mary"], "words that end in “y” (Mary)"),
    ):
        found, whole = describe(patterns, kind, name, fires_on(STORIES, rows, fired))
        if short is None:  # six words of equal share: an affix
            assert len(found) == 1 and found[0].startswith("-ing (") and whole.startswith("words that end in “ing” (")
            words = found[0].removeprefix("-ing (").removesuffix(")").split(", ")
            assert len(words) == 2 and all(word.endswith("ing") for word in words)
        else:
            assert found == short and whole == long


def test_forms_of_a_word_count_as_one():
    texts = ["the dog played. dogs play. the dog plays."]
    rows = pieces(texts, True)
    patterns = find_patterns(texts, rows)
    assert len(patterns.find("family", "play")) == 3 and len(patterns.find("family", "dog")) == 3
    assert len(patterns.find("family", "the")) == 0
    code = fires_on(texts, rows, ["played", "dog", "dogs"])
    assert words_of(patterns, np.flatnonzero(code), code) == (["dog", "played"], 1)
    assert describe(patterns, "family", "dog", code) == (["dog"], "dog in any form (dog)")
    assert short_name(patterns, ["word"] * 4, [["played"], ["play"], ["dog"], ["plays"]]) == "played, dog"
    assert short_name(patterns, ["word", "after", "word"], [["a", "b", "c"], ["after “x”"], ["d", "e"]]
                      ) == "a, b, c; after “x” (+2)"


def test_names_are_written_as_in_the_texts():
    patterns = find_patterns(STORIES, pieces(STORIES, True))
    code = np.ones(patterns.n, np.float32)
    assert describe(patterns, "word", "tom", code)[0] == ["Tom"]
    assert describe(patterns, "word", "the", code)[0] == ["the"]  # it stands in lower case too
    assert describe(patterns, "after", "mary", code)[0] == ["after “Mary”"]
    assert describe(patterns, "within", "decided", code) == (["decided"], "pieces of “decided”")
    assert describe(patterns, "phrase", "mary dec-", fires_on(STORIES, pieces(STORIES, True), ["dec"])
                    ) == (["“Mary decided”"], "“Mary dec- (decided)”")


def test_languages_without_spaces_and_split_characters():
    texts = ["我喜欢狗。他喜欢猫。", "ม้า", "x 🙂"]
    spans = [(0, i, i + 1) for i in range(10)] + [(1, 0, 1), (1, 1, 3), (2, 0, 1), (2, 1, 2), (2, 2, 3), (2, 2, 3)]
    rows = dict(zip(("text_id", "char_start", "char_end"), torch.tensor(spans, dtype=torch.int32).T))
    patterns = find_patterns(texts, rows)
    code = np.ones(patterns.n, np.float32)
    assert len(patterns.find("token", "狗")) == 1 and describe(patterns, "token", "喜", code) == (["喜"], "“喜”")
    for kind, names in patterns.names.items():
        assert all(describe(patterns, kind, name, code)[1] for name in names)


def test_the_patterns_of_some_rows():
    rows = pieces(STORIES, True)
    patterns, keep = find_patterns(STORIES, rows), rows["text_id"].numpy() == 1
    alone = find_patterns([STORIES[1]], {key: column[keep] - int(key == "text_id") for key, column in rows.items()})
    part = patterns.only(keep)
    assert part.n == alone.n and (part.piece == alone.piece).all()
    for kind, names in alone.names.items():
        for name in names:
            if kind != "family":  # which forms there are is a matter of all texts
                assert part.find(kind, name).tolist() == alone.find(kind, name).tolist()
    assert part.find("word", "marble").tolist() == []


def test_every_latent_that_fires_has_a_line():
    codes, is_val = planted([lambda s, i: s[i] == "dog", lambda s, i: 2.0 * (s[i] == "cat") + (s[i] == "bird"),
                             lambda s, i: 0.0], TEXTS * 12)
    (start, values, indices), = codes
    values = values.clone()
    values[~is_val, 1] = 0
    codes = Codes(codes.texts, codes.rows, 3, lambda: iter([(start, values, indices)]))
    named = name_latents(codes, patterns_of(codes), is_val, range(3), W_dec=torch.eye(3))
    assert sorted(named) == [0]
    unseen = name_unseen(codes, {1, 2})
    assert sorted(unseen) == [1] and unseen[1]["name"] == "cat" and unseen[1]["score"] is None
    assert "no token that names are made from" in unseen[1]["description"]
    assert name_unseen(codes, set()) == {}


UNITS = {"mary", "dog", "the", "found", "say", "don't", "t"}


@pytest.mark.parametrize(
    ("name", "broken", "declared"),
    [
        ("dog, Mary (+8)", [], []), ("mar…, dog", ["mar…"], []), ("…ing", ["…ing"], []), ("mar, dog", ["mar"], []),
        ("after “the”, “Mary”; before full stop", [], []), ("a quotation; the start of a text", [], []),
        ("-ing (found, say)", [], ["-ing"]), ("f- (found, fun)", ["fun"], ["f-"]), ("“the dog”; don't", [], []),
        ("pieces of “dog”", [], []), ("the last piece of a longer word; -e- (the)", [], ["-e-"]),
        ("“, th- (the)”", [], ["th-"]), ("dog at the start of a text", [], []), ("狗", [], []), ("“!?”", [], []),
    ],
)
def test_fragments_and_affixes(name, broken, declared):
    assert (fragments(name, UNITS), affixes(name)) == (broken, declared)


def test_the_report_in_closed_form():
    made = {"rule": [["word", "dog"]], "name": "dog", "score": 0.75, "f1": 0.9, "coherence": 0.25}
    concepts = {
        0: made, 1: made | {"name": "mar…", "score": 0.5, "f1": 0.1, "coherence": 0.75},
        2: made | {"name": "-ing (say)", "score": None, "f1": None, "coherence": 1.0}, 3: {"name": "x", "rule": None},
    }
    assert naming_report(concepts, ["the dog", "Mary don't say, found t"]) == {
        "names": 3, "with a fragment (%)": 33.3, "with an affix (%)": 33.3, "coherence, 25 %": 0.5,
        "coherence, median": 0.75, "coherence, 75 %": 0.875, "coherence under 0.5 (%)": 33.3,
        "balanced accuracy": 0.625, "F1": 0.5, "F1 >= 0.8 (%)": 50.0, "of these, coherence under 0.5 (%)": 100.0}
    assert np.isnan(naming_report({}, [])["F1"])
