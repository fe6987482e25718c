"""What is trained loads without this project and says the same; new texts and rows are classified by name."""
import json

import pandas
import pytest
import torch
import transformers
from conftest import TEXTS, tiny_model, word_tokenizer
from safetensors.torch import load_file
from test_sae_ception_cycles import defaults, script  # noqa: F401  (fixtures)
from test_sae_ception_heads import classifier
from test_sae_ception_modules import TABLE, written  # noqa: F401  (a fixture)

from cycles.export import save_for_others
from cycles.prediction import numbers, predictions, texts
from cycles.session import Session
from cycles.steps import train_model
from lib.environment import InputError

FLOATS = """
    class Floats(nn.Module):
        def forward(self, x):
            return x.float()
"""


def trained(defaults, folder, lm, padded=True, **changed):  # noqa: F811
    """A session whose baseline is trained on short texts of two classes."""
    if not padded:
        lm.config.pad_token_id = None
    lm.save_pretrained(folder / "model")
    tokenizer = word_tokenizer()
    tokenizer.pad_token = tokenizer.pad_token if padded else None
    tokenizer.save_pretrained(folder / "model")
    lines = [{"text": f"{TEXTS[i % 6]} {TEXTS[i % 5]} {i}", "label": ("negative", "positive")[i % 2]}
             for i in range(60)]
    (folder / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    small = {"LABEL_FIELD": "label", "EPOCHS_PER_CYCLE": 1, "DEVICE": "cpu", "LR": 1e-2, **changed}
    session = Session(defaults[0] | small | {"MODEL": str(folder / "model"), "DATASET": str(folder / "mine.jsonl")}, 0)
    train_model(session, "baseline", 0)
    return session


def said(how, text):
    """What the printed lines say of a text: name -> probability."""
    printed = []
    exec(how.replace('"a text"', repr(text)), {"print": printed.append})
    (found,) = printed
    return found if isinstance(found, dict) else {item["label"]: item["score"] for item in found[0]}


def predicted(session, text):
    """What predict.py says of a text, in the same form."""
    row = predictions(session, texts(session, text, None, None), None, 0).iloc[0]
    return {name: row[f"p({name})"] for name in session.task.class_names}


def expected(session):
    ids = session.task.splits["test"]
    return [session.task.texts[i] for i in ids.tolist()], session.outputs(ids)[1].softmax(1)


@pytest.mark.parametrize("make", [lambda: tiny_model("llama"), lambda: tiny_model("gpt2"), lambda: classifier("bert"),
                                  lambda: classifier("llama")], ids=["llama", "gpt2", "own bert", "own llama"])
def test_transformers_loads_it_and_says_the_same(defaults, tmp_path, make):  # noqa: F811
    session = trained(defaults, tmp_path, make())
    how = save_for_others(session, tmp_path / "out")
    texts, p = expected(session)
    assert "pipeline" in how and how in (tmp_path / "out/README.md").read_text()
    classify = transformers.pipeline("text-classification", str(tmp_path / "out"), top_k=None, device="cpu")
    for text, row in zip(texts, p):
        found = {item["label"]: item["score"] for item in classify([text])[0]}
        assert found == pytest.approx({"negative": float(row[0]), "positive": float(row[1])}, abs=1e-4)


@pytest.mark.parametrize("make", [lambda: tiny_model("llama"), lambda: tiny_model("bert"),
                                  lambda: classifier("gpt2", ["negative", "positive"])],
                         ids=["pipeline", "head beside the body", "own gpt2"])
def test_a_longer_text_is_cut_as_in_training(defaults, tmp_path, make):  # noqa: F811
    """The session's own tokenizer stays as it was."""
    session = trained(defaults, tmp_path, make(), MAX_LENGTH=8)
    limit = session.tokenizer.model_max_length
    how = save_for_others(session, tmp_path / "out")
    assert session.tokenizer.model_max_length == limit > 8
    for text in (" ".join(TEXTS), " ".join(reversed(TEXTS)), "a cat"):
        assert said(how, text) == pytest.approx(predicted(session, text), abs=1e-5)
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert saved.model_max_length == 8 and len(saved(" ".join(TEXTS), truncation=True)["input_ids"]) == 8


@pytest.mark.parametrize("kind", ["llama", "bert", "distilbert", "roberta"])
def test_a_class_that_is_not_in_the_data_is_left_out(defaults, tmp_path, kind):  # noqa: F811
    """It may win otherwise: nothing trained it down. The names are the data's, as predict.py says them."""
    lm = classifier(kind, ["NEGATIVE", "neutral", "POSITIVE"])
    out = [layer for layer in lm.modules() if isinstance(layer, torch.nn.Linear) and layer.out_features == 3][0]
    with torch.no_grad():
        out.weight[1] = 4 * torch.randn(16)
        if out.bias is not None:
            out.bias[1] = 9
    session = trained(defaults, tmp_path, lm, MAX_LENGTH=64)
    before = {name: p.clone() for name, p in session.model.state_dict().items()}
    how = save_for_others(session, tmp_path / "out")
    assert json.loads((tmp_path / "out/classes.json").read_text()) == session.task.class_names
    for text in TEXTS:
        assert said(how, text) == pytest.approx(predicted(session, text), abs=1e-4)
    after = session.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], p) for name, p in after.items())
    assert session.model.lm.config.num_labels == 3


