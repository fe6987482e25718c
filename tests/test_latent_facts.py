"""Everything shown of each latent against dense, naive computation on small tensors; the files it is kept in."""
import json

import pytest
import torch
from conftest import TEXTS, dense_codes, in_batches, tiny_model, word_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from concepts import counts, examples
from concepts.codes import Codes, encode_run
from concepts.coherence import interest
from concepts.counts import MIN_TOGETHER, code_histograms, cofiring, draw_rows, token_shares
from concepts.directions import logit_effects, token_text
from concepts.examples import (
    INTERVALS,
    NEAR,
    NEAR_OF_ROW,
    PER_INTERVAL,
    codes_around,
    near_misses,
    over_range,
    silent_rows,
)
from concepts.facts import Corpus, collect_facts, read_facts, write_facts
from concepts.firings import collect_firings
from concepts.page_data import Known, page_latents, read_stability
from concepts.page_files import write_page
from concepts.page_index import packed_example
from concepts.top_texts import LONGEST, _cut, read_examples, read_top_texts, write_top_texts
from lib.activations import SaveSettings, save_activations
from lib.environment import InputError
from lib.files import write_tensors
from lib.hooks import resolve
from lib.sae import make_sae
from lib.texts import split_texts

K, F = 5, 40


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    model = tiny_model("llama")
    texts = [" ".join(TEXTS[(i + j) % len(TEXTS)] for j in range(1 + i % 3)) for i in range(40)]
    return save_activations(tmp_path_factory.mktemp("facts") / "run", model, word_tokenizer(),
                            [resolve(model, "resid_post:1")], texts=texts, splits=split_texts(40, 0.2, 0),
                            settings=SaveSettings(shard_rows=100))


def make(threshold=None):
    """16 -> 40 latents, k = 5; the last latent can never fire."""
    g = torch.Generator().manual_seed(0)
    W, b = torch.randn(F, 16, generator=g), torch.zeros(F)
    b[F - 1] = -1e6
    return make_sae(W, b, W, torch.zeros(16), 4.0, K, threshold=threshold)


@pytest.fixture(scope="module")
def codes(run):
    codes = encode_run(run, run.hook(), make())
    list(codes)
    return codes


@pytest.fixture(scope="module")
def dense(codes):
    return dense_codes(codes)


@pytest.fixture(scope="module")
def corpus(run):
    return Corpus([text["text"] for text in run.texts], run.rows)


def test_histograms_count_every_code_in_its_bin(codes, dense):
    highest = dense.amax(0)
    found = code_histograms(in_batches(codes, 7), highest)
    for latent in range(F):
        edges = highest[latent].double() * torch.arange(31).double() / 30
        active = dense[:, latent][dense[:, latent] > 0].double()
        expected = [int(((active >= low) & ((active < high) | (number == 29))).sum())
                    for number, (low, high) in enumerate(zip(edges[:-1], edges[1:]))]
        assert (found[latent] - torch.tensor(expected)).abs().sum() <= 2 and found[latent].sum() == len(active)
    one = Codes(["a"], codes.rows, 1, lambda: iter([(0, torch.tensor([[0.1], [1.0], [2.0], [3.0]]),
                                                     torch.zeros(4, 1).int())]))
    assert code_histograms(one, torch.tensor([3.0]))[0].nonzero()[:, 0].tolist() == [1, 10, 20, 29]


def test_token_shares_in_full(run, codes, dense):
    found, token_id = token_shares(in_batches(codes, 9), fires_of(dense), 4), run.rows["token_id"]
    assert found.n_rows == len(codes)
    for latent in range(F):
        code = dense[:, latent]
        by_token = {t: code[token_id == t] for t in token_id.unique().tolist()}
        expected = sorted(((float(c.sum() / code.sum()), t) for t, c in by_token.items() if c.sum() > 0), reverse=True)
        there = found.rows[latent] >= 0
        assert int(there.sum()) == min(4, len(expected))
        tokens = token_id[found.rows[latent][there]].tolist()
        assert found.share[latent][there].tolist() == pytest.approx([s for s, _ in expected[:4]], rel=1e-5)
        for place, token in enumerate(tokens):
            on = by_token[token]
            assert found.rows[latent, place] == int((token_id == token).nonzero()[0])
            assert found.fires[latent, place] == int((on > 0).sum())
            assert found.mean[latent, place] == pytest.approx(float(on[on > 0].mean()), rel=1e-5)
            assert found.fired[latent, place] == pytest.approx(float((on > 0).float().mean()), rel=1e-6)
    assert (found.rows[F - 1] == -1).all() and not found.share[F - 1].any()


