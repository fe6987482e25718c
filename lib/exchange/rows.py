"""An SAE that others published, in the units of stored activations."""
from ..batches import Rows, sample_rows
from ..environment import log
from ..sae import SAE
from .folded import Folded, rescaled, unfold


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
