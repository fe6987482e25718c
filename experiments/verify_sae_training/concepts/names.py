"""Names of latents by statistics alone: which patterns of a token and its context tell that the latent fires.

A name stands for a rule: a set of patterns (concepts/patterns.py); the rule says "fires" where any of them holds. It is
found on the tokens of the training texts and scored on those of the held-out texts.

    named = name_latents(codes, is_val, latents)     # latent -> an entry of concepts.json
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
from concepts.patterns import EDGE, KINDS, PLACES, Patterns, find_patterns

SCORE_KIND = "balanced accuracy of the rule on held-out tokens; 0.5 is chance"
WORDS_KIND = "balanced accuracy on held-out tokens of firing on the name's own words; 0.5 is chance"
MAX_ROWS = 1_000_000  # tokens that names are made from; of a larger corpus, every n-th text
CANDIDATES = 16  # patterns of each kind that are considered for a latent
PRIOR = 1.0  # weight of the corpus as a prior, in firings of the latent
MIN_Z = 3.0  # log-odds in standard deviations below which a pattern is chance
MAX_PATTERNS = 12  # in one rule
MIN_GAIN = 0.005  # in F1, for one more pattern
LONGEST = 60  # characters of one pattern in words; a "word" of a text may be a page of letters without a space
SHOWN = 4  # patterns in a name; the description has all
MARKS = {
    ".": "full stop", ",": "comma", "!": "exclamation mark", "?": "question mark", ":": "colon", ";": "semicolon",
    '"': "quotation mark", "“": "opening quote", "”": "closing quote", "-": "hyphen",
    "'": "apostrophe", "’": "curly apostrophe",
    "[space]": "white space", "[line break]": "line break", "[tab]": "tab", "[empty]": "piece of a character",
}
PREFIXES = {"after": "after ", "before": "before ", "within": "pieces of "}
Rule = list[tuple[str, str]]


def name_latents(
    codes: Codes, is_val: Tensor, latents: Iterable[int], progress: bool = True
) -> dict[int, dict[str, Any]]:
    """Name, description, rule and held-out score of each latent that fires on a training text.

    is_val: bool [N], the row belongs to a held-out text. Returns latent -> an entry of concepts.json. Deterministic.
    """
    patterns, held_out, strength = _used(codes, is_val)
    candidates = candidate_patterns(patterns, strength, ~held_out)
    token_of, tokens = patterns.column("token"), list(patterns.names["token"])
    entries = {}
    for latent in tqdm(latents, desc="naming", unit="latent", disable=not progress):
        code = _code(strength, latent)
        if (code[~held_out] > 0).any():
            common = tokens[np.bincount(token_of[(code > 0) & ~held_out]).argmax()]
            entries[latent] = _entry(patterns, code, held_out, candidates[latent], [("token", common)])
    return entries


def score_words(codes: Codes, is_val: Tensor, names: dict[int, str]) -> dict[int, dict[str, Any]]:
    """Scores of names that have no rule, such as a person's: the rule is to fire on the name's own words.

    It is a floor: a name that says more than words ("verbs of eating") can be better than its words show.
    """
    patterns, held_out, strength = _used(codes, is_val)
    scored = {}
    for latent, name in names.items():
        words = dict.fromkeys(re.findall(r"[^\W_]+(?:['’][^\W_]+)*", name.lower()))
        rule = [("word", word) for word in words if word not in ("and", "or") or len(words) == 1]
        scores = score_rule(predict(patterns, rule)[held_out], _code(strength, latent)[held_out] > 0)
        scored[latent] = {"score": scores.pop("balanced_accuracy"), "score_kind": WORDS_KIND, "judge": "words",
                          **scores}
    return scored


def used_rows(codes: Codes) -> np.ndarray:
    """The rows that names are made from, bool [N]: all, or those of every n-th text, so that they are about
    MAX_ROWS.
    """
    step = -(-len(codes) // MAX_ROWS)
    return codes.rows["text_id"].numpy() % max(step, 1) == 0


def _used(codes: Codes, is_val: Tensor) -> tuple[Patterns, np.ndarray, scipy.sparse.csr_matrix]:
    """Patterns, held out or not, and codes of the used rows."""
    use = used_rows(codes)
    patterns = find_patterns(codes.texts, {name: column[use] for name, column in codes.rows.items()})
    return patterns, is_val.numpy()[use], codes_matrix(codes, use)


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


def candidate_patterns(patterns: Patterns, strength: scipy.sparse.csr_matrix, train: np.ndarray) -> list[Rule]:
    """For each latent the patterns (kind, name) that are over-represented where it fires.

    By the z-score of their log-odds against the rest of the corpus, with the corpus as an informative Dirichlet prior
    (Monroe, Colaresi and Quinn 2008, "Fightin' Words"). A firing counts by its code over the latent's mean code.

    strength: codes [F, N]; train: bool [N], the rows to count.
    """
    weight = strength @ scipy.sparse.diags(train.astype(np.float32))
    weight.eliminate_zeros()
    fires = np.diff(weight.indptr)
    weight = scipy.sparse.diags(fires / np.maximum(np.asarray(weight.sum(1)).ravel(), 1e-12)) @ weight
    n_rows = int(train.sum())
    found: list[Rule] = [[] for _ in fires]
    for kind in KINDS:
        names, sizes = list(patterns.names[kind]), np.diff(patterns.starts[kind])
        ones = np.ones(int(sizes.sum()), np.float32)
        place = patterns.rows[kind], np.arange(len(sizes)).repeat(sizes)
        member = scipy.sparse.csr_matrix((ones, place), (patterns.n, len(sizes)))
        counts, corpus = (weight @ member).tocsr(), train.astype(np.float64) @ member
        for latent in np.flatnonzero(fires):
            span = slice(*counts.indptr[latent : latent + 2])
            category, n = counts.indices[span], fires[latent]
            here, prior = counts.data[span], PRIOR * n * corpus[category] / n_rows + 0.01
            rest, n_prior = np.maximum(corpus[category] - here, 0), PRIOR * n + 1
            odds = np.log((here + prior) / np.maximum(n + n_prior - here - prior, 0.01))
            odds_rest = np.log((rest + prior) / np.maximum(n_rows - n + n_prior - rest - prior, 0.01))
            z = (odds - odds_rest) / np.sqrt(1 / (here + prior) + 1 / (rest + prior))
            order = np.lexsort((category, -z))[:CANDIDATES]
            found[latent] += [(kind, names[category[i]]) for i in order if z[i] > MIN_Z]
    return found


def choose_rule(patterns: Patterns, fires: np.ndarray, train: np.ndarray, candidates: Rule) -> Rule:
    """The set of patterns that predicts the firing best by F1, built greedily; ties go to the earlier candidate.

    F1 rather than balanced accuracy, which for a rare latent hardly punishes a rule that covers half the corpus.
    fires, train: bool [N].
    """
    members = [rows[train[rows]] for rows in (patterns.find(*candidate) for candidate in candidates)]
    covered, best = np.zeros(patterns.n, bool), 0.0
    chosen: Rule = []
    n_fires, hits, n_covered = int((fires & train).sum()), 0, 0
    while len(chosen) < MAX_PATTERNS:
        trials = []
        for number, rows in enumerate(members):
            new = rows[~covered[rows]]
            new_hits = hits + int(fires[new].sum())
            trials.append((2 * new_hits / (n_fires + n_covered + len(new)), -number, new_hits, n_covered + len(new)))
        if not trials or max(trials)[0] < best + MIN_GAIN:
            break
        best, number, hits, n_covered = max(trials)
        chosen.append(candidates[-number])
        covered[members[-number]] = True
    return chosen


def predict(patterns: Patterns, rule: Rule) -> np.ndarray:
    """bool [N]: some pattern (kind, name) of the rule holds for the token."""
    says = np.zeros(patterns.n, bool)
    for kind, name in rule:
        says[patterns.find(kind, name)] = True
    return says


def score_rule(says: np.ndarray, fires: np.ndarray) -> dict[str, float | None]:
    """Balanced accuracy (mean of recall on firing and on silent tokens), precision, recall and F1 of a prediction.

    says, fires: bool [N]. All None where the latent never fires, precision None where the rule never says so.
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


