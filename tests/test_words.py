"""Forms of words: what belongs together, what only looks like it, and languages that are left alone."""
import pytest

from concepts.words import UNIT, base_forms


@pytest.mark.parametrize(
    ("base", "forms"),
    [
        ("dog", ["dogs", "dog's", "dog’s"]), ("box", ["boxes"]), ("baby", ["babies"]), ("cookie", ["cookies"]),
        ("wish", ["wishes", "wished", "wishing"]), ("tomato", ["tomatoes"]), ("shoe", ["shoes"]), ("cry", ["cried"]),
        ("play", ["plays", "played", "playing"]), ("hope", ["hoped", "hoping"]), ("hop", ["hopped", "hopping"]),
        ("use", ["used", "using"]), ("free", ["freed"]), ("see", ["seeing"]), ("roll", ["rolled", "rolling"]),
        ("dance", ["danced", "dancing"]), ("feel", ["feeling", "feelings"]), ("argue", ["argued", "arguing"]),
        ("Юля", []),
    ],
)
def test_forms_of_a_word(base, forms):
    assert base_forms([base, *forms]) == dict.fromkeys(forms, base)


def test_the_right_one_of_two_verbs():
    assert base_forms(["hop", "hope", "hopping", "hoping"]) == {"hopping": "hop", "hoping": "hope"}


@pytest.mark.parametrize("words", [
    ["a", "as"], ["star", "stared"], ["rag", "raging"], ["new", "news"], ["even", "evening"], ["bee", "being"],
    ["see", "seed"], ["she", "shed"],
    ["th", "thing"], ["king", "ring", "bring", "spring"], ["princes", "princess"], ["dres", "dress"],
    ["bu", "bus"], ["thi", "this"], ["fee", "feed"], ["dog", "cat"], ["haus", "hause"],
    ["kot", "kota", "kotem"], ["犬", "猫"], [],
])
def test_what_only_looks_like_a_form(words):
    assert base_forms(words) == {}


def test_only_words_that_are_there_are_merged():
    assert base_forms(["plays", "played"]) == {}


def test_units():
    assert UNIT.findall("Don't say “no”, Юля! 犬が好き。a_b 3rd") == [
        "Don't", "say", "“", "no", "”", ",", "Юля", "!", "犬が好き", "。", "a", "_", "b", "3rd"]
