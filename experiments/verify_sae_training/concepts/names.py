"""Names of latents by statistics alone: the patterns of a token and its context that tell where the latent fires.

A name stands for a rule, a set of patterns (concepts/patterns.py): it says "fires" where any of them holds. It is found
on the tokens of the training texts and scored on those of the held-out texts.

    patterns = patterns_of(codes)       # of the texts: the same for every SAE on them
    named = name_latents(codes, patterns, is_val, latents, W_dec=sae.W_dec)   # latent -> an entry of concepts.json
"""
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor
from tqdm.auto import tqdm

from concepts.codes import Codes
from concepts.coherence import add_coherence
from concepts.patterns import KINDS, Patterns, Rule, find_patterns
from concepts.wording import describe, short_name

SCORE_KIND = "balanced accuracy of the rule on held-out tokens; 0.5 is chance"
WORDS_KIND = "balanced accuracy on held-out tokens of firing on the name's own words; 0.5 is chance"
MAX_ROWS = 1_000_000  # tokens that names are made from; from a larger corpus, every n-th text is used
CANDIDATES = 16  # patterns of each kind that are considered for a latent
PRIOR = 1.0  # weight of the corpus as a prior, in firings of the latent
MIN_Z = 3.0  # standard deviations of the log-odds below which a pattern may be chance
MAX_PATTERNS = 12  # in one rule
MIN_GAIN = 0.005  # in F1, for one more pattern


def patterns_of(codes: Codes) -> Patterns:
    """The patterns of the rows that names are made from (used_rows)."""
    use = used_rows(codes)
    return find_patterns(codes.texts, {name: column[use] for name, column in codes.rows.items()})


def name_latents(
    codes: Codes, patterns: Patterns, is_val: Tensor, latents: Iterable[int], W_dec: Tensor
) -> dict[int, dict[str, Any]]:
    """Name, description, rule, held-out score and coherence of each latent that fires on a training text.

    patterns: of patterns_of. is_val: bool [N], true for rows of held-out texts. W_dec: dictionary, [F, D]. Returns
    latent -> an entry of concepts.json. Deterministic.
    """
    use = used_rows(codes)
    held_out, strength = is_val.numpy()[use], codes_matrix(codes, use)
    parts = [(patterns.only(rows), strength[:, rows].tocsr()) for rows in (~held_out, held_out)]
    train, seen = parts[0]
    candidates = candidate_patterns(train, seen)
    token_of, tokens = train.column("token"), list(train.names["token"])
    entries = {}
    for latent in tqdm(latents, desc="naming", unit="latent"):
        if len(rows := firing_rows(seen, latent)):
            common = [("token", tokens[np.bincount(token_of[rows]).argmax()])]
            split = [(part, _code(codes_of, latent)) for part, codes_of in parts]
            entries[latent] = _entry(split, candidates[latent], common)
    add_coherence(entries, patterns, strength, W_dec)
    return entries


def score_words(
    codes: Codes, patterns: Patterns, is_val: Tensor, concepts: dict[int, dict[str, Any]]
) -> dict[int, dict[str, Any]]:
    """Scores of names without a rule, such as a person's: the rule is to fire on the name's own words.

    A lower bound: a name that means more than its words ("verbs of eating") may be better than they show.
    """
    use = used_rows(codes)
    held_out, strength = is_val.numpy()[use], codes_matrix(codes, use)
    scored = {}
    for latent, entry in concepts.items():
        words = dict.fromkeys(re.findall(r"[^\W_]+(?:['’][^\W_]+)*", entry["name"].lower()))
        rule = [("word", word) for word in words if word not in ("and", "or") or len(words) == 1]
        scores = score_rule(predict(patterns, rule)[held_out], _code(strength, latent)[held_out] > 0)
        score = scores.pop("balanced_accuracy")
        scored[latent] = {"score": score, "score_kind": WORDS_KIND, "judge": "words", **scores}
    return scored


