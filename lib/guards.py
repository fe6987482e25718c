"""What a script asks before it writes: does another process write here, is there room, was this begun differently?

    with in_use(folder):                       # one process at a time, until the block or the process ends
        require_room(folder, n_bytes)
        ...
"""
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from .checking import Schema
from .distributed import rank, wait_for_all
from .environment import InputError, log
from .files import check_files, read_json
from .schemas import FILES

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]


REPORT = Schema({"files": FILES})


@contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process, and remove what a killed one left half-written in it.

    The kernel keeps the lock, on the file .lock in the folder, and drops it when the process ends, however it ends.
    The file holds the process's number meanwhile. Of several ranks the first one holds the folder for all.
    Raises InputError if another process holds it.
    """
    if rank():
        wait_for_all()
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+", encoding="utf-8") as file:
        _lock(file, folder)
        for left in folder.rglob(".*.tmp"):
            left.unlink(missing_ok=True)
        wait_for_all()
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def _lock(file: IO[str], folder: Path) -> None:
    if fcntl is None:
        log.warning("this system has no file locks: start no second process on %s", folder)
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read() or "unknown"
        raise InputError(f"{folder} is in use by process {holder}; wait until it ends, or stop it") from None
    except OSError as error:  # some network file systems have no locks
        log.warning("%s can't be locked (%s): start no second process on it", folder, error)


def require_room(folder: Path, n_bytes: float) -> None:
    """Raise InputError if the disk of `folder` has less than n_bytes free."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if n_bytes > free:
        raise InputError(
            f"{folder} needs {n_bytes / 1e9:.3g} GB more, its disk has {free / 1e9:.3g} GB free; "
            "make room, then rerun the same command to resume, "
            "or set STORE_DIR to a folder on another disk"
        )


def bytes_in(folder: Path) -> int:
    """Bytes of all files below `folder`; 0 if it is not there."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def up_to_date(report: Path, made_from: dict[str, Any]) -> bool:
    """Whether the files that a report lists were made from just this, and are unharmed; False if there is no report.

    Raises InputError if they were made from something else, or if one was altered.
    """
    if not report.exists():
        return False
    found = read_json(report, REPORT)
    if why := differences({name: found.get(name) for name in made_from}, json.loads(json.dumps(made_from))):
        raise InputError(f"{report.parent} was made with other constants ({why}); set STORE_DIR to another folder, or "
                         f"delete {report} to make it anew")
    check_files(report.parent, found["files"], verify=True)
    return True


def differences(then: dict[str, Any], now: dict[str, Any]) -> str:
    """Which entries differ, those of inner dicts too, in words: "top_k was 4, is 8; seed was 0, is 1"; empty if none
    does.
    """
    found = []
    for name in [*then, *(name for name in now if name not in then)]:
        old, new = then.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found.append(differences(old, new))
        elif old != new:
            found.append(f"{name} was {old!r}, is {new!r}")
    return "; ".join(filter(None, found))