def fires_of(dense):
    return (dense > 0).sum(0)


def naive_phi(fires):
    return torch.nan_to_num(torch.corrcoef(fires.T.double())).fill_diagonal_(0)


def test_cofiring_is_the_correlation_of_firing(codes, dense):
    fires = dense > 0
    together = fires.T.double() @ fires.double()
    phi = naive_phi(fires).where(together >= MIN_TOGETHER, 0).clamp(min=0)
    found = cofiring(in_batches(codes, 11), fires_of(dense), 3)
    assert found.n_rows == len(codes) and (found.latents >= 0).sum() > F
    for latent in range(F):
        there = found.latents[latent] >= 0
        others = found.latents[latent][there]
        assert found.phi[latent].tolist() == pytest.approx(phi[latent].topk(3).values.tolist(), abs=1e-6)
        assert torch.equal(found.together[latent][there].double(), together[latent][others])
        assert phi[latent][others].tolist() == pytest.approx(found.phi[latent][there].tolist(), abs=1e-6)


def test_counts_above_the_limit_are_exact_on_rows_drawn_by_seed(run, codes, dense, monkeypatch):
    l0 = float((dense > 0).sum()) / len(codes)
    monkeypatch.setattr(counts, "FIRINGS", 100.001 * l0)
    monkeypatch.setattr(counts, "PAIRS", 150.001 * l0 * (l0 - 1) / 2)
    monkeypatch.setattr(counts, "PENDING", 8)
    shares, beside = token_shares(codes, fires_of(dense), 3), cofiring(codes, fires_of(dense), 3)
    assert (shares.n_rows, beside.n_rows) == (100, 150)
    drawn = draw_rows(len(codes), 150)
    fires = dense[drawn] > 0
    phi = naive_phi(fires).where(fires.T.double() @ fires.double() >= MIN_TOGETHER, 0).clamp(min=0)
    assert torch.allclose(beside.phi.double(), phi.topk(3).values, atol=1e-6)
    drawn = draw_rows(len(codes), 100)
    latent = int(dense[drawn].sum(0).argmax())
    token = run.rows["token_id"] == run.rows["token_id"][shares.rows[latent, 0]]
    assert shares.share[latent, 0] == pytest.approx(
        float(dense[drawn & token, latent].sum() / dense[drawn, latent].sum()), rel=1e-5)
    assert int(draw_rows(10, 3).sum()) == 3 and draw_rows(3, 3).all() and not torch.equal(
        draw_rows(100, 50, seed=0), draw_rows(100, 50, seed=1))


def test_a_width_of_one_has_no_pairs(run):
    codes = encode_run(run, run.hook(), make_sae(torch.eye(16), torch.ones(16), torch.eye(16), torch.zeros(16), 1.0, 1))
    assert (cofiring(codes, fires_of(dense_codes(codes))).latents == -1).all()


def test_draws_over_the_range(codes, dense):
    firings = collect_firings(codes, 2)
    rows = over_range(in_batches(codes, 13), firings).view(F, INTERVALS, PER_INTERVAL)
    assert torch.equal(rows, over_range(codes, firings).view_as(rows))
    for latent in range(F):
        code, highest = dense[:, latent].double(), float(firings.max[latent])
        for number in range(INTERVALS):
            low = highest * (INTERVALS - 1 - number) / INTERVALS
            inside = (code > low) & (code <= low + highest / INTERVALS * 1.0001) & (code > 0)
            inside[firings.top_rows[latent][firings.top_rows[latent] >= 0]] = False
            there = rows[latent, number][rows[latent, number] >= 0].tolist()
            assert len(set(there)) == len(there) == min(PER_INTERVAL, int(inside.sum())) and inside[there].all()


