"""The concept dictionary: its schema, its formats there and back, edits by people, merge, search, and its script."""
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_verify_scripts import script  # noqa: F401  (a fixture)

from concepts.dictionary import (
    edit_concepts,
    export_concepts,
    merge_concepts,
    read_concepts,
    search_concepts,
    write_concepts,
)
from concepts.formats import SCHEMA
from concepts.tables import concepts_from_csv, concepts_to_csv
from lib.environment import InputError
from lib.files import read_json, write_tensors

HEADER = {"sae_hash": "aa", "run_id": "r", "model_id": "m", "hook": "h", "n_latents": 8}
MADE = {"name": "dog, cat", "description": "Fires on dog", "source": "offline", "score": 0.75,
        "rule": [["word", "dog"]], "model": None}
# Names that YAML or a table would read as something else if they were not quoted.
AWKWARD = ["no", "1.0", 'a, "b"', "Öl: ”x”", "- dash", "null", "{x}", "#1", "a\u2028b"]


def named_sae(store):
    """The folder of an SAE of this name; its weights are not read here."""
    folder = store / "verify_sae_training" / "saes" / "mine"
    folder.mkdir(parents=True)
    for name in ("topk_sae.pt", "topk_sae.json"):
        (folder / name).touch()
    return folder


def dictionary(concepts, **change):
    return {"schema_version": 1, **HEADER, "concepts": concepts} | change


def test_names_by_people_survive(tmp_path):
    path = tmp_path / "concepts.json"
    entry = {"name": "old", "source": "offline", "score": 0.7}
    write_concepts(path, HEADER, {1: entry, 2: entry})
    content = json.loads(path.read_text())
    content["concepts"]["2"] = {"name": "mine", "source": "human"}
    path.write_text(json.dumps(content))
    now = write_concepts(path, HEADER, {1: entry | {"name": "new"}, 2: entry, 3: entry})
    assert [now[i]["name"] for i in (1, 2, 3)] == ["new", "mine", "old"]
    assert read_concepts(path, "aa")["concepts"] == now
    write_concepts(path, HEADER | {"sae_hash": "bb"}, {1: entry})
    assert read_concepts(path)["concepts"].keys() == {1}
    assert read_concepts(tmp_path / "concepts_aa.json")["concepts"][2]["name"] == "mine"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 9}, "schema"),
        ({"concepts": {"8": {"name": "x", "source": "human"}}}, "latent 8"),
        ({"concepts": {"dog": {"name": "x", "source": "human"}}}, "dog"),
        ({"concepts": {"1": {"name": "x", "source": "guess"}}}, "source"),
        ({"concepts": {"1": {"source": "human"}}}, "name"),
        ({"concepts": {"5": {"name": "x", "source": "human"}}}, "never fires"),
        ({"concepts": {"1": {"name": "x", "source": "human", "score": 1.5}}}, "latent 1: score: 1.5 is greater"),
        ({"concepts": {"1": {"name": "", "source": "human"}}}, "latent 1: name"),
        ({"concepts": {"1": {"name": "x", "source": "offline", "rule": [["word"]]}}}, "latent 1: rule: 0"),
        ({"n_latents": 0}, "n_latents"),
        ({"concepts": []}, "concepts"),
        ({"sae_hash": "cc"}, "another SAE"),
    ],
)
def test_wrong_concept_files_are_refused(tmp_path, change, message):
    path = tmp_path / "concepts.json"
    path.write_text(json.dumps({"schema_version": 1, **HEADER, "concepts": {}} | change))
    with pytest.raises(InputError, match=message):
        read_concepts(path, "aa", dead=[5])


def test_the_table_for_people(tmp_path):
    entry = {"name": 'a, "b"', "description": "d", "source": "offline", "score": 0.5, "notes": ""}
    concepts = {1: entry, 4: entry}
    concepts_to_csv(concepts, tmp_path / "t.csv")
    assert concepts_from_csv(tmp_path / "t.csv", concepts) == concepts
    table = (tmp_path / "t.csv").read_text().replace('4,"a, ""b"""', "4,Öl")
    (tmp_path / "t.csv").write_text(table)
    changed = concepts_from_csv(tmp_path / "t.csv", concepts)
    assert changed[1] == entry and (changed[4]["name"], changed[4]["source"]) == ("Öl", "human")


@pytest.mark.parametrize("ending", [".json", ".yaml", ".yml"])
def test_a_dictionary_comes_back_whole(tmp_path, ending):
    content = dictionary({i: MADE | {"name": name, "score": i / 9} for i, name in enumerate(AWKWARD)}, n_latents=20)
    export_concepts(content, tmp_path / f"c{ending}")
    assert read_concepts(tmp_path / f"c{ending}") == content


