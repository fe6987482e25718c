"""The table of other tools' formats: how each is recognised and read. A new format is one entry here.

    found = read_foreign(folder)              # whichever format is there
    sae = unfold(found.sae, scale)
"""
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ..environment import InputError
from ..schemas import Misfit, Text, check
from . import dictionary_learning, gemma_scope, llama_scope, sae_lens, sparsify
from .folded import Folded
from .places import hub_name, signature_of

ONE_LINE = Text(r"[^\x00-\x1f\x7f]{1,300}")


class Reader(NamedTuple):
    """One tool's files of one SAE."""

    files: tuple[str, ...]
    """All of them; only this format has the first."""
    read: Callable[[Path, str], tuple[Folded, dict[str, Any]]]
    """(folder, where it comes from) -> the SAE, and its kind, model_name and hook_name so far as the files tell.
    Raises Misfit or InputError.
    """


READERS = {
    "sae_lens": Reader(sae_lens.FILES, sae_lens.read),
    "dictionary_learning": Reader(dictionary_learning.FILES, dictionary_learning.read),
    "sparsify": Reader(sparsify.FILES, sparsify.read),
    "gemma_scope": Reader(gemma_scope.FILES, gemma_scope.read),
    "gemma_scope_2": Reader(gemma_scope.FILES_3, gemma_scope.read_3),
    "llama_scope": Reader(llama_scope.FILES, llama_scope.read),
}


class Foreign(NamedTuple):
    """An SAE from another tool's files."""

    format: str
    """A key of READERS."""
    sae: Folded
    facts: dict[str, str]
    """kind: standard, gated, topk, batchtopk, jumprelu or matryoshka; where the files tell, model_name and hook_name in
    their own words, and hook, that name as a LAYER_SIGNATURE.
    """


def is_foreign(folder: Path) -> bool:
    """Whether the folder holds an SAE in one of the formats."""
    return any((folder / known.files[0]).exists() for known in READERS.values())


def folders_of(files: list[str], most: int = 3) -> list[str]:
    """The first folders with an SAE, from the paths of a repository's files."""
    firsts = tuple(f"/{known.files[0]}" for known in READERS.values())
    found = {path.removesuffix(first) for path in files for first in firsts if path.endswith(first)}
    return sorted(found)[:most]


def read_foreign(folder: Path, where: str | None = None) -> Foreign:
    """The SAE in `folder`; where: its repository and folder there, whose names some formats need; None: the path.

    Raises InputError for an unknown format, or an SAE that ours can't be.
    """
    for name, known in READERS.items():
        if (folder / known.files[0]).exists():
            try:
                sae, facts = known.read(folder, where or str(folder))
                check(facts, dict.fromkeys(facts, ONE_LINE))
            except Misfit as misfit:
                raise InputError(f"{folder} holds no {name} SAE that can be read: {misfit}") from None
            if "hook_name" in facts:
                facts["hook"] = signature_of(facts["hook_name"])
            if "model_name" in facts:
                facts["model_name"] = hub_name(facts["model_name"])
            return Foreign(name, sae, facts)
    if below := folders_of([path.relative_to(folder).as_posix() for path in folder.glob("*/**/*.*")]):
        raise InputError(f"{folder} holds several SAEs; set SUBFOLDER to the folder of one, like {' or '.join(below)}")
    wanted = ", ".join(f"{known.files[0]} ({name})" for name, known in READERS.items())
    raise InputError(f"{folder} holds none of {wanted}; set SOURCE and SUBFOLDER to the folder of one SAE")
