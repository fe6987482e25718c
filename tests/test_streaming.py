"""Texts streamed to a file: the same texts and the same run as from memory, and nothing is lost in a kill."""
import json

import datasets
import pandas
import pytest
import streaming
from conftest import run_script
from streaming import TextFile, fingerprint_texts, stream_texts

from lib.documents import drawn_from_stream, drawn_rows
from lib.environment import InputError
from lib.files import fingerprint
from lib.texts import load_documents

SAVE = "experiments/verify_sae_training/01_save_activations.py"
DOCUMENTS = [{"n": i, "text": None if i % 7 == 3 else f"é \u2028 line\nbreak \"{i}\"" * (i % 5)} for i in range(60)]


@pytest.fixture(params=["jsonl", "parquet"])
def source(tmp_path, request):
    path = tmp_path / f"data.{request.param}"
    if request.param == "jsonl":
        path.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    else:
        pandas.DataFrame(DOCUMENTS).to_parquet(path)
    return path


def in_memory(source, limit):
    return [document["text"] for document in load_documents(str(source), limit=limit)]


@pytest.mark.parametrize("limit", [None, 20, 1000])
def test_streamed_texts_are_those_of_memory(source, tmp_path, limit):
    texts, expected = stream_texts(str(source), tmp_path / "copy.jsonl", limit=limit), in_memory(source, limit)
    assert list(texts) == expected and len(texts) == len(expected)
    assert texts[3:15] == expected[3:15] and texts[-1] == expected[-1] and texts[100_000:] == []
    assert fingerprint_texts(texts) == fingerprint(expected)


def test_a_copy_that_was_killed_goes_on(source, tmp_path, monkeypatch):
    """Killed after any block, or within a line, the copy ends with the same bytes and reads no document twice."""
    monkeypatch.setattr(streaming, "COPY_TEXTS", 4)
    stream_texts(str(source), tmp_path / "whole.jsonl", limit=50)
    whole = (tmp_path / "whole.jsonl").read_bytes()
    for cut in range(0, len(whole), 97):
        part = tmp_path / f"{cut}.jsonl.part"
        part.write_bytes(whole[:cut])
        stream_texts(str(source), tmp_path / f"{cut}.jsonl", limit=50)
        assert (tmp_path / f"{cut}.jsonl").read_bytes() == whole and not part.exists()


def test_an_interrupted_copy_leaves_whole_blocks(source, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "COPY_TEXTS", 4)

    def stop(documents, **options):
        for i, document in enumerate(documents):
            if i == 30:
                raise KeyboardInterrupt
            yield document

    with monkeypatch.context() as patch:
        patch.setattr(streaming, "tqdm", stop)
        with pytest.raises(KeyboardInterrupt):
            stream_texts(str(source), tmp_path / "copy.jsonl")
    assert not (tmp_path / "copy.jsonl").exists()
    assert len((tmp_path / "copy.jsonl.part").read_text().split("\n")) - 1 == 28
    assert list(stream_texts(str(source), tmp_path / "copy.jsonl")) == in_memory(source, None)


def test_a_finished_copy_is_not_made_again(source, tmp_path):
    stream_texts(str(source), tmp_path / "copy.jsonl", limit=10)
    before = in_memory(source, 10)
    source.unlink()
    assert list(stream_texts(str(source), tmp_path / "copy.jsonl", limit=10)) == before


def test_what_cant_be_streamed_is_named(source, tmp_path):
    with pytest.raises(InputError, match="no field 'story'.*n, text"):
        stream_texts(str(source), tmp_path / "a.jsonl", text_field="story")
    (tmp_path / "texts.csv").write_text("text\nhello\n")
    with pytest.raises(InputError, match="STREAM=False for texts.csv"):
        stream_texts(str(tmp_path / "texts.csv"), tmp_path / "b.jsonl")
    with pytest.raises(InputError, match="can't be read"):
        stream_texts("nobody/nothing-of-this-name", tmp_path / "c.jsonl")


def test_lines_that_are_no_text_are_left_out(tmp_path):
    (tmp_path / "x.jsonl").write_text('"a"\nnull\n"b"\n')
    assert list(TextFile(tmp_path / "x.jsonl")) == ["a", "b"]


def test_a_streamed_run_has_the_files_of_one_from_memory(tmp_path, saved_model):
    model, data = saved_model
    constants = (f"MODEL={model}", f"DATASET={data}", "SHARD_ROWS=100", "PREFLIGHT=False", "VAL_FRAC=0.2")
    runs = []
    for name in ("False", "True"):
        run_script(SAVE, *constants, f"STREAM={name}", store=tmp_path / name)
        [run] = (tmp_path / name / "verify_sae_training" / "runs").iterdir()
        runs.append({str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()})
    assert runs[0] == runs[1] and len(runs[0]) > 8


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet", "txt", "folder"])
def test_a_limit_draws_a_sample(tmp_path, kind, monkeypatch):
    """From a sorted file a limit draws a fair sample: the same at every call, in order, whatever the format."""
    monkeypatch.setattr("lib.documents.CHUNK_ROWS", 37)
    frame = pandas.DataFrame({"text": [f"{'ab'[i // 200]} {i:03d}" for i in range(400)], "n": range(400)})
    path = tmp_path / f"sorted.{kind}"
    writers = {
        "jsonl": lambda: frame.to_json(path, orient="records", lines=True),
        "json": lambda: frame.to_json(path, orient="records"),
        "csv": lambda: frame.to_csv(path, index=False), "tsv": lambda: frame.to_csv(path, sep="\t", index=False),
        "parquet": lambda: frame.to_parquet(path), "txt": lambda: path.write_text("\n\n".join(frame.text)),
        "folder": lambda: datasets.Dataset.from_pandas(frame).save_to_disk(path),
    }
    writers[kind]()
    drawn = in_memory(path, 100)
    assert len(drawn) == 100 and drawn == sorted(drawn) == in_memory(path, 100)
    assert 35 <= sum(text.startswith("a") for text in drawn) <= 65
    assert drawn == [frame.text[i] for i in drawn_rows(400, 100)]
    assert in_memory(path, 400) == in_memory(path, None) == frame.text.tolist()


def test_a_stream_of_unknown_length_draws_from_a_buffer(monkeypatch):
    monkeypatch.setattr("lib.documents.STREAM_BUFFER", 300)
    stream = datasets.Dataset.from_dict({"n": list(range(400))}).to_iterable_dataset()
    drawn = [row["n"] for row in drawn_from_stream(stream, 100)]
    assert len(set(drawn)) == 100 and max(drawn) > 300 and [row["n"] for row in drawn_from_stream(stream, 100)] == drawn