def test_a_table_comes_back_without_a_change(tmp_path):
    concepts = {i: MADE | {"name": name, "notes": "two\nlines"} for i, name in enumerate(AWKWARD)}
    export_concepts(dictionary(concepts), tmp_path / "c.csv")
    assert concepts_from_csv(tmp_path / "c.csv", concepts) == concepts


@pytest.mark.parametrize(("name", "content", "message"), [
    ("c.yaml", "a: [", "is damaged or not YAML"), ("c.yaml", "- 1", "is not a concept dictionary"),
    ("c.json", "{", "is damaged"), ("gone.yaml", None, "is missing"),
])
def test_files_that_are_none(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message) as error:
        read_concepts(tmp_path / name)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="has no known ending"):
        export_concepts(dictionary({}), tmp_path / "c.xml")


def test_merge_tells_conflicts_and_keeps_what_people_wrote():
    person = MADE | {"source": "human"}
    mine = dictionary({1: MADE, 2: MADE, 3: person | {"name": "mine"}, 4: MADE | {"name": "same"},
                       5: person | {"name": "first"}})
    other = dictionary({2: person | {"name": "theirs"}, 3: MADE, 4: MADE | {"name": "same", "score": 0.1}, 5: person,
                        6: MADE})
    merged, conflicts = merge_concepts(mine, other)
    assert list(merged) == [1, 2, 3, 4, 5, 6]
    assert [merged[i]["name"] for i in (2, 3, 5)] == ["theirs", "mine", "first"] and merged[4]["score"] == 0.75
    assert [(c.latent, c.kept, c.dropped)
            for c in conflicts] == [(2, "theirs", "dog, cat"), (3, "mine", "dog, cat"), (5, "first", "dog, cat")]
    assert [c.reason for c in conflicts] == ["a person's name", "a person's name", "the first dictionary's"]
    assert merge_concepts(mine, mine) == (mine["concepts"], [])
    with pytest.raises(InputError, match="different SAEs"):
        merge_concepts(mine, dictionary({}, sae_hash="bb"))


def test_search_puts_names_first_then_scores():
    concepts = {
        1: MADE | {"name": "pets", "description": "a Dog"}, 2: MADE | {"name": "dog"},
        3: MADE | {"name": "big dog", "score": 0.9},
        4: {"name": "cat", "source": "human"}, 5: {"name": "x", "notes": "dog", "source": "human"},
    }
    assert search_concepts(concepts, "DOG") == [3, 2, 1, 5]
    assert (search_concepts(concepts, "dog big") == [3]
            and search_concepts(concepts, " ") == [] == search_concepts(concepts, "zebra"))


def test_the_schema_describes_what_the_steps_write():
    described = SCHEMA["$defs"]["concept"]["properties"]
    assert {"score", "judge", "scored_name", "rule", "offline_name"} <= described.keys()
    assert set(SCHEMA["required"]) <= SCHEMA["properties"].keys()


def test_the_script(script, own_store):  # noqa: F811
    path = named_sae(own_store) / "concepts.json"
    write_concepts(path, HEADER, {1: MADE, 2: MADE | {"name": "cow"}})
    other = path.with_name("other.yaml")
    export_concepts(dictionary({2: MADE | {"name": "moo", "source": "human"}, 3: MADE}), other)
    code, out, _ = script("concept_dictionary.py", f"MERGE={other}", f"EXPORT={path.with_name('out.csv')}",
                          "SEARCH=moo")
    assert code == 0 and "2: kept moo, dropped cow" in out and "1 found" in out
    assert (read_concepts(path)["concepts"][2]["source"] == "human"
            and (path.parent / "out.csv").read_text().count("\n") == 4)
    (path.parent / "out.csv").write_text("latent,name\n3,hay\n")
    assert script("concept_dictionary.py", f"MERGE={path.with_name('out.csv')}")[0] == 0
    assert read_json(path)["concepts"]["3"] == MADE | {"name": "hay", "source": "human"}


def written(path, names, sae_hash="aa", **entry):
    """A step's names in concepts.json, as notebook 04 writes them."""
    named = {latent: MADE | entry | {"name": name, "scored_name": name} for latent, name in names.items()}
    return write_concepts(path, HEADER | {"sae_hash": sae_hash}, named)


def edit_table(path, old, new):
    text = path.with_suffix(".csv").read_bytes().decode("utf-8-sig")
    assert old in text
    path.with_suffix(".csv").write_text(text.replace(old, new))


def names_of(path):
    return {latent: entry["name"] for latent, entry in read_concepts(path)["concepts"].items()}


