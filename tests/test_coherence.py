"""Coherence in closed form: one thing, several, what is missed; what may not raise it; interest."""
import numpy as np
import pytest
import scipy.sparse
import torch
from test_concepts import TEXTS, planted, word_rows
from test_dictionary import HEADER

from concepts.coherence import activation_shares, add_coherence, called, interest, likeness, mean_codes, unrelated
from concepts.dictionary import read_concepts, write_concepts
from concepts.names import codes_matrix, name_latents, patterns_of
from concepts.patterns import find_patterns
from concepts.tables import concepts_from_csv, read_table
from lib.environment import InputError
from lib.files import read_json, write_json


def test_likeness_is_the_cosine_above_that_of_unrelated_words():
    vectors = np.array([[1.0, 0], [0, 2], [3, 3], [-1, 0], [0, 0]])
    root = np.sqrt(0.5)
    found = likeness(vectors, 0.5)
    assert found[0].tolist() == pytest.approx([1, 0, (root - 0.5) / 0.5, 0, 0], abs=1e-6)
    assert (found == found.T).all() and (found.diagonal() == 1).all()
    assert likeness(vectors, 0.0)[0, 2] == pytest.approx(root)


def test_the_zero_is_a_percentile_of_pairs():
    angles = np.linspace(0, np.pi / 2, 21)
    vectors = np.stack([np.cos(angles), np.sin(angles)], 1)
    pairs = [np.cos(a - b) for i, a in enumerate(angles) for b in angles[:i]]
    assert unrelated(vectors) == pytest.approx(min(np.percentile(pairs, 95), 0.99), abs=1e-6)
    assert unrelated(vectors[:1]) == 0 and unrelated(-np.eye(2) + 0.5) == 0  # none, and opposite ones


def test_shares_are_of_the_activation_and_a_token_counts_once():
    texts = ["the cat sat on the mat ."]
    patterns = find_patterns(texts, word_rows(texts))
    code = np.array([1.0, 4, 0, 0, 2, 0, 1])  # the cat . . the . "."
    rule = [("word", "the"), ("word", "cat"), ("phrase", "the cat"), ("word", "never")]
    fires = np.flatnonzero(code)
    assert activation_shares(patterns, rule, fires, code[fires]).tolist() == [3 / 8, 4 / 8, 0, 0]
    mean = mean_codes(patterns, scipy.sparse.csr_matrix(code[:, None]), rule).toarray()[:, 0]
    assert mean.tolist() == [1.5, 4, 4, 0]


RULES = [
    lambda s, i: 2.0 * (s[i] == "dog") + 1.0 * (s[i] == "bird"),  # two words
    lambda s, i: 3.0 * (s[i] == "cat"),  # one
    lambda s, i: 0.5 * (s[i] in ("dog", "bird")),  # what both have in common
]


def coherences(rules, W_dec):
    codes, is_val = planted(rules, TEXTS * 12)
    named = name_latents(codes, patterns_of(codes), is_val, range(len(rules)), W_dec=W_dec)
    share = [sum(codes.slice(i) == word for i in range(len(codes))) * code for word, code in (("dog", 2), ("bird", 1))]
    return named, np.array(share) / sum(share)


def test_one_word_is_one_thing():
    assert coherences(RULES[:2], torch.eye(2))[0][1]["coherence"] == 1


def test_two_words_are_one_thing_if_they_have_more_in_common_than_the_latent():
    apart = [RULES[0], lambda s, i: 1.0 * (s[i] == "dog"), lambda s, i: 1.0 * (s[i] == "bird")]
    named, share = coherences(apart, torch.eye(3))
    assert named[0]["coherence"] == pytest.approx((share**2).sum(), abs=1e-4)
    assert ("little to do with each other" in named[0]["description"]) == (named[0]["coherence"] < 0.5)
    named, _ = coherences(RULES, torch.eye(3))
    assert named[0]["coherence"] == pytest.approx(1, abs=1e-3)
    twin = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0]])  # a latent of the same direction
    named, _ = coherences([*apart, RULES[0]], twin)
    assert named[0]["coherence"] == named[3]["coherence"] == pytest.approx((share**2).sum(), abs=1e-4)
    for factor in (0.1, 10.0):  # the latent's own strength changes nothing
        scaled = [lambda s, i, f=factor: f * RULES[0](s, i), *apart[1:]]
        assert coherences(scaled, torch.eye(3))[0][0]["coherence"] == pytest.approx((share**2).sum(), abs=1e-4)


