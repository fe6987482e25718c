"""Labels that are no labels are refused, samples keep the classes' shares, and data sorted by label train and score
alike.
"""
import gzip
import json
import logging

import numpy as np
import pandas
import pytest
import torch
from conftest import TEXTS, word_tokenizer
from test_sae_ception_cycles import defaults, digits, script, write_texts  # noqa: F401  (fixtures)

from cycles.examples import make_batch
from cycles.labels import classes, draw
from cycles.language import letter_tokens
from cycles.session import Session
from cycles.sources import load_task, own_data
from lib.environment import InputError

WHERE = ["train", "train", "train", "test"]


@pytest.mark.parametrize("values,said", [
    ([0, None, 1, 0], "no value in 1 of 4 examples (rows 2 of train)"),
    ([0.0, float("nan"), float("nan"), 0.0], "no value in 2 of 4 examples (rows 2 of train, 3 of train)"),
    (["a", "b", " ", "a"], "rows 3 of train"), ([0, pandas.NA, 1, 0], "no value"),
    (["a", "b", "a", pandas.NaT], "rows 1 of test"), (["a", "b", "b", None], "rows 1 of test"),
    ([0, [1], 1, 0], "no plain label (a list, dict or date) in 1 of 4"), ([{"a": 1}] * 4, "no plain label"),
    ([0, np.array([1, 2]), 1, 0], "no plain label"),
    (["a", 1, "a", "a"], "mixes words and numbers (row 2 of train: 1)"),
    ([0, True, 1, 0], "mixes numbers and true or false"), ([0, 1, 1, "0"], "row 1 of test: '0'"),
    ([0, 1, 1, -1], "no training example has in 1 of 4 examples (rows 1 of test, e.g. '-1'); set LABEL_FIELD"),
])
def test_values_that_are_no_labels_are_refused_with_their_rows(values, said):
    with pytest.raises(InputError) as error:
        classes(values, WHERE, "LABEL_FIELD=mood")
    message = str(error.value)
    assert said in message and message.startswith("LABEL_FIELD=mood") and "\n" not in message


def test_classes_and_their_names():
    y, names = classes(["sad", "happy", "sad", "happy"], WHERE, "x")
    assert y.tolist() == [1, 0, 1, 0] and names == ["happy", "sad"]
    y, names = classes([np.int64(7), 3, 7.0, 3], WHERE, "x")
    assert y.tolist() == [1, 0, 1, 0] and names == [3, 7]
    assert classes([True, False, True, True], WHERE, "x")[1] == [False, True]
    assert classes([0, 1, 1, 2], WHERE, "x", trained_on=False)[0].tolist() == [0, 1, 1, 2]


def test_a_draw_keeps_the_classes_shares():
    y = torch.tensor([0] * 600 + [1] * 300 + [2] * 97 + [3] * 3)
    ids = torch.arange(1000)
    drawn = draw(ids, y, 100, 0)
    assert len(drawn) == 100 and torch.equal(drawn, drawn.sort().values)
    assert torch.bincount(y[drawn]).tolist() == [59, 30, 10, 1]  # the three of the last class are worth .3: one stays
    assert torch.equal(drawn, draw(ids, y, 100, 0)) and not torch.equal(drawn, draw(ids, y, 100, 1))
    assert torch.equal(draw(ids, y, None, 0), ids) and torch.equal(draw(ids, y, 1000, 0), ids)
    some = torch.tensor([5, 700, 3, 999, 1])
    assert set(draw(some, y, 3, 0).tolist()) <= set(some.tolist()) and len(draw(some, y, 2, 0)) == 2


