"""The concept dictionary: its schema, its formats there and back, edits by people, merge, search, and its script."""
import json

import pytest
from conftest import run_script

from lib.dictionary import (
    SCHEMA,
    concepts_from_csv,
    concepts_to_csv,
    export_concepts,
    merge_concepts,
    read_concepts,
    search_concepts,
    write_concepts,
)
from lib.environment import InputError
from lib.files import read_json

HEADER = {"sae_hash": "aa", "run_id": "r", "model_id": "m", "hook": "h", "n_latents": 8}
MADE = {"name": "dog, cat", "description": "Fires on dog", "source": "offline", "score": 0.75, "rule": [["word", "dog"]], "model": None}
# Names that YAML or a table would read as something else if they were not quoted.
AWKWARD = ["no", "1.0", 'a, "b"', "Öl: ”x”", "- dash", "null", "{x}", "#1", "a\u2028b"]


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
    ("c.yaml", "a: [", "is no YAML"), ("c.yaml", "- 1", "is no concept dictionary"), ("c.json", "{", "is damaged"), ("gone.yaml", None, "is missing"),
])  # fmt: skip
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
    mine = dictionary({1: MADE, 2: MADE, 3: person | {"name": "mine"}, 4: MADE | {"name": "same"}, 5: person | {"name": "first"}})
    other = dictionary({2: person | {"name": "theirs"}, 3: MADE, 4: MADE | {"name": "same", "score": 0.1}, 5: person, 6: MADE})
    merged, conflicts = merge_concepts(mine, other)
    assert list(merged) == [1, 2, 3, 4, 5, 6]
    assert [merged[i]["name"] for i in (2, 3, 5)] == ["theirs", "mine", "first"] and merged[4]["score"] == 0.75
    assert [(c.latent, c.kept, c.dropped) for c in conflicts] == [(2, "theirs", "dog, cat"), (3, "mine", "dog, cat"), (5, "first", "dog, cat")]
    assert [c.reason for c in conflicts] == ["a person's name", "a person's name", "the first dictionary's"]
    assert merge_concepts(mine, mine) == (mine["concepts"], [])
    with pytest.raises(InputError, match="different SAEs"):
        merge_concepts(mine, dictionary({}, sae_hash="bb"))


def test_search_puts_names_first_then_scores():
    concepts = {
        1: MADE | {"name": "pets", "description": "a Dog"}, 2: MADE | {"name": "dog"}, 3: MADE | {"name": "big dog", "score": 0.9},
        4: {"name": "cat", "source": "human"}, 5: {"name": "x", "notes": "dog", "source": "human"},
    }  # fmt: skip
    assert search_concepts(concepts, "DOG") == [3, 2, 1, 5]
    assert search_concepts(concepts, "dog big") == [3] and search_concepts(concepts, " ") == [] == search_concepts(concepts, "zebra")


def test_the_schema_describes_what_the_steps_write():
    described = SCHEMA["$defs"]["concept"]["properties"]
    assert {"score", "judge", "scored_name", "rule", "offline_name"} <= described.keys()
    assert set(SCHEMA["required"]) <= SCHEMA["properties"].keys()


def test_the_script(own_store):
    path, script = own_store / "verify_sae_training" / "concepts.json", "experiments/verify_sae_training/concept_dictionary.py"
    write_concepts(path, HEADER, {1: MADE, 2: MADE | {"name": "cow"}})
    other = path.with_name("other.yaml")
    export_concepts(dictionary({2: MADE | {"name": "moo", "source": "human"}, 3: MADE}), other)
    done = run_script(script, f"MERGE={other}", f"EXPORT={path.with_name('out.csv')}", "SEARCH=moo", store=own_store)
    assert "2: kept moo, dropped cow" in done.stdout and "1 found" in done.stdout
    assert read_concepts(path)["concepts"][2]["source"] == "human" and (path.parent / "out.csv").read_text().count("\n") == 4
    (path.parent / "out.csv").write_text("latent,name\n3,hay\n")
    run_script(script, f"MERGE={path.with_name('out.csv')}", store=own_store)
    assert read_json(path)["concepts"]["3"] == MADE | {"name": "hay", "source": "human"}
    wrong = run_script(script, "EXPORT=out.xml", store=own_store, check=False)
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1
