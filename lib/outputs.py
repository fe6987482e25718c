"""What a step asks of its outputs: does another process write there, is there room, what was it made from, is it whole?

    with in_use(folder):                                     # one process at a time
        require_room(folder, n_bytes)
        if not is_current(path, made_from_then, made_from_now, "delete it to make it again"):
            ...

An output says what it was made from: a dict of named parts (constants, settings, fingerprints), in the file or beside
it. is_current() compares them with what would be used now.
"""
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from os import getpid
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from .distributed import add_up, beat, own_part, rank, wait_for_all
from .environment import InputError, log
from .files import require_file, sha256

SMALL_FILE = 8 << 20  # bytes; the checksum of a smaller file is compared whenever it is listed
FINGERPRINT = re.compile("[0-9a-f]{16}|[0-9a-f]{64}")
Parts = dict[str, Any]


def is_current(output: object, then: Parts | None, now: Parts, otherwise: str) -> bool:
    """Whether an output exists and was made from what would be used now.

    then: the parts that it says it was made from; None if there is no output. Parts that `now` lacks don't count.
    Raises InputError if it was made from something else: it names what has changed, and what to do `otherwise`.
    """
    if then is None:
        return False
    if why := differences({name: then.get(name) for name in now}, now):
        raise InputError(f"{output} was made with other constants or data ({why}); {otherwise}")
    return True


def why_no_run(path: Path, most: int = 5) -> str:
    """What to tell of a run's folder that holds no finished run: whether it is there, what to do, which others are."""
    others = sorted(path.parent.glob("*/manifest.json"), key=lambda file: file.stat().st_mtime_ns, reverse=True)
    there = " or ".join(file.parent.name for file in others[:most])
    others_do = f", or set RUN_ID to a finished one, like {there}" if there else ""
    if path.is_dir():
        return (f"run {path.name} is unfinished; run 01_save_activations.py with its constants again to finish it"
                f"{others_do}")
    return f"run {path.name} is missing; run 01_save_activations.py{others_do}"


def differences(then: Parts, now: Parts) -> str:
    """What differs between two dicts of parts, in words: "TOP_K was 4, is 8; SEED was 0, is 1"; empty if nothing does.

    Inner dicts are compared entry by entry. A fingerprint's digits tell a reader nothing: it is only named ("other
    activations"), and only if nothing else differs, because it may cover the other parts too.
    """
    found = list(_differences(_as_json(then), _as_json(now)))
    told = [words for words, is_fingerprint in found if not is_fingerprint]
    return "; ".join(told or [words for words, _ in found[:1]])


def _differences(then: Parts, now: Parts, within: str = "") -> Iterator[tuple[str, bool]]:
    for name in [*then, *(name for name in now if name not in then)]:
        old, new = then.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{name} ")
        elif old != new:
            is_fingerprint = any(isinstance(value, str) and FINGERPRINT.fullmatch(value) for value in (old, new))
            yield f"other {within}{name}" if is_fingerprint else f"{name} was {old!r}, is {new!r}", is_fingerprint


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))  # tuples become lists, as in what was read from a file


@contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process, and remove what a killed process left half-written in it.

    A folder that is still empty at the end is removed.

    The kernel keeps the lock, on the file .lock in the folder, and frees it however the process ends. With several
    ranks, rank 0 holds the folder for all. Raises InputError if another process holds it.
    """
    if rank():
        wait_for_all()
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        holder = ""
        with suppress(OSError):
            holder = f" {path.read_text()}"
        raise InputError(f"{folder} is in use by process{holder}; wait until it ends, or stop it") from None
    except (OSError, NotImplementedError) as error:  # some network file systems have no locks
        log.warning("%s can't be locked (%s): start no second process on it", folder, error)
    for left in folder.rglob(".*.tmp"):
        left.unlink(missing_ok=True)
    wait_for_all()
    try:
        _note_holder(path, str(getpid()))
        yield
    finally:
        _note_holder(path, "")
        with suppress(OSError):  # an empty folder that stays does no harm
            if list(folder.iterdir()) == [path]:
                path.unlink()
                folder.rmdir()
        lock.release()


def _note_holder(lock: Path, holder: str) -> None:
    """Write the holder's process number into its lock file; it only names the process in a message."""
    with suppress(OSError):
        lock.write_text(holder)


def require_room(folder: Path, n_bytes: float) -> None:
    """Raise InputError if the disk of `folder` has less than n_bytes free."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if n_bytes > free:
        raise InputError(f"{folder} needs {n_bytes / 1e9:.3g} GB more, its disk has {free / 1e9:.3g} GB free; make "
                         "room, then rerun the same command to resume, or set STORE_DIR to a folder on another disk")


def safe_name(name: str) -> str:
    """`name` if it is a plain file name. Raises InputError for anything that could leave its folder."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*", name):
        raise InputError(f"{name[:60]!r} is not a file name; use letters, digits, '_', '-' and '.'")
    return name


def list_files(folder: Path, names: list[str], known: dict[str, str] | None = None) -> list[dict[str, Any]]:
    """A manifest's entries for files in `folder`: name, bytes, sha256. Every rank must call it; each reads a part.

    known: checksums that were taken when the files were written, by name.
    """
    digests, known = torch.zeros(len(names), 32, dtype=torch.uint8), known or {}
    for i in range(len(names))[own_part(len(names))]:
        digest = known.get(names[i]) or sha256(folder / names[i])
        digests[i] = torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8)
        beat()
    wait_for_all()
    add_up(digests)
    return [{"file": name, "bytes": (folder / name).stat().st_size, "sha256": bytes(digest).hex()}
            for name, digest in zip(names, digests.tolist())]


def check_files(folder: Path, entries: list[dict[str, Any]], verify: bool = False) -> None:
    """Raise InputError for the first listed file that is missing, leaves the folder, or was altered.

    Sizes are always compared, checksums for small files; with `verify` for all, which reads them whole.
    """
    whole = folder.resolve()
    for entry in entries:
        path = folder / entry["file"]
        require_file(path, remedy=f"delete {folder} and make it again")
        if not path.resolve().is_relative_to(whole):
            raise InputError(f"{path} is a link that leaves {folder}; put the file itself there")
        compare = verify or entry["bytes"] <= SMALL_FILE
        if path.stat().st_size != entry["bytes"] or (compare and sha256(path) != entry["sha256"]):
            raise InputError(f"{path} was altered or truncated since it was written; delete {folder} and make it again")
