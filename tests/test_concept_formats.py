"""Files of concepts from people, spreadsheets and strangers: read as they were meant, or refused in one line."""
import csv
import io
import json
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_dictionary import HEADER, MADE, dictionary

from concepts.dictionary import export_concepts, merge_concepts, read_concepts
from concepts.formats import load
from concepts.tables import concepts_from_csv, concepts_to_csv, read_table
from lib.environment import InputError

FORMULAS = ["=cmd|'/C calc'!A0", "+1", "-1", "@SUM(1)", "\t=1", "\r=1", "'=1",
            "''+1", "＝1", "'quoted'", "= ", "-", "'"]


def refused(call, *arguments):
    """The one line with which a call refuses."""
    with pytest.raises(InputError) as error:
        call(*arguments)
    assert "\n" not in str(error.value) and len(str(error.value)) < 700
    return str(error.value)


@pytest.mark.parametrize("field", ["name", "description", "notes", "model"])
def test_formulas_are_texts_in_a_spreadsheet_and_come_back(tmp_path, field):
    concepts = {i: MADE | {field: text} for i, text in enumerate(FORMULAS)}
    concepts_to_csv(concepts, tmp_path / "t.csv", "aa")
    rows = list(csv.reader(io.StringIO((tmp_path / "t.csv").read_bytes().decode("utf-8-sig"), newline="")))
    assert not [cell for row in rows for cell in row if cell[:1] in tuple("=+-@\t\r＝＋－＠")]
    assert concepts_from_csv(tmp_path / "t.csv", concepts, "aa") == concepts
    edited = concepts_from_csv(tmp_path / "t.csv", {}, "aa")
    assert edited == {}  # no line was edited


@pytest.mark.parametrize("save", [
    lambda text: text.encode("utf-8-sig"),
    lambda text: text.encode("utf-8"),
    lambda text: text.replace(",", "\t").encode("utf-16"),
    lambda text: text.replace(",", ";").encode("utf-8-sig"),
    lambda text: b"sep=;\r\n" + text.replace(",", ";").encode(),
    lambda text: text.replace("\r\n", "\n").encode(),
    lambda text: text.encode() + b",,,,,,,,,,\r\n\r\n",
])
def test_tables_as_spreadsheets_save_them(tmp_path, save):
    concepts = {1: MADE | {"name": "grün → blau"}, 2: MADE | {"name": "b"}}
    for entry in concepts.values():
        entry["description"] = "no separator"
    concepts_to_csv(concepts, tmp_path / "t.csv", "aa")
    text = (tmp_path / "t.csv").read_bytes().decode("utf-8-sig")
    (tmp_path / "t.csv").write_bytes(save(text.replace("2,b,", "2,bö,")))
    now = concepts_from_csv(tmp_path / "t.csv", concepts, "aa")
    assert (now[1] == concepts[1]
            and now[2] == concepts[2] | {"name": "bö", "notes": "", "edited_by": "", "source": "human"})


@pytest.mark.parametrize(("content", "message"), [
    ("latent,name\n1,grün\n".encode("latin-1"), "is not UTF-8 text; save it in UTF-8"),
    ("latent,name\n²,x\n".encode(), "a latent's number and a name"),
    (b"latent,name\n1, \n", "a latent's number and a name"),
    (b"latent,name\n-1,x\n", "a latent's number"),
    (b"latent,name\n1" + b"0" * 5000 + b",x\n", "a latent's number"),
    (b"latent,name\n1,a\n1,b\n", "latent 1 appears twice"),
    (b"latent,name\n1," + b"x" * 200_000 + b"\n", "field larger than field limit"),
    (b'latent,name\n1,"x\n2,y\n', "unexpected end of data"),
    (b"latent,name\n1,a,b\n", "more cells than columns"),
    (b"", "must name the columns latent and name"),
    (b"number,title\n1,x\n", "must name the columns"),
    (b"\x00\x01\x02", "must name the columns"),
    (b"\xff\xfelatent", "must name the columns|is not UTF-8"),
    (b"latent,name\n1,gr?n ? blau\n", "latent 1 lost characters"),
])
def test_tables_that_are_none(tmp_path, content, message):
    (tmp_path / "t.csv").write_bytes(content)
    said = refused(concepts_from_csv, tmp_path / "t.csv", {1: MADE | {"name": "gr→n ā blau"}}, "aa")
    assert any(part in said for part in message.split("|"))


