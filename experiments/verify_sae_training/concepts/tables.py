"""The concept dictionary as a CSV table that people edit in a spreadsheet, and what they edited in it.

Every line carries a stamp: the SAE, and a digest of the entry it was written for. A line that no longer fits its digest
was edited, and the entry becomes that person's.
"""
import csv
import io
import re
from pathlib import Path
from typing import Any, NamedTuple

from concepts.formats import EDITABLE, Concepts, decoded, digest, one_line
from lib.environment import InputError
from lib.files import write_text

CSV_COLUMNS = (
    "latent", "name", "description", "notes", "rating", "edited_by", "source", "backend", "model", "judge", "score",
    "f1", "coherence", "stamp",
)
# What a spreadsheet runs, or strips and then runs; the last four are the wide forms that Japanese keyboards write.
FORMULA = re.compile("'*[=+\\-@\t\r\n＝＋－＠]")


class Line(NamedTuple):
    """One line of a table."""

    latent: int
    new: dict[str, str]
    """Its EDITABLE columns."""
    sae_hash: str
    """Of the SAE that the line was written for; empty if unknown."""
    made: str
    """Digest of the entry that the line was written for; empty if unknown."""


def concepts_to_csv(concepts: Concepts, path: Path, sae_hash: str = "") -> None:
    """Write a table that a person can edit, one concept per line, with the byte order mark that Excel needs."""
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
    """The lines of a table: cells separated by comma, semicolon or tab, UTF-8 or UTF-16. Raises InputError."""
    text = decoded(path)
    first, _, rest = text.partition("\n")
    if first.lower().startswith("sep="):  # Excel's own
        text, first = rest, rest.partition("\n")[0]
    separator = next((s for s in ",;\t" if {"latent", "name"} <= {cell.strip(' "\r') for cell in first.split(s)}), None)
    if separator is None:
        raise InputError(f"{path} is not a table of concepts; its first line must name the columns latent and name")
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    lines, seen = [], set()
    try:
        for row in reader:
            if not any(cell for cells in row.values() for cell in (cells if isinstance(cells, list) else [cells])):
                continue
            lines.append(_line(row, f"{path}, line {reader.line_num}"))
            if lines[-1].latent in seen:
                raise InputError(f"{path}, line {reader.line_num}: latent {lines[-1].latent} appears twice")
            seen.add(lines[-1].latent)
    except csv.Error as error:
        where = f"{path}, line {reader.line_num}"
        raise InputError(f"{where}: {one_line(error)}; quote texts that hold quotes or line breaks") from None
    return lines


def _line(row: dict[Any, Any], where: str) -> Line:
    latent, name = (row.get("latent") or "").strip(), row.get("name")
    if any(row.get(None) or []):  # type: ignore[call-overload]  # DictReader's key for cells beyond the header
        raise InputError(f"{where}: more cells than columns; quote texts that hold a separator")
    if not re.fullmatch("[0-9]{1,9}", latent) or not (name or "").strip():
        raise InputError(f"{where}: every line needs a latent's number and a name")
    sae_hash, _, made = (row.get("stamp") or "").rpartition("/")
    return Line(int(latent), {key: _text(row[key]) for key in EDITABLE if row.get(key) is not None}, sae_hash, made)


class Conflict(NamedTuple):
    """One latent that two dictionaries name differently."""

    latent: int
    kept: str
    dropped: str
    reason: str


def concepts_from_csv(
    path: Path | str, concepts: Concepts, sae_hash: str | None = None, conflicts: list[Conflict] | None = None
) -> Concepts:
    """The concepts with a table's edits; where an EDITABLE column was changed, the source becomes "human".

    conflicts: receives the latents that another person has renamed since the export; those names stay. Raises
    InputError for a table that is damaged or about another SAE.
    """
    changed, found = with_edits(concepts, read_table(Path(path)), sae_hash, Path(path))
    if conflicts is not None:
        conflicts.extend(found)
    return changed


def with_edits(
    concepts: Concepts, lines: list[Line], sae_hash: str | None, path: Path
) -> tuple[Concepts, list[Conflict]]:
    """concepts_from_csv for a table that has been read; path: for messages."""
    changed, conflicts = dict(concepts), []
    for line in lines:
        if line.sae_hash and sae_hash and line.sae_hash != sae_hash:
            raise InputError(f"{path} names the latents of another SAE ({line.sae_hash}, not {sae_hash})")
        entry = concepts.get(line.latent, {})
        old = {key: entry.get(key) or "" for key in EDITABLE}
        if line.made == digest(line.latent, line.new) or old | line.new == old:
            continue
        lossy = {key: text.encode("cp1252", "replace").decode("cp1252") for key, text in old.items()}
        if any(old[key] != value == lossy[key] for key, value in line.new.items()):
            raise InputError(f"{path}: latent {line.latent} lost characters; save it in UTF-8 (in Excel: CSV UTF-8)")
        if line.made and entry.get("source") == "human" and line.made != digest(line.latent, entry):
            conflicts.append(Conflict(line.latent, kept=entry["name"], dropped=line.new["name"],
                                      reason="renamed since that table was exported"))
        else:
            rated = line.new.get("rating") or entry.get("rating")  # an empty cell is no rating
            new = {key: text for key, text in line.new.items() if key != "rating" or rated}
            changed[line.latent] = entry | new | {"source": "human"}
    return changed, conflicts
