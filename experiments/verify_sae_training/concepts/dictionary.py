"""The concept dictionary concepts.json: written, edited, exported, merged, searched; what a person wrote is never lost.

    write_concepts(path, header, named)              # what a step made; people's names stay
    edit_concepts(path, lambda content: ...)         # what a person wants
    content = read_concepts(path, sae_hash(sae))

A dictionary is about one SAE, identified by its sae_hash. The table concepts.csv beside it holds the same for people to
edit; their edits are read before anything is written. Formats and checks: concepts/formats.py and tables.py.
"""
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import filelock

from concepts.formats import YAML_ENDINGS, Concepts, as_read, as_yaml, check, digest, load, to_write
from concepts.tables import Conflict, concepts_to_csv, read_table, with_edits
from lib.environment import InputError, log
from lib.files import write_json, write_text

ENDINGS = (".json", *YAML_ENDINGS, ".csv")
PATIENCE = 120  # seconds to wait while another process changes the same dictionary


def write_concepts(path: Path, header: dict[str, Any], named: Concepts, dead: Iterable[int] = ()) -> Concepts:
    """Write concepts.json and concepts.csv, and return the concepts that they now hold.

    header: sae_hash, run_id, model_id, hook, n_latents.

    People's names stay: those in the existing files, unless `named` has a person's for the same latent, and those in
    concepts_<sae_hash>.json, where an SAE's dictionary is kept while concepts.json is about another one.
    """
    with _alone(path):
        kept: Concepts = {}
        if not path.exists():
            _keep_edited(path.with_suffix(".csv"))
        else:
            old = _present(path, dead, header["sae_hash"])
            if old["sae_hash"] == header["sae_hash"]:
                kept = _by_people(old["concepts"])
            else:
                aside = _aside(path, old["sae_hash"])
                _write(aside, _with_aside(path, old))
                log.warning("%s was about another SAE; its names are now in %s", path.name, aside.name)
        mine = named | kept | _by_people(named)
        content = _with_aside(path, {**header, "concepts": dict(sorted(mine.items()))})
        _write(path, content, dead)
        concepts_to_csv(content["concepts"], path.with_suffix(".csv"), header["sae_hash"])
        _aside(path, header["sae_hash"]).unlink(missing_ok=True)
    return content["concepts"]


def edit_concepts(
    path: Path, change: Callable[[dict[str, Any]], Concepts], dead: Iterable[int] = ()
) -> dict[str, Any]:
    """Replace the concepts of a dictionary by change(content), one process at a time.

    The result is checked before anything is written. Returns what the file now holds, as read_concepts does.
    """
    with _alone(path):
        content = _present(path, dead)
        content |= {"concepts": dict(sorted(change(content).items()))}
        _write(path, content, dead)
        concepts_to_csv(content["concepts"], path.with_suffix(".csv"), content["sae_hash"])
    return content


def read_concepts(path: Path, sae_hash: str | None = None, dead: Iterable[int] = ()) -> dict[str, Any]:
    """Read and check a dictionary, .json or .yaml; the keys of "concepts" become int.

    Entries edited since a step wrote them get the source "human". Raises InputError if the file is missing or damaged,
    and where check() does.
    """
    return as_read(check(load(path), path, sae_hash, dead))


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Lock a dictionary, so that no other process writes between our reading and our writing."""
    lock = filelock.FileLock(path.with_name(f".{path.name}.lock"), timeout=PATIENCE)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout:
        raise InputError(f"{path} is in use by another process; wait until it ends") from None
    except OSError as error:
        raise InputError(f"{path} can't be written ({error.strerror})") from None
    try:
        yield
    finally:
        lock.release()


def _present(path: Path, dead: Iterable[int] = (), sae_hash: str | None = None) -> dict[str, Any]:
    """The dictionary at `path` with a person's edits in the table beside it. dead: of the SAE `sae_hash`, if given.

    A table whose edits can't be used is kept under another name, and the log says so.
    """
    content, table = read_concepts(path), path.with_suffix(".csv")
    if not table.exists():
        return content
    try:
        lines = read_table(table)
        edited, conflicts = with_edits(content["concepts"], lines, content["sae_hash"], table)
        if edited != content["concepts"] and not any(line.made for line in lines):
            raise InputError(f"{table} has no column stamp, which tells edits from old names; set MERGE to it")
        its_dead = dead if sae_hash in (None, content["sae_hash"]) else ()
        check(to_write({**content, "concepts": {}}, edited), table, dead=its_dead)
        if conflicts:
            raise InputError(f"{table} and {path.name} were both edited at latent {conflicts[0].latent}")
    except InputError as error:
        _keep(table, str(error))
        return content
    changed = sum(content["concepts"].get(latent) != entry for latent, entry in edited.items())
    if changed:
        log.warning("%d concepts were edited in %s; %s now has them as a person's", changed, table.name, path.name)
    return content | {"concepts": edited}


def _keep_edited(table: Path) -> None:
    """Keep a table that has no dictionary under another name, if a person edited it."""
    try:
        if table.exists() and any(line.made != digest(line.latent, line.new) for line in read_table(table)):
            _keep(table, f"{table} was edited, and the concepts.json that it belongs to is gone")
    except InputError as error:
        _keep(table, str(error))


def _keep(table: Path, why: str) -> None:
    kept = free_name(table.with_name(f"{table.stem}_edited.csv"))
    os.replace(table, kept)
    log.warning("%s; the table is kept as %s, and its edits are not in concepts.json", why, kept.name)


def _aside(path: Path, sae_hash: str) -> Path:
    """Where an SAE's dictionary is kept while the file at `path` is about another one."""
    return path.with_name(f"{path.stem}_{sae_hash}.json")


