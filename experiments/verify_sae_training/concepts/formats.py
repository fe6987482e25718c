"""The concept dictionary as JSON, as YAML and as a table that people edit (CSV): read with limits, checked, written.

experiments/verify_sae_training/concepts/concepts.schema.json is the schema (JSON Schema 2020-12), with a description of
every field. What is in these files
comes from people, chat models and other projects: it is data, never code, a formula or a path.

An entry that a step made carries a digest of its name, description and notes; in a table every line does. Where text
and digest disagree a person has edited the text, and it is kept as that person's.
"""
import codecs
import csv
import io
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import yaml

from lib.environment import InputError
from lib.files import fingerprint, read_bytes, write_text

SCHEMA = json.loads(Path(__file__).with_name("concepts.schema.json").read_text(encoding="utf-8"))
SCHEMA_VERSION = SCHEMA["properties"]["schema_version"]["const"]
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
CSV_COLUMNS = (
    "latent", "name", "description", "notes", "edited_by", "source", "backend", "model", "judge", "score", "stamp",
)
EDITABLE = ("name", "description", "notes", "edited_by")
STALE = ("rule", "confidence")  # said of the name that was there before a person's
YAML_ENDINGS = (".yaml", ".yml")
MAX_BYTES = 500_000_000  # of one file; 100,000 concepts take a tenth of it
MAX_DEPTH = 10  # of lists and objects inside each other; a dictionary has 5
# What a spreadsheet runs, or strips and then runs; the last four are the wide forms that Japanese keyboards write.
FORMULA = re.compile("'*[=+\\-@\t\r\n＝＋－＠]")
Concepts = dict[int, dict[str, Any]]


def digest(latent: int, entry: dict[str, Any]) -> str:
    """Tells whether a person has edited an entry since; begins with a letter: spreadsheets would round a number."""
    return "d" + fingerprint([latent, *(entry.get(key) or "" for key in EDITABLE)])


def load(path: Path) -> Any:
    """The content of a .json or .yaml file: objects with text keys, lists, texts, finite numbers, booleans and null.

    Raises InputError if it is missing, too large, damaged, too deeply nested, or has a key twice.
    """
    kind = "YAML" if path.suffix in YAML_ENDINGS else "JSON"
    try:
        text = _decoded(path)
        if kind == "YAML":
            content = yaml.load(text, Loader=_Loader)  # derived from SafeLoader
        else:
            content = json.loads(text, object_pairs_hook=_unique, parse_constant=_not_finite)
        _check_plain(content)
    except InputError:
        raise
    except RecursionError:
        raise InputError(f"{path} is damaged (nested too deeply)") from None
    except (ValueError, TypeError, OverflowError, AttributeError, LookupError, yaml.YAMLError) as error:
        raise InputError(f"{path} is damaged or not {kind} ({_one_line(error)}); correct it, or move it away") from None
    return content


def _decoded(path: Path) -> str:
    """A file's text: UTF-8, or UTF-16 with its mark as spreadsheets write it."""
    raw = read_bytes(path, MAX_BYTES, "check its name, or correct it")
    utf16 = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return raw.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text; save it in UTF-8 (in Excel: CSV UTF-8)") from None


