"""The concept dictionary: concepts.json, its schema, the same as YAML or as a table, two of them merged, and search.

lib/concepts.schema.json is the schema (JSON Schema 2020-12), with a description of every field. A dictionary is about
one SAE, told by its sae_hash. JSON and YAML hold all of it; a table (CSV) holds what people read and edit.
"""
import csv
import io
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema

from lib.environment import InputError, log
from lib.files import read_json, write_json, write_text

SCHEMA = json.loads(Path(__file__).with_name("concepts.schema.json").read_text(encoding="utf-8"))
SCHEMA_VERSION = SCHEMA["properties"]["schema_version"]["const"]
CSV_COLUMNS = ("latent", "name", "description", "notes", "edited_by", "source", "backend", "model", "judge", "score")
EDITABLE = ("name", "description", "notes", "edited_by")
ENDINGS = (".json", ".yaml", ".yml", ".csv")
Concepts = dict[int, dict[str, Any]]


def write_concepts(path: Path, header: dict[str, Any], named: Concepts) -> Concepts:
    """Write concepts.json and return what it now holds. header: sae_hash, run_id, model_id, hook, n_latents.

    Entries with source "human" in the file that is there are kept, unless `named` has a person's own for the same
    latent. If that file is about another SAE, it is moved aside to concepts_<its sae_hash>.json, so that nothing a
    person wrote is lost.
    """
    kept: Concepts = {}
    if path.exists():
        old = read_concepts(path)
        if old["sae_hash"] == header["sae_hash"]:
            newer = {latent for latent, entry in named.items() if entry["source"] == "human"}
            kept = {i: entry for i, entry in old["concepts"].items() if entry["source"] == "human" and i not in newer}
        else:
            aside = path.with_name(f"{path.stem}_{old['sae_hash']}.json")
            os.replace(path, aside)
            log.info("%s was about another SAE and is now %s", path.name, aside.name)
    concepts = dict(sorted((named | kept).items()))
    write_json(path, _content(header, concepts))
    return concepts


def read_concepts(path: Path, sae_hash: str | None = None, dead: Iterable[int] = ()) -> dict[str, Any]:
    """Read and check a dictionary, .json or .yaml; the keys of "concepts" become int.

    Raises InputError for a missing or damaged file, anything that breaks the schema, a latent the SAE does not have, a
    file about another SAE than `sae_hash`, and a name for a latent in `dead`.
    """
    content = _read_yaml(path) if path.suffix in (".yaml", ".yml") else read_json(path)
    if not isinstance(content, dict) or content.get("schema_version") != SCHEMA_VERSION:
        raise InputError(f"{path} is no concept dictionary of schema {SCHEMA_VERSION}; run 04_name_sae_concepts.ipynb again")
    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(SCHEMA).iter_errors(content))
    if error is not None:
        where = ": ".join(map(str, error.absolute_path)).replace("concepts: ", "latent ", 1) or "top level"
        raise InputError(f"{path}, {where}: {' '.join(error.message.split())[:200]}; lib/concepts.schema.json has the format")
    if sae_hash is not None and content["sae_hash"] != sae_hash:
        other = f"names the latents of another SAE ({content['sae_hash']}, not {sae_hash})"
        raise InputError(f"{path} {other}; run 04_name_sae_concepts.ipynb again")
    concepts, dead = {int(key): entry for key, entry in content["concepts"].items()}, set(dead)
    for latent in concepts:
        if latent >= content["n_latents"]:
            raise InputError(f"{path} names latent {latent}, but the SAE has latents 0 to {content['n_latents'] - 1}")
        if latent in dead:
            raise InputError(f"{path} names latent {latent}, which never fires; delete that entry")
    return content | {"concepts": concepts}


def _content(header: dict[str, Any], concepts: Concepts) -> dict[str, Any]:
    by_key = {str(latent): entry for latent, entry in concepts.items()}
    return {"schema_version": SCHEMA_VERSION, **header, "concepts": by_key}


def _yaml() -> Any:
    try:
        import yaml
    except ImportError:
        raise InputError("YAML needs the package PyYAML: pip install pyyaml, or use .json or .csv") from None
    return yaml


