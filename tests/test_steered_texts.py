"""What is counted in steered texts, by hand; how a strength and a latent are chosen."""
import math

import numpy as np
import pytest
import torch
from conftest import WORDS, tiny_model, word_tokenizer
from test_steering import MAXIMA, random_sae

from concepts.appearance import (
    distinct,
    followers_of,
    repeated,
    rule_of,
    share_of_words,
    share_shown,
    truth_of,
    words_of,
    words_to_seek,
)
from concepts.continuations import Continuation, continue_texts, perplexities
from concepts.directions import direct_view
from concepts.screening import own_ids, screen, vocabulary_of
from concepts.steered_texts import Writing, compare, sweep
from concepts.steering_report import meanings, strengths_table, telling_pairs, verdict
from concepts.strengths import COARSE, MAX_REPEATED, find_strength
from lib.hooks import resolve
from lib.steering import Edit, Spare, steer

TREE = {"leaves": [{"number": 1, "path": "animal/pet", "words": ["Dog", "dogs", "cat"]},
                   {"number": 2, "path": "animal", "words": ["dog", "cat", "bird", "bear"]}]}


def test_the_share_of_tokens_on_which_a_pattern_holds():
    tokenizer = word_tokenizer()
    texts = ["the dog saw a dog", "a cat sat", "dog dog", "the dog ran . the dog sat"]
    starts = [4, 1, 7, 9]  # after "the", "a", everything, and "the dog r"
    shares = share_shown(tokenizer, texts, starts, [("word", "dog")])
    assert shares[[0, 1, 3]].tolist() == [2 / 4, 0, 1 / 4] and np.isnan(shares[2])
    before = share_shown(tokenizer, texts, starts, [("before", "dog"), ("word", "sat")])
    assert before[[0, 1, 3]].tolist() == [1 / 4, 1 / 2, 2 / 4]
    assert share_shown(tokenizer, texts, [0] * 4, [("phrase", "the dog")]).tolist() == [1 / 5, 0, 0, 2 / 7]
    assert share_shown(tokenizer, texts, starts, [])[:2].tolist() == [0, 0]
    cats = share_shown(tokenizer, ["she jumped", "she sat"], [0, 0], [("family", "jump")])
    assert cats.tolist() == [1 / 2, 0]  # though "jump" is in no text


def test_the_share_of_words_that_belong_to_a_list():
    shares = share_of_words(["One dog, two Dogs!", "a", "a"], [3, 0, 1], {"dog", "dogs"})
    assert shares[:2].tolist() == [2 / 5, 0] and np.isnan(shares[2])  # dog , two Dogs !


def test_what_a_name_stands_for():
    assert rule_of({"name": "x", "rule": [["before", "dog"]]}) == [("before", "dog")]
    assert rule_of({"name": "Cats and dogs"}) == [("word", "cats"), ("word", "dogs")]
    assert rule_of({"name": "and"}) == [("word", "and")]
    rule = [("word", "Dog"), ("phrase", "the cat"), ("before", "!"), ("after", "sun"), ("place", "number"),
            ("cased", "dog")]
    assert words_of(rule) == ["dog", "cat"]
    assert truth_of(rule, TREE) == ("animal/pet", frozenset({"dog", "dogs", "cat"}))  # a larger share of its words
    assert truth_of([("word", "dog"), ("word", "sun")], TREE) == ("", frozenset())  # half is not most
    assert truth_of(rule, None) == truth_of([], TREE) == ("", frozenset())


def test_words_that_follow_a_concepts_words():
    texts = ["a dog barked"] * 6 + ["the dog sat"] * 6 + ["a cat sat and a bird sat and sat"] * 6
    # "sat" follows a dog 6 times of 12, and is 24 of 90 words: a lift of 1.9; "barked": 6 of 12 to 6 of 90, 7.5
    assert followers_of([("word", "dog")], texts) == {"barked"}
    assert followers_of([("word", "dog")], texts[2:]) == frozenset()  # 4 times is too seldom
    assert followers_of([("before", "dog"), ("after", "dog")], texts) == frozenset()
    assert words_to_seek([("word", "dog"), ("word", "cat")], TREE, texts[:2]) == (
        "animal/pet", {"truth": frozenset({"dog", "dogs", "cat"})})


def test_repetition_by_hand():
    assert repeated([1, 2, 3, 1, 2, 3]) == 1 / 4  # 123 231 312 123
    assert repeated([1, 1, 1, 1]) == 1 / 2 and repeated([1, 2]) == 0
    assert distinct([[1, 2, 3], [1, 2], [9]]) == 2 / 3  # 12 23 12
    assert distinct([[1], []]) is None


def done(texts, perplexity):
    """Continuations of "the" in words of the tokenizer."""
    rows = [word_tokenizer()(text)["input_ids"] for text in texts]
    ids = torch.tensor([row + [0] * (8 - len(row)) for row in rows])
    written = torch.tensor([[False, False] + [True] * (len(row) - 2) + [False] * (8 - len(row)) for row in rows])
    return Continuation(texts, torch.tensor(perplexity), ids=ids, mask=(ids != 0).long(), written=written,
                        starts=[3] * len(texts))


