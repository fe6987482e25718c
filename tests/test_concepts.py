"""Top texts, statistics and live codes against brute force; patterns and names on known texts; the files."""

import numpy as np
import pytest
import scipy.sparse
import torch
from conftest import ASSETS, TEXTS, dense_codes, in_batches, tiny_model, word_tokenizer

from concepts.codes import Codes, codes_at, codes_of_text, encode_run, live_codes
from concepts.directions import closest_directions, promoted_tokens
from concepts.firings import collect_firings
from concepts.names import candidate_patterns, name_latents, patterns_of, predict, score_rule
from concepts.patterns import find_patterns
from concepts.wording import describe
from lib.activations import SaveSettings, save_activations
from lib.environment import InputError
from lib.hooks import resolve
from lib.models import load_tokenizer
from lib.sae import make_sae
from lib.texts import split_texts, tokenise


@pytest.fixture
def model():
    return tiny_model("llama")


@pytest.fixture
def run(tmp_path, model):
    texts = [" ".join(TEXTS[(i + j) % len(TEXTS)] for j in range(1 + i % 3)) for i in range(30)]
    points = [resolve(model, "resid_post:1")]
    settings = SaveSettings(shard_rows=100)
    return save_activations(tmp_path / "run", model, word_tokenizer(), points, texts=texts,
                            splits=split_texts(30, 0.2, 0), settings=settings)


@pytest.fixture
def sae():
    """16 -> 40 latents, k = 3; the last latent can never fire."""
    g = torch.Generator().manual_seed(0)
    W, b = torch.randn(40, 16, generator=g), torch.zeros(40)
    b[39] = -1e6
    return make_sae(W, b, W, torch.zeros(16), 4.0, 3)


