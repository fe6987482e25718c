"""The concept dictionary as JSON and YAML: read within limits, checked, written.

concepts.schema.json beside this file is the schema (JSON Schema 2020-12), with a description of every field. What these
files hold comes from people, chat models and other projects: it is data, never code, a formula or a path.

An entry that a step made carries a digest of its name, description and notes. Where text and digest disagree, a person
has edited the text, and it is kept as that person's.
"""
import codecs
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from lib.environment import InputError
from lib.files import fingerprint, read_bytes

SCHEMA = json.loads(Path(__file__).with_name("concepts.schema.json").read_text(encoding="utf-8"))
SCHEMA_VERSION = SCHEMA["properties"]["schema_version"]["const"]
EDITABLE = ("name", "description", "notes", "edited_by", "rating")
STALE = ("rule", "confidence")  # about the name that a person has replaced
YAML_ENDINGS = (".yaml", ".yml")
AGAIN = "run 04_name_sae_concepts.ipynb again"
MAX_BYTES = 500_000_000  # of one file; 100,000 concepts take a tenth of it
MAX_DEPTH = 10  # of nested lists and objects; a dictionary has 5
Concepts = dict[int, dict[str, Any]]


def digest(latent: int, entry: dict[str, Any]) -> str:
    """Shows whether a person has edited an entry since; begins with a letter, as spreadsheets round numbers."""
    texts = [entry.get(key) or "" for key in EDITABLE]
    return "d" + fingerprint([latent, *(texts if texts[-1] else texts[:-1])])  # as before there were ratings


def load(path: Path) -> Any:
    """The content of a .json or .yaml file: plain data with text keys and finite numbers.

    Raises InputError if it is missing, too large, damaged, too deeply nested, or repeats a key.
    """
    kind = "YAML" if path.suffix in YAML_ENDINGS else "JSON"
    try:
        text = decoded(path)
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
        raise InputError(f"{path} is damaged or not {kind} ({one_line(error)}); correct it, or move it away") from None
    return content


def decoded(path: Path) -> str:
    """A file's text: UTF-8, or UTF-16 with a byte order mark, as spreadsheets write it."""
    raw = read_bytes(path, MAX_BYTES, "check its name, or correct it")
    utf16 = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return raw.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text; save it in UTF-8 (in Excel: CSV UTF-8)") from None


class _Loader(yaml.SafeLoader):
    """YAML as plain data: no repeated keys, and no aliases, which can stand for billions of values."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not supported")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        pairs = [(self.construct_object(key, True), self.construct_object(value, deep)) for key, value in node.value]
        return _unique([(str(key), value) for key, value in pairs])


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data):
        return True

    def represent_str(self, data):
        # Outside double quotes, PyYAML would turn some kinds of line breaks into others.
        style = '"' if re.search("[\x00-\x1f\x7f-\x9f\u2028\u2029\ufeff]", data) else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style)


_Dumper.add_representer(str, _Dumper.represent_str)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key in found if sum(key == other for other, _ in pairs) > 1)
        raise ValueError(f"{twice[:40]!r} appears twice")
    return found


def _not_finite(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


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
    """The content, if it is sound; the keys of its "concepts" are text.

    Raises InputError if it breaks the schema, is about another SAE than `sae_hash`, or names a latent that the SAE does
    not have or that is in `dead`.
    """
    if not isinstance(content, dict) or content.get("schema_version") != SCHEMA_VERSION:
        raise InputError(f"{path} is not a concept dictionary of schema {SCHEMA_VERSION}; {AGAIN}")
    import jsonschema  # takes 1.5 s, which a step without a dictionary does without

    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(SCHEMA).iter_errors(content))
    if error is not None:
        where = ": ".join(map(str, error.absolute_path)).replace("concepts: ", "latent ", 1) or "top level"
        raise InputError(f"{path}, {where[:80]}: {one_line(error.message)}; concepts.schema.json has the format")
    if sae_hash is not None and content["sae_hash"] != sae_hash:
        raise InputError(f"{path} names the latents of another SAE ({content['sae_hash']}, not {sae_hash}); {AGAIN}")
    dead = set(dead)
    for latent in map(int, content["concepts"]):
        if latent >= content["n_latents"]:
            raise InputError(f"{path} names latent {latent}, but the SAE has latents 0 to {content['n_latents'] - 1}")
        if latent in dead:
            raise InputError(f"{path} names latent {latent}, which never fires; delete that entry")
    return content


def to_write(header: dict[str, Any], concepts: Concepts) -> dict[str, Any]:
    """What a file holds: the header, and the entries, those that a step made with their digests."""
    stamps = {i: {} if entry["source"] == "human" else {"digest": digest(i, entry)} for i, entry in concepts.items()}
    by_key = {str(latent): entry | stamps[latent] for latent, entry in concepts.items()}
    return {"schema_version": SCHEMA_VERSION, **header, "concepts": by_key}


def as_read(content: dict[str, Any]) -> dict[str, Any]:
    """The inverse of to_write, for content that passed check(): entries edited since get the source "human"."""
    stamped = any("digest" in entry for entry in content["concepts"].values())
    concepts: Concepts = {}
    for latent, entry in ((int(key), dict(entry)) for key, entry in content["concepts"].items()):
        made = entry.pop("digest", None)
        # In files from before there were digests, the scored name shows whether an entry was edited.
        edited = made != digest(latent, entry) if stamped else entry.get("scored_name") not in (None, entry["name"])
        if edited and entry["source"] != "human":
            entry = {key: value for key, value in entry.items() if key not in STALE} | {"source": "human"}
        if entry.get("judge") not in (None, "rule", "words"):  # once those of contexts half of which fire
            entry |= {key: None for key in ("precision", "f1") if key in entry}
        concepts[latent] = entry
    return content | {"concepts": concepts}


def as_yaml(content: dict[str, Any]) -> str:
    whole = content | {"concepts": {int(key): entry for key, entry in content["concepts"].items()}}
    return yaml.dump(whole, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def one_line(error: object) -> str:
    return " ".join(str(error).split())[:200]