def test_texts_are_compared_pair_by_pair():
    plain = done(["the dog sat", "the cat sat", "the"], [2.0, 8.0, float("nan")])
    new = done(["the dog dog", "the dog sat", "the dog"], [4.0, 8.0, 3.0])
    found = compare(word_tokenizer(), new, plain,
                    Writing([], 2, rule=[("word", "dog")], favoured=[WORDS.index("dog") + 4], words={"truth": ["cat"]}))
    assert found["concept"] == pytest.approx((1 + 1 / 2 + 1) / 3) and found["shown_in"] == 1
    assert found["shown"] == [1, 1 / 2, 1]
    # the third pair has no unsteered text: differences 1 - 1/2 and 1/2 - 0 have no spread
    assert found["concept_rise"] == pytest.approx({"mean": 0.5, "low": 0.5, "high": 0.5})
    assert found["truth"] == 0 and found["truth_rise"]["mean"] == -0.25
    half = 12.706204736 * 0.25  # t interval of -.0 and -.5
    assert found["truth_rise"]["low"] == pytest.approx(-0.25 - half)
    assert found["favoured"] == 4 / 5
    assert found["perplexity"] == pytest.approx(96 ** (1 / 3))
    spread = 12.706204736 * math.log(2) / 2
    assert found["cost"] == pytest.approx({"mean": 2**0.5, "low": 2**0.5 * math.exp(-spread),
                                           "high": 2**0.5 * math.exp(spread)}, rel=1e-6)


def test_measuring_counts_what_was_written():
    model, tokenizer = tiny_model("llama"), word_tokenizer()
    point, sae = resolve(model, "resid_post:1"), random_sae()

    def swept(**options):
        return sweep(model, tokenizer, point, sae, edits=[Edit(5, "add")], maxima=MAXIMA, strengths=(None, 0.0, 30.0),
                     writing=Writing(["the cat sat", "a dog"], 8, **options))

    plain, same, strong = swept(favoured=range(len(tokenizer)))
    assert plain["texts"] == continue_texts(model, tokenizer, ["the cat sat", "a dog"], 8).texts
    assert plain | {"strength": 0.0} == same  # bit for bit
    assert plain["favoured"] == strong["favoured"] == 1.0 and strong["texts"] != plain["texts"]
    assert plain["cost"] == {"mean": 1.0, "low": 1.0, "high": 1.0} and plain["concept_rise"]["mean"] == 0
    assert swept()[0]["favoured"] == 0.0 and all(0 <= row[key] <= 1 for row in (plain, strong)
                                                 for key in ("fires", "repeated", "distinct"))


def test_a_text_may_end_at_any_of_the_models_end_tokens():
    """The filler after it is not written; a prompt continued alone says how long each is."""
    model, tokenizer = tiny_model("llama"), word_tokenizer()
    prompts = ["the cat", "a dog sat", "the red bird", "dog"]
    model.generation_config.eos_token_id = None
    free = continue_texts(model, tokenizer, prompts, 12)
    lengths = {end: [ids.index(end) + 1 if end in ids else 12 for ids in free.ids_written]
               for end in range(4, len(WORDS) + 4)}
    end = next(end for end, found in lengths.items() if len(set(found)) > 1)  # it ends them at different lengths
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, end]
    together = continue_texts(model, tokenizer, prompts, 12).ids_written
    assert together == [continue_texts(model, tokenizer, [prompt], 12).ids_written[0] for prompt in prompts]
    assert len(set(map(len, together))) > 1 and all(end not in ids[:-1] for ids in together)


def test_an_empty_continuation_has_no_perplexity():
    model, ids = tiny_model("gpt2"), torch.tensor([[1, 5, 6]] * 2)
    judged = torch.tensor([[False, False, True], [False] * 3])
    with torch.no_grad():
        assert perplexities(model, ids, torch.ones_like(ids), judged).isnan().tolist() == [False, True]


def curve(concept, cost, repeated=lambda s: 0.0, tried=None):
    """What measuring() would return where the texts follow these curves of the distance from no change."""
    def measure(strength):
        if tried is not None and strength is not None:
            tried.append(strength)
        s = strength or 0.0
        return {"strength": strength, "concept_rise": {"mean": concept(s)}, "cost": {"mean": cost(s)},
                "repeated": 0.3 + repeated(s)}
    return measure


def test_the_strength_is_the_one_that_shows_most_among_those_that_read_well():
    tried: list[float] = []
    best, rows = find_strength(curve(lambda s: s, lambda s: 1 + s**2, tried=tried), "add", 1.5)
    assert best["strength"] == pytest.approx(0.5**0.5, abs=0.02) and best["cost"]["mean"] <= 1.5
    assert len(tried) == len(set(tried)) <= 12 and max(tried) == 1
    assert [row["strength"] for row in rows] == [None, *sorted(tried)]
    best, _ = find_strength(curve(lambda s: -abs(s - 0.7), lambda s: 1.0), "add", 1.5)
    assert best["strength"] == 0.75  # halfway from .5 to 1, the neighbours that were tried
    scaled, _ = find_strength(curve(lambda s: s, lambda s: s), "scale", 3.0)
    assert 2.9 < scaled["strength"] <= 3.0
    always, rows = find_strength(curve(lambda s: s, lambda s: 1.0), "clamp", 1.5)
    assert always["strength"] == COARSE[-1]


