"""How every file is written and read: whole or not at all, and told apart from one that was damaged since.

JSON, safetensors and torch archives; nothing but tensors and plain values is unpickled. What a file must hold is
described in lib/schemas.py; what does not fit is an InputError of one line.
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

HOST = re.sub("[^A-Za-z0-9]", "", platform.node())  # processes are told apart by machine and number
ANYTHING = Schema(Any)


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """Call write(temporary path), then rename to `path`: a reader sees the old file or the whole new one.

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
    except Exception as error:  # safetensors and torch raise kinds of their own
        if is_disk_full(error):
            raise InputError(
                f"the disk of {path.parent} is full; make room, then rerun the same command to resume"
            ) from None
        if not isinstance(error, OSError):
            raise
        raise InputError(f"{path} can't be written ({error.strerror or error}); make it writable, or set another "
                         "place") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path, pattern: str = "**/.*.tmp") -> None:
    """Remove the temporary files of processes of this machine that are no more: they were killed while they wrote."""
    for left in folder.glob(pattern):
        host, _, process = left.name.split(".")[-2].rpartition("-")
        if os.name == "posix" and host == HOST and process.isdigit() and not _is_running(int(process)):
            left.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it runs as someone else
        pass
    return True


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    atomic_write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any, sealed: bool = False) -> None:
    """Write JSON atomically; NaN and infinity are refused, because other tools can't read them.

    sealed: a dict that nobody edits by hand; it gets an entry "sha256" over all others, which read_json checks.
    """
    if sealed:
        value = json.loads(json.dumps(value))  # the digest is of what is read back: keys become strings
        value = {**value, "sha256": _json_digest(value)}
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path, schema: Schema = ANYTHING) -> Any:
    """What a JSON file holds, without its seal. Raises InputError, which names file and place, if it does not fit."""
    value = parse_json(read_bytes(path, schema.limit, schema.remedy), path, schema.remedy)
    try:
        if schema.sealed and (not isinstance(value, dict) or "sha256" not in value):
            raise InputError(f"{path} has no seal, so it was altered since it was written; {schema.remedy}")
        # A seal is known by its name and by its value, so that it is missed wherever one of the two was altered.
        entries = value.items() if isinstance(value, dict) else ()
        found = [name for name, inner in entries
                 if name == "sha256" or isinstance(inner, str) and inner.startswith("sha256:")]
        seals = {name: value.pop(name) for name in found}
        if seals and seals != {"sha256": _json_digest(value)}:
            raise InputError(f"{path} was altered since it was written; {schema.remedy}")
        check(value, schema.content)
    except Misfit as misfit:
        raise InputError(f"{path} is damaged: {misfit}; {schema.remedy}") from None
    except RecursionError:
        raise InputError(f"{path} is damaged: it is nested too deep; {schema.remedy}") from None
    return value


def parse_json(data: bytes, path: Path, remedy: str) -> Any:
    """One JSON value. NaN, infinity, duplicate keys and too many brackets are an InputError, as is what is no JSON."""
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        why = "it is nested too deep" if isinstance(error, RecursionError) else first_line(error)
        raise InputError(f"{path} is damaged ({why}); {remedy}") from None


def read_lines(path: Path, wanted: Any, remedy: str) -> Iterator[Any]:
    """The values of a file with one JSON value a line, each as described in `wanted`; InputError names the line that is
    not.
    """
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
        raise ValueError("a key comes twice")
    return found


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def read_bytes(path: Path, limit: int, remedy: str = "delete it and run its step again") -> bytes:
    """A file's bytes. Raises InputError if it is missing, larger than `limit` bytes, no regular file, or unreadable."""
    require_file(path, limit, remedy)
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror}); make it readable") from None


