"""Does a latent stand for one thing? Coherence, and how interesting that makes it.

F1 says how well a list of patterns describes where a latent fires: "pot, showed, stopped" may reach 1. Coherence says
whether the list is of one thing. Draw two of the latent's firings, each in proportion to its code. Two of one pattern
are alike by 1, two of different patterns by the cosine of what the SAE finds on these patterns' tokens *across this
latent's direction*, above what unrelated words reach; a firing that no pattern covers is like nothing. The mean is

    q @ likeness @ q        # q: share of the activation on each pattern, first come; their sum is the part covered

so it is 1 only where one pattern covers everything, or several that are the same to the model. A name of one pattern
that covers a share c has c squared. The latent's own direction is left out because all that it fires on has it in
common, and a second latent of that direction would make anything coherent. A broader pattern would raise coherence;
rules are chosen by F1, which then falls, so read the two together.
"""
from collections.abc import Mapping
from itertools import chain
from typing import Any

import numpy as np
import scipy.sparse
from torch import Tensor
from tqdm.auto import tqdm

from concepts.patterns import Patterns, Rule
from lib.encoder import fit_of

MIXED = 0.5  # a latent of less coherence stands for several things
REFERENCE_WORDS = 500  # the commonest words; what their pairs reach at UNRELATED is the zero of likeness
UNRELATED = 95  # percentile
AT_ONCE = 512  # latents whose patterns are held as vectors


def add_coherence(
    entries: dict[int, dict[str, Any]], patterns: Patterns, strength: scipy.sparse.csr_matrix, W_dec: Tensor
) -> None:
    """Give each entry with a rule its "coherence", and say in the description of a mixed one what it is.

    strength: codes [F, N] on the tokens of the patterns. W_dec: dictionary, [F, D].
    """
    dictionary, codes = W_dec.cpu().numpy(), strength.T.tocsr()
    centre = np.asarray(strength.mean(1)).ravel() @ dictionary
    common = sorted(patterns.names["word"], key=lambda word: -len(patterns.find("word", word)))[:REFERENCE_WORDS]
    zero = unrelated(mean_codes(patterns, codes, [("word", word) for word in common]) @ dictionary - centre)
    latents = list(entries)
    for first in tqdm(range(0, len(latents), AT_ONCE), desc="coherence", unit=f"x {AT_ONCE} latents"):
        rules = {i: [(kind, name) for kind, name in entries[i]["rule"]] for i in latents[first : first + AT_ONCE]}
        numbers = {pattern: number for number, pattern in enumerate(dict.fromkeys(chain(*rules.values())))}
        vectors = mean_codes(patterns, codes, list(numbers)) @ dictionary - centre
        for latent, rule in rules.items():
            across = vectors[[numbers[pattern] for pattern in rule]]
            across -= np.outer(across @ dictionary[latent], dictionary[latent])
            span = slice(*strength.indptr[latent : latent + 2])
            shares = activation_shares(patterns, rule, strength.indices[span], strength.data[span])
            _note(entries[latent], round(float(shares @ likeness(across, zero) @ shares), 4))


def _note(entry: dict[str, Any], value: float) -> None:
    entry["coherence"] = value
    if value < MIXED and len(entry["rule"]) > 1:
        entry["description"] += ". Several things that have little to do with each other"


def mean_codes(patterns: Patterns, codes: scipy.sparse.csr_matrix, rule: Rule) -> scipy.sparse.csr_matrix:
    """The mean code of every latent on the tokens of each pattern, [patterns, F]. codes: [N, F]."""
    rows = [patterns.find(*pattern) for pattern in rule]
    sizes = np.array([len(part) for part in rows])
    place = np.arange(len(rows)).repeat(sizes), np.concatenate(rows) if rows else np.empty(0, int)
    weights = (1 / np.maximum(sizes, 1)).astype(np.float32).repeat(sizes)
    return scipy.sparse.csr_matrix((weights, place), (len(rows), patterns.n)) @ codes


def unrelated(vectors: np.ndarray) -> float:
    """The cosine that UNRELATED percent of the pairs of these vectors, [n, D], stay under; 0 if there are no pairs."""
    pairs = _cosines(vectors)[np.triu_indices(len(vectors), 1)]
    return float(np.clip(np.percentile(pairs, UNRELATED), 0, 0.99)) if len(pairs) else 0.0


def likeness(vectors: np.ndarray, zero: float) -> np.ndarray:
    """How alike patterns are, [n, n]: their cosines, scaled so that `zero` and less is 0; 1 on the diagonal.

    vectors: [n, D], about the mean of the corpus.
    """
    alike = np.clip((_cosines(vectors) - zero) / (1 - zero), 0, 1)
    np.fill_diagonal(alike, 1)
    return alike


def _cosines(vectors: np.ndarray) -> np.ndarray:
    units = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
    return units @ units.T


def activation_shares(patterns: Patterns, rule: Rule, rows: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """The share of a latent's activation on each pattern of its rule; a token belongs to the first that has it.

    rows, codes: where the latent fires, and how strongly, [n].
    """
    left = np.zeros(patterns.n, np.float32)
    left[rows] = codes
    shares = []
    for pattern in rule:
        found = patterns.find(*pattern)
        shares.append(float(left[found].sum()))
        left[found] = 0
    return np.array(shares) / (float(codes.sum()) or 1.0)


def interest(entry: Mapping[str, Any], ablated_kl: float | None = None) -> float:
    """How much a latent is worth looking at, from 0 to 1: specific, coherent, more than one token, causal.

    F1 x coherence x (1 + beyond + effect) / 3, with beyond = how far the name's balanced accuracy is above that of the
    most frequent token, over half; effect = sqrt(1 - exp(-KL)), a bound on the probability that ablating the latent
    moves (Bretagnolle and Huber 1979). Where F1 is not known, as of a chat model's names, how far balanced accuracy is
    above chance, doubled, stands for it. What was not measured adds nothing; an entry without coherence, from before
    there was one, counts as coherent. ablated_kl: nats, "ablated" in concept_effects.json.
    """
    score, baseline, one_thing = entry.get("score"), entry.get("baseline"), entry.get("coherence")
    described = entry.get("f1")
    if described is None:
        described = max(2 * score - 1, 0.0) if score is not None else 0.0
    beyond = min(max(2 * (score - baseline), 0.0), 1.0) if score is not None and baseline is not None else 0.0
    effect = float(np.sqrt(-np.expm1(-max(ablated_kl or 0.0, 0.0))))
    return described * (1.0 if one_thing is None else one_thing) * (1 + beyond + effect) / 3


def called(concepts: Mapping[int, Mapping[str, Any]], word: str) -> int | None:
    """The latent whose name this word fits best, as in lib.encoder.Encoder.find, the most interesting first; None: no
    name has it.
    """
    fits = {latent: fit for latent, entry in concepts.items() if (fit := fit_of(word, entry["name"]))}
    return min(fits, key=lambda latent: (fits[latent], -interest(concepts[latent]), latent), default=None)
