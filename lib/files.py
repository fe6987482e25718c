"""How every file is written and read: whole or not at all, and told apart from one that was damaged since.

JSON, safetensors and torch archives; nothing but tensors and plain values is unpickled.
"""
import glob
import hashlib
import io
import json
import os
import platform
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from lib.distributed import add_up, own_part
from lib.environment import InputError, is_disk_full

HOST = re.sub("[^A-Za-z0-9]", "", platform.node())  # processes are told apart by machine and number
SMALL_FILE = 8 << 20  # bytes; the checksum of a smaller file is compared whenever it is listed


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """Call write(temporary path), then rename to `path`: a reader sees the old file or the whole new one.

    Raises InputError if the disk is full; the old file stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, f".{glob.escape(path.name)}.*.tmp")
    temporary = path.with_name(f".{path.name}.{HOST}-{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except Exception as error:  # safetensors and torch raise kinds of their own
        if not is_disk_full(error):
            raise
        raise InputError(f"the disk of {path.parent} is full; make room, then the same command goes on") from None
    finally:
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
        value = {**value, "sha256": _json_digest(value)}
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file, without its seal; a missing, damaged or altered one is an InputError that names it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); delete it and run its step again") from None
    # A seal is known by its name and by its value, so that it is missed wherever one of the two was altered.
    sealed = [name for name in value if name == "sha256" or str(value[name]).startswith("sha256:")] if isinstance(value, dict) else []
    seals = {name: value.pop(name) for name in sealed}
    if seals and seals != {"sha256": _json_digest(value)}:
        raise InputError(f"{path} was altered since it was written; delete it and run its step again")
    return value


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


def read_note(path: Path) -> Any:
    """The note in a safetensors file's header."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["note"])


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file, memory-mapped; a missing or damaged one is an InputError that names it."""
    if not path.exists():
        raise InputError(f"{path} is missing")
    try:
        return load_file(path)
    except Exception as error:  # safetensors raises its own type, which is not exported
        raise InputError(f"{path} is damaged ({error}); delete it and run its step again") from None


def write_sealed(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file with a digest of its tensors, which read_sealed checks."""
    write_tensors(path, tensors, note=_tensors_digest(tensors))


def read_sealed(path: Path) -> dict[str, Tensor]:
    """What write_sealed wrote; a missing, damaged or altered file is an InputError that names it."""
    tensors = read_tensors(path)
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


def read_torch(path: Path, otherwise: str) -> Any:
    """What write_torch wrote, on the CPU; nothing but tensors and plain values is unpickled.

    Raises InputError for a missing or damaged file, with what to do `otherwise`. torch itself does not compare the
    checksums that the archive holds.
    """
    if not path.exists():
        raise InputError(f"there is no {path}; {otherwise}")
    try:
        with zipfile.ZipFile(path) as archive:
            if (bad := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"the checksum of {bad} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and zipfile raise many kinds for a damaged archive
        raise InputError(f"{path} is damaged ({str(error).splitlines()[0][:120]}); delete it, then {otherwise}") from None


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(value: Any) -> str:
    """Sixteen hex digits of anything JSON can hold, or of a tensor's bytes and shape."""
    if isinstance(value, Tensor):
        data = str((tuple(value.shape), value.dtype)).encode() + value.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
    else:
        data = json.dumps(value, sort_keys=True, default=str).encode()
    return hashlib.sha256(data).hexdigest()[:16]


def safe_name(name: str) -> str:
    """`name` if it is a plain file name; anything that could leave its folder is an InputError."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*", name):
        raise InputError(f"{name!r} is no file name; use letters, digits, '_', '-' and '.'")
    return name


def list_files(folder: Path, names: list[str]) -> list[dict[str, Any]]:
    """The entries of a manifest for files under `folder`: name, bytes, sha256. All ranks call it, each reads its part."""
    digests = torch.zeros(len(names), 32, dtype=torch.uint8)
    for i in range(len(names))[own_part(len(names))]:
        digests[i] = torch.tensor(list(bytes.fromhex(sha256(folder / names[i]))), dtype=torch.uint8)
    add_up(digests)
    return [
        {"file": name, "bytes": (folder / name).stat().st_size, "sha256": bytes(digest).hex()} for name, digest in zip(names, digests.tolist())
    ]


def check_files(folder: Path, entries: list[dict[str, Any]], verify: bool = False) -> None:
    """Raise InputError for the first listed file that is missing, has another size or (verify, or small) another sha256."""
    for entry in entries:
        path = folder / entry["file"]
        if not path.exists():
            raise InputError(f"{path} is missing; delete {folder} and make it again")
        if path.stat().st_size != entry["bytes"] or ((verify or entry["bytes"] <= SMALL_FILE) and sha256(path) != entry["sha256"]):
            raise InputError(f"{path} was altered or truncated since it was written; delete {folder} and make it again")