def _entry(
    patterns: Patterns, code: np.ndarray, held_out: np.ndarray, candidates: Rule, common: Rule
) -> dict[str, Any]:
    """One latent's entry. code: [N]; common: the rule of its most frequent token, to compare with."""
    fires = code > 0
    chosen = choose_rule(patterns, fires, ~held_out, candidates)
    # The patterns with most of the latent's activation come first.
    mass = [float((code * ~held_out)[patterns.find(*pattern)].sum()) for pattern in chosen]
    rule = [pattern for _, pattern in sorted(zip(mass, chosen), key=lambda item: -item[0])] or common
    words = [describe(patterns, kind, name, fires) for kind, name in rule]
    scores = score_rule(predict(patterns, rule)[held_out], fires[held_out])
    name = _name([kind for kind, _ in rule], words)
    return {
        "name": name, "scored_name": name,
        "description": "Fires on " + "; ".join(words),
        "score": scores.pop("balanced_accuracy"), "score_kind": SCORE_KIND, "judge": "rule", **scores,
        "baseline": score_rule(predict(patterns, common)[held_out], fires[held_out])["balanced_accuracy"],
        "rule": [list(pattern) for pattern in rule],
        "backend": "offline", "model": None, "prompt_hash": None, "n_examples": int((fires & ~held_out).sum()),
        "source": "offline", "edited_by": None, "notes": "",
    }


