"""How files are written, whole or not at all, and how they are read: a damaged one is an InputError of one line.

JSON, safetensors and torch archives; nothing but tensors and plain values is unpickled. lib/schemas.py has the words
that describe what a file must hold.
"""
import contextlib
import glob
import hashlib
import io
import json
import os
import platform
import re
import stat
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from .environment import InputError, first_line, is_disk_full
from .schemas import Misfit, Schema, check, check_tensors

HOST = re.sub("[^A-Za-z0-9]", "", platform.node())  # with the process number, it tells temporary files apart
ANYTHING = Schema(Any)
REDO = "delete it and run its step again"


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """Call write(temporary path), then rename that file to `path`: a reader sees the old file or the whole new one.

    Raises InputError if it can't be written; the old file stays.
    """
    temporary = path.with_name(f".{path.name}.{HOST}-{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent, f".{glob.escape(path.name)}.*.tmp")
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except Exception as error:  # safetensors and torch raise their own types
        if is_disk_full(error):
            raise InputError(f"the disk of {path.parent} is full; make room, then rerun the same command to resume"
                             ) from None
        if not isinstance(error, OSError):
            raise
        raise InputError(f"{path} can't be written ({error.strerror or error}); make it writable, or choose another "
                         "place") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path, pattern: str = "**/.*.tmp") -> None:
    """Remove the temporary files of this machine's processes that no longer run: they were killed while writing."""
    for left in folder.glob(pattern):
        host, _, process = left.name.split(".")[-2].rpartition("-")
        if os.name == "posix" and host == HOST and process.isdigit() and not _is_running(int(process)):
            left.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError as error:
        return isinstance(error, PermissionError)  # it runs as another user
    return True


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    atomic_write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any, sealed: bool = False) -> None:
    """Write JSON atomically. NaN and infinity are refused: other tools can't read them.

    sealed: add an entry "sha256" over all others, which read_json checks; for dicts that nobody edits by hand.
    """
    if sealed:
        value = json.loads(json.dumps(value))  # the digest is over what is read back: keys become strings
        value = {**value, "sha256": _json_digest(value)}
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path, schema: Schema = ANYTHING) -> Any:
    """A JSON file's value, without its seal. Raises InputError, which names file and place, if it does not match."""
    value = parse_json(read_bytes(path, schema.limit, schema.remedy), path, schema.remedy)
    try:
        if schema.sealed and (not isinstance(value, dict) or "sha256" not in value):
            raise InputError(f"{path} has no seal, so it was altered since it was written; {schema.remedy}")
        # A seal is known by its name and by its value, so that altering one of the two does not hide it.
        entries = value.items() if isinstance(value, dict) else ()
        found = [name for name, inner in entries
                 if name == "sha256" or isinstance(inner, str) and inner.startswith("sha256:")]
        seals = {name: value.pop(name) for name in found}
        if seals and seals != {"sha256": _json_digest(value)}:
            raise InputError(f"{path} was altered since it was written; {schema.remedy}")
        check(value, schema.content)
    except (Misfit, RecursionError) as error:
        why = error if isinstance(error, Misfit) else "it is nested too deep"
        raise InputError(f"{path} is damaged: {why}; {schema.remedy}") from None
    return value


def parse_json(data: bytes, path: Path, remedy: str) -> Any:
    """One JSON value. Raises InputError for anything else, and for NaN, infinity, duplicate keys and deep nesting."""
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        why = "it is nested too deep" if isinstance(error, RecursionError) else first_line(error)
        raise InputError(f"{path} is damaged ({why}); {remedy}") from None


def read_lines(path: Path, wanted: Any, remedy: str) -> Iterator[Any]:
    """The values of a file with one JSON value a line. Raises InputError for the first line that is not as `wanted`."""
    require_file(path, remedy=remedy)
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            value = parse_json(line, path, remedy)
            try:
                check(value, wanted)
            except Misfit as misfit:
                raise InputError(f"{path} is damaged: line {number}: {misfit}; {remedy}") from None
            yield value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key appears twice")
    return found


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def read_bytes(path: Path, limit: int, remedy: str = REDO) -> bytes:
    """A file's bytes. Raises InputError if it is missing, larger than `limit` bytes, no regular file, or unreadable."""
    require_file(path, limit, remedy)
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror}); make it readable") from None


def require_file(path: Path, limit: int | None = None, remedy: str = REDO) -> None:
    """Raise InputError if there is no regular file; reading a pipe would wait for ever."""
    try:
        found = path.stat()
    except FileNotFoundError:
        raise InputError(f"{path} is missing; {remedy.removeprefix('delete it and ')}") from None
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror}); make it readable") from None
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{path} is not a file; {remedy}")
    if limit is not None and found.st_size > limit:
        raise InputError(f"{path} has {found.st_size:,} bytes, {limit:,} at most are read; {remedy}")


def _json_digest(value: Any) -> str:
    return "sha256:" + hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_tensors(path: Path, tensors: dict[str, Tensor], note: Any = None) -> None:
    """Write a safetensors file atomically. note: JSON value for the file's header, which read_note() returns.

    The note is one string because safetensors writes several entries in random order: equal files would differ.
    """
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    metadata = None if note is None else {"note": json.dumps(note)}
    # save_file would leave a temporary file of its own if it were killed.
    atomic_write(path, lambda temporary: temporary.write_bytes(save(contiguous, metadata)))


@contextlib.contextmanager
def _reading(path: Path, remedy: str = REDO) -> Iterator[None]:
    """Whatever the library raises for a damaged file becomes an InputError; they export few of the types."""
    require_file(path, remedy=remedy)
    try:
        yield
    except Exception as error:
        raise InputError(f"{path} is damaged ({first_line(error)}); {remedy}") from None


def read_note(path: Path, wanted: Any = str) -> Any:
    """The note in a safetensors file's header. Raises InputError if there is none that matches `wanted`."""
    with _reading(path), safe_open(path, "pt") as file:
        note = json.loads((file.metadata() or {})["note"])
        check(note, wanted)
    return note


def read_tensors(
    path: Path, wanted: dict[str, str] | None = None, finite: bool = False, **sizes: int
) -> dict[str, Tensor]:
    """A safetensors file, memory-mapped. Raises InputError if it is missing, damaged, or does not match `wanted`."""
    with _reading(path):
        tensors = load_file(path)
        check_tensors(tensors, wanted or {}, finite, **sizes)
    return tensors


def write_torch(path: Path, value: Any) -> None:
    """torch.save, atomically; equal values give equal bytes."""
    buffer = io.BytesIO()  # torch.save would write the temporary file's name into the archive
    torch.save(value, buffer)
    atomic_write(path, lambda temporary: temporary.write_bytes(buffer.getbuffer()))


def read_torch(path: Path, otherwise: str, wanted: Any = None) -> Any:
    """What write_torch wrote, on the CPU; nothing but tensors and plain values is unpickled.

    wanted: a description of the plain values. Raises InputError for a missing or damaged file, with what to do
    `otherwise`. torch would not compare the archive's checksums, and would unpack what is compressed.
    """
    with _reading(path, f"delete it and {otherwise}"):
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise zipfile.BadZipFile("it is compressed")
            if (bad := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"the checksum of {bad} is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
        if wanted is not None:
            check(content, wanted)
    return content


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(value: Any) -> str:
    """Sixteen hex digits over anything that JSON can hold, or over a tensor's bytes and shape."""
    if isinstance(value, Tensor):
        digest = hashlib.sha256(str((tuple(value.shape), value.dtype)).encode())
        digest.update(value.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
    else:
        digest = hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]
