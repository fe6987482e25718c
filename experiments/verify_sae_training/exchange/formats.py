"""The table of other tools' formats: how each is recognised, read and written. A new format is one entry here.

    kind, folded = read_foreign(folder)              # whichever format is there
    FORMATS["sae_lens"].write(folder, fold(sae), about)
"""
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from exchange import dictionary_learning, sae_lens, sparsify
from exchange.facts import hook_folder, module_folder
from exchange.folded import Folded
from lib.environment import InputError
from lib.schemas import Misfit
from lib.training.kinds import WITH_THRESHOLD


class Format(NamedTuple):
    """One tool's files of one SAE."""

    files: tuple[str, ...]
    """All of them; only this format has the first."""
    read: Callable[[Path], Folded]
    """Raises Misfit or InputError."""
    write: Callable[[Path, Folded, dict[str, Any]], None]
    """folder, SAE, exchange.facts.facts_of."""
    folder: Callable[[dict[str, Any]], str]
    """Name of the SAE's folder, from the same facts."""
    library: str
    """What the hub calls the tool."""
    loading: str
    """Python that loads the SAE, with {repo} and {folder}."""
    thresholds: bool = False
    """Whether it holds SAEs with a threshold for each latent (batchtopk, jumprelu)."""


FORMATS = {
    "sae_lens": Format(
        sae_lens.FILES, sae_lens.read, sae_lens.write, hook_folder, library="saelens", thresholds=True,
        loading='from sae_lens import SAE\nsae = SAE.from_pretrained("{repo}", "{folder}")',
    ),
    "dictionary_learning": Format(
        dictionary_learning.FILES, dictionary_learning.read, dictionary_learning.write, hook_folder,
        library="dictionary-learning",
        loading='from dictionary_learning.utils import load_dictionary\n'
                'sae, config = load_dictionary("{folder}", "cpu")  # of a local copy',
    ),
    "sparsify": Format(
        sparsify.FILES, sparsify.read, sparsify.write, module_folder, library="sparsify",
        loading='from sparsify import Sae\n'
                'sae = Sae.load_from_hub("{repo}", hookpoint="{folder}")  # input flattened to [N, D]',
    ),
}


def formats_for(folded: Folded) -> list[str]:
    """The formats that can hold this SAE."""
    return [name for name, known in FORMATS.items() if known.thresholds or folded.threshold is None]


def write_foreign(name: str, folder: Path, folded: Folded, about: dict[str, Any]) -> list[Path]:
    """Write the SAE in a format of the table; returns the files. Raises InputError where the format can't hold it."""
    if name not in (able := formats_for(folded)):
        raise InputError(f"{name} has no SAEs with thresholds ({', '.join(WITH_THRESHOLD)}); set FORMAT to "
                         f"{' or '.join(able)}")
    FORMATS[name].write(folder, folded, about)
    return [folder / file for file in FORMATS[name].files]


def read_foreign(folder: Path) -> tuple[str, Folded]:
    """(format, SAE) of the files in `folder`. Raises InputError for an unknown format or an SAE that ours can't be."""
    for name, known in FORMATS.items():
        if (folder / known.files[0]).exists():
            try:
                return name, known.read(folder)
            except Misfit as misfit:
                raise InputError(f"{folder} holds no {name} SAE that can be read: {misfit}") from None
    wanted = ", ".join(f"{known.files[0]} ({name})" for name, known in FORMATS.items())
    raise InputError(f"{folder} holds none of {wanted}; set SOURCE and SUBFOLDER to the folder of one SAE")