def _read_yaml(path: Path) -> Any:
    try:
        content = _yaml().safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except _yaml().YAMLError as error:
        raise InputError(f"{path} is no YAML ({' '.join(str(error).split())[:160]})") from None
    if isinstance(content, dict) and isinstance(content.get("concepts"), dict):
        content["concepts"] = {str(key): entry for key, entry in content["concepts"].items()}
    return content


def export_concepts(content: dict[str, Any], path: Path) -> None:
    """Write a dictionary (what read_concepts returns) as .json, .yaml or .csv, by the path's ending."""
    header = {key: value for key, value in content.items() if key != "concepts"}
    if path.suffix == ".csv":
        concepts_to_csv(content["concepts"], path)
    elif path.suffix == ".json":
        write_json(path, _content(header, content["concepts"]))
    elif path.suffix in ENDINGS:
        whole = {**header, "concepts": content["concepts"]}
        write_text(path, _yaml().safe_dump(whole, sort_keys=False, allow_unicode=True, width=120))
    else:
        raise InputError(f"{path.name} has no known ending; use {', '.join(ENDINGS)}")


def concepts_to_csv(concepts: Concepts, path: Path) -> None:
    """Write a table that a person can edit: one concept a line."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, CSV_COLUMNS, extrasaction="ignore")
    writer.writeheader()
    writer.writerows({"latent": latent, **entry} for latent, entry in concepts.items())
    write_text(path, buffer.getvalue())


def concepts_from_csv(path: Path | str, concepts: Concepts) -> Concepts:
    """The concepts with the table's changes: where name, description or notes differ, the source becomes "human"."""
    changed = dict(concepts)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = list(csv.DictReader(file))
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    for line in lines:
        if not (line.get("latent") or "").isdigit() or not line.get("name"):
            raise InputError(f"{path}: every line needs a latent's number and a name")
        entry = changed.get(int(line["latent"]), {})
        new = {key: line[key] for key in EDITABLE if line.get(key) is not None}
        if any((entry.get(key) or "") != value for key, value in new.items()):
            changed[int(line["latent"])] = entry | new | {"source": "human"}
    return changed


class Conflict(NamedTuple):
    """One latent that two dictionaries name differently."""

    latent: int
    kept: str
    dropped: str
    reason: str


def merge_concepts(mine: dict[str, Any], other: dict[str, Any]) -> tuple[Concepts, list[Conflict]]:
    """The concepts of two dictionaries of one SAE, and where their names differ.

    A person's entry wins over one that was made; otherwise `mine` wins. Raises InputError for another SAE's dictionary.
    """
    if mine["sae_hash"] != other["sae_hash"]:
        raise InputError(f"the dictionaries name different SAEs ({mine['sae_hash']} and {other['sae_hash']})")
    merged, conflicts = other["concepts"] | mine["concepts"], []
    for latent in sorted(mine["concepts"].keys() & other["concepts"].keys()):
        first, second = mine["concepts"][latent], other["concepts"][latent]
        theirs = second["source"] == "human" and first["source"] != "human"
        kept, dropped = (second, first) if theirs else (first, second)
        merged[latent] = kept
        if kept["name"] != dropped["name"]:
            by_person = (kept["source"] == "human") != (dropped["source"] == "human")
            reason = "a person's name" if by_person else "the first dictionary's"
            conflicts.append(Conflict(latent, kept["name"], dropped["name"], reason))
    return dict(sorted(merged.items())), conflicts


def search_concepts(concepts: Concepts, query: str) -> list[int]:
    """Latents whose name, description or notes have all words of the query, whatever the case: those whose name has them
    first, then by score."""
    words = query.lower().split()
    found = []
    for latent, entry in concepts.items():
        name = entry["name"].lower()
        rest = f"{name} {entry.get('description') or ''} {entry.get('notes') or ''}".lower()
        if words and all(word in rest for word in words):
            in_name = all(word in name for word in words)
            found.append((not in_name, -(entry.get("score") or 0), latent))
    return [latent for *_, latent in sorted(found)]
