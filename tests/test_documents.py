"""Data sets with rows that hold no text: they are counted and told, or the whole is refused in one line."""
import json
import logging
import os

import datasets
import pandas
import pytest
import torch
from conftest import tiny_model, word_tokenizer
from streaming import stream_texts

from lib.activations import save_activations
from lib.environment import InputError
from lib.hooks import resolve
from lib.texts import load_documents, read_documents, split_by_text, split_texts

GOOD = ["the cat sat", "a dog ran", "it was sad", "the blue bird"]
BAD = {"null": None, "number": 3.5, "zero": 0, "flag": True, "list": ["a"], "dict": {"a": 1},
       "empty": "", "blank": " \n\u3000"}


def jsonl(path, values):
    lines = [json.dumps({"other": 1} if value is ... else {"other": 1, "text": value}) for value in values]
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


@pytest.mark.parametrize("bad", BAD)
def test_a_row_without_text_is_left_out_with_a_line(tmp_path, caplog, bad):
    path = jsonl(tmp_path / "x.jsonl", [*GOOD[:2], BAD[bad], *GOOD[2:]])
    with caplog.at_level(logging.WARNING, "workbench"):
        assert [document["text"] for document in load_documents(path)] == GOOD
    assert "1 of 5 rows have no text in 'text'; the first is row 3" in caplog.text and caplog.text.count("\n") == 1


def test_a_missing_field_is_left_out_with_a_line(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "workbench"):
        assert len(load_documents(jsonl(tmp_path / "x.jsonl", [*GOOD, ...]))) == 4
    assert "the first is row 5 of these: they are left out" in caplog.text


@pytest.mark.parametrize("ending", ["csv", "tsv", "json", "parquet"])
@pytest.mark.parametrize("limit", [None, 5])
def test_an_empty_cell_is_left_out_with_a_line(tmp_path, caplog, ending, limit):
    frame, path = pandas.DataFrame({"n": range(6), "text": [*GOOD[:2], "", *GOOD[2:], "  "]}), tmp_path / f"x.{ending}"
    {"csv": lambda: frame.to_csv(path, index=False), "tsv": lambda: frame.to_csv(path, index=False, sep="\t"),
     "json": lambda: frame.to_json(path, orient="records"), "parquet": lambda: frame.to_parquet(path)}[ending]()
    with caplog.at_level(logging.WARNING, "workbench"):
        found = [document["text"] for document in load_documents(str(path), limit=limit)]
    assert set(found) <= set(GOOD) and len(found) >= (4 if limit is None else 3)
    assert "rows have no text in 'text'; the first is row 3 of these, which is blank" in caplog.text


@pytest.mark.parametrize("content", ["\ntext\nfoo\nbar\n", "text\r\r\nfoo\r\r\nbar\r\r\n", "text\n\nfoo\n\nbar\n\n",
                                     "text\nfoo\n \nbar\n\n"])
def test_blank_lines_are_no_documents_unless_row_numbers_matter(tmp_path, content):
    path = tmp_path / "x.csv"
    path.write_bytes(content.encode())
    for limit in (None, 2):
        assert [row["text"] for row in load_documents(str(path), limit=limit)] == ["foo", "bar"]
    path.write_text("text\nfoo\n \nbar\n")
    assert [row["text"] for row in read_documents(str(path), blank_lines=True)] == ["foo", " ", "bar"]


@pytest.mark.parametrize("bad", BAD)
def test_mostly_no_text_is_refused(tmp_path, bad):
    path = jsonl(tmp_path / "x.jsonl", [BAD[bad]] * 3 + GOOD[:2])
    with pytest.raises(InputError, match="3 of 5 rows have no text in 'text'.*set TEXT_FIELD") as error:
        load_documents(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "text"), [
    ("numbers.csv", "text,n\n1,2\n3,4\n"), ("flags.csv", "text,n\nTrue,2\nFalse,4\n"),
    ("numbers.tsv", "text\tn\n1.5\t2\n2.5\t4\n"),
])
def test_a_column_of_other_values_is_refused(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match="2 of 2 rows have no text in 'text'"):
        load_documents(str(tmp_path / name))