def test_a_name_of_one_pattern_that_misses_activation_is_not_coherent():
    codes, _ = planted(RULES, TEXTS * 12)
    patterns, strength = patterns_of(codes), codes_matrix(codes, np.ones(len(codes), bool))
    dogs, birds = (len(patterns.find("word", word)) * code for word, code in (("dog", 2), ("bird", 1)))
    entries = {0: {"rule": [["word", "bird"]], "description": ""}, 1: {"rule": [["word", "bird"]], "description": ""}}
    add_coherence(entries, patterns, strength, torch.eye(3))
    assert entries[0]["coherence"] == pytest.approx((birds / (dogs + birds)) ** 2, abs=1e-4)
    assert entries[1]["coherence"] == 0 and "several" not in entries[1]["description"].lower()


def test_interest_in_closed_form():
    entry = {"f1": 0.8, "coherence": 0.5, "score": 0.9, "baseline": 0.6}
    assert interest(entry) == pytest.approx(0.8 * 0.5 * (1 + 0.6) / 3)
    assert interest(entry, 0.0) == interest(entry) and interest(entry, 1e9) == pytest.approx(0.4 * 2.6 / 3)
    assert interest(entry, 0.1) == pytest.approx(0.4 * (1.6 + np.sqrt(1 - np.exp(-0.1))) / 3)
    assert interest(entry | {"baseline": 0.95}) == pytest.approx(0.4 / 3)  # no better than its commonest token
    assert interest(entry | {"coherence": None}) == interest(entry | {"coherence": 1.0})
    assert interest({"name": "by a person"}) == interest({"f1": None}) == 0
    whole = {"f1": 1.0, "coherence": 1.0, "score": 1.0, "baseline": 0.5}
    assert interest(whole, 1e9) == 1


def test_coherence_is_stored_and_files_from_before_it_still_open(tmp_path):
    path, table = tmp_path / "concepts.json", tmp_path / "concepts.csv"
    old = {"name": "dog", "description": "d", "source": "offline", "score": 0.9, "f1": 0.8, "baseline": 0.6,
           "scored_name": "dog", "rule": [["word", "dog"]], "notes": ""}
    concepts = write_concepts(path, HEADER, {0: old, 1: old | {"coherence": 0.25}})
    assert read_concepts(path)["concepts"] == concepts and [line.latent for line in read_table(table)] == [0, 1]
    assert interest(concepts[0]) == 4 * interest(concepts[1])
    assert ",0.8,0.25," in table.read_text() and "f1,coherence,stamp" in table.read_text()
    table.write_text(table.read_text().replace("1,dog,", "1,my dog,"))
    edited = concepts_from_csv(table, concepts)
    assert edited[1]["source"] == "human" and edited[1]["coherence"] == 0.25  # it is the latent's, not the name's
    content = read_json(path)
    content["concepts"]["1"]["coherence"] = 1.5
    write_json(path, content)
    with pytest.raises(InputError, match="latent 1: coherence: 1.5 is greater"):
        read_concepts(path)


def test_a_word_calls_the_latent_whose_name_has_it_as_a_word():
    concepts = {0: {"name": "answered", "f1": 1.0}, 1: {"name": "bored, red", "f1": 0.3}, 2: {"name": "red", "f1": 0.5},
                3: {"name": "red", "f1": 0.9}, 4: {"name": "the red ball", "f1": 1.0}}
    found = []
    while (latent := called(concepts, "Red")) is not None:
        found.append(latent)
        del concepts[latent]
    assert found == [3, 2, 1, 4, 0]