@pytest.mark.parametrize("with_threshold", [False, True])
def test_near_misses_are_the_closest_of_all(run, with_threshold):
    threshold = torch.rand(F, generator=torch.Generator().manual_seed(3)) * 0.5 if with_threshold else None
    sae = make(threshold)
    x = torch.cat([shard.float() for shard in run.shards(run.hook())])
    pre = (x - sae.mean) / sae.scale @ sae.W_enc.T + sae.b_enc
    codes = dense_codes(encode_run(run, run.hook(), sae))
    full = (codes > 0).sum(1) == K
    needed = torch.where(full, codes.topk(K, dim=1).values[:, -1], 0)[:, None].expand_as(pre)
    needed = needed if threshold is None else torch.maximum(needed, threshold)
    ratio = torch.where((pre > 0) & (needed > 0) & (codes == 0), pre / needed.clamp(min=1e-12), 0)
    ratio = ratio.where(ratio >= ratio.topk(NEAR_OF_ROW, dim=1).values[:, -1:], 0)
    found = near_misses(sae, run.shards(run.hook()), run.rows["text_id"])
    assert found.n_rows == len(x)
    for latent in range(F):
        there = found.rows[latent] >= 0
        rows, text_id = found.rows[latent][there], run.rows["text_id"]
        peaks = sorted((float(ratio[text_id == t, latent].max()) for t in text_id.unique()), reverse=True)[:NEAR]
        assert ratio[rows, latent].tolist() == pytest.approx([p for p in peaks if p > 0], rel=1e-4)
        assert found.scores[latent][there].tolist() == pytest.approx(pre[rows, latent].tolist(), rel=1e-4)
        assert found.needed[latent][there].tolist() == pytest.approx(needed[rows, latent].tolist(), rel=1e-4)
        assert not codes[rows, latent].any()
    assert (found.rows >= 0).any() and (found.rows[F - 1] == -1).all()


def test_silent_tokens_are_the_latents_own_where_it_is_silent(run, codes, dense):
    shares = token_shares(codes, fires_of(dense))
    rows, token_id = silent_rows(codes, shares), run.rows["token_id"]
    assert (rows >= 0).any() and (rows[F - 1] == -1).all()
    for latent in range(F):
        there = rows[latent][rows[latent] >= 0]
        own = token_id[shares.rows[latent, :3]][shares.rows[latent, :3] >= 0]
        assert not dense[there, latent].any() and torch.isin(token_id[there], own).all()
        assert len(there.unique()) == len(there)


@pytest.mark.parametrize("size", [1, 6, 1000])
def test_codes_around_any_row(run, codes, dense, size):
    g = torch.Generator().manual_seed(4)
    rows = torch.randint(-1, len(codes), (F, 3), generator=g)
    windows = torch.tensor([[4, 2], [1, 0], [0, 3]])
    found, text_id = codes_around(in_batches(codes, size), rows, windows), run.rows["text_id"]
    for cell, row in enumerate(rows.flatten().tolist()):
        latent, (before, after) = cell // 3, windows[cell % 3].tolist()
        expected = {
            other - row: float(dense[other, latent]) for other in range(row - before, row + after + 1)
            if row >= 0 and 0 <= other < len(codes) and text_id[other] == text_id[row] and dense[other, latent] > 0
        }
        kept = slice(*found.starts[cell : cell + 2].tolist())
        assert dict(zip(found.offsets[kept].tolist(), found.values[kept].tolist())) == expected


