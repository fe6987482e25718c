"""Latents of two SAEs matched: by codes against dense correlations, by dictionary, and against chance."""
from urllib.parse import unquote

import numpy as np
import pytest
import scipy.sparse
import torch
from conftest import run_notebook
from test_verify_scripts import FOLDER, TRAIN, script, source  # noqa: F401  (two fixtures)

from checks import comparison, matching
from checks.matching import best_matches, chance, matched_cosine, rotated, sparse_codes
from concepts.page_data import read_stability
from lib.environment import InputError
from lib.files import read_json
from lib.sae import make_sae


def random_codes(n=300, latents=12, density=0.2, seed=0):
    return scipy.sparse.csr_array(scipy.sparse.random_array((n, latents), density=density, rng=seed))


@pytest.mark.parametrize("pairs", [1, 500, 20_000_000])
def test_correlations_are_those_of_dense_codes(monkeypatch, pairs):
    monkeypatch.setattr(matching, "BLOCK_PAIRS", pairs)
    a, b = random_codes(seed=1), random_codes(latents=9, seed=2)
    match, r = best_matches(a, b)
    dense = np.corrcoef(a.toarray().T, b.toarray().T)[:12, 12:]
    together = (a.toarray().T @ b.toarray()) > 0
    dense[~together] = -np.inf
    np.testing.assert_allclose(r, dense.max(1), atol=1e-12)
    assert match.tolist() == dense.argmax(1).tolist()


def test_a_shuffled_sae_is_found_again_and_chance_is_not():
    a = random_codes(2000)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    match, r = best_matches(a, scipy.sparse.csr_array(3 * a[:, order.numpy()]))
    assert order[match].tolist() == list(range(12)) and torch.allclose(r, torch.ones(12, dtype=torch.float64))
    assert chance(a, a).max() < 0.2


def test_a_latent_without_a_match_has_none():
    a = scipy.sparse.csr_array(np.array([[1.0, 0, 2], [0, 0, 2], [0, 0, 2]]))
    b = scipy.sparse.csr_array(np.array([[2.0, 0], [0, 1], [0, 0]]))
    match, r = best_matches(a, b)
    assert match.tolist() == [0, -1, -1] and r[0] == pytest.approx(1) and r[1:].isnan().all()  # dead; always on
    with pytest.raises(InputError, match="must be of the same ones"):
        best_matches(a, b[:2])