def sorted_files(folder, kind):
    """Constants of a tiny model and of training and test files that are sorted by label; no validation file."""
    c = write_texts(folder, "llama")
    rows = [{"text": f"{TEXTS[i % 6]} {('happy', 'sad')[i >= 60]} {i}", "mood": ("good", "bad")[i >= 60],
             "topic": i % 4} for i in range(120)]
    for name, part in (("train", rows), ("test", rows)):
        path, frame = folder / f"sorted_{name}.{kind}", pandas.DataFrame(part)
        if kind == "csv":
            frame.to_csv(path, index=False)
        elif kind == "parquet":
            frame.to_parquet(path)
        else:
            frame.to_json(path, orient="records", lines=True)
    return (c
            | {"DATASET": str(folder / f"sorted_train.{kind}"), "TEST_DATASET": str(folder / f"sorted_test.{kind}"),
               "VAL_DATASET": None})


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
def test_a_file_sorted_by_label(defaults, tmp_path, kind, caplog):  # noqa: F811
    c = (defaults[0] | sorted_files(tmp_path, kind)
         | {"DATA_LIMIT": 60, "VAL_FRAC": 0.2, "EVAL_LIMIT": 20, "PROBE_LIMIT": 20})
    with caplog.at_level(logging.INFO, "workbench"):
        task = load_task(c, 0, word_tokenizer())
        assert task.class_names == ["bad", "good"] and task.attribute_names == ["0", "1", "2", "3"]
        assert [torch.bincount(task.y[ids]).tolist() for ids in task.splits.values()] == [[24, 24], [6, 6], [60, 60]]
        assert torch.bincount(task.y[task.sample(task.splits["test"], c["EVAL_LIMIT"], 0,
                                                 "EVAL_LIMIT, test examples")]).tolist() == [10, 10]
        task.sample(task.splits["test"], c["EVAL_LIMIT"], 0, "EVAL_LIMIT, test examples")
    said = [line.getMessage() for line in caplog.records]
    assert "DATA_LIMIT, training examples: 60 of 120 drawn by seed 0: bad (30), good (30)" in said
    assert said.count("EVAL_LIMIT, test examples: 20 of 120 drawn by seed 0: bad (10), good (10)") == 1


def test_a_sorted_file_scores_as_a_shuffled_one_would(digits, monkeypatch):  # noqa: F811
    """Every limit of the evaluation draws from all classes: on digits sorted by class accuracy is no class's own."""
    from cycles.steps import evaluate_cycle, train_cycle_sae, train_model

    session = Session(digits | {"METRICS": ("robustness",), "EVAL_LIMIT": 100, "PROBE_LIMIT": 100, "ROBUST_LIMIT": 50,
                            "EPOCHS_PER_CYCLE": 15}, 0)
    for name, ids in session.task.splits.items():
        session.task.splits[name] = ids[session.task.y[ids].argsort(stable=True)]
    session.task_key = session.task.identity()
    for step in (train_model, train_cycle_sae):
        step(session, "baseline", 0)
    seen = []
    monkeypatch.setattr("cycles.attacks.make_batch", lambda task, ids, _: seen.append(task.y[ids].unique().tolist()) or
                        make_batch(task, ids, session.device))
    test = evaluate_cycle(session, "baseline", 0)["test"]
    assert (test["task_accuracy"] > 0.5 and 0.1 < test["base_u"] < 0.9 and test["base_csi"] < 0.9
            and seen == [list(range(10))])


def test_absorption_looks_at_the_examples_that_are_scored(labelled_texts, defaults):  # noqa: F811
    c = (defaults[0]
         | {name: str(labelled_texts / file)
            for name, file in (("MODEL", "llama"), ("DATASET", "train.jsonl"), ("VAL_DATASET", "val.jsonl"),
                               ("TEST_DATASET", "test.jsonl"))})
    session = Session(c | {"DEVICE": "cpu", "DATA_LIMIT": None, "BATCH_SIZE": 8}, 0)
    asked = []
    real = session.task.batch
    session.task.batch = lambda ids, *rest: asked.extend(ids.tolist()) or real(ids, *rest)
    letter_tokens(session, session.task.splits["test"], 60)
    assert set(asked) <= set(session.task.splits["test"].tolist()) and asked != sorted(asked) and len(asked) < 30


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("change,said", [
    (lambda rows: [{k: v for k, v in row.items() if k != "mood" or i != 7} for i, row in enumerate(rows)],
     "no value in 1 of "),
    (lambda rows: [row | {"mood": float("nan") if i % 8 == 1 else row["mood"]} for i, row in enumerate(rows)],
     "LABEL_FIELD=mood has no value in 8 of "),
    (lambda rows: [row | {"mood": "yes" if i == 3 else row["mood"]} for i, row in enumerate(rows)],
     "mixes numbers and words"),
    (lambda rows: [row | {"topic": None if i == 3 else row["topic"]} for i, row in enumerate(rows)],
     "ATTRIBUTE_FIELD=topic has no value"),
    (lambda rows: [row | {"topic": [1]} for row in rows], "ATTRIBUTE_FIELD=topic has no plain label"),
    (lambda rows: [{"text": row["text"], "topic": 0} for row in rows],
     "has no field 'mood'; it has text, topic: set LABEL_FIELD"),
])
def test_a_file_with_labels_missing(defaults, tmp_path, change, said):  # noqa: F811
    c = defaults[0] | write_texts(tmp_path, "llama")
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    write_lines(tmp_path / "train.jsonl", change(rows))
    with pytest.raises(InputError) as error:
        load_task(c, 0, word_tokenizer())
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("change,said", [
    (lambda row: {"text": row["text"], "topic": row["topic"]}, "VAL_DATASET=.*has no field 'mood'.*set LABEL_FIELD"),
    (lambda row: row | {"mood": None}, "no value in 20 of 110 examples .rows 1 of val"),
    (lambda row: {"content": row["text"], "mood": row["mood"], "topic": 0},
     "VAL_DATASET=.*has no field 'text'.*set TEXT_FIELD_HELD_OUT$"),
])
def test_held_out_files_without_labels_or_texts(defaults, tmp_path, change, said):  # noqa: F811
    c = defaults[0] | write_texts(tmp_path, "llama")
    rows = [json.loads(line) for line in (tmp_path / "val.jsonl").read_text().splitlines()]
    write_lines(tmp_path / "val.jsonl", [change(row) for row in rows])
    with pytest.raises(InputError, match=said):
        load_task(c, 0, word_tokenizer())