class _Loader(yaml.SafeLoader):
    """YAML as plain data: no aliases, which can stand for billions of values, and no key twice."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not read")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        pairs = [(self.construct_object(key, True), self.construct_object(value, deep)) for key, value in node.value]
        return _unique([(str(key), value) for key, value in pairs])


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data):
        return True

    def represent_str(self, data):
        # PyYAML would turn some kinds of line breaks into others, but not between double quotes.
        style = '"' if re.search("[\x00-\x1f\x7f-\x9f\u2028\u2029\ufeff]", data) else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style)


_Dumper.add_representer(str, _Dumper.represent_str)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key in found if sum(key == other for other, _ in pairs) > 1)
        raise ValueError(f"{twice[:40]!r} stands there twice")
    return found


def _not_finite(name: str) -> None:
    raise ValueError(f"{name} is not a number that JSON has")


def _check_plain(value: Any, depth: int = 0) -> None:
    if depth > MAX_DEPTH:
        raise ValueError("nested too deeply")
    if isinstance(value, dict):
        for key, inner in value.items():
            _check_plain(key, depth)
            _check_plain(inner, depth + 1)
    elif isinstance(value, list):
        for inner in value:
            _check_plain(inner, depth + 1)
    elif isinstance(value, str):
        if not value.isascii() and re.search("[\ud800-\udfff]", value):
            raise ValueError("half a character in a text")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"the number {value}")
    elif value is not None and not isinstance(value, bool | int | float):
        raise ValueError(f"{str(value)[:40]} is read as a {type(value).__name__}; put a text in quotes")


def check(content: Any, path: Path, sae_hash: str | None = None, dead: Iterable[int] = ()) -> Any:
    """The content, whose keys of "concepts" are text, if it is sound.

    Raises InputError for what breaks the schema, is about another SAE than `sae_hash`, or names a latent that the SAE
    does not have or that is in `dead`.
    """
    if not isinstance(content, dict) or content.get("schema_version") != SCHEMA_VERSION:
        known = f"concept dictionary of schema {SCHEMA_VERSION}"
        raise InputError(f"{path} is no {known}; run 04_name_sae_concepts.ipynb again")
    error = jsonschema.exceptions.best_match(VALIDATOR.iter_errors(content))
    if error is not None:
        where = ": ".join(map(str, error.absolute_path)).replace("concepts: ", "latent ", 1) or "top level"
        raise InputError(f"{path}, {where[:80]}: {_one_line(error.message)}; "
                         "experiments/verify_sae_training/concepts/concepts.schema.json has the format")
    if sae_hash is not None and content["sae_hash"] != sae_hash:
        other = f"names the latents of another SAE ({content['sae_hash']}, not {sae_hash})"
        raise InputError(f"{path} {other}; run 04_name_sae_concepts.ipynb again")
    dead = set(dead)
    for latent in map(int, content["concepts"]):
        if latent >= content["n_latents"]:
            raise InputError(f"{path} names latent {latent}, but the SAE has latents 0 to {content['n_latents'] - 1}")
        if latent in dead:
            raise InputError(f"{path} names latent {latent}, which never fires; delete that entry")
    return content


def to_write(header: dict[str, Any], concepts: Concepts) -> dict[str, Any]:
    """What a file holds: the header, and the entries with the digests of those that a step made."""
    stamps = {i: {} if entry["source"] == "human" else {"digest": digest(i, entry)} for i, entry in concepts.items()}
    by_key = {str(latent): entry | stamps[latent] for latent, entry in concepts.items()}
    return {"schema_version": SCHEMA_VERSION, **header, "concepts": by_key}


def as_read(content: dict[str, Any]) -> dict[str, Any]:
    """The inverse, of a content that passed check(): what a person edited since it was written has source "human"."""
    stamped = any("digest" in entry for entry in content["concepts"].values())
    concepts: Concepts = {}
    for latent, entry in ((int(key), dict(entry)) for key, entry in content["concepts"].items()):
        made = entry.pop("digest", None)
        # Files from before there were digests tell by the name that was scored.
        edited = made != digest(latent, entry) if stamped else entry.get("scored_name") not in (None, entry["name"])
        if edited and entry["source"] != "human":
            entry = {key: value for key, value in entry.items() if key not in STALE} | {"source": "human"}
        concepts[latent] = entry
    return content | {"concepts": concepts}


def as_yaml(content: dict[str, Any]) -> str:
    whole = content | {"concepts": {int(key): entry for key, entry in content["concepts"].items()}}
    return yaml.dump(whole, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class Line(NamedTuple):
    """One line of a table."""

    latent: int
    new: dict[str, str]
    """Its EDITABLE columns."""
    sae_hash: str
    """Of the SAE that the line was written for; empty where it does not say."""
    made: str
    """Digest of the entry that the line was written for; empty where it does not say."""


def concepts_to_csv(concepts: Concepts, path: Path, sae_hash: str = "") -> None:
    """Write a table that a person can edit, one concept a line. Excel garbles one without a byte order mark."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, CSV_COLUMNS, extrasaction="ignore")
    writer.writeheader()
    for latent, entry in concepts.items():
        cells = {key: _cell(value) if isinstance(value, str) else value for key, value in entry.items()}
        writer.writerow({"latent": latent, **cells, "stamp": f"{sae_hash}/{digest(latent, entry)}"})
    write_text(path, "\ufeff" + buffer.getvalue())


def _cell(text: str) -> str:
    """A text that no spreadsheet takes for a formula."""
    return "'" + text if FORMULA.match(text) else text


def _text(cell: str) -> str:
    return cell[1:] if cell.startswith("'") and FORMULA.match(cell) else cell


def read_table(path: Path) -> list[Line]:
    """The lines of a table: comma, semicolon or tab between the cells, UTF-8 or UTF-16. InputError for what is none."""
    text = _decoded(path)
    first, _, rest = text.partition("\n")
    if first.lower().startswith("sep="):  # Excel's own
        text, first = rest, rest.partition("\n")[0]
    separator = next((s for s in ",;\t" if {"latent", "name"} <= {cell.strip(' "\r') for cell in first.split(s)}), None)
    if separator is None:
        raise InputError(f"{path} is no table of concepts; its first line must name the columns latent and name")
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    lines, seen = [], set()
    try:
        for row in reader:
            if not any(cell for cells in row.values() for cell in (cells if isinstance(cells, list) else [cells])):
                continue
            lines.append(_line(row, f"{path}, line {reader.line_num}"))
            if lines[-1].latent in seen:
                raise InputError(f"{path}, line {reader.line_num}: latent {lines[-1].latent} stands there twice")
            seen.add(lines[-1].latent)
    except csv.Error as error:
        where = f"{path}, line {reader.line_num}"
        raise InputError(f"{where}: {_one_line(error)}; put a text with quotes or line breaks in quotes") from None
    return lines


def _line(row: dict[Any, Any], where: str) -> Line:
    latent, name = (row.get("latent") or "").strip(), row.get("name")
    if any(row.get(None) or []):  # type: ignore[call-overload]  # DictReader's key of what is beyond the header
        raise InputError(f"{where}: more cells than columns; put a text that holds a separator in quotes")
    if not re.fullmatch("[0-9]{1,9}", latent) or not (name or "").strip():
        raise InputError(f"{where}: every line needs a latent's number and a name")
    sae_hash, _, made = (row.get("stamp") or "").rpartition("/")
    return Line(int(latent), {key: _text(row[key]) for key in EDITABLE if row.get(key) is not None}, sae_hash, made)


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:200]