def laughs(levels):
    """YAML's billion laughs: each line stands for nine of the line before."""
    return "\n".join(["a0: &a0 [lol]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels))])


@pytest.mark.parametrize(("name", "text", "message"), [
    ("c.yaml", laughs(12), "aliases"), ("c.yaml", "a: &x {b: 1}\nc:\n  <<: *x\n", "aliases"),
    ("c.yaml", "a: &x [*x]", "aliases"),
    ("c.yaml", "[" * 5000, "nested too deeply"), ("c.json", "[" * 100_000, "nested too deeply"),
    ("c.json", "[" * 20 + "]" * 20, "nested too deeply"),
    ("c.yaml", "a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
    ("c.yaml", "a: 2026-99-99", "month must be"),
    ("c.yaml", "a: 2026-01-01", "put a text in quotes"), ("c.yaml", "a: .nan", "the number nan"),
    ("c.yaml", "1: a\n'1': b", "appears twice"),
    ("c.yaml", "? [a]\n: b", "is not a concept dictionary"), ("c.yaml", "a: " + "9" * 5000, "Exceeds the limit"),
    ("c.yaml", "a: \ud800", "not UTF-8"),
    ("c.yaml", "a: !!binary aGVsbG8=", "read as a bytes"), ("c.json", '{"a": 1, "a": 2}', "appears twice"),
    ("c.json", '{"a": "\\ud83d"}', "half a character"),
    ("c.json", '{"a": NaN}', "NaN"), ("c.json", '{"a": 1e999}', "the number inf"),
    ("c.json", "null", "is not a concept dictionary"),
    ("c.json", '{"schema_version": 1, "sae_hash": "../../x", "n_latents": 8, "concepts": {}}', "sae_hash"),
    ("c.json", json.dumps(dictionary({"1\n": MADE})), "concepts"),
    ("c.json", json.dumps(dictionary({"1" * 5000: MADE})), "concepts"),
    ("c.json", json.dumps(dictionary({"1": MADE | {"name": "x" * 2000}})), "name"),
    ("c.json", json.dumps(dictionary({}, n_latents=1e300)), "n_latents"),
])
def test_hostile_files_are_refused_in_one_line_and_soon(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text.encode(errors="surrogatepass"))
    start = time.monotonic()
    assert message in refused(read_concepts, tmp_path / name)
    assert time.monotonic() - start < 5


def test_what_is_no_file_is_refused(tmp_path):
    (tmp_path / "c.json").mkdir()
    for path, message in ((tmp_path / "c.json", "is not a file"), (tmp_path / "gone.yaml", "is missing"),
                          (tmp_path / ("x" * 300), "can't be read")):
        assert message in refused(load, path)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
NAMES = TEXT.filter(str.strip)
SOON = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@SOON
@given(st.dictionaries(st.integers(0, 7), st.tuples(NAMES, TEXT, TEXT), max_size=8),
       st.sampled_from(["json", "yaml", "csv"]))
def test_any_dictionary_comes_back_from_any_format(tmp_path, texts, ending):
    """Texts, formulas, line breaks, controls: the same when read back, and no line of a table counts as edited."""
    concepts = {i: MADE | {"name": name, "description": text, "notes": notes}
                for i, (name, text, notes) in sorted(texts.items())}
    path = tmp_path / f"c.{ending}"
    path.unlink(missing_ok=True)
    content = dictionary(concepts)
    export_concepts(content, path)
    if ending == "csv":
        assert [(line.latent, line.new["name"], line.new["notes"])
                for line in read_table(path)] == [(i, e["name"], e["notes"]) for i, e in concepts.items()]
        assert concepts_from_csv(path, concepts, HEADER["sae_hash"]) == concepts
    else:
        assert read_concepts(path) == content and merge_concepts(content, read_concepts(path)) == (concepts, [])


@SOON
@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode(errors="surrogatepass")),
       st.sampled_from([".json", ".yaml", ".csv"]))
def test_no_bytes_are_a_traceback(tmp_path, content, ending):
    path = tmp_path / f"any{ending}"
    for head in (b"", b"latent,name\n1,x\n" if ending == ".csv" else b'{"schema_version": 1, '):
        path.write_bytes(head + content)
        try:
            concepts_from_csv(path, {}, "aa") if ending == ".csv" else read_concepts(path)
        except InputError as error:
            assert "\n" not in str(error)


@SOON
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=8),
                    st.data())
def test_no_shape_is_a_traceback(tmp_path, value, data):
    """A sound dictionary with one value of any shape in any place."""
    content = dictionary({"1": MADE | {"score": 0.5}})
    place = data.draw(st.sampled_from([(), ("concepts",), ("concepts", "1")]))
    target = content
    for key in place:
        target = target[key]
    target[data.draw(st.sampled_from(list(target)))] = value
    (tmp_path / "c.json").write_text(json.dumps(content))
    try:
        found = read_concepts(tmp_path / "c.json")["concepts"]
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert all(entry["name"].strip() for entry in found.values())