def test_the_file_says_what_was_computed(tmp_path, run, codes, dense, corpus):
    path, sae = tmp_path / "latent_facts.safetensors", make()
    firings = collect_firings(codes, 3)
    made = collect_facts(codes, firings, near_misses(sae, run.shards(run.hook()), run.rows["text_id"]))
    write_facts(path, made, sae_hash="aa", run_id="r")
    facts = read_facts(path, F, "aa")
    kinds = set()
    for latent in range(F):
        groups = facts.groups(latent, corpus)
        kinds |= {group["kind"] for group in groups}
        for group in groups:
            for e in group["examples"]:
                first, last = e["window"]
                here = (run.rows["text_id"] == e["text_id"]) & (run.rows["pos"] >= first) & (run.rows["pos"] <= last)
                spans = torch.stack([run.rows["char_start"][here], run.rows["char_end"][here]], 1).tolist()
                acts = dense[here, latent].tolist()
                shown = dict(zip(map(tuple, e["spans"]), e["acts"]))
                assert [shown.get(tuple(span), 0) for span in spans] == pytest.approx(acts, rel=1e-5)
                assert [spans[0], spans[-1]] == [e["spans"][0], e["spans"][-1]] and len(shown) == len(e["acts"])
                assert [e["char_start"], e["char_end"]] in e["spans"]
                assert e["token_str"] == e["text"][e["char_start"] : e["char_end"]]
                row = int(((run.rows["text_id"] == e["text_id"]) & (run.rows["pos"] == e["token_idx"])).nonzero())
                fired = float(dense[row, latent])
                assert (fired == 0) == (group["kind"] in ("near_miss", "zero"))
                assert fired == 0 or e["score"] == pytest.approx(fired, rel=1e-5)
                assert group["low"] <= e["score"] <= group["high"] * 1.00001
                assert group["kind"] != "near_miss" or 0 < e["score"] <= e["needed"] * 1.0001
        shares = [group["share"] for group in groups if group["kind"] == "interval"]
        code = dense[:, latent]
        for group in groups:
            if group["kind"] == "interval":
                inside = ((code >= group["low"]) & (code <= group["high"]) & (code > 0)).sum() / (code > 0).sum()
                assert group["share"] == pytest.approx(float(inside), abs=2.5 / float((code > 0).sum()))
        assert sum(shares) <= 1.0001
    assert kinds == {"top", "interval", "near_miss", "zero"} and facts.groups(F - 1, corpus) == []
    assert facts.tokens(F - 1) == facts.beside(F - 1) == []
    again = collect_facts(in_batches(codes, 17), firings)
    assert all(torch.equal(made.tensors[name], again.tensors[name]) for name in ("histogram", "share_rows", "cofiring"))
    assert not any(g["kind"] == "near_miss" for latent in range(F) for g in again.groups(latent, corpus))


def test_damaged_facts_are_one_line(tmp_path, codes):
    path, facts = tmp_path / "latent_facts.safetensors", collect_facts(codes, collect_firings(codes, 3))
    note = facts.note | {"sae_hash": "aa", "run_id": "r"}
    with pytest.raises(InputError, match="another SAE"):
        write_tensors(path, facts.tensors, note)
        read_facts(path, F, "bb")
    harms = {"rows": len(codes), "share_rows": -2, "cofiring": F, "act_starts": 10**6}
    for name, wrong in harms.items():
        harmed = facts.tensors[name].clone()
        harmed.view(-1)[-1] = wrong
        write_tensors(path, facts.tensors | {name: harmed}, note)
        with pytest.raises(InputError, match="damaged"):
            read_facts(path, F, "aa")
    for changed in ({"groups": [["top", 3, 20, 10]]}, {"groups": [["best", 3, 20, 10]]}, {"n_rows": 0}):
        write_tensors(path, facts.tensors, note | changed)
        with pytest.raises(InputError, match="damaged"):
            read_facts(path, F, "aa")


def test_top_texts_hold_what_was_promised(tmp_path, run, codes, dense, corpus):
    firings = collect_firings(codes, 3)
    facts = collect_facts(codes, firings)
    write_top_texts(tmp_path / "top_texts.json", facts, corpus, {"sae_hash": "aa"})
    meta, top, middle = read_top_texts(tmp_path / "top_texts.json")
    assert (meta["top"], meta["n_latents"], middle) == (3, F, {}) and sorted(top) == list(range(F)) and top[F - 1] == []
    for latent, found in top.items():
        assert len({e["text_id"] for e in found}) == len(found)
        scores = [e["score"] for e in found]
        assert scores == sorted(scores, reverse=True) and scores == pytest.approx(
            [float(dense[row, latent]) for row in firings.top_rows[latent].tolist() if row >= 0], rel=1e-5)
        for e in found:
            assert e["token_str"] == e["text"][e["char_start"] : e["char_end"]] and e["score"] == max(e["acts"])
            assert e["text"] == run.texts[e["text_id"]]["text"]
            first, last = e["window"]
            here = (run.rows["text_id"] == e["text_id"]) & (run.rows["pos"] >= first) & (run.rows["pos"] <= last)
            assert e["acts"] == pytest.approx(dense[here, latent].tolist(), rel=1e-5)
    assert json.loads((tmp_path / "top_texts.json").read_text())["meta"]["sae_hash"] == "aa"


