"""The formats that an SAE is exported in; lib/exchange reads these and more. A new one is one entry here.

    FORMATS["sae_lens"].write(folder, fold(sae), about)
"""
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from exchange.facts import hook_folder, module_folder
from exchange.writers import write_dictionary_learning, write_sae_lens, write_sparsify
from lib.environment import InputError
from lib.exchange.folded import Folded
from lib.exchange.formats import READERS
from lib.training.kinds import WITH_THRESHOLD


class Format(NamedTuple):
    """One tool's files of one SAE."""

    write: Callable[[Path, Folded, dict[str, Any]], None]
    """folder, SAE, exchange.facts.facts_of."""
    folder: Callable[[dict[str, Any]], str]
    """Name of the SAE's folder, from the same facts."""
    library: str
    """What the hub calls the tool."""
    loading: str
    """Python that loads the SAE, with {repo} and {folder}."""
    thresholds: bool = True
    """Whether it holds SAEs with a threshold for each latent (batchtopk, jumprelu; standard and gated imports)."""


FORMATS = {
    "sae_lens": Format(
        write_sae_lens, hook_folder, library="saelens",
        loading='from sae_lens import SAE\nsae = SAE.from_pretrained("{repo}", "{folder}")',
    ),
    "dictionary_learning": Format(
        write_dictionary_learning, hook_folder, library="dictionary-learning",
        loading='from dictionary_learning.utils import load_dictionary\n'
                'sae, config = load_dictionary("{folder}", "cpu")  # of a local copy',
    ),
    "sparsify": Format(
        write_sparsify, module_folder, library="sparsify", thresholds=False,
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
    return [folder / file for file in READERS[name].files]