def require_file(path: Path, limit: int | None = None, remedy: str = "delete it and run its step again") -> None:
    """Raise InputError if there is no regular file; a pipe would be waited for for ever."""
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
    """Write a safetensors file atomically. note: JSON value for the file's header, read back by read_note().

    The note is one string because safetensors writes several metadata keys in random order: equal files would differ.
    """
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    metadata = None if note is None else {"note": json.dumps(note)}
    # save_file would leave a temporary file of its own where it is killed.
    atomic_write(path, lambda temporary: temporary.write_bytes(save(contiguous, metadata)))


def read_note(path: Path, wanted: Any = str) -> Any:
    """The note in a safetensors file's header. Raises InputError if there is none that fits `wanted`
    (lib/schemas.py).
    """
    require_file(path)
    try:
        with safe_open(path, "pt") as file:
            note = json.loads((file.metadata() or {})["note"])
        check(note, wanted)
    except Exception as error:  # safetensors raises its own type, which is not exported
        raise _damaged(path, error, "delete it and run its step again") from None
    return note


def read_tensors(
    path: Path, wanted: dict[str, str] | None = None, finite: bool = False, **sizes: int
) -> dict[str, Tensor]:
    """A safetensors file, memory-mapped. Raises InputError if it is missing, damaged or not as described
    (lib/schemas.py).
    """
    require_file(path)
    try:
        tensors = load_file(path)
        check_tensors(tensors, wanted or {}, finite, **sizes)
    except Exception as error:  # safetensors raises its own type, which is not exported
        raise _damaged(path, error, "delete it and run its step again") from None
    return tensors


def _damaged(path: Path, error: Exception, remedy: str) -> InputError:
    return InputError(f"{path} is damaged ({first_line(error)}); {remedy}")


def write_sealed(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file with a digest of its tensors, which read_sealed checks."""
    write_tensors(path, tensors, note=_tensors_digest(tensors))


def read_sealed(path: Path, wanted: dict[str, str] | None = None, **sizes: int) -> dict[str, Tensor]:
    """What write_sealed wrote; a missing, damaged or altered file is an InputError that names it."""
    tensors = read_tensors(path, wanted, False, **sizes)
    if read_note(path) != _tensors_digest(tensors):
        raise InputError(f"{path} was altered since it was written; delete it and run its step again")
    return tensors


def _tensors_digest(tensors: dict[str, Tensor]) -> str:
    return fingerprint({name: fingerprint(tensor) for name, tensor in tensors.items()})


def write_torch(path: Path, value: Any) -> None:
    """torch.save, atomically; equal values give equal bytes."""
    buffer = io.BytesIO()  # torch.save would write the temporary file's name into the archive
    torch.save(value, buffer)
    atomic_write(path, lambda temporary: temporary.write_bytes(buffer.getbuffer()))


def read_torch(path: Path, otherwise: str, wanted: Any = None) -> Any:
    """What write_torch wrote, on the CPU; nothing but tensors and plain values is unpickled.

    wanted: a description of its plain values (lib/schemas.py). Raises InputError for a missing or damaged file, with
    what to do `otherwise`. torch itself does not compare the checksums that the archive holds, and unpacks what is
    packed.
    """
    require_file(path, remedy=otherwise)
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise zipfile.BadZipFile("it is packed")
            if (bad := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"the checksum of {bad} is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
        if wanted is not None:
            check(content, wanted)
    except Exception as error:  # torch and zipfile raise many kinds for a damaged archive
        raise _damaged(path, error, f"delete it, then {otherwise}") from None
    return content


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(value: Any) -> str:
    """Sixteen hex digits of anything JSON can hold, or of a tensor's bytes and shape."""
    if isinstance(value, Tensor):
        digest = hashlib.sha256(str((tuple(value.shape), value.dtype)).encode())
        digest.update(value.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
    else:
        digest = hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def safe_name(name: str) -> str:
    """`name` if it is a plain file name; anything that could leave its folder is an InputError."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*", name):
        raise InputError(f"{name[:60]!r} is no file name; use letters, digits, '_', '-' and '.'")
    return name