@pytest.mark.parametrize("name,value", [
    ("TEST_DATASET", "mine"), ("VAL_DATASET", "mine"), ("TEST_FRAC", 0.5), ("LABEL_FIELD", "parity"),
    ("TEST_SPLIT", "other"), ("TRAIN_SPLIT", "other"), ("VAL_SPLIT", "validation"),
])
def test_what_images_do_not_use_is_refused(digits, name, value):  # noqa: F811
    assert own_data(digits)["DATASET"] == "digits"
    with pytest.raises(InputError, match=f"{name}={value} would be ignored"):
        own_data(digits | {name: value})


def test_own_data_need_no_constants_of_the_stories(tmp_path, script, caplog):  # noqa: F811
    """The command in the docstring of step 1: data of one's own without the stories' attribute and validation file."""
    c = write_texts(tmp_path, "llama")
    for name in ("train", "test"):
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        write_lines(tmp_path / f"my_{name}.jsonl", [{"text": f"{row['text']} {number}", "label": row["mood"]}
                                                    for number, row in enumerate(rows)])
    own = [f"MODEL={c['MODEL']}", f"DATASET={tmp_path}/my_train.jsonl", "LABEL_FIELD=label", "SETTING=mine",
           "EPOCHS_PER_CYCLE=1", "VAL_FRAC=0.2"]
    _, out, err = script("01_train_baseline.py", *own, f"TEST_DATASET={tmp_path}/my_test.jsonl")
    for said in ("train: 48 examples: 0 (24), 1 (24)", "val: 12 examples", "test: 30 examples"):
        assert said in out + err + caplog.text


def idx(array):
    return gzip.compress(bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
                         + array.astype(np.uint8).tobytes())


def image_folder(folder, n_images, n_labels, side=4, test_side=4):
    rng = np.random.default_rng(0)
    for prefix, n, labels, s in (("train", n_images, n_labels, side), ("t10k", 40, 40, test_side)):
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(idx(rng.integers(0, 255, (n, s, s))))
        (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(idx((np.arange(labels) * 2 // labels) * 4 + 1))
    return str(folder)


@pytest.mark.parametrize("sizes,said", [((200, 150), "holds 200 images .* 150 labels"),
                                        ((100, 150), "holds 100 images"), ((100, 100, 4, 5), "must have one size")])
def test_images_and_labels_that_do_not_belong_together(digits, tmp_path, sizes, said):  # noqa: F811
    with pytest.raises(InputError, match=said):
        load_task(digits | {"DATASET": image_folder(tmp_path, *sizes)}, 0)


def test_images_sorted_by_label_with_numbers_left_out(digits, tmp_path):  # noqa: F811
    """Labels 1 and 5 only: two classes with these names, and a limit that takes both."""
    task = load_task(digits | {"DATASET": image_folder(tmp_path, 200, 200), "DATA_LIMIT": 60}, 0)
    assert task.n_classes == 2 and task.class_names == ["1", "5"] and len(task.images) == 100
    assert [torch.bincount(task.y[ids]).tolist() for ids in task.splits.values()] == [[22, 23], [8, 7], [20, 20]]


def test_groups_are_named_by_their_members(digits):  # noqa: F811
    task = load_task(digits | {"LABEL_GROUPS": (0, 1) * 5}, 0)
    assert task.class_names == ["0/2/4/6/8", "1/3/5/7/9"] and task.attribute_names == [str(i) for i in range(10)]
