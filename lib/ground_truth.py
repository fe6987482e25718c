"""What the embedded stories know of every token: its word's concept, which sense of two it has, its story's state.

    truth = ground_truth(run)                        # of a run of activations; None for a data set without concepts
    truth = truth_of(stories, tree, rows)            # of any tokens; tree: tree_at(path of its concepts.json)
    for rows, columns in searched(truth, is_val, every): ...

A concept's `part` is "leaf" or "node" of the concept tree, "sense" or "state". A sense is sought among its word's own
tokens only (`word`), where the token itself tells nothing; everything else among all tokens.
"""
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .documents import Documents
from .environment import InputError, log
from .files import read_json
from .models import local_path, source_of_run
from .schemas import COUNT, POSITIVE, Misfit, Schema, Text, check
from .store import Run
from .texts import load_documents

# concepts.json beside a data set whose words have concepts, as the embedded stories do
TRUTH = Schema({"leaves": [{"number": POSITIVE, "path": Text(r"[^/]{1,60}(/[^/]{1,60}){0,9}"), "words": [str]}],
                "topics": [str], "moods": [str]})
STORY = {"text": str, "concepts": [COUNT], "topic": COUNT, "mood": COUNT}
WORD_F1 = 0.8  # a concept that the token table reaches this F1 for, on training rows, is a word concept
MIN_TOKENS, MIN_SENSE = 20, 5  # held-out tokens a concept needs; a sense needs as many of its word without it
FEELINGS = ("feeling/good", "feeling/bad/sad", "feeling/bad/afraid", "feeling/bad/angry")
PETS = ("animal/pet/dog", "animal/pet/cat", "animal/pet/rabbit")
NAMES = ("name/girl", "name/boy")
WORD = re.compile("[A-Za-z]+")
CLAUSE_END = re.compile(r'[.,!?;:"]|$')
Span = tuple[int, int, str]  # first character, last character + 1, name of the concept


class Concept(NamedTuple):
    """One ground-truth concept; its column in `labels` has the same number."""

    name: str
    part: str
    """leaf, node, sense or state."""
    word: str | None = None
    """Of a sense: the word among whose tokens it is sought."""


class Truth(NamedTuple):
    """The concepts of tokens, a row each."""

    concepts: list[Concept]
    labels: Tensor
    """bool [n_rows, C]."""
    words: dict[str, Tensor]
    """Word of a sense -> its rows, bool [n_rows]."""


def ground_truth(run: Run) -> Truth | None:
    """The concepts of a run's tokens; None for a data set without, see concept_tree().

    Raises InputError if a text of the run is not in the data set.
    """
    tree = concept_tree(run)
    if tree is None:
        return None
    return truth_of(_stories_of(run), tree, run.rows)


def truth_of(stories: Documents, tree: dict[str, Any], rows: dict[str, Tensor]) -> Truth | None:
    """The concepts of tokens; None, with a warning, if the stories have another form, or numbers of another tree.

    rows: text_id (which of the stories), char_start and char_end of each token, int [n_rows].
    """
    numbers = {0, *(leaf["number"] for leaf in tree["leaves"])}
    if not all(_says_its_concepts(story, tree, numbers) for story in stories):
        log.warning("the texts don't give their words the numbers of the concepts.json beside them; it is ignored")
        return None
    return _labelled(stories, tree, rows)


def searched(truth: Truth, is_val: Tensor, every: Tensor) -> Iterator[tuple[Tensor, list[int]]]:
    """(rows bool [n_rows], columns of truth.labels): concepts with enough held-out tokens, and where they are sought.

    A sense is sought in the rows of its word, every other concept in the rows `every`. is_val, every: bool [n_rows].
    """
    for word in (None, *truth.words):
        rows = every if word is None else truth.words[word]
        columns = [i for i, concept in enumerate(truth.concepts) if concept.word == word]
        labels, held_out = truth.labels[rows][:, columns], is_val[rows]
        n_val = labels[held_out].sum(0)
        enough = (n_val >= MIN_TOKENS if word is None
                  else (n_val >= MIN_SENSE) & (int(held_out.sum()) - n_val >= MIN_SENSE))
        if enough.any() and labels[~held_out].any():
            yield rows, [column for column, is_enough in zip(columns, enough.tolist()) if is_enough]


def concept_tree(run: Run) -> dict[str, Any] | None:
    """tree_beside() the data set of a run."""
    return tree_beside(run.meta["dataset"])


def tree_beside(dataset: dict[str, Any] | None) -> dict[str, Any] | None:
    """The concepts.json beside a data set: leaves (number, path, words), topics, moods. None, with a warning, if the
    data set has moved or the file has another shape, as some other project's would.

    dataset: as in a run's meta.json and in an SAE's origin; None: not known.
    """
    if dataset is None:
        return None
    try:
        source = source_of_run(dataset)
    except InputError as error:
        log.warning("no ground truth: %s", error)
        return None
    path = local_path(source)
    return None if path is None else tree_at(path.parent / "concepts.json")


def tree_at(found: Path) -> dict[str, Any] | None:
    """What a concepts.json holds; None if there is none or, with a warning, if it has another shape."""
    if not found.exists():
        return None
    try:
        tree = read_json(found, TRUTH)
        leaves = tree["leaves"]
        if leaves and all(len({leaf[key] for leaf in leaves}) == len(leaves) for key in ("number", "path")):
            return tree
    except InputError:
        pass  # damaged, or of another shape: the same line says so
    log.warning("the concepts.json beside the data set holds no tree of concepts with their words; it is ignored")
    return None