@pytest.mark.parametrize("limit", [None, 1])
@pytest.mark.parametrize("ending,separator,remedy", [("csv", ",", "quote fields"), ("tsv", "\t", "leave out the tabs")])
@pytest.mark.parametrize("more", ["", "4", "4{0}5"])
def test_rows_with_more_fields_than_the_header_are_refused(tmp_path, ending, separator, remedy, more, limit):
    """pandas would take the first column for the rows' names, and the next one, here also texts, for the first."""
    path = tmp_path / f"x.{ending}"
    fields = [["text", "note"], *([text, f"note {text}"] for text in GOOD)]
    path.write_text("".join(separator.join(row) + "\n" for row in fields))
    assert len(load_documents(str(path), limit=limit)) == (limit or len(GOOD))
    rows = [fields[0], *([*row, more.format(separator)] for row in fields[1:])]
    path.write_text("".join(separator.join(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=f"^DATASET=.*x.{ending} has rows with more fields .*; {remedy}") as error:
        load_documents(str(path), limit=limit)
    assert "\n" not in str(error.value)


def test_a_folder_without_the_split_names_those_that_are_there(tmp_path):
    rows = datasets.Dataset.from_dict({"text": GOOD})
    datasets.DatasetDict({"training": rows, "dev": rows.select([0])}).save_to_disk(tmp_path / "folder")
    assert [document["text"] for document in load_documents(str(tmp_path / "folder"), "dev")] == GOOD[:1]
    with pytest.raises(InputError, match="has no split 'train'; it has training, dev: set DATA_SPLIT") as error:
        load_documents(str(tmp_path / "folder"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("column", [[b"a", b"b"], [{"a": 1}, {"a": 2}], [["a"], ["b"]], [1, 2]])
def test_a_parquet_column_of_other_values_is_refused(tmp_path, column):
    pandas.DataFrame({"text": column}).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(InputError, match="2 of 2 rows have no text"):
        load_documents(str(tmp_path / "x.parquet"))


def test_a_stream_tells_what_it_leaves_out(tmp_path, caplog):
    path = jsonl(tmp_path / "x.jsonl", [GOOD[0], None, *GOOD[1:], " "])
    with caplog.at_level(logging.WARNING, "workbench"):
        assert list(stream_texts(path, tmp_path / "copy.jsonl")) == GOOD
    assert "2 of 6 rows have no text in 'text'; the first is row 2" in caplog.text
    with pytest.raises(InputError, match="2 of 2 rows"):
        stream_texts(jsonl(tmp_path / "y.jsonl", [None, None]), tmp_path / "other.jsonl")


def test_a_text_that_occurs_twice_stands_on_one_side_of_the_split():
    texts = [f"text {i % 70}" for i in range(100)] + ["\ud800"]
    splits = split_by_text(texts, 0.2, 3)
    sides = {text: {split for other, split in zip(texts, splits) if other == text} for text in texts}
    assert all(len(side) == 1 for side in sides.values()) and [*sides.values()].count({"val"}) == round(71 * 0.2)
    assert split_by_text(texts[:70], 0.2, 3) == split_texts(70, 0.2, 3)  # of old, where nothing occurs twice
    with pytest.raises(InputError, match="two different texts"):
        split_by_text(["a"] * 5, 0.2, 3)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.jsonl")
    with pytest.raises(InputError, match="is not a file"):
        load_documents(str(tmp_path / "x.jsonl"))


@pytest.mark.parametrize("texts", [["cat", "cat"], ["a cat"] * 6])
def test_activations_that_are_all_alike_are_refused_and_leave_no_run(tmp_path, texts):
    model = tiny_model("llama")
    with torch.no_grad():  # whatever the token, its activation is the same
        model.model.embed_tokens.weight[:] = model.model.embed_tokens.weight[5]
    splits = ["val"] + ["train"] * (len(texts) - 1)
    with pytest.raises(InputError, match="same activation at .*, so there is nothing to learn"):
        save_activations(tmp_path / "run", model, word_tokenizer(), [resolve(model, "resid_pre:0")], texts=texts,
                         splits=splits)
    assert not (tmp_path / "run" / "manifest.json").exists()