def test_long_texts_are_cut_around_the_peak():
    text = "".join(chr(97 + i % 26) for i in range(3 * LONGEST))
    rest = dict.fromkeys(("score", "token_str", "token_idx", "text_id", "window", "acts"), 0)
    for start, end in ((0, 3), (700, 704), (3 * LONGEST - 2, 3 * LONGEST), (5, 5 + LONGEST + 9)):
        cut = _cut({"text": text, "char_start": start, "char_end": end, **rest})
        first = cut.get("text_start", 0)
        assert cut["text"][cut["char_start"] : cut["char_end"]] == text[start:end]
        assert len(cut["text"]) == max(LONGEST, end - first) and text[first:].startswith(cut["text"])


def test_a_latent_that_fires_wherever_it_can_has_no_near_miss(run):
    """A standard SAE: every latent may fire on every row, over a threshold of 0."""
    sae = make(torch.zeros(F))
    sae.top_k = F
    assert (near_misses(sae, run.shards(run.hook()), run.rows["text_id"]).rows == -1).all()
    codes = encode_run(run, run.hook(), sae)
    dense = dense_codes(codes)
    phi = naive_phi(dense > 0).where((dense > 0).T.double() @ (dense > 0).double() >= MIN_TOGETHER, 0).clamp(min=0)
    assert cofiring(codes, fires_of(dense), 3).phi.double() == pytest.approx(phi.topk(3).values.numpy(), abs=1e-6)


def test_fewer_rows_are_looked_at_for_near_misses_of_a_large_sae(run, monkeypatch):
    monkeypatch.setattr(examples, "NEAR_CELLS", 50 * F)
    assert near_misses(make(), run.shards(run.hook()), run.rows["text_id"]).n_rows == 50


def test_a_word_finds_the_latents_that_live_on_it(run, codes, dense, corpus):
    facts = collect_facts(codes, collect_firings(codes, 3))
    found, token_id = facts.on_word(" CAT", corpus), run.rows["token_id"]
    cat = token_id == word_tokenizer().convert_tokens_to_ids("cat")
    shares = torch.nan_to_num(dense[cat].sum(0) / dense.sum(0))
    listed = torch.from_numpy(found) > 0
    assert listed.any() and found[listed] == pytest.approx(shares[listed].numpy(), rel=1e-5)
    assert not facts.on_word("zebra", corpus).any()


def test_an_older_store_still_opens(tmp_path, codes, corpus):
    old = {"meta": {"schema_version": 1, "sae_hash": "aa", "n_latents": 1}, "middle": {"0": []},
           "0": [{"text": "a cat", "score": 1.5, "token_str": "cat", "char_start": 2, "char_end": 5}]}
    path = tmp_path / "top_texts.json"
    path.write_text(json.dumps(old))
    assert read_examples(tmp_path, 1, "aa") == (None, {0: old["0"]}, {0: []})
    with pytest.raises(InputError, match="another SAE"):
        read_examples(tmp_path, 1, "bb")
    facts = collect_facts(codes, collect_firings(codes, 2))
    write_top_texts(path, facts, corpus, {"sae_hash": "aa"})
    with pytest.raises(InputError, match="latent_facts.safetensors is missing; run 04"):
        read_examples(tmp_path, F, "aa")
    write_facts(tmp_path / "latent_facts.safetensors", facts, sae_hash="aa", run_id="r")
    found, top, middle = read_examples(tmp_path, F, "aa")
    assert found is not None and (top, middle) == ({}, {}) and found.top(0, corpus) == facts.top(0, corpus)