def test_top_rows_and_statistics_equal_brute_force(run, sae):
    codes = encode_run(run, run.hooks[0], sae)
    firings, dense, text_id = collect_firings(codes, top=4), dense_codes(codes), run.rows["text_id"]
    for latent in range(40):
        code = dense[:, latent]
        peaks = []
        for t in text_id.unique():
            rows = (text_id == t).nonzero()[:, 0]
            best = int(rows[code[rows].argmax()])
            if code[best] > 0:
                peaks.append((-float(code[best]), best))
        expected = [row for _, row in sorted(peaks)[:4]]
        assert [r for r in firings.top_rows[latent].tolist() if r >= 0] == expected
        active = code[code > 0]
        assert firings.fires[latent] == len(active)
        if len(active):
            assert firings.max[latent] == active.max()
            assert firings.mean_active[latent] == pytest.approx(float(active.mean()), rel=1e-5)
            exact = float(active.sort().values[int(np.ceil(0.99 * len(active))) - 1])
            assert firings.p99[latent] == pytest.approx(exact, rel=0.017)
    assert firings.fires[39] == 0 and firings.max[39] == firings.p99[39] == firings.mean_active[39] == 0


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_the_batches_do_not_matter(run, sae, size):
    codes = encode_run(run, run.hooks[0], sae)
    one, other = collect_firings(codes, 5), collect_firings(in_batches(codes, size), 5)
    for name in ("fires", "max", "p99", "top_rows"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_the_last_text_counts_even_if_the_last_batch_is_silent():
    rows = {name: torch.zeros(4, dtype=torch.int32)
            for name in ("text_id", "pos", "token_id", "char_start", "char_end")}
    batches = [(0, torch.tensor([[1.0], [2.0]]), torch.tensor([[0], [0]])),
               (2, torch.zeros(2, 1), torch.zeros(2, 1).int())]
    firings = collect_firings(Codes(["abcd"], rows, 2, lambda: iter(batches)), 2)
    assert firings.fires.tolist() == [2, 0] and firings.top_rows.tolist() == [[1, -1], [-1, -1]]


def test_ties_go_to_the_earlier_row(run):
    sae = make_sae(torch.zeros(2, 16), torch.tensor([1.0, 0.0]), torch.eye(16)[:2], torch.zeros(16), 1.0, 1)
    firings = collect_firings(encode_run(run, run.hooks[0], sae), 3)
    first = [int((run.rows["text_id"] == t).nonzero()[0]) for t in range(3)]
    assert firings.top_rows[0].tolist() == first


def test_codes_at_looks_up_any_row(run, sae):
    codes = encode_run(run, run.hooks[0], sae)
    dense = dense_codes(codes)
    g = torch.Generator().manual_seed(1)
    rows, latents = torch.randint(0, len(codes), (200,), generator=g), torch.randint(0, 40, (200,), generator=g)
    assert torch.equal(codes_at(in_batches(codes, 9), rows, latents), dense[rows, latents])
    assert codes_at(codes, torch.tensor([-1]), torch.tensor([0])).tolist() == [0.0]


def test_live_codes_are_the_stored_ones_and_change_nothing(run, sae, model):
    texts = [text["text"] for text in run.texts]
    ids = torch.tensor([word_tokenizer()(texts[0])["input_ids"]])
    before = model(ids).logits
    live = live_codes(texts, model, word_tokenizer(), resolve(model, "resid_post:1"), sae, SaveSettings())
    stored = encode_run(run, run.hooks[0], sae)
    assert torch.equal(model(ids).logits, before)
    assert all(torch.equal(live.rows[name], stored.rows[name]) for name in live.rows)
    assert torch.allclose(dense_codes(live), dense_codes(stored), atol=1e-5)
    assert torch.equal(collect_firings(live, 3).top_rows, collect_firings(stored, 3).top_rows)
    with pytest.raises(InputError, match="no token"):
        live_codes([""], model, word_tokenizer(), resolve(model, "resid_post:1"), sae, SaveSettings())


def test_codes_of_one_text_are_its_part_of_the_run(run, sae):
    codes, one = encode_run(run, run.hooks[0], sae), codes_of_text(run, run.hooks[0], sae, 3)
    mask = run.rows["text_id"] == 3
    assert torch.allclose(dense_codes(one), dense_codes(codes)[mask], atol=1e-6)
    assert one.slice(2) == codes.slice(int(mask.nonzero()[2])) and not one.rows["text_id"].any()


def test_codes_of_a_large_run_are_made_again(run, sae, monkeypatch):
    kept = collect_firings(encode_run(run, run.hooks[0], sae), 3)
    monkeypatch.setattr("concepts.codes.KEEP_BYTES", 0)
    codes = encode_run(run, run.hooks[0], sae)
    for _ in range(2):
        assert torch.equal(collect_firings(codes, 3).top_rows, kept.top_rows)


def test_a_latent_promotes_the_token_whose_unembedding_it_is(model):
    with torch.no_grad():
        model.model.norm.weight.copy_(torch.rand(16, generator=torch.Generator().manual_seed(2)) + 0.5)
        direction = (model.lm_head.weight - model.lm_head.weight.mean(0)) * model.model.norm.weight
    wanted = [word_tokenizer().convert_tokens_to_ids(word) for word in ("dog", "tree")]
    sae = make_sae(direction[wanted], torch.zeros(2), direction[wanted], torch.zeros(16), 1.0, 1)
    assert [tokens[0] for tokens in promoted_tokens(sae, model, word_tokenizer(), 3)] == ["dog", "tree"]
    narrow = make_sae(torch.eye(8), torch.zeros(8), torch.eye(8), torch.zeros(8), 1.0, 1)
    assert promoted_tokens(narrow, model, word_tokenizer()) == [[]] * 8
    assert promoted_tokens(sae, tiny_model("bert"), word_tokenizer()) == [[], []]


def word_rows(texts):
    """Rows of texts tokenised into words and marks, without a model."""
    columns = []
    for t, item in enumerate(tokenise(word_tokenizer(), texts, 0, 128)):
        columns += [(t, p, item.ids[p], *item.offsets[p]) for p in range(len(item.ids)) if item.keep[p]]
    table = torch.tensor(columns, dtype=torch.int32)
    return {name: table[:, i] for i, name in enumerate(("text_id", "pos", "token_id", "char_start", "char_end"))}


def test_patterns_of_whole_words():
    text = 'The cat sat . "The dog ran" it was sad .'
    rows = word_rows([text])
    slices = [text[a:b] for a, b in zip(rows["char_start"].tolist(), rows["char_end"].tolist())]
    patterns = find_patterns([text], rows)

    def tokens(kind, name):
        return [slices[i] for i in patterns.find(kind, name)]

    assert tokens("word", "the") == ["The", "The"] and tokens("cased", "the") == []
    assert tokens("after", "the") == ["cat", "dog"] and tokens("after", "^") == ["The"]
    assert tokens("before", "sat") == ["cat"] and tokens("before", "^") == ["."]
    assert tokens("phrase", "the dog") == ["dog"]
    assert tokens("place", "text start") == ["The"] and tokens("place", "sentence start") == ["The"]
    assert tokens("place", "in speech") == ['"', "The", "dog", "ran"]
    assert tokens("place", "punctuation") == [".", '"', '"', "."]
    assert tokens("word", "zebra") == []


def test_patterns_of_pieces():
    text = "Sally sailed.\n "
    spans = [(0, 3), (3, 5), (5, 9), (9, 12), (12, 13), (13, 14), (14, 15)]  # Sal ly ⎵sai led . newline blank
    rows = {"text_id": torch.zeros(7, dtype=torch.int32)}
    rows |= {"char_start": torch.tensor([a for a, _ in spans]).int(),
             "char_end": torch.tensor([b for _, b in spans]).int()}
    patterns = find_patterns([text], rows)
    assert patterns.find("word", "sal-").tolist() == [0] and patterns.find("word", "sally").tolist() == [1]
    assert patterns.find("start", "sal").tolist() == [0] and patterns.find("start", "sally").tolist() == [1]
    assert patterns.find("within", "sailed").tolist() == [2] and patterns.find("token", "led").tolist() == [3]
    assert patterns.find("before", "sailed").tolist() == [1] and patterns.find("ending", "ed").tolist() == [3]
    assert patterns.find("token", "[line break]").tolist() == [5] and patterns.find("word", "[space]").tolist() == [6]
    assert patterns.find("after", ".").tolist() == [5, 6]
    assert "".join(patterns.piece) == "sesewww"


def planted(fires, texts, n_latents=1):
    """Codes in which latent i has the code fires[i](token number) on each token."""
    rows = word_rows(texts)
    slices = [texts[t][a:b] for t, a, b in zip(*(rows[n].tolist() for n in ("text_id", "char_start", "char_end")))]
    values = torch.tensor([[float(rule(slices, i)) for rule in fires] for i in range(len(slices))])
    indices = torch.arange(len(fires)).expand(len(slices), -1)
    return Codes(texts, rows, len(fires), lambda: iter([(0, values, indices)])), rows["text_id"] // len(TEXTS) % 4 == 0


def test_planted_rules_are_named_and_scored():
    rules = [
        lambda s, i: 2.0 * (s[i] == "dog") + 1.0 * (s[i] == "bird"),
        lambda s, i: i > 0 and s[i - 1] == "the",
        lambda s, i: 0.0,
    ]
    codes, is_val = planted(rules, TEXTS * 12)
    named = name_latents(codes, patterns_of(codes), is_val, range(3), W_dec=torch.eye(3))
    assert named[0]["name"] == "dog, bird" and named[0]["rule"] == [["word", "dog"], ["word", "bird"]]
    assert named[1]["name"] == "after “the”"
    assert 2 not in named
    for latent in (0, 1):
        assert named[latent]["score"] == named[latent][
            "precision"
        ] == named[latent]["recall"] == named[latent]["f1"] == 1
    assert 0.5 < named[1]["baseline"] < 1
    assert named == name_latents(codes, patterns_of(codes), is_val, range(3), W_dec=torch.eye(3))


def test_a_name_groups_its_patterns_by_kind():
    rules = [lambda s, i: s[i] in ("dog", "red") or (i > 0 and s[i - 1] in ("under", "on"))]
    codes, is_val = planted(rules, TEXTS * 12)
    entry = name_latents(codes, patterns_of(codes), is_val, [0], W_dec=torch.eye(1))[0]
    assert entry["score"] == 1 and "; " in entry["name"]
    assert sorted(entry["name"].split("; ")) in (["after “on”, “under”", "dog, red"],
                                                 ["after “under”, “on”", "dog, red"])


def test_the_score_is_of_held_out_texts():
    # The latent fires on "cat" in the training texts only; in the held-out ones on "dog".
    codes, is_val = planted([lambda s, i: s[i] == "cat"], TEXTS * 12)
    (start, values, indices), rows = next(iter(codes)), codes.rows
    dog = torch.tensor([codes.slice(i) == "dog" for i in range(len(codes))])
    values[is_val, 0] = dog[is_val].float()
    shuffled = Codes(codes.texts, rows, 1, lambda: iter([(start, values, indices)]))
    entry = name_latents(shuffled, patterns_of(shuffled), is_val, [0], W_dec=torch.eye(1))[0]
    assert entry["name"] == "cat" and entry["recall"] == 0 and entry["score"] < 0.5


def test_log_odds_prefer_what_is_specific():
    codes, is_val = planted([lambda s, i: s[i] == "red" or i % 5 == 0], TEXTS * 12)
    patterns = find_patterns(codes.texts, codes.rows)
    strength = scipy.sparse.csr_matrix(dense_codes(codes).numpy().T)
    train = ~is_val.numpy()
    found = candidate_patterns(patterns.only(train), strength[:, train])[0]
    candidates = [name for kind, name in found if kind == "word"]
    assert candidates[0] == "red" and "the" not in candidates


def test_scores_in_closed_form():
    says, fires = np.array([1, 1, 0, 0, 0, 0], bool), np.array([1, 0, 1, 0, 0, 0], bool)
    found = score_rule(says, fires)
    assert found == {"balanced_accuracy": round((0.5 + 0.75) / 2, 4), "precision": 0.5, "recall": 0.5, "f1": 0.5}
    assert score_rule(~says, fires)["balanced_accuracy"] == pytest.approx(1 - found["balanced_accuracy"])
    for always in (True, False):
        assert score_rule(np.full(6, always), fires)["balanced_accuracy"] == 0.5
    assert set(score_rule(says, np.zeros(6, bool)).values()) == {None}


def test_a_rule_is_the_union_of_its_patterns():
    texts = ["the cat sat on the mat ."]
    patterns = find_patterns(texts, word_rows(texts))
    assert predict(patterns, [("word", "cat"), ("after", "on"), ("word", "never")]).nonzero()[0].tolist() == [1, 4]


@pytest.mark.skipif(not ASSETS.exists(), reason="needs the shared assets")
@pytest.mark.parametrize("name", ["stories260K", "babyllama105"])
def test_patterns_of_real_tokenizers(name):
    tokenizer = load_tokenizer(str(ASSETS / "models" / name))
    texts = ["Lily said, “I like the zoo!”\nThen she ran home.", "Ünï"]
    columns = []
    for item in tokenise(tokenizer, texts, 0, 128):
        columns += [(item.text_id, *item.offsets[p]) for p in range(len(item.ids)) if item.keep[p]]
    rows = dict(zip(("text_id", "char_start", "char_end"), torch.tensor(columns, dtype=torch.int32).T))
    patterns = find_patterns(texts, rows)
    said = patterns.find("word", "said")
    assert len(said) == 1 and texts[0][: int(rows["char_end"][said[0]])] == "Lily said"
    spoken = patterns.find("place", "in speech")
    assert "I like the zoo" in texts[0][int(rows["char_start"][spoken[0]]) : int(rows["char_end"][spoken[-1]])]


def test_codes_may_be_read_inside_a_reading_of_them(run, sae, monkeypatch):
    """Both passes see every row, kept in memory or not, and so does one that follows passes broken off."""
    for keep in (10**9, 0):
        monkeypatch.setattr("concepts.codes.KEEP_BYTES", keep)
        monkeypatch.setattr("concepts.codes.TABLE_CELLS", 64 * sae.n_latents)  # batches of 64 rows
        codes, expected = encode_run(run, run.hook(), sae), dense_codes(encode_run(run, run.hook(), sae))
        next(iter(codes))  # a pass that is broken off
        outer = []
        for number, batch in enumerate(codes):
            outer.append(batch)
            if number == 1:
                assert torch.equal(dense_codes(codes), expected)
        assert (len(outer) > 3
                and torch.equal(dense_codes(Codes(codes.texts, codes.rows, 40, lambda: iter(outer))), expected))
        assert torch.equal(dense_codes(codes), expected) and torch.equal(dense_codes(codes), expected)


def test_closest_directions_are_those_of_all_cosines(sae):
    latents = torch.tensor([3, 0, 17, 39, 5])
    cosines = sae.W_dec @ sae.W_dec.T
    for chunk in (1, 2, 256):
        found = closest_directions(sae.W_dec, latents, 3, 0.1, chunk)
        for latent, near in zip(latents.tolist(), found):
            order = [i for i in cosines[latent].argsort(descending=True).tolist()
                     if i != latent and cosines[latent, i] > 0.1][:3]
            assert ([i for i, _ in near] == order
                    and [c for _, c in near] == pytest.approx(cosines[latent, order].tolist(), abs=1e-6))
    assert (closest_directions(sae.W_dec[:1], torch.tensor([0]), 5, 0.3) == [[]]
            and closest_directions(sae.W_dec, latents[:0], 5, 0.3) == [])


def test_a_page_of_letters_is_no_long_name():
    """Base64 in a text is one word of any length; a name with it must fit into concepts.json."""
    text = "A" * 50_000 + " b"
    rows = {"text_id": [0, 0], "char_start": [0, 50_001], "char_end": [50_000, 50_002]}
    patterns = find_patterns([text], {name: torch.tensor(column, dtype=torch.int32) for name, column in rows.items()})
    code = np.ones(2, np.float32)
    for kind, name in (("word", "a" * 50_000), ("token", "a" * 50_000), ("after", "a" * 50_000),
                       ("phrase", "a" * 50_000 + " b"), ("before", "b")):
        assert len(patterns.find(kind, name)) == 1 and all(
            0 < len(text) < 80 for text in describe(patterns, kind, name, code)[0])