def _with_aside(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """The content with the people's names set aside for its SAE; a file that disagrees is renamed and kept."""
    aside = _aside(path, content["sae_hash"])
    if not aside.exists():
        return content
    people, theirs = _by_people(content["concepts"]), _by_people(read_concepts(aside, content["sae_hash"])["concepts"])
    both = people.keys() & theirs.keys()
    if any(digest(latent, theirs[latent]) != digest(latent, people[latent]) for latent in both):
        kept = free_name(aside.with_name(f"{aside.stem}_older.json"))
        os.replace(aside, kept)
        log.warning("%s has other names by people than %s; it is kept as %s", aside.name, path.name, kept.name)
    return content | {"concepts": dict(sorted((content["concepts"] | theirs | people).items()))}


def _by_people(concepts: Concepts) -> Concepts:
    return {latent: entry for latent, entry in concepts.items() if entry["source"] == "human"}


def free_name(path: Path) -> Path:
    """`path`, with a number if it exists."""
    numbered = (path.with_stem(f"{path.stem}_{number}") for number in count(2))
    return path if not path.exists() else next(other for other in numbered if not other.exists())


def _write(path: Path, content: dict[str, Any], dead: Iterable[int] = ()) -> None:
    header = {key: value for key, value in content.items() if key not in ("schema_version", "concepts")}
    write_json(path, check(to_write(header, content["concepts"]), path, dead=dead))


def export_concepts(content: dict[str, Any], path: Path) -> None:
    """Write a dictionary (what read_concepts returns) as .json, .yaml or .csv, by the path's ending.

    Raises InputError for another ending, and for a file that exists: somebody may have edited it.
    """
    require_new(path)
    if path.suffix == ".csv":
        concepts_to_csv(content["concepts"], path, content["sae_hash"])
    elif path.suffix == ".json":
        _write(path, content)
    else:
        header = {key: value for key, value in content.items() if key != "concepts"}
        write_text(path, as_yaml(to_write(header, content["concepts"])))


def require_new(path: Path) -> None:
    """Raise InputError if export_concepts would refuse this path."""
    if path.suffix not in ENDINGS:
        raise InputError(f"{path.name} has no known ending; use {', '.join(ENDINGS)}")
    if os.path.lexists(path):
        raise InputError(f"{path} already exists; choose another name, or move it away")


def merge_concepts(mine: dict[str, Any], other: dict[str, Any]) -> tuple[Concepts, list[Conflict]]:
    """The concepts of two dictionaries of one SAE, and where their names differ.

    A person's entry wins over one that a step made; otherwise `mine` wins. Raises InputError if the SAEs differ.
    """
    if mine["sae_hash"] != other["sae_hash"]:
        raise InputError(f"the dictionaries name different SAEs ({mine['sae_hash']} and {other['sae_hash']})")
    if mine["n_latents"] != other["n_latents"]:
        sizes = f"{mine['n_latents']} and {other['n_latents']}"
        raise InputError(f"the dictionaries have {sizes} latents; one is damaged")
    merged, conflicts = other["concepts"] | mine["concepts"], []
    for latent in sorted(mine["concepts"].keys() & other["concepts"].keys()):
        first, second = mine["concepts"][latent], other["concepts"][latent]
        theirs = second["source"] == "human" and first["source"] != "human"
        kept, dropped = (second, first) if theirs else (first, second)
        merged[latent] = kept
        if kept["name"] != dropped["name"]:
            by_person = (kept["source"] == "human") != (dropped["source"] == "human")
            conflicts.append(Conflict(latent, kept=kept["name"], dropped=dropped["name"],
                                      reason="a person's name" if by_person else "the first dictionary's"))
    return dict(sorted(merged.items())), conflicts


def search_concepts(concepts: Concepts, query: str) -> list[int]:
    """Latents whose name, description or notes hold all words of the query, ignoring case.

    Those whose name holds them come first, then by score.
    """
    words = query.lower().split()
    found = []
    for latent, entry in concepts.items():
        name = entry["name"].lower()
        rest = f"{name} {entry.get('description') or ''} {entry.get('notes') or ''}".lower()
        if words and all(word in rest for word in words):
            in_name = all(word in name for word in words)
            found.append((not in_name, -(entry.get("score") or 0), latent))
    return [latent for *_, latent in sorted(found)]
