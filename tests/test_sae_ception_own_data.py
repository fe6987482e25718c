"""A stranger's file of texts: nothing but its name and columns need be set, and what can't be right is said in one
line.
"""
import json
import logging

import pandas
import pytest
import torch
from conftest import TEXTS, word_tokenizer
from sklearn.model_selection import train_test_split
from test_sae_ception_cycles import defaults, script, write_texts  # noqa: F401  (fixtures)

from cycles.labels import classes, in_words
from cycles.sources import load_task, own_data
from cycles.tasks import say_what_is_scored
from lib.environment import InputError
from presets import setting_name


def reviews(n=60, **changed):
    """n rows, sorted by label, with a column of its own name each."""
    rows = {"review": [f"{TEXTS[i % 6]} {('sad', 'happy')[i >= n // 2]} {TEXTS[(i // 6) % 6]} {i}" for i in range(n)],
            "verdict": ["bad"] * (n // 2) + ["good"] * (n - n // 2)}
    return pandas.DataFrame(rows | changed)


@pytest.fixture
def own(defaults, tmp_path):  # noqa: F811
    """own(frame, **constants): the task of a CSV of these rows."""

    def load(frame, seed=0, **constants):
        frame.to_csv(tmp_path / "mine.csv", index=False)
        c = own_data(defaults[0] | {"DATASET": str(tmp_path / "mine.csv"), "TEXT_FIELD": "review",
                                    "LABEL_FIELD": "verdict", **constants})
        return load_task(c, seed, word_tokenizer())

    return load


def refused(load, *args, **constants):
    with pytest.raises(InputError) as error:
        load(*args, **constants)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_sorted_file_is_cut_into_splits_with_all_classes(own):
    task = own(reviews())
    assert task.class_names == ["bad", "good"] and task.attribute is None
    assert [torch.bincount(task.y[ids]).tolist() for ids in task.splits.values()] == [[21, 22], [3, 2], [6, 6]]
    ids = torch.cat(list(task.splits.values()))
    assert len(ids) == len(ids.unique()) == 60  # all of the file: the stories' limit of 600 is not its own
    other = own(reviews(), seed=1)
    assert torch.equal(task.splits["test"], other.splits["test"])
    assert not torch.equal(task.splits["val"], other.splits["val"])


def test_texts_that_occur_twice_stay_on_one_side_of_the_test(own, caplog):
    frame = reviews()
    task = own(pandas.concat([frame, frame]), TEST_FRAC=0.25)
    test = {task.texts[i] for i in task.splits["test"].tolist()}
    assert len(test) == 15 and len(task.splits["test"]) == 30
    assert test.isdisjoint(task.texts[i] for name in ("train", "val") for i in task.splits[name].tolist())


@pytest.mark.parametrize("seed", range(3))
def test_texts_that_occur_twice_stay_on_one_side_of_the_validation(own, seed):
    """Whatever the seed, and with another number of copies of each text."""
    frame = reviews()
    task = own(pandas.concat([frame, frame[::2], frame[::3], frame[::3]]), seed=seed, VAL_FRAC=0.25)
    texts = {name: {task.texts[i] for i in ids.tolist()} for name, ids in task.splits.items()}
    assert len(texts["val"]) == 12 and not texts["val"] & (texts["train"] | texts["test"])
    assert sum(len(ids) for ids in task.splits.values()) == len(torch.cat(list(task.splits.values())).unique()) == 130
    assert [torch.bincount(task.y[ids]).min() > 0 for ids in task.splits.values()] == [True] * 3


def test_unique_texts_are_cut_as_ever(own):
    """By rows: what was trained on them before stays as it was."""
    task = own(reviews(), VAL_FRAC=0.25)
    both = torch.cat([task.splits["train"], task.splits["val"]]).sort().values.numpy()
    train, val = train_test_split(both, test_size=0.25, random_state=0, stratify=task.y[both].numpy())
    assert task.splits["val"].tolist() == sorted(val) and task.splits["train"].tolist() == sorted(train)


def test_held_out_texts_that_are_trained_on_are_told(own, tmp_path, caplog):
    reviews(20).to_csv(tmp_path / "test.csv", index=False)
    own(reviews(20), TEST_DATASET=str(tmp_path / "test.csv"), VAL_FRAC=0.25)
    assert "20 of 20 test texts are training texts too" in caplog.text


def test_texts_of_both_held_out_splits_are_told(own, tmp_path, caplog):
    reviews(20).to_csv(tmp_path / "test.csv", index=False)
    reviews(20).to_csv(tmp_path / "val.csv", index=False)
    frame = reviews().assign(review=lambda f: "the " + f.review)
    own(frame, TEST_DATASET=str(tmp_path / "test.csv"), VAL_DATASET=str(tmp_path / "val.csv"))
    assert "20 of 20 val texts are test texts too" in caplog.text and "training texts too" not in caplog.text


def test_a_validation_file_stays_the_validation_set_where_test_is_cut(own, tmp_path):
    held_out = reviews(20).assign(review=lambda f: f.review + " again")
    held_out.to_csv(tmp_path / "val.csv", index=False)
    task = own(reviews(), VAL_DATASET=str(tmp_path / "val.csv"))
    assert [len(ids) for ids in task.splits.values()] == [48, 20, 12]
    assert {task.texts[i] for i in task.splits["val"].tolist()} == set(held_out.review)


def test_blanks_around_a_text_make_no_other_text(own):
    frame = reviews()
    task = own(pandas.concat([frame, frame.assign(review=lambda f: f.review + " ")]), TEST_FRAC=0.25, VAL_FRAC=0.25)
    texts = [{task.texts[i].strip() for i in ids.tolist()} for ids in task.splits.values()]
    assert sum(map(len, texts)) == len(set.union(*texts)) == 60


def test_other_attributes_or_classes_are_another_task(own):
    frame = reviews().assign(colour=["red", "blue"] * 30)
    task = own(frame, ATTRIBUTE_FIELD="colour")
    others = [own(frame.assign(colour=frame.colour[::-1].tolist()), ATTRIBUTE_FIELD="colour"),
              own(frame.assign(colour=frame.colour.str.upper()), ATTRIBUTE_FIELD="colour"), own(frame),
              own(frame.assign(verdict=frame.verdict + "!"), ATTRIBUTE_FIELD="colour")]
    assert len({each.identity() for each in (task, *others)}) == 5
    assert own(frame, ATTRIBUTE_FIELD="colour").identity() == task.identity()


def test_one_file_is_never_two_splits(own, tmp_path):
    said = refused(own, reviews(), TEST_DATASET=str(tmp_path / "mine.csv"))
    assert "TEST_DATASET and DATASET are the same data, mine.csv" in said and "set TEST_DATASET to None" in said
    assert "set VAL_SPLIT to None" in refused(own, reviews(), VAL_SPLIT="validation")


def test_a_folder_without_splits_is_cut_too(own, tmp_path):
    import datasets

    names = datasets.ClassLabel(names=["bad", "good"])
    frame = reviews().assign(verdict=lambda f: (f.verdict == "good").astype(int))
    datasets.Dataset.from_pandas(frame).cast_column("verdict", names).save_to_disk(tmp_path / "folder")
    task = own(reviews(), DATASET=str(tmp_path / "folder"))
    assert task.class_names == ["bad", "good"] and [len(ids) for ids in task.splits.values()] == [43, 5, 12]
    assert sum(task.splits[name].numel() for name in task.splits) == len(torch.cat(list(task.splits.values())).unique())


@pytest.mark.parametrize("values,names", [
    ([1.0, 0.0, 1.0, 0.0], [0, 1]), (["Positive ", "negative", "Positive", " negative"], ["Positive", "negative"]),
    (["Positive", "negative", "negative", "positive "], ["Positive", "negative"]),
])
def test_labels_that_are_written_differently_are_one_class(values, names, caplog):
    y, found = classes(values, ["train", "train", "train", "test"], "LABEL_FIELD=x")
    assert found == names and y[3] == (0 if "ositive" in str(values[3]) or values[3] == 0.0 else 1)
    assert ("'positive' is read as 'Positive'" in caplog.text) == (values[3] == "positive ")


def test_two_classes_that_differ_in_case_stay_two_and_are_told(caplog):
    y, names = classes(["a", "A", "a", "A"], ["train"] * 4, "LABEL_FIELD=x")
    assert names == ["A", "a"] and y.tolist() == [1, 0, 1, 0]
    assert "'A' and 'a' are different classes" in caplog.text


def test_an_attribute_that_the_first_row_lacks_is_not_forgotten(own, tmp_path):
    rows = reviews().assign(colour="red").to_dict("records")
    del rows[0]["colour"]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = refused(own, reviews(), DATASET=str(tmp_path / "mine.jsonl"), ATTRIBUTE_FIELD="colour")
    assert "ATTRIBUTE_FIELD=colour has no value in 1 of 60 examples" in said


def test_numbers_are_named_as_the_data_set_names_them():
    assert in_words([0, 1], ["bad", "good"]) == ["bad", "good"] and in_words([1, 2], ["a", "b", "c"]) == ["b", "c"]
    assert in_words([1, 5], ["bad", "good"]) == ["1", "5"] and in_words(["a", "b"], None) == ["a", "b"]


@pytest.mark.parametrize("change,constants,said", [
    ({"verdict": "good"}, {}, "the labels have only one value, good; set LABEL_FIELD"),
    ({"verdict": [i / 7 for i in range(60)]}, {}, "a number that is no class in 51 of 60 examples"),
    ({"verdict": [f"n{i}" for i in range(60)]}, {},
     "has 60 values in 60 training examples (e.g. 'n0'); set LABEL_FIELD"),
    ({"verdict": ["good"] * 59 + ["bad"]}, {}, "a test set can't be cut from DATASET: 'bad' has 1 of 60 examples"),
    ({"verdict": ["good"] * 58 + ["bad"] * 2}, {"TEST_FRAC": 0.5},
     "validation can't be cut from training: 'bad' has 1 of 30 examples"),
    ({"verdict": ["good"] * 30 + [None] * 30}, {}, "no value in 30 of 60 examples"),
    ({}, {"LABEL_FIELD": "label"}, "has no field 'label'; it has review, verdict: set LABEL_FIELD"),
    ({}, {"TEXT_FIELD": "text"}, "has no field 'text'; it has review, verdict: set TEXT_FIELD"),
    ({"review": [""] * 40 + ["the cat"] * 20}, {}, "which is blank; set TEXT_FIELD"),
    ({}, {"TEXT_FIELD": "number", "LABEL_FIELD": "verdict"}, "has no field 'number'"),
])
def test_a_file_that_can_t_be_right_is_refused_in_one_line(own, change, constants, said):
    message = refused(own, reviews(**change), **constants)
    assert said in message and "set " in message


def test_blank_texts_are_left_out_and_counted(own, caplog):
    texts = reviews().review.tolist()
    task = own(reviews(review=[" " if i in (3, 40) else text for i, text in enumerate(texts)]))
    assert sum(len(ids) for ids in task.splits.values()) == 58
    assert "2 of 60 rows have no text in 'review'; the first is row 4 of these, which is blank" in caplog.text


@pytest.mark.parametrize("verdicts,said", [
    (["good"] * 6, "all 6 test examples are of the class 'good'; set TEST_DATASET"),
    (["good", "bad", "Mixed"], "set LABEL_FIELD or DATASET so that training has every class"),
])
def test_a_test_file_without_the_classes_is_refused(own, tmp_path, verdicts, said):
    frame = pandas.DataFrame({"review": [f"{TEXTS[i % 6]} tree {i}" for i in range(len(verdicts))],
                              "verdict": verdicts})
    frame.to_csv(tmp_path / "test.csv", index=False)
    assert said in refused(own, reviews(), TEST_DATASET=str(tmp_path / "test.csv"))


def test_a_class_that_a_split_lacks_is_told(own, tmp_path, caplog):
    frame = reviews(verdict=["bad", "good", "mixed"] * 20)
    test = pandas.DataFrame({"review": ["the red cat sat", "the red dog sat"], "verdict": ["bad", "mixed"]})
    test.to_csv(tmp_path / "test.csv", index=False)
    own(frame, TEST_DATASET=str(tmp_path / "test.csv"))
    assert ("test has no example of 'good': no score of it counts this class; set TEST_DATASET to data with every "
            "class") in caplog.text


def test_the_log_says_what_is_scored(own, defaults, caplog):  # noqa: F811
    with caplog.at_level(logging.INFO, "workbench"):
        task = own(reviews())
        say_what_is_scored(task, defaults[0] | {"LABEL_FIELD": "verdict", "PROBE_LIMIT": 20}, 0)
    said = [line.getMessage() for line in caplog.records]
    assert said.pop().startswith("only 12 test examples are scored: base U leaves out units that fire on fewer than 20")
    assert said[-5:] == ["verdict: 2 classes", "train: 43 examples: bad (21), good (22)",
                         "val: 5 examples: bad (3), good (2)", "test: 12 examples: bad (6), good (6)",
                         "PROBE_LIMIT, training examples: 20 of 43 drawn by seed 0: bad (10), good (10)"]


@pytest.mark.parametrize("given,name", [
    ({}, "tiny"), ({"DATASET": "my reviews.v2.csv"}, "my_reviews.v2"), ({"DATASET": "/a/.b.tsv"}, "_b"),
    ({"DATASET": "a.csv", "SETTING": "x"}, "x"), ({"DATASET": "user/data"}, "tiny"),
    ({"DATASET": "store/embedded/stories/test.jsonl"}, "tiny"), ({"PRESET": "mlp_mnist", "DATASET": "d/mnist"},
                                                                 "mlp_mnist"),
])
def test_outputs_are_named_after_the_file(defaults, given, name):  # noqa: F811
    assert setting_name(defaults[0] | given) == name


def test_the_stories_moods_have_their_names(defaults):  # noqa: F811
    task = load_task(own_data(defaults[0]), 0, word_tokenizer())
    assert task.class_names == ["bad end", "good end"] and len(task.attribute_names) == 4
    assert not any(name.isdigit() for name in task.attribute_names) and len(task.splits["train"]) == 600


def test_a_file_of_own_data_needs_no_other_constant(tmp_path, monkeypatch, script, own_store):  # noqa: F811
    c = write_texts(tmp_path, "llama")
    reviews(40).to_csv(tmp_path / "mine.csv", index=False)
    small = [f"MODEL={c['MODEL']}", "EPOCHS_PER_CYCLE=1", "SAE_EPOCHS=1", "SEEDS=0", "ARMS=lambda0,per_class",
             "METRICS=()", "KEEP_PCT=5"]
    monkeypatch.chdir(tmp_path)
    printed = script("04_train_cycle.py", "DATASET=mine.csv", "TEXT_FIELD=review", "LABEL_FIELD=verdict", *small)[1]
    assert "test: 8 examples: bad (4), good (4)" in printed and "SETTING=mine" in printed
    assert (own_store / "sae_ception/mine/results.csv").exists()
    assert "next: " in script("01_train_baseline.py", "DATASET=mine.csv", "TEXT_FIELD=review", "LABEL_FIELD=verdict",
                              *small[:2])[1]
    assert script("02_train_sae.py", "SETTING=mine", "SAE_EPOCHS=1")[0] == 0