def test_a_head_that_can_t_be_cut_is_refused(defaults, tmp_path):  # noqa: F811
    """Two layers have as many outputs as there are classes, and no other one decides which is the last."""
    session = trained(defaults, tmp_path, classifier("llama"))
    session.model.lm.more = torch.nn.Linear(3, 3)
    with pytest.raises(InputError, match="can't be cut to the data's classes, .* set KEEP_HEAD=False") as error:
        save_for_others(session, tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_tokenizer_that_loads_as_another_is_refused(defaults, tmp_path, monkeypatch):  # noqa: F811
    session = trained(defaults, tmp_path, tiny_model("llama"), MAX_LENGTH=8)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda _folder: word_tokenizer(bos=False))
    with pytest.raises(InputError, match="reads texts otherwise") as error:
        save_for_others(session, tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("make,changed", [
    (lambda: classifier("llama", problem_type="multi_label_classification"), {"KEEP_HEAD": False}),
    (lambda: tiny_model("llama"), {"MODEL_DTYPE": "bfloat16", "TARGET_LAYER": "1"}),
    (lambda: classifier("llama"), {"MODEL_DTYPE": "bfloat16", "TARGET_LAYER": "1"}),
], ids=["several labels", "bfloat16", "own bfloat16"])
def test_what_is_saved_gives_probabilities_in_float32(defaults, tmp_path, make, changed):  # noqa: F811
    session = trained(defaults, tmp_path, make(), **changed)
    assert "pipeline" in save_for_others(session, tmp_path / "out")
    classify = transformers.pipeline("text-classification", str(tmp_path / "out"), top_k=None, device="cpu")
    texts, p = expected(session)
    names = json.loads((tmp_path / "out/classes.json").read_text())
    assert classify.model.config.id2label == dict(enumerate(names))
    assert {x.dtype for x in classify.model.parameters()} == {torch.float32}
    for row, found in zip(p, classify(texts, batch_size=3)):
        scores = {item["label"]: item["score"] for item in found}
        assert sum(scores.values()) == pytest.approx(1, abs=1e-4)
        assert scores["positive"] == pytest.approx(float(row[1]), abs=0.03)


def test_a_last_word_with_the_number_zero_is_read(defaults, tmp_path):  # noqa: F811
    """A tokenizer without padding: GPT-2's token 0 is "!", which transformers must not take for padding."""
    session = trained(defaults, tmp_path, tiny_model("gpt2"), padded=False)
    assert session.task.pad_id == session.model.lm.config.pad_token_id == session.tokenizer.eos_token_id != 0


def test_a_head_that_transformers_has_not_is_saved_beside_the_body(defaults, tmp_path):  # noqa: F811
    session = trained(defaults, tmp_path, tiny_model("bert"))
    how = save_for_others(session, tmp_path / "out")
    texts, p = expected(session)
    body = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    head = load_file(tmp_path / "out/head.safetensors")
    assert "[:, 0]" in how and json.loads((tmp_path / "out/classes.json").read_text()) == ["negative", "positive"]
    with torch.no_grad():
        for text, row in zip(texts, p):
            state = body(**tokenizer(text, return_tensors="pt")).last_hidden_state[:, 0]
            assert torch.allclose(torch.nn.functional.linear(state, **head).softmax(1)[0], row, atol=1e-5)


def test_torch_loads_a_module_without_this_project(written, tmp_path):  # noqa: F811
    session = Session(written(TABLE), 0)
    train_model(session, "baseline", 0)
    save_for_others(session, tmp_path / "out")
    fresh = Session(written(TABLE), 5).own.module
    fresh.load_state_dict(torch.load(tmp_path / "out/model.pt", weights_only=True))
    ids = session.task.splits["test"]
    with torch.no_grad():
        assert torch.equal(fresh.eval()(session.task.images[ids]), session.outputs(ids)[1])


def test_the_two_scripts(defaults, tmp_path, monkeypatch, script, own_store, capfd):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    tiny_model("llama").save_pretrained("model")
    word_tokenizer().save_pretrained("model")
    rows = pandas.DataFrame({"review": [f"{TEXTS[i % 6]} {('sad', 'happy')[i % 2]} {i}" for i in range(60)],
                             "verdict": ["bad", "good"] * 30})
    rows.to_csv("mine.csv", index=False)
    script("04_train_cycle.py", "DATASET=mine.csv", "TEXT_FIELD=review", "LABEL_FIELD=verdict", "MODEL=model",
           "EPOCHS_PER_CYCLE=2", "SAE_EPOCHS=1", "SEEDS=0", "ARMS=lambda0,per_class", "METRICS=()", "KEEP_PCT=5")
    printed = script("predict.py", "SETTING=mine", "TEXT=the cat was happy")[1]
    assert "prediction" in printed and "p(good)" in printed and "latents" in printed
    rows[["review"]].to_csv("new.csv", index=False)
    script("predict.py", "SETTING=mine", "DATA=new.csv", "SHOW_LATENTS=3")
    found = pandas.read_csv(own_store / "sae_ception/mine/predictions.csv")
    assert len(found) == 60 and set(found.prediction) <= {"bad", "good"}
    assert (found["p(bad)"] + found["p(good)"]).between(0.9999, 1.0001).all()
    assert (found.probability == found[["p(bad)", "p(good)"]].max(axis=1)).all()
    assert found.latents.str.fullmatch(r"(\d+:\d+\.\d\d ?){1,3}").all()
    assert "text-classification" in script("save_model.py", "SETTING=mine", "ARM=lambda0", "TO=out")[1]
    assert transformers.AutoModelForSequenceClassification.from_pretrained("out").config.id2label == {
        0: "bad", 1: "good"}
    pandas.DataFrame({"review": ["the cat", " ", "the dog"]}).to_csv("gaps.csv", index=False)
    for arguments, said in ((["TEXT=a", "DATA=new.csv"], "set TEXT to a text, or DATA to a file"),
                            (["DATA=new.csv", "TEXT_FIELD=text"], "has no field 'text'"),
                            (["TEXT=a", "ARM=class_mean"], "model_cycle_1_best.pt is missing"),
                            (["TEXT=a", "SETTING=other"], "holds no baseline"),
                            (["DATA=gaps.csv"], "text 2 is blank; give it words, or leave its row out of DATA")):
        code, _, err = script("predict.py", "SETTING=mine", *arguments, ok=False)
        assert code == 2 and said in err.splitlines()[-1], err
    code, _, err = script("save_model.py", "SETTING=mine", "TO=out", ok=False)
    assert code == 2 and "set TO to a new folder" in err


def test_rows_of_numbers_are_classified(written, tmp_path, script, own_store):  # noqa: F811
    c = written(TABLE)
    script("04_train_cycle.py", f"MODEL={c['MODEL']}", "SEEDS=0", "ARMS=lambda0,per_class", "METRICS=()",
           "EPOCHS_PER_CYCLE=3", "LR=0.01", "WARMUP_STEPS=0", "KEEP_PCT=3")
    session = Session(c, 0)
    x = session.task.images[session.task.splits["test"]]
    pandas.DataFrame(x.numpy()).to_csv(tmp_path / "rows.csv", index=False)
    script("predict.py", "SETTING=mine", f"DATA={tmp_path}/rows.csv")
    found = pandas.read_csv(own_store / "sae_ception/mine/predictions.csv")
    truth = [session.task.class_names[i] for i in session.task.y[session.task.splits["test"]].tolist()]
    assert list(found.columns)[:2] == ["row", "prediction"] and (found.prediction == truth).mean() > 0.8
    pandas.DataFrame(x[:, 1:].numpy()).to_csv(tmp_path / "rows.csv", index=False)
    pandas.DataFrame(x.numpy()).to_csv(tmp_path / "bare.csv", index=False, header=False)
    for data, said in ((f"{tmp_path}/rows.csv", "must have 13 columns"),
                       (f"{tmp_path}/bare.csv", "give it a first line with the columns' names"),
                       (f"{tmp_path}/gone.csv", "there is no file")):
        code, _, err = script("predict.py", "SETTING=mine", f"DATA={data}", ok=False)
        assert code == 2 and said in err.splitlines()[-1]


def rows(session, folder, text):
    """What predict.py makes of a .csv file that holds this text."""
    (folder / "some.csv").write_text(text)
    return numbers(session, str(folder / "some.csv"))


@pytest.mark.parametrize("kind,row,said", [
    ("int64", "0.5", "has 0.5 .* inputs are int64"), ("int64", "1e30", r"has 1e\+30 .* int64"),
    ("uint8", "300", "has 300 .* inputs are uint8"), ("uint8", "-1", "has -1 .* inputs are uint8"),
    ("bool", "2", "has 2 .* inputs are bool"), ("float32", "1e300", "13 columns of finite numbers"),
])
def test_numbers_that_the_inputs_can_t_hold_are_refused(written, tmp_path, kind, row, said):  # noqa: F811
    """Where training had whole numbers a fraction would be cut off, and what is out of range would wrap around."""
    source = TABLE.replace("module = ", f"x = x.round().abs().to(torch.{kind})\n        module = ").replace(
        "nn.Linear(13, 32)", "Floats(), nn.Linear(13, 32)").replace('"2"', '"3"') + FLOATS
    session = Session(written(source), 0)
    header = ",".join(f"c{i}" for i in range(13))
    assert rows(session, tmp_path, f"{header}\n{'1,' * 12}1.0\n").images.tolist() == [[1] * 13]
    with pytest.raises(InputError, match=said) as error:
        rows(session, tmp_path, f"{header}\n{'1,' * 12}{row}\n")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("end", [",7", ","])
def test_rows_with_a_field_more_than_the_header_are_refused(written, tmp_path, end):  # noqa: F811
    """pandas would take the first column for the rows' names, and shift all others."""
    session = Session(written(TABLE), 0)
    text = "\n".join([",".join(f"c{i}" for i in range(13)), *[",".join(map(str, range(13))) + end] * 2])
    with pytest.raises(InputError, match="rows with more fields than the header"):
        rows(session, tmp_path, text)
