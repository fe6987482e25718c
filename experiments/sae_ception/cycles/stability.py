"""Are the latents of an SAE found again by another seed, and more than the spread of the activations alone would do?

    found, null = stability(session, "per_class", 1)     # matched cosines, the same number of each

The null matches the SAE with one of the other seed that was trained in the same way on Gaussian rows with the mean and
covariance of the activations: whatever two dictionaries share because both fill the directions in which activations
vary, and because there are many latents in few dimensions, they share too. A rotated dictionary would not: it points
where there are no activations, and any SAE beats it.
"""
import torch
from torch import Tensor

from cycles.labels import draw
from cycles.matching import one_to_one
from cycles.sae_training import sae_of_rows
from cycles.scored import dense_codes, token_rows
from cycles.session import Session
from lib.environment import InputError
from lib.sae import SAE

EXAMPLES = 2_000  # training examples whose activations give mean and covariance, and tell which latents are alive
ROWS = 100_000  # Gaussian rows to train on, at most; where there are more activations, the null takes fewer steps
VAL_SHARE = 0.1  # as many more choose the null's best epoch


def stability(session: Session, arm: str, cycle: int) -> tuple[Tensor, Tensor]:
    """Cosines of the latents of this arm and cycle's SAE matched one to one with those of its second seed, and with
    those of the null: ascending, as many of each. Raises InputError without a second SAE.
    """
    if session.c["N_SAE_SEEDS"] < 2:
        raise InputError("stability over SAE seeds needs two of them; set N_SAE_SEEDS=2")
    session.load(arm, cycle)
    x, n_rows = activations(session)
    first, second = (session.sae(arm, cycle, seed) for seed in (0, 1))
    seed = 1_000_000 * cycle + 10 * session.seed + 1  # that of the second SAE
    n = min(n_rows, ROWS)
    rows = gaussian_like(x, n + max(1, int(VAL_SHARE * n)), seed)
    null = sae_of_rows(session, rows, torch.arange(len(rows)) >= n, seed)
    return matched(*(alive_rows(sae, of) for sae, of in ((first, x), (second, x), (null, rows[:len(x)]))))


def matched(a: Tensor, b: Tensor, null: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines of the unit rows a [A, D] matched one to one with b's, and with null's, ascending.

    The larger of b and null is thinned first: the best of many is always closer.
    """
    n = min(len(b), len(null))
    if not len(a) or not n:
        raise InputError("one of the SAEs has no latent alive: there is nothing to match")
    generator = torch.Generator().manual_seed(0)
    few = (rows[torch.randperm(len(rows), generator=generator)[:n]] for rows in (b, null))
    found, by_chance = (one_to_one(a.double() @ rows.double().T)[2].sort().values for rows in few)
    return found, by_chance


def gaussian_like(x: Tensor, n: int, seed: int) -> Tensor:
    """n Gaussian rows [n, D] with the mean and the covariance of the rows x [N, D]."""
    values, directions = torch.linalg.eigh(torch.cov(x.double().T, correction=0))
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, x.shape[1], generator=generator, dtype=torch.float64)
    return (x.double().mean(0) + z * values.clamp(min=0).sqrt() @ directions.T).float()


def activations(session: Session) -> tuple[Tensor, int]:
    """Activations [N, D] of some training examples at the positions that SAEs learn from, and how many all have."""
    task, ids = session.task, session.task.splits["train"]
    some = draw(ids, task.y, EXAMPLES, 0)
    if not session.is_text or session.c["SAE_POSITIONS"] == "pooled":
        return session.outputs(some)[0], len(ids)
    n_rows = sum(sum(task.tokens[i].keep) for i in ids.tolist())
    return torch.cat([states.cpu() for _, states in token_rows(session, some)]), n_rows


def alive_rows(sae: SAE, x: Tensor) -> Tensor:
    """The dictionary rows of the latents that fire on any of the rows x [N, D]."""
    fires = torch.stack([(dense_codes(sae, part) > 0).any(0) for part in x.split(4096)]).any(0)
    return sae.W_dec.cpu()[fires]
