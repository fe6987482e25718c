"""Whether what a latent stands for appears in texts that a model wrote, and how much they repeat themselves.

    rule = rule_of(concepts[17])                       # its name's patterns, such as [("before", "river")]
    shares = share_shown(tokenizer, done, rule)        # of what was written in each text
"""
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from concepts.names import predict
from concepts.patterns import OPEN, Rule, find_patterns
from concepts.words import UNIT
from lib.texts import tokenise

FOLLOWERS, MIN_FOLLOWED, MIN_LIFT = 20, 5, 3.0  # followers_of() says how
LONGEST = 100_000  # tokens of a text, more than any model writes here
# Kinds of pattern (concepts/patterns.py) that name a word to come or the word itself; the rest is about what surrounds.
OWN_WORDS = ("word", "cased", "family", "start", "token", "within", "before", "phrase")
WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


def rule_of(entry: dict[str, Any]) -> Rule:
    """The patterns that a concept's name stands for; for a name without, such as a person's, the name's own words."""
    if entry.get("rule"):
        return [(kind, name) for kind, name in entry["rule"]]
    words = dict.fromkeys(WORD.findall(entry["name"].lower()))
    return [("word", word) for word in words if word not in ("and", "or") or len(words) == 1]


def words_of(rule: Rule) -> list[str]:
    """The words that a rule names, in lower case, without those that only stand before what it means."""
    named = [name.split()[-1] if kind == "phrase" else name for kind, name in rule if kind in OWN_WORDS]
    return list(dict.fromkeys(word.lower().rstrip(OPEN) for word in named if word[:1].isalnum()))


def truth_of(rule: Rule, tree: dict[str, Any] | None) -> tuple[str, frozenset[str]]:
    """The ground-truth concept that most of a rule's words belong to, and all its words; "" and none without one.

    tree: concepts.json beside a data set (lib/ground_truth.py). Of several, the one with the largest share of its
    own words named, then the first by name.
    """
    words = set(words_of(rule))
    found = []
    for leaf in tree["leaves"] if tree else ():
        own = frozenset(word.lower() for word in leaf["words"])
        common = len(words & own)
        if 2 * common > len(words):
            found.append((-common / len(own), leaf["path"], own))
    return min(found)[1:] if found else ("", frozenset())


def followers_of(rule: Rule, texts: Iterable[str]) -> frozenset[str]:
    """The words that follow a rule's words in texts, far more often than they occur elsewhere: at most FOLLOWERS.

    A latent of an early layer says which word was just read, so steering by it writes what follows that word. Counts
    words that follow at least MIN_FOLLOWED times and have at least MIN_LIFT times their share of all words; of more,
    those that follow most often.
    """
    own = set(words_of([pattern for pattern in rule if pattern[0] in ("word", "cased", "family", "token", "phrase")]))
    after: Counter[str] = Counter()
    overall: Counter[str] = Counter()
    for text in texts:
        units = [match[0].lower() for match in UNIT.finditer(text)]
        overall.update(units)
        after.update(second for first, second in zip(units, units[1:]) if first in own)
    share = after.total() / max(overall.total(), 1)
    lifted = [word for word, n in after.items() if word[0].isalnum() and word not in own and n >= MIN_FOLLOWED
              and n >= MIN_LIFT * overall[word] * share]
    return frozenset(sorted(lifted, key=lambda word: (-after[word], word))[:FOLLOWERS])


def words_to_seek(
    rule: Rule, tree: dict[str, Any] | None, texts: Iterable[str]
) -> tuple[str, dict[str, frozenset[str]]]:
    """The ground-truth concept of a rule ("": none), and its words and those that follow: "truth", "follows"."""
    truth, words = truth_of(rule, tree)
    sought = {"truth": words, "follows": followers_of(rule, texts)}
    return truth, {key: found for key, found in sought.items() if found}


def share_shown(tokenizer, texts: Sequence[str], starts: Sequence[int], rule: Rule) -> np.ndarray:
    """The share of each text's tokens, from character starts[i] on, on which a pattern of the rule holds, [B].

    The tokens are those into which the tokenizer splits the text as it reads it. nan where nothing was written.
    """
    items = tokenise(tokenizer, texts, 0, LONGEST)
    places = [(item.text_id, *span) for item in items for span, keep in zip(item.offsets, item.keep) if keep]
    # One text more, of the words that families are named after: "played" is a form of "play" where both occur.
    bases = " ".join(name for kind, name in rule if kind == "family")
    places += [(len(texts), *match.span()) for match in UNIT.finditer(bases)]
    columns = torch.tensor(places, dtype=torch.int32).view(-1, 3)
    rows = dict(zip(("text_id", "char_start", "char_end"), columns.T.contiguous()))
    says, (text_id, start, _) = predict(find_patterns([*texts, bases], rows), rule), columns.numpy().T
    new = start >= np.array([*starts, len(bases)])[text_id]
    return _shares(says[new], text_id[new], len(texts))


def share_of_words(texts: Sequence[str], starts: Sequence[int], words: Collection[str]) -> np.ndarray:
    """The share of each text's words and punctuation marks, from character starts[i] on, that are in `words`, [B].

    words: in lower case. nan where nothing was written.
    """
    units = [(i, match[0].lower() in words) for i, (text, start) in enumerate(zip(texts, starts))
             for match in UNIT.finditer(text, start)]
    text_id, says = (np.array(column, dtype=int) for column in zip(*units)) if units else np.zeros((2, 0), int)
    return _shares(says, text_id, len(texts))


def _shares(says: np.ndarray, text_id: np.ndarray, n_texts: int) -> np.ndarray:
    count = np.bincount(text_id, minlength=n_texts)
    hits = np.bincount(text_id, weights=says, minlength=n_texts)
    return np.divide(hits, count, out=np.full(n_texts, np.nan), where=count > 0)


def repeated(ids: Sequence[int]) -> float:
    """The share of a text's three-token sequences that occurred before in it; 0 for fewer than three tokens."""
    triples = list(zip(ids, ids[1:], ids[2:]))
    return 1 - len(set(triples)) / len(triples) if triples else 0.0


def distinct(texts: Iterable[Sequence[int]]) -> float | None:
    """Distinct two-token sequences over all of them, in all texts together (distinct-2, Li et al. 2016); None for none.

    Low where all texts say the same, which `repeated` does not see.
    """
    pairs = Counter(pair for ids in texts for pair in zip(ids, ids[1:]))
    return len(pairs) / pairs.total() if pairs else None
