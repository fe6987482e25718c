"""Which layer? Numbers in closed form, labels of words and texts, recommendations, the script."""
import json

import pytest
import torch
from conftest import TEXTS, tiny_model, word_tokenizer
from test_verify_scripts import script, source  # noqa: F401  (two fixtures)

from checks import figures
from checks.layers import _word_labels, probe_layers, recommend_layer
from lib.activations import SaveSettings, block_rows, preflight
from lib.environment import InputError
from lib.hooks import resolve
from lib.metrics.layers import layer_statistics, linear_probe
from lib.texts import tokenise

MANY = [TEXTS[i % len(TEXTS)] for i in range(40)]


def test_statistics_in_closed_form():
    x = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    assert layer_statistics(x) == pytest.approx({"width": 2, "median_norm": 1, "gamma": 0, "outlier_frac": 0,
                                                 "outlier_dims": 0, "participation": 2})
    moved = layer_statistics(x + torch.tensor([3.0, 4]))
    assert moved["gamma"] == pytest.approx(5) and moved["participation"] == pytest.approx(2)
    assert layer_statistics(x * torch.tensor([1.0, 0]))["participation"] == pytest.approx(1)
    big = layer_statistics(torch.cat([x, torch.tensor([[0.0, 11.0]])]))
    assert big["outlier_frac"] == pytest.approx(0.2)
    wide = torch.ones(4, 9) * torch.tensor([1.0] * 8 + [7.0])
    assert layer_statistics(wide)["outlier_dims"] == 1 and layer_statistics(wide / 7 * 5)["outlier_dims"] == 1


def test_a_model_whose_weights_are_not_numbers_is_refused():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 2] = float("inf")
    points = [resolve(model, f"resid_post:{i}") for i in range(2)]
    with pytest.raises(InputError, match="not finite, because model.layers.1.mlp.up_proj.weight"):
        probe_layers(model, word_tokenizer(), points, MANY, settings=SaveSettings())


def test_a_linear_probe_reads_what_is_linear_and_nothing_else():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(600, 6, generator=g)
    y, is_val = (x[:, 0] > 0).long() + (x[:, 0] > 1), torch.arange(600) % 3 == 0
    found = linear_probe(torch.nn.functional.one_hot(y, 3).float() + 0.01 * x[:, :3], y, is_val)
    assert found["probe_accuracy"] == 1
    assert found["majority"] == pytest.approx(float((y[is_val] == 0).float().mean()))
    noise = linear_probe(x, torch.randint(0, 3, (600,), generator=g), is_val)
    assert noise["probe_accuracy"] < 0.45
    assert linear_probe(x, y, is_val) == linear_probe(x * 100 + 7, y, is_val)
    assert linear_probe(torch.zeros(600, 6), y, is_val)["probe_accuracy"] == found["majority"]


@pytest.fixture
def probed():
    model = tiny_model("llama")
    return model, word_tokenizer(), [resolve(model, f"resid_post:{i}") for i in range(3)]


def test_a_probe_of_all_layers_in_one_pass(probed):
    model, tokenizer, points = probed
    labels = [[1 if word == "cat" else 2 if word == "dog" else 0 for word in text.split() if word.isalpha()]
              for text in MANY]
    table = probe_layers(*probed, MANY, settings=SaveSettings(), labels=labels)
    assert [row["signature"] for row in table] == [point.signature for point in points]
    before = preflight(model, tokenizer, points, MANY, settings=SaveSettings())
    for row, alone in zip(table, before):
        assert all(row[name] == pytest.approx(alone[name])
                   for name in ("median_norm", "gamma", "participation", "outlier_frac"))
        assert row["gb_per_million"] == pytest.approx(0.064)
    assert table[0]["probe_accuracy"] > 0.95 > table[0]["majority"]
    assert 0 < table[0]["seconds_per_million"] < table[1]["seconds_per_million"] < table[2]["seconds_per_million"]
    assert "probe_accuracy" not in probe_layers(*probed, MANY, settings=SaveSettings())[0]
    signature, _ = recommend_layer(table)
    assert signature == table[0]["signature"]
    assert figures.layers(table, signature).get_axes()[3].get_title() == "Linear probe on the labels"


def test_labels_of_words_are_at_the_token_that_ends_them(probed):
    model, tokenizer, points = probed
    texts = ["the cat sat .", "dog , dog"]
    rows, _ = block_rows(model, points[:1], tokenise(tokenizer, texts, 0, 99), pad_id=0, settings=SaveSettings())
    found = _word_labels(rows, texts, [[0, "animal", None], ["animal", "pet"]])
    assert [(texts[rows[i, 0]][rows[i, 3] : rows[i, 4]], int(rows[i, 1]), label) for i, label in found] == [
        ("cat", 2, "animal"), ("dog", 1, "animal"), ("dog", 3, "pet")
    ]