def used_rows(codes: Codes) -> np.ndarray:
    """The rows that names are made from, bool [N]: all, or those of every n-th text, about MAX_ROWS in number."""
    step = -(-len(codes) // MAX_ROWS)
    return codes.rows["text_id"].numpy() % max(step, 1) == 0


def firing_rows(strength: scipy.sparse.csr_matrix, latent: int) -> np.ndarray:
    """The rows on which a latent fires. strength: codes [F, N]."""
    return strength.indices[slice(*strength.indptr[latent : latent + 2])]


def _code(strength: scipy.sparse.csr_matrix, latent: int) -> np.ndarray:
    """One latent's codes over all rows, float32 [N]."""
    code = np.zeros(strength.shape[1], np.float32)
    span = slice(*strength.indptr[latent : latent + 2])
    code[strength.indices[span]] = strength.data[span]
    return code


def codes_matrix(codes: Codes, use: np.ndarray) -> scipy.sparse.csr_matrix:
    """The codes over 0 as a sparse matrix, latents x used rows. use: bool [N]."""
    number = np.cumsum(use) - 1
    parts = []
    for start, values, indices in codes:
        used = torch.from_numpy(use[start : start + len(values)])
        row, slot = (values.gt(0) & used[:, None]).nonzero(as_tuple=True)
        parts.append((values[row, slot].numpy(), indices[row, slot].numpy(), number[start + row.numpy()]))
    value, latent, place = (np.concatenate(column) for column in zip(*parts))
    return scipy.sparse.csr_matrix((value, (latent, place)), shape=(codes.n_latents, int(use.sum())))


def candidate_patterns(patterns: Patterns, strength: scipy.sparse.csr_matrix) -> list[Rule]:
    """For each latent, the patterns (kind, name) that are over-represented where it fires.

    Ranked by the z-score of their log-odds against the rest of the corpus, with the corpus as an informative Dirichlet
    prior (Monroe, Colaresi and Quinn 2008, "Fightin' Words"). A firing weighs its code over the latent's mean code.

    strength: codes [F, N].
    """
    fires = np.diff(strength.indptr)
    weight = scipy.sparse.diags(fires / np.maximum(np.asarray(strength.sum(1)).ravel(), 1e-12)) @ strength
    found: list[Rule] = [[] for _ in fires]
    for kind in KINDS:
        names, sizes = list(patterns.names[kind]), np.diff(patterns.starts[kind])
        ones = np.ones(int(sizes.sum()), np.float32)
        place = patterns.rows[kind], np.arange(len(sizes)).repeat(sizes)
        member = scipy.sparse.csr_matrix((ones, place), (patterns.n, len(sizes)))
        counts = (weight @ member).tocsr()
        for latent in np.flatnonzero(fires):
            span = slice(*counts.indptr[latent : latent + 2])
            category = counts.indices[span]
            z = _log_odds_z(counts.data[span], sizes[category].astype(float), fires[latent], patterns.n)
            order = np.lexsort((category, -z))[:CANDIDATES]
            found[latent] += [(kind, names[category[i]]) for i in order if z[i] > MIN_Z]
    return found


def _log_odds_z(here: np.ndarray, corpus: np.ndarray, n: int, n_rows: int) -> np.ndarray:
    """z-scores of categories: their weight among n firings, [C], against their counts in the corpus of n_rows, [C]."""
    prior, n_prior = PRIOR * n * corpus / n_rows + 0.01, PRIOR * n + 1
    rest = np.maximum(corpus - here, 0)
    odds = np.log((here + prior) / np.maximum(n + n_prior - here - prior, 0.01))
    odds_rest = np.log((rest + prior) / np.maximum(n_rows - n + n_prior - rest - prior, 0.01))
    return (odds - odds_rest) / np.sqrt(1 / (here + prior) + 1 / (rest + prior))


def choose_rule(patterns: Patterns, fires: np.ndarray, n_fires: int, candidates: Rule) -> Rule:
    """The set of patterns that best predicts the firing by F1, built greedily; ties go to the earlier candidate.

    By F1 because balanced accuracy hardly punishes a rule for a rare latent that covers half the corpus.
    patterns: of the training rows alone. fires: bool [N], true on n_fires rows.
    """
    left = dict(enumerate(patterns.find(*candidate) for candidate in candidates))
    chosen: Rule = []
    best, hits, n_covered, covered = 0.0, 0, 0, np.zeros(patterns.n, bool)
    while len(chosen) < MAX_PATTERNS:
        trials = []
        for number, rows in list(left.items()):
            new_hits = int(np.count_nonzero(fires[rows]))
            # What the rows could gain if all others were dropped; it only falls, so what is too little stays so.
            if 2 * (hits + new_hits) / (n_fires + n_covered + new_hits) < best + MIN_GAIN:
                del left[number]
                continue
            n_new = n_covered + len(rows)
            trials.append((2 * (hits + new_hits) / (n_fires + n_new), -number, hits + new_hits, n_new))
        if not trials or max(trials)[0] < best + MIN_GAIN:
            break
        best, number, hits, n_covered = max(trials)
        chosen.append(candidates[-number])
        covered[left.pop(-number)] = True
        left = {number: rows[~covered[rows]] for number, rows in left.items()}
    return chosen


def predict(patterns: Patterns, rule: Rule) -> np.ndarray:
    """Whether any pattern (kind, name) of the rule holds for each token, bool [N]."""
    says = np.zeros(patterns.n, bool)
    for kind, name in rule:
        says[patterns.find(kind, name)] = True
    return says


def score_rule(says: np.ndarray, fires: np.ndarray) -> dict[str, float | None]:
    """Balanced accuracy (the mean of recall on firing and on silent tokens), precision, recall and F1 of a prediction.

    says, fires: bool [N]. All None if the latent fires on no token or on all; precision None if `says` never holds.
    """
    hits, said, fired = int((says & fires).sum()), int(says.sum()), int(fires.sum())
    if fired == 0 or fired == len(fires):
        return dict.fromkeys(("balanced_accuracy", "precision", "recall", "f1"))
    recall, silent = hits / fired, 1 - (said - hits) / (len(fires) - fired)
    return {
        "balanced_accuracy": round((recall + silent) / 2, 4),
        "precision": round(hits / said, 4) if said else None,
        "recall": round(recall, 4),
        "f1": round(2 * hits / (said + fired), 4),
    }


def _entry(split: list[tuple[Patterns, np.ndarray]], candidates: Rule, common: Rule) -> dict[str, Any]:
    """One latent's entry. split: patterns and codes, [N], of the training rows and of those held out; common: the
    baseline, the rule of its most frequent token.
    """
    (train, code), (held_out, unseen) = split
    n_fires = int(np.count_nonzero(code))
    chosen = choose_rule(train, code > 0, n_fires, candidates)
    # Those that cover most of the latent's activation come first.
    mass = [float(code[train.find(*pattern)].sum()) for pattern in chosen]
    rule = [pattern for _, pattern in sorted(zip(mass, chosen), key=lambda item: -item[0])] or common
    described = [describe(train, kind, name, code) for kind, name in rule]
    name = short_name(train, [kind for kind, _ in rule], [short for short, _ in described])
    scores = score_rule(predict(held_out, rule), unseen > 0)
    return {
        "name": name, "scored_name": name,
        "description": "Fires on " + "; ".join(long for _, long in described),
        "score": scores.pop("balanced_accuracy"), "score_kind": SCORE_KIND, "judge": "rule", **scores,
        "baseline": score_rule(predict(held_out, common), unseen > 0)["balanced_accuracy"],
        "rule": [list(pattern) for pattern in rule],
        "backend": "offline", "model": None, "prompt_hash": None, "n_examples": n_fires,
        "source": "offline", "edited_by": None, "notes": "",
    }
