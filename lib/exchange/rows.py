"""An SAE that others published, in the units of stored activations."""
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..batches import Rows, sample_rows
from ..environment import InputError, log
from ..sae import SAE, load_sae
from ..saes import MODEL_FILE, find_sae
from .folded import Folded, rescaled, unfold
from .formats import read_foreign
from .hub import folder_of


def sae_for(source: str, rows: Rows) -> SAE:
    """An SAE by its name or folder, or one that others published: a folder of theirs, or user/repository/its/folder.

    Raises InputError if there is none, or ours can't be what it is.
    """
    try:
        folder = find_sae(source)
    except InputError:
        if "/" not in source and not Path(source).is_dir():
            raise
        with _called_start_from():
            folder = folder_of(source)
    if (folder / MODEL_FILE).exists():
        return load_sae(folder / MODEL_FILE)
    with _called_start_from():
        found = read_foreign(folder, source)
    sae = fitted(found.sae, rows)
    sae.config["imported"] = {"format": found.format, "source": source, "subfolder": "", **found.facts}
    return sae


@contextmanager
def _called_start_from() -> Iterator[None]:
    """What is said of import_sae.py's SOURCE and SUBFOLDER, said of the one constant that is both."""
    try:
        yield
    except InputError as error:
        said = str(error).replace("SOURCE and SUBFOLDER", "START_FROM").replace("SOURCE=", "START_FROM=")
        raise InputError(said.replace("set SUBFOLDER to", "add to START_FROM")) from None


def fitted(folded: Folded, rows: Rows) -> SAE:
    """The SAE with its codes in units of the rows' scale, as those trained on them have.

    Where it leaves the scale of its input to an estimate (SAELens's expected_average_only_in), that is the mean norm of
    a sample of the training rows.
    """
    if folded.wants_norm is not None:
        norms = [x.norm(dim=1).double() for x in sample_rows(rows, validation=False)]
        mean_norm = float(sum(norm.sum() for norm in norms)) / sum(map(len, norms))
        log.info("the SAE wants activations of mean norm %.4g; these have %.4g, and are scaled to it",
                 folded.wants_norm, mean_norm)
        folded = rescaled(folded, folded.wants_norm / mean_norm)
    return unfold(folded, rows.scale)