@pytest.mark.parametrize("edited", ["json", "json without source", "csv", "aside"])
def test_names_by_people_survive_other_saes_in_between(tmp_path, edited):
    """SAEs a, b, a, b named in turns; a person names latent 1 of a, and later latent 2 of b."""
    path = tmp_path / "concepts.json"
    written(path, {1: "one", 2: "two"})
    if edited == "csv":
        edit_table(path, "1,one,", "1,mine,")
    elif edited != "aside":
        content = json.loads(path.read_text())
        content["concepts"]["1"] |= {"name": "mine"} | ({"source": "human"} if edited == "json" else {})
        path.write_text(json.dumps(content))
    written(path, {1: "eins", 2: "zwei"}, "bb")
    if edited == "aside":
        aside = tmp_path / "concepts_aa.json"
        aside.write_text(aside.read_text().replace('"name": "one"', '"name": "mine"'))
    assert names_of(path) == {1: "eins", 2: "zwei"} and names_of(tmp_path / "concepts_aa.json") == {1: "mine", 2: "two"}
    edit_concepts(path, lambda content: content["concepts"] | {2: {"name": "of b", "source": "human"}})
    for _ in range(2):
        assert written(path, {1: "one", 2: "two"})[1]["source"] == "human" and names_of(path) == {1: "mine", 2: "two"}
        written(path, {1: "eins", 2: "zwei"}, "bb")
        assert names_of(path) == {1: "eins", 2: "of b"}
    assert sorted(file.name for file in tmp_path.glob("*.json")) == ["concepts.json", "concepts_aa.json"]


def test_two_files_of_people_for_one_sae_are_both_kept(tmp_path):
    path = tmp_path / "concepts.json"
    written(path, {1: "one"})
    edit_concepts(path, lambda content: {1: {"name": "mine", "source": "human"}})
    (tmp_path / "concepts_aa.json").write_text(path.read_text().replace("mine", "older"))
    written(path, {1: "eins"}, "bb")
    written(path, {1: "one", 2: "two"})
    assert names_of(path) == {1: "mine", 2: "two"} and names_of(tmp_path / "concepts_aa_older.json") == {1: "older"}


def test_a_table_edited_in_place_is_taken_in(tmp_path, caplog):
    path = tmp_path / "concepts.json"
    written(path, {1: "one", 2: "two"})
    edit_table(path, "1,one,", "1,mine,")
    assert (written(path, {1: "newer", 2: "newer"})[1]
            | {"name": "mine", "source": "human"} == read_concepts(path)["concepts"][1])
    assert "1 concepts were edited in concepts.csv" in caplog.text and names_of(path) == {1: "mine", 2: "newer"}
    assert "1,mine," in path.with_suffix(".csv").read_text()
    before = path.read_bytes()
    written(path, {1: "newer", 2: "newer"})
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 3  # with the lock's file


@pytest.mark.parametrize("spoil", [
    lambda raw: raw.replace(b"1,one,", b"1,gr\xfcn,"),  # not UTF-8
    lambda raw: raw.replace(b"1,one,", b"99,one,"),
    lambda raw: raw.replace(b"aa/d", b"cc/d").replace(b"1,one,", b"1,mine,"),
    lambda raw: raw.replace(b"1,one,", b'1,"one,'),
    lambda raw: b"latent,name\n1,mine\n",  # has no stamps: old names could not be told from edits
])
def test_a_table_whose_edits_cannot_be_taken_in_is_kept(tmp_path, caplog, spoil):
    path, table = tmp_path / "concepts.json", tmp_path / "concepts.csv"
    for kept in ("concepts_edited.csv", "concepts_edited_2.csv"):
        written(path, {1: "one"})
        table.write_bytes(spoiled := spoil(table.read_bytes()))
        written(path, {1: "newer", 2: "two"})
        assert ((tmp_path / kept).read_bytes() == spoiled and kept in caplog.text
                and names_of(path) == {1: "newer", 2: "two"})
    table.write_bytes(spoiled)
    path.unlink()
    written(path, {1: "one"})
    assert (tmp_path / "concepts_edited_3.csv").read_bytes() == spoiled


def test_both_files_edited_at_one_latent_are_both_kept(tmp_path, caplog):
    path = tmp_path / "concepts.json"
    written(path, {1: "one"})
    path.write_text(path.read_text().replace('"name": "one"', '"name": "json\'s"'))
    edit_table(path, "1,one,", "1,csv's,")
    assert (written(path, {1: "newer"})[1]["name"] == "json's"
            and "csv's" in (tmp_path / "concepts_edited.csv").read_text())