def test_texts_that_go_in_circles_do_not_read_well():
    repeats = curve(lambda s: s, lambda s: 1.0, repeated=lambda s: 0.0 if s <= 0.25 else 2 * MAX_REPEATED)
    best, _ = find_strength(repeats, "add", 1.5)
    assert best["strength"] == 0.25
    best, rows = find_strength(curve(lambda s: s, lambda s: 9.0), "add", 1.5)
    assert best is None and len(rows) == 1 + 1 + 4


def test_tokens_of_a_concepts_words():
    vocabulary = vocabulary_of(word_tokenizer(), len(WORDS) + 4)
    assert vocabulary["dog"] == [WORDS.index("dog") + 4]
    ids = own_ids(word_tokenizer(), [("before", "dog"), ("phrase", "the cat"), ("after", "sat")], vocabulary)
    assert ids == sorted([WORDS.index("dog") + 4, WORDS.index("cat") + 4])


def test_screening_finds_the_latent_that_writes_its_own_words(monkeypatch):
    """One latent's row raises its own word, another's lowers it, a third one's word is common."""
    model, tokenizer = tiny_model("llama"), word_tokenizer()
    point, sae = resolve(model, "resid_post:2"), random_sae()
    view = direct_view(model, 16)
    for latent, word, sign in ((4, "dog", 1), (5, "cat", -1)):
        sae.W_dec[latent] = sign * torch.nn.functional.normalize(view[WORDS.index(word) + 4], dim=0)
    maxima, rules = torch.full((32,), 3.0), {4: [("before", "dog")], 5: [("word", "cat")], 7: [("after", "a")],
                                             6: [("word", word) for word in WORDS]}
    monkeypatch.setattr("concepts.screening.COMMON", 0.5)
    monkeypatch.setattr("concepts.screening.STRENGTHS", (1.0,))
    writing = Writing(["a"], 6, spare=Spare({1}))
    (found,) = screen(model, tokenizer, point, sae, rules=rules, maxima=maxima, writing=writing, limit=1e9)
    assert found.latent == 4 and screen(model, tokenizer, point, sae, rules=rules, maxima=maxima, writing=writing,
                                        limit=1.0) == []  # no edit is free
    texts, column = continue_texts(model, tokenizer, ["a"], 6), WORDS.index("dog") + 4
    chance = []
    for edits in ([], [Edit(4, "add", 1.0)]):
        with torch.no_grad(), steer(model, point, sae, edits, maxima=maxima, spare=Spare({1})):
            logits = model(input_ids=texts.ids).logits[0]
        chance.append(float(logits[:-1].softmax(1)[texts.written[0, 1:], column].mean()))
    assert found.before == pytest.approx(chance[0]) and found.rise == pytest.approx(chance[1] - chance[0], rel=1e-4)


def test_the_report_says_what_is_not_sure():
    model, tokenizer = tiny_model("llama"), word_tokenizer()
    rows = sweep(model, tokenizer, resolve(model, "resid_post:1"), random_sae(), edits=[Edit(5, "add")], maxima=MAXIMA,
                 strengths=(None, 30.0), writing=Writing(["the cat"], 4, words={"truth": {"dog"}}))
    table = strengths_table(rows)
    assert list(table["strength"]) == ["none", "30.000"] and table["rise"][0] == "0.0% [, ]"  # one pair: no interval
    assert "truth: written words of the stories' concept pet" in meanings(list(table), "pet")
    assert not any(line.startswith("follows") for line in meanings(list(table), ""))
    good = rows[1] | {"concept_rise": {"mean": 0.2, "low": 0.1, "high": 0.3},
                      "cost": {"mean": 1.4, "low": 1, "high": 2}}
    (said,) = verdict(rows[0], good, 1.5)
    assert "on other seeds than those that chose it" in said
    assert "greedy, on the very texts that chose it" in verdict(rows[0], good, 1.5, greedy=True)[0]
    bad = good | {"concept_rise": {"mean": 0.2, "low": -0.1, "high": 0.5}, "cost": {"mean": 1.6, "low": 1, "high": 2}}
    (_, chance, costly) = verdict(rows[0], bad, 1.5)
    assert "may be chance" in chance and "more than 1.5 times" in costly
    before = {"shown": [0.0, 0.5, 0.0, None], "texts": ["a", "b", "c", "d"]}
    after = {"shown": [0.1, 0.5, 0.4, 1.0], "texts": ["A", "B", "C", "D"]}
    assert telling_pairs(before, after) == {"largest rise": ("c", "C"), "median rise": ("a", "A")}
    assert telling_pairs({"shown": [None], "texts": [""]}, after) == {}
