"""The report.json of what a script here writes: what it was made from, and a checksum for each of its files."""
from pathlib import Path
from typing import Any

from lib.files import read_json
from lib.outputs import check_files, is_current
from lib.schemas import FILES, Schema

REPORT = Schema({"files": FILES})


def up_to_date(report: Path, made_from: dict[str, Any]) -> bool:
    """Whether the files that a report lists were made from just this, and are unharmed; False if there is no report.

    Raises InputError if they were made from something else, or if one was altered.
    """
    if not report.exists():
        return False
    found = read_json(report, REPORT)
    is_current(report.parent, found, made_from, f"set STORE_DIR to another folder, or delete {report} to make it anew")
    check_files(report.parent, found["files"], verify=True)
    return True