@pytest.mark.parametrize("ending", ["yaml", "json"])
def test_an_exported_file_tells_what_was_edited(tmp_path, ending):
    written(tmp_path / "concepts.json", {1: "one", 2: "two"})
    export_concepts(read_concepts(tmp_path / "concepts.json"), export := tmp_path / f"mine.{ending}")
    export.write_text(export.read_text().replace("one", "mine", 1).replace("Fires on dog", "Barks", 1))
    merged, conflicts = merge_concepts(read_concepts(tmp_path / "concepts.json"), read_concepts(export))
    assert ((merged[1]["name"], merged[1]["source"], merged[2]["source"]) == ("mine", "human", "offline")
            and len(conflicts) == 1)


def test_a_file_from_before_there_were_digests(tmp_path):
    path = tmp_path / "concepts.json"
    path.write_text(json.dumps(dictionary({"1": MADE | {"name": "mine", "scored_name": "dog, cat"}, "2": MADE})))
    assert [entry["source"] for entry in read_concepts(path)["concepts"].values()] == ["human", "offline"]


def test_an_edited_table_against_another_persons_name(tmp_path):
    """A line that was not edited changes nothing, however old it is; a name given since stays and is told."""
    path = tmp_path / "concepts.json"
    written(path, {1: "one", 2: "two", 3: "three"})
    export_concepts(read_concepts(path), mine := tmp_path / "mine.csv")
    edit_concepts(path,
                  lambda content: content["concepts"] | {i: {"name": "theirs", "source": "human"} for i in (1, 2)})
    edit_table(mine, "1,one,", "1,mine,")
    edit_table(mine, "3,three,", "3,drei,")
    conflicts = []
    now = concepts_from_csv(mine, read_concepts(path)["concepts"], "aa", conflicts)
    assert [now[i]["name"] for i in (1, 2, 3)] == ["theirs", "theirs", "drei"]
    assert [(c.latent, c.kept, c.dropped) for c in conflicts] == [(1, "theirs", "mine")]
    with pytest.raises(InputError, match="another SAE"):
        concepts_from_csv(mine, {}, "bb")


def test_eight_people_at_once_lose_nothing(tmp_path):
    path = tmp_path / "concepts.json"
    written(path, {i: f"made {i}" for i in range(8)})

    def name(latent):
        edit_concepts(path,
                      lambda content: content["concepts"] | {latent: {"name": f"mine {latent}", "source": "human"}})

    with ThreadPoolExecutor(8) as people:
        list(people.map(name, range(8)))
    assert names_of(path) == {i: f"mine {i}" for i in range(8)}


@pytest.mark.parametrize(("name", "text", "message"), [
    ("t.csv", "latent,name\n99999,mine\n", "names latent 99999, but the SAE has latents 0 to 7"),
    ("t.csv", "latent,name\n5,mine\n", "names latent 5, which never fires"),
    ("t.json", json.dumps(dictionary({"9": MADE}, n_latents=10)), "8 and 10 latents"),
    ("t.json", json.dumps(dictionary({"1": MADE | {"score": float("nan")}})), "NaN is not a JSON number"),
    ("t.json", json.dumps(dictionary({"1": MADE}, sae_hash="bb")), "different SAEs"),
])
def test_a_merge_is_checked_before_anything_is_written(script, own_store, tmp_path, name, text, message):  # noqa: F811
    path = named_sae(own_store) / "concepts.json"
    written(path, {1: "one"})
    stats = ({"fires": torch.tensor([1, 1, 1, 1, 1, 0, 1, 1])}
             | {name: torch.ones(8) for name in ("max", "mean_active", "p99")})
    write_tensors(path.with_name("latent_stats.safetensors"), stats)
    (tmp_path / name).write_text(text)
    before = {file: file.read_bytes() for file in path.parent.iterdir()}
    code, _, err = script("concept_dictionary.py", f"MERGE={tmp_path / name}")
    assert code == 2 and message in err and err.count("\n") == 1
    assert {file: file.read_bytes() for file in path.parent.iterdir()} == before


def test_an_export_replaces_nothing(script, own_store, tmp_path):  # noqa: F811
    path = named_sae(own_store) / "concepts.json"
    written(path, {1: "one"})
    assert script("concept_dictionary.py", "EXPORT=mine.yaml")[0] == 0
    (tmp_path / "mine.yaml").write_text("notes of a person")
    (tmp_path / "t.csv").write_text("latent,name\n1,mine\n")
    for export, message in (("mine.yaml", "already exists; choose another name"), (path, "already exists"),
                            ("out.xml", "has no known ending")):
        code, _, err = script("concept_dictionary.py", f"EXPORT={export}", "MERGE=t.csv")
        assert code == 2 and message in err and err.count("\n") == 1
    assert (tmp_path / "mine.yaml").read_text() == "notes of a person" and names_of(path) == {1: "one"}
