"""Safetensors files with a digest of their tensors: one that was altered since it was written is not read."""
from pathlib import Path

from torch import Tensor

from lib.environment import InputError
from lib.files import REDO, fingerprint, read_note, read_tensors, write_tensors


def write_sealed(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file with a digest of its tensors, which read_sealed checks."""
    write_tensors(path, tensors, note=_digest(tensors))


def read_sealed(path: Path, wanted: dict[str, str] | None = None, **sizes: int) -> dict[str, Tensor]:
    """What write_sealed wrote. Raises InputError if it is missing, damaged or altered, or does not match `wanted`."""
    tensors = read_tensors(path, wanted, False, **sizes)
    if read_note(path) != _digest(tensors):
        raise InputError(f"{path} was altered since it was written; {REDO}")
    return tensors


def _digest(tensors: dict[str, Tensor]) -> str:
    return fingerprint({name: fingerprint(tensor) for name, tensor in tensors.items()})