def _name(kinds: list[str], words: list[str]) -> str:
    """The first patterns, grouped by kind: dog, cat; after “said”, “asked” (+3)."""
    groups: dict[str, list[str]] = {}
    for kind, text in list(zip(kinds, words))[:SHOWN]:
        group = kind if kind in PREFIXES or kind in ("phrase", "place") else "word"
        groups.setdefault(group, []).append(text.removeprefix(PREFIXES.get(group, "")))
    more = f" (+{len(words) - SHOWN})" if len(words) > SHOWN else ""
    return "; ".join(PREFIXES.get(group, "") + ", ".join(texts) for group, texts in groups.items()) + more


def describe(patterns: Patterns, kind: str, name: str, fires: np.ndarray) -> str:
    """One pattern in words a person reads: dog, do…, …ing, after “said”. fires: bool [N], where the latent fires."""
    rows = patterns.find(kind, name)
    name = name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"
    pieces = patterns.piece[rows[fires[rows]]]
    open_end = kind in ("word", "cased", "token", "phrase") and np.isin(pieces, ["s", "m"]).sum() > len(pieces) / 2
    to_come = "…" if open_end else ""
    before = "…" if kind == "token" and np.isin(pieces, ["m", "e"]).sum() > len(pieces) / 2 else ""
    if kind == "place":
        return PLACES[name]
    if name == EDGE and kind in ("after", "before"):
        return f"{kind} the {'start' if kind == 'after' else 'end'} of a text"
    if kind in ("after", "before"):
        return f"{kind} {MARKS.get(name) or f'“{name}”'}"
    if kind == "within":
        return f"pieces of “{name}”"
    if kind == "ending":
        return f"…{name}"
    if kind == "phrase":
        first = name.startswith(EDGE + " ")
        return f"{name[len(EDGE) + 1 :]}{to_come} at the start of a text" if first else f"“{name}{to_come}”"
    return MARKS.get(name) or (f"{before}{name}{to_come}" if name[0].isalnum() else f"“{name}”")