def test_matched_cosine():
    rows = torch.nn.functional.normalize(torch.randn(20, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    assert matched_cosine(rows, rows[order]) == pytest.approx(1)
    # Row by row, the first would take .8 and leave 0 to the second; together they do better.
    a = torch.tensor([[0.8, 0.6], [1.0, 0]])
    b = torch.tensor([[1.0, 0], [0, 1.0]])
    assert matched_cosine(a, b) == pytest.approx((0.6 + 1) / 2)
    assert matched_cosine(rows, rotated(rows)) < 0.8
    torch.testing.assert_close(rotated(rows) @ rotated(rows).T, rows.double() @ rows.double().T)
    with pytest.raises(InputError, match="at most 8,192"):
        matched_cosine(torch.ones(8193, 1), rows)


def test_sparse_codes_are_the_saes():
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(16, 5, generator=generator)
    sae = make_sae(W, torch.zeros(16), W, torch.zeros(5), 1.0, top_k=3)
    x = torch.randn(40, 5, generator=generator)
    values, indices = sae.encode(x)
    dense = torch.zeros(40, 16).scatter_add_(1, indices, values)
    np.testing.assert_allclose(sparse_codes(sae, x.split(7)).toarray(), dense, atol=1e-6)


def one(name, seed, layer="resid_post:1", **constants):
    config = {"constants": {"SEED": seed, "TOP_K": 1, **constants}, "data_digest": layer}
    W = torch.eye(3)
    sae = make_sae(W, torch.zeros(3), W, torch.zeros(3), 1.0, top_k=1, config=config)
    return comparison.One(name, sae, "hook", point=None, layer=layer, names={2: f"two of {name.name}"})


def test_stability_is_the_mean_over_the_other_seeds(tmp_path):
    saes = {"A": one(tmp_path / "a", 0), "B": one(tmp_path / "b", 1, START_FROM=None), "C": one(tmp_path / "c", 2),
            "D": one(tmp_path / "d", 0, "resid_post:2"), "E": one(tmp_path / "e", 0, TOP_K=2)}
    assert comparison.as_seeds(saes) == [["A", "B", "C"]]
    nan = float("nan")
    matches = {(a, b): (torch.tensor([0, 1, -1]), torch.tensor([1.0, 0.5, nan])) for a in saes for b in saes}
    matches["A", "C"] = torch.tensor([2, 1, -1]), torch.tensor([0.5, -0.1, nan])
    matches["A", "D"] = torch.tensor([2, -1, -1]), torch.tensor([0.25, nan, nan])
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "concepts.html").touch()
    written = comparison.write_stability(saes, [["A", "B", "C"]], matches, run_id="r", n_tokens=9)
    assert [path.parent.name for path in written] == ["a", "b", "c", "d", "e"]
    found = read_json(tmp_path / "a" / "stability.json")["latents"]
    assert {latent: entry["stability"] for latent, entry in found.items()} == {"0": 0.75, "1": 0.25}
    assert found["0"]["seeds"][1] == {"sae": "c", "latent": 2, "correlation": 0.5}
    assert found["0"]["layers"] == [{"sae": "d", "latent": 2, "correlation": 0.25, "layer": "resid_post:2",
                                     "name": "two of d", "href": "../d/concepts.html#2"}]
    assert "stability" not in read_json(tmp_path / "e" / "stability.json")["latents"]["0"]


def test_a_folder_of_any_name_is_linked(tmp_path):
    name = "my best (SAE) ~ é"
    saes = {"A": one(tmp_path / "a", 0), "B": one(tmp_path / name, 0, "resid_post:2")}
    (tmp_path / name).mkdir()
    (tmp_path / name / "concepts.html").touch()
    matches = {(a, b): (torch.tensor([0]), torch.tensor([1.0])) for a in saes for b in saes}
    comparison.write_stability(saes, [], matches, run_id="r", n_tokens=9)
    found = read_stability(tmp_path / "a" / "stability.json", read_json(tmp_path / "a" / "stability.json")["sae_hash"])
    href = found[0]["layers"][0]["href"]
    assert href.isascii() and unquote(href) == f"../{name}/concepts.html#0"


def test_the_notebook_on_two_seeds_and_two_layers(script, source, own_store):  # noqa: F811
    saved = script("01_save_activations.py", *source, "LAYER_SIGNATURE=resid_post:1,resid_post:2", "PREFLIGHT=False")
    assert saved[0] == 0
    for change in (["LAYER=resid_post:2"], ["SEED=1"], []):
        assert script("02_train_sae.py", *TRAIN, *change)[0] == 0
    names = run_notebook(FOLDER / "09_compare_saes.ipynb")
    assert [one.layer for one in names["saes"]] == ["resid_post:1", "resid_post:1", "resid_post:2"]
    assert names["groups"] == [["A", "B"]] and len(names["written"]) == 3
    assert names["table"]["EV"].between(0, 1).all()
    lost = names["table"].get("loss recovered")  # an untrained model may gain by its own mean: then there is none
    assert lost is None or np.isfinite(lost).all()
    assert 0 < names["seeds"][0]["PW-MCC"] <= 1 and names["seeds"][0]["by chance"] < names["seeds"][0]["correlation"]
    assert list(names["columns"]) == ["token", "A", "B", "C"]
    run, keep, codes = names["run"], names["keep"], names["codes"]["A"]
    latent = int(names["fires"]["A"].argmax())
    tokens = [run.texts[text]["text"][start:end] for text, start, end in
              zip(*(run.rows[name][keep].tolist() for name in ("text_id", "char_start", "char_end")))]
    totals = {}
    for token, code in zip(tokens, codes.toarray()[:, latent]):
        totals |= {token: totals.get(token, 0) + code} if code else {}
    first = comparison.strongest_tokens(run, keep, codes, [latent])[latent]
    assert first == sorted(totals, key=lambda token: -totals[token])[:4]
    content = read_json(own_store / "verify_sae_training" / "comparison.json")
    assert len(content["found_again"]) == 6 and len(content["scores"]) == 3