@pytest.mark.parametrize("text", ["Mój dom, it's big", "dog 2 dogs", "一二三"])
def test_as_many_labels_as_words_or_none(probed, text):
    """A label would stand beside another word."""
    with pytest.raises(InputError, match="a text has . words, its runs of letters, and 4 labels"):
        _word_labels(torch.zeros(0, 5), [text], [["A", "B", "C", "D"]])
    assert _word_labels(torch.tensor([[0, 1, 5, 0, 3]]), ["Mój dom"], [["A", "B"]]) == [(0, "A")]


def test_labels_of_texts_and_labels_that_are_too_few(probed):
    labels = ["pet" if "cat" in text.split() else "none" for text in MANY]
    assert probe_layers(*probed, MANY, settings=SaveSettings(), labels=labels)[0]["probe_accuracy"] > 0.9
    with pytest.raises(InputError, match="at least two classes and five texts"):
        probe_layers(*probed, MANY, settings=SaveSettings(), labels=["one"] * len(MANY))
    with pytest.raises(InputError, match="at least two classes and five texts"):
        probe_layers(*probed, MANY[:3], settings=SaveSettings(), labels=[0, 1, 0])
    with pytest.raises(InputError, match="no text yields a token"):
        probe_layers(*probed, ["", ""], settings=SaveSettings())


def layer(name, **numbers):
    return {"signature": name, "gamma": 1.0, "outlier_frac": 0.0, "participation": 5.0} | numbers


def test_recommended_layers():
    accuracy = [0.5, 0.8, 0.805, 0.7]
    table = [layer(f"l{i}", probe_accuracy=a, majority=0.3) for i, a in enumerate(accuracy)]
    assert recommend_layer(table)[0] == "l1" and "0.800, is within 0.01 of the best, 0.805" in recommend_layer(table)[1]
    table[1]["gamma"], table[2]["outlier_frac"] = 9.0, 0.5
    assert recommend_layer(table)[0] == "l3" and recommend_layer(table)[1].startswith("2 of 4 left out")
    assert recommend_layer([layer("a"), layer("b", participation=9.0)])[0] == "b"
    signature, reason = recommend_layer([layer("a", gamma=9.0), layer("b", gamma=8.0, participation=6.0)])
    assert signature == "b" and "SKIP_FIRST=1" in reason


def test_the_script(script, source, own_store, tmp_path):  # noqa: F811
    folder = own_store / "verify_sae_training"
    code, out, _ = script("00_probe_layers.py", *source)
    assert (code == 0 and "recommended: LAYER_SIGNATURE=llamaforcausallm_model_layers_" in out
            and (folder / "figures" / "layers.png").exists())
    assert json.loads((folder / "layers.json").read_text())["labels"] is None
    lines = [json.dumps({"text": text, "kind": int("cat" in text)}) for text in MANY]
    (tmp_path / "labelled.jsonl").write_text("\n".join(lines))
    code, out, _ = script("00_probe_layers.py", source[0], f"DATASET={tmp_path}/labelled.jsonl", "LABEL_FIELD=kind",
                          "POINTS=resid_pre, mlp_out")
    assert code == 0 and "probe" in out and len(json.loads((folder / "layers.json").read_text())["layers"]) == 6
    (tmp_path / "bodies.jsonl").write_text("\n".join(json.dumps({"body": text}) for text in MANY))
    given = ["DATA_SPLIT=other", "TEXT_FIELD=body", "MAX_LENGTH=9", "SKIP_FIRST=1", "MODEL_DTYPE=float32", "DEVICE=cpu"]
    code, out, _ = script("00_probe_layers.py", source[0], f"DATASET={tmp_path}/bodies.jsonl", *given, "N_TEXTS=20",
                          "BATCH_SIZE_SAVE=16")
    following = out.splitlines()[-1]
    assert code == 0 and "01_save_activations.py MODEL=" in following
    assert all(f" {constant}" in following for constant in given)
    assert not any(name in following for name in ("N_TEXTS", "BATCH_SIZE_SAVE", "TRUST_REMOTE_CODE"))
    for wrong, message in (("LABEL_FIELD=mood", "set LABEL_FIELD"), ("N_TEXTS=3", "at least 10"),
                           ("POINTS=resid", "resid")):
        code, _, err = script("00_probe_layers.py", *source, wrong)
        assert code == 2 and message in err and err.count("\n") == 1