def _stories_of(run: Run) -> Documents:
    """The lines of the data set that hold the run's texts, in the run's order."""
    by_text = {story["text"]: story for story in load_documents(source_of_run(run.meta["dataset"]))}
    if missing := sum(text["text"] not in by_text for text in run.texts):
        raise InputError(f"{missing} texts of run {run.run_id} are no longer in its data set; run "
                         "01_save_activations.py again")
    return [by_text[text["text"]] for text in run.texts]


def _says_its_concepts(story: dict[str, Any], tree: dict[str, Any], numbers: set[int]) -> bool:
    """Whether a story has the number of every word's leaf (0: none), its topic and its mood, all of them of this tree.

    Numbers of another tree, or fewer than words, would give wrong labels without a word.
    """
    try:
        check(story, STORY)
    except Misfit:
        return False
    return (len(story["concepts"]) == len(WORD.findall(story["text"])) and numbers.issuperset(story["concepts"])
            and story["topic"] < len(tree["topics"]) and story["mood"] < len(tree["moods"]))


def _labelled(stories: Documents, tree: dict[str, Any], rows: dict[str, Tensor]) -> Truth:
    """What the stories know of these tokens."""
    paths = {leaf["number"]: leaf["path"] for leaf in tree["leaves"]}
    senses = _senses(stories, paths)
    parts = {name: "leaf" if name in paths.values() else "node" for path in paths.values() for name in _above(path)}
    named = [Concept(name, parts[name]) for name in sorted(parts)]
    named += [Concept(f"{word}: {sense or 'no concept'}", "sense", word) for word, sense in senses.items()]
    named += [Concept(name, "state") for name in _state_names(tree)]
    column = {concept.name: i for i, concept in enumerate(named)}
    word_column = {word: i for i, word in enumerate(senses)}
    spans, word_spans = [], []
    for text_id, story in enumerate(stories):
        spans += [(text_id, start, end, column[name]) for start, end, name in _spans(story, paths, senses, tree)]
        words = ((match, word_column.get(match[0].lower())) for match in WORD.finditer(story["text"]))
        word_spans += [(text_id, *match.span(), number) for match, number in words if number is not None]
    of_word = label_rows(rows, torch.tensor(word_spans).view(-1, 4), len(senses))
    labels = label_rows(rows, torch.tensor(spans).view(-1, 4), len(named))
    return Truth(named, labels, {word: of_word[:, i] for word, i in word_column.items()})


def _above(path: str) -> list[str]:
    """A leaf's path and those of the nodes above it."""
    steps = path.split("/")
    return ["/".join(steps[:depth]) for depth in range(1, len(steps) + 1)]


def _senses(stories: list[dict[str, Any]], paths: dict[int, str]) -> dict[str, str]:
    """For every word with several senses, the rarer of its two commonest ones; "" is the sense without a concept."""
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for story in stories:
        for match, leaf in zip(WORD.finditer(story["text"]), story["concepts"]):
            seen[match[0].lower()][paths.get(leaf, "")] += 1
    return {word: counts.most_common(2)[1][0] for word, counts in sorted(seen.items()) if len(counts) > 1}


def _state_names(tree: dict[str, Any]) -> list[str]:
    last = [f"last named: {path}" for path in (*FEELINGS, *PETS, *NAMES)]
    return ["in a quotation", "after a negation", *last, *(f"topic: {topic}" for topic in tree["topics"]),
            *(f"how it ends: {mood}" for mood in tree["moods"])]


def _spans(
    story: dict[str, Any], paths: dict[int, str], senses: dict[str, str], tree: dict[str, Any]
) -> Iterator[Span]:
    """Where each concept holds in a story."""
    text = story["text"]
    words = [(match, paths.get(leaf, "")) for match, leaf in zip(WORD.finditer(text), story["concepts"])]
    for match, path in words:
        for name in _above(path) if path else ():
            yield *match.span(), name
        word = match[0].lower()
        if senses.get(word) == path:
            yield *match.span(), f"{word}: {path or 'no concept'}"
        if path == "negation" and (end := CLAUSE_END.search(text, match.end())):
            yield match.end(), end.start(), "after a negation"
    quotes = [match.start() for match in re.finditer('"', text)]
    for opening, closing in zip(quotes[::2], quotes[1::2]):
        yield opening + 1, closing, "in a quotation"
    for group in (FEELINGS, PETS, NAMES):
        named = [(match.end(), path) for match, path in words if path in group]
        for (begin, path), (until, _) in zip(named, [*named[1:], (len(text), "")]):
            yield begin, until, f"last named: {path}"
    yield 0, len(text), f"topic: {tree['topics'][story['topic']]}"
    yield 0, len(text), f"how it ends: {tree['moods'][story['mood']]}"


def label_rows(rows: dict[str, Tensor], spans: Tensor, n_concepts: int) -> Tensor:
    """Which concepts each row's token belongs to, bool [n_rows, n_concepts].

    rows: as in truth_of, by text and place. spans: int64 [n, 4], (text_id, char_start, char_end, concept); a token
    belongs to every concept it overlaps. A token without characters, as a special one, belongs to none.
    """
    width = 1 << 32  # characters are numbered over all texts, each text beginning at a multiple of this
    real = (rows["char_end"] > rows["char_start"]).nonzero()[:, 0]  # the others' places are not in order
    text_id, start, end = (rows[name][real].long() for name in ("text_id", "char_start", "char_end"))
    first = torch.searchsorted(text_id * width + end, spans[:, 0] * width + spans[:, 1], right=True)
    last = torch.searchsorted(text_id * width + start, spans[:, 0] * width + spans[:, 2])
    labels = torch.zeros(len(rows["text_id"]), n_concepts, dtype=torch.bool)
    for offset in range(int((last - first).max()) if len(spans) else 0):
        inside = first + offset < last
        labels[real[first[inside] + offset], spans[inside, 3]] = True
    return labels
