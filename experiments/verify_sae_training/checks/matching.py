"""Which latents of two SAEs are the same: by what they fire on, and by their dictionary rows.

    a, b = sparse_codes(first, x), sparse_codes(second, x)       # the same N tokens; x of each SAE's own layer
    match, correlation = best_matches(a, b)                      # for each latent of the first, the second's best
    mcc = matched_cosine(first.W_dec, second.W_dec)

A match by correlation works across layers, where dictionaries can't be compared. A best match is sought among all
latents of the other SAE, so it grows with their number: beside it stands the same search by chance(), on shuffled
tokens.
"""
from collections.abc import Iterable, Iterator

import numpy as np
import scipy.sparse
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from lib.environment import InputError
from lib.sae import SAE

BLOCK_PAIRS = 20_000_000  # pairs (token, latent, latent) that one block of a product may make
MATCHED_AT_MOST = 8192  # latents; the exact one-to-one matching takes time with their cube


def sparse_codes(sae: SAE, batches: Iterable[Tensor]) -> scipy.sparse.csr_array:
    """Codes [N, F] of activations that come in batches [n, D], float64; those of 0 are not stored."""
    parts = []
    for x in batches:
        values, latents = (part.cpu().numpy() for part in sae.encode(x.float().to(sae.mean.device)))
        row, slot = (values > 0).nonzero()
        parts.append(scipy.sparse.csr_array((values[row, slot].astype(np.float64), (row, latents[row, slot])),
                                            shape=(len(values), sae.n_latents)))
    return scipy.sparse.csr_array(scipy.sparse.vstack(parts))


def best_matches(a: scipy.sparse.csr_array, b: scipy.sparse.csr_array) -> tuple[Tensor, Tensor]:
    """For each of the F_a latents of codes a [N, F_a], the latent of b [N, F_b] whose codes correlate most with its own
    (Pearson's r over all N tokens, zeros included), and that correlation: int64 and float64 [F_a].

    -1 and NaN for a latent that has no r with any: it never fires on these tokens, or with none of b's.
    """
    if a.shape[0] != b.shape[0]:
        raise InputError(f"the codes are of {a.shape[0]:,} and {b.shape[0]:,} tokens; they must be of the same ones")
    n, (mean_a, sd_a), (mean_b, sd_b) = a.shape[0], _moments(a), _moments(b)
    match, best = torch.full((a.shape[1],), -1), torch.full((a.shape[1],), float("nan"), dtype=torch.float64)
    by_latent = a.tocsc()
    for start, stop in _blocks(a, b):
        together = scipy.sparse.csr_array(by_latent[:, start:stop].T @ b)
        together.sort_indices()
        for row in range(stop - start):
            first, last = together.indptr[row], together.indptr[row + 1]
            if first == last:
                continue
            others, i = together.indices[first:last], start + row
            with np.errstate(invalid="ignore", divide="ignore"):  # a code that never changes has no correlation
                r = (together.data[first:last] / n - mean_a[i] * mean_b[others]) / (sd_a[i] * sd_b[others])
            if np.isfinite(r).any():
                at = np.nanargmax(np.where(np.isfinite(r), r, np.nan))
                match[i], best[i] = int(others[at]), float(r[at])
    return match, best


def chance(a: scipy.sparse.csr_array, b: scipy.sparse.csr_array, seed: int = 0) -> Tensor:
    """The correlations that best_matches finds where b's tokens are shuffled: what the search alone gives, [F_a]."""
    return best_matches(a, b[np.random.default_rng(seed).permutation(b.shape[0])])[1]


def matched_cosine(a: Tensor, b: Tensor) -> float:
    """Mean cosine of the rows of two dictionaries [F, D], matched one to one so that it is largest.

    The PW-MCC of arXiv 2505.20254, where several seeds of one training reach .80. With unequal numbers of latents, over
    the pairs that there are. Raises InputError for more than MATCHED_AT_MOST latents.
    """
    if max(len(a), len(b)) > MATCHED_AT_MOST:
        raise InputError(f"one-to-one matching takes at most {MATCHED_AT_MOST:,} latents")
    units = [torch.nn.functional.normalize(rows.double().cpu(), dim=1) for rows in (a, b)]
    cosine = (units[0] @ units[1].T).numpy()
    return float(cosine[linear_sum_assignment(cosine, maximize=True)].mean())


def rotated(dictionary: Tensor, seed: int = 0) -> Tensor:
    """The rows [F, D] turned by one random rotation: the same angles between them, none kept to another dictionary."""
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(dictionary.shape[1], dictionary.shape[1], generator=generator,
                                       dtype=torch.float64))
    return dictionary.double().cpu() @ (q * r.diagonal().sign())


def _moments(codes: scipy.sparse.csr_array) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each latent's codes over all tokens."""
    mean = np.asarray(codes.mean(axis=0)).ravel()
    square = np.asarray(codes.multiply(codes).mean(axis=0)).ravel()
    return mean, np.sqrt(np.maximum(square - mean**2, 0))


def _blocks(a: scipy.sparse.csr_array, b: scipy.sparse.csr_array) -> Iterator[tuple[int, int]]:
    """Ranges of a's latents whose products with b stay under BLOCK_PAIRS, whatever the number of latents."""
    per_token = np.diff(b.indptr)
    pairs = np.bincount(a.indices, weights=np.repeat(per_token, np.diff(a.indptr)), minlength=a.shape[1])
    start, held = 0, 0.0
    for latent, count in enumerate(pairs):
        if held and held + count > BLOCK_PAIRS:
            yield start, latent
            start, held = latent, 0.0
        held += count
    yield start, a.shape[1]