def test_the_page_shows_the_same_without_the_tokens_that_do_not_fire(codes, corpus):
    facts = collect_facts(codes, collect_firings(codes, 3))
    for latent in range(F):
        for group in facts.places:
            pair = [facts.examples(latent, group, corpus, whole) for whole in (False, True)]
            assert [[packed_example(e) for e in part] for part in pair][0] == [packed_example(e) for e in pair[1]]


def shown(codes, corpus, **more):
    firings = collect_firings(codes, 3)
    return Known(firings.stats(), corpus, {0: {"name": "dog", "f1": 0.5, "source": "offline"}},
                 facts=collect_facts(codes, firings), **more)


def test_every_living_latent_comes_to_the_page_named_or_not(tmp_path, codes, corpus, dense):
    known = shown(codes, corpus, near={1: [(2, 0.5)]}, positions=torch.arange(2 * F).view(F, 2).float(),
                  logits=(torch.tensor([[[7], [8]]] * F), torch.tensor([[[0.5], [-0.25]]] * F)), token=str,
                  effects={0: {"ablated": {"kl": 0.3}}}, stability={3: {"stability": 0.8, "other": 1}})
    found = list(page_latents(known))
    assert [one["latent"] for one in found] == (dense > 0).any(0).nonzero()[:, 0].tolist() and len(found) > F // 2
    one = found[0]
    assert (one["near"], one["map"], one["promotes"], one["demotes"]) == ([], (0.0, 1.0), [("7", 0.5)], [("8", -0.25)])
    assert one["frequency"] == pytest.approx(float((dense[:, 0] > 0).float().mean()))
    assert one["interest"] == interest(known.concepts[0], 0.3) > interest(known.concepts[0])
    assert sum(one["histogram"]["counts"]) == one["fires"]
    assert one["histogram"]["edges"][-1] == pytest.approx(one["max"])
    assert one["token_share"][0][0].isdecimal() and found[1]["near"] == [[2, 0.5]]
    stable = next(one for one in found if one["latent"] == 3)
    assert stable["stability"] == 0.8 and "other" not in stable
    assert write_page(tmp_path / "concepts.html", {"title": "t"}, page_latents(known)) == [tmp_path / "concepts.html"]
    older = list(page_latents(Known(known.stats, corpus, {}, older=({0: ["a"]}, {}))))
    assert older[0]["top"] == ["a"] and "histogram" not in older[0]


def test_stability_is_read_where_several_saes_were_compared(tmp_path):
    path = tmp_path / "stability.json"
    assert read_stability(path, "aa") == {}
    entry = {"stability": 0.9, "seeds": [{"sae": "b", "latent": 4, "correlation": 0.9}]}
    path.write_text(json.dumps({"sae_hash": "aa", "latents": {"17": entry}}))
    assert read_stability(path, "aa") == {17: entry}
    with pytest.raises(InputError, match="another SAE"):
        read_stability(path, "bb")
    path.write_text(json.dumps({"sae_hash": "aa", "latents": {"17": {"stability": "high"}}}))
    with pytest.raises(InputError):
        read_stability(path, "aa")


def test_logit_effects_are_the_products_with_the_unembedding():
    sae = make()
    view = torch.randn(9, 16, generator=torch.Generator().manual_seed(5))
    ids, changes = logit_effects(sae, view, 4)
    logits = sae.W_dec @ view.T
    assert torch.equal(ids[:, 0].long(), logits.topk(4).indices)
    assert torch.equal(ids[:, 1].long(), (-logits).topk(4).indices)
    assert torch.allclose(changes, logits.gather(1, ids.long().flatten(1)).view(F, 2, 4), atol=1e-5)
    assert logit_effects(sae, view, 20)[0].shape == (F, 2, 9)


def test_pieces_of_characters_are_shown_as_bytes():
    letters = {chr(code): i for i, code in enumerate([*range(33, 127), *range(161, 173), *range(174, 256),
                                                      *range(256, 324)])}
    byte_level = Tokenizer(models.BPE(letters, []))
    byte_level.pre_tokenizer, byte_level.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level)
    pieces = [token_text(tokenizer, i) for i in tokenizer("“ a")["input_ids"]]
    assert pieces[-5:] == ["<0xE2>", "<0x80>", "<0x9C>", " ", "a"]
    assert token_text(tokenizer, 10**6) == "[1000000]"
