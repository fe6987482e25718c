"""Labelled texts: files, hub data sets and the embedded stories, as tokens with classes.

A file without a test set of its own gives one: TEST_FRAC of its rows, the same for every seed.
"""
from pathlib import Path
from typing import Any

from sklearn.model_selection import train_test_split

from cycles.labels import classes, in_words, smallest_class
from cycles.tasks import Task, limited
from lib.environment import InputError, first_line, log
from lib.files import read_json
from lib.models import local_path
from lib.schemas import Schema
from lib.texts import filler_id, load_documents, tokenise

STORIES = "store/embedded/stories"  # the default data; its validation and test files go when DATASET changes
TEST_SEED = 0  # every seed has the same test set
Rows = list[dict[str, Any]]


def text_task(c: dict[str, Any], tokenizer: Any) -> tuple[Task, list[str]]:
    """Tokens with their classes, and the split of each text."""
    rows, where, texts = _labelled_rows(c)
    label, attribute = c["LABEL_FIELD"], c["ATTRIBUTE_FIELD"]
    y, known = classes([row.get(label) for row in rows], where, f"LABEL_FIELD={label}")
    task = Task(y, 0, {}, class_names=in_words(known, _called(c, label)), pad_id=filler_id(tokenizer),
                numbers=[value for value in known if type(value) is int])
    if attribute and any(attribute in row for row in rows):
        values = [row.get(attribute) for row in rows]
        task.attribute, known = classes(values, where, f"ATTRIBUTE_FIELD={attribute}", trained_on=False)
        task.attribute_names = in_words(known, _called(c, attribute))
    if "test" not in where:
        where = _with_test(task, texts, where, c["TEST_FRAC"])
    _tell_repeated(texts, where)
    kept = limited(task, where, c["DATA_LIMIT"])
    tokens = tokenise(tokenizer, [texts[i] for i in kept], 0, c["MAX_LENGTH"])
    n_cut = sum(len(item.ids) >= c["MAX_LENGTH"] for item in tokens)
    if n_cut:
        log.info("%s of %s texts fill MAX_LENGTH=%d tokens; what lies beyond is not read", f"{n_cut:,}",
                 f"{len(tokens):,}", c["MAX_LENGTH"])
    # a text without a token has no activation to read
    filled = [(i, item) for i, item in zip(kept, tokens) if item.ids]
    if len(filled) < len(kept):
        log.info("%s texts without a token are left out", f"{len(kept) - len(filled):,}")
    ids = [i for i, _ in filled]
    task.y, task.texts = y[ids], [texts[i] for i in ids]
    task.tokens = [item._replace(text_id=new) for new, (_, item) in enumerate(filled)]
    if task.attribute is not None:
        task.attribute = task.attribute[ids]
    return task, [where[i] for i in ids]


def _labelled_rows(c: dict[str, Any]) -> tuple[Rows, list[str], list[str]]:
    """The rows of all splits, the split of each, and its text."""
    rows, where, texts = [], [], []
    for name, constant, dataset, split in _sources(c):
        hint = "TEXT_FIELD" if name == "train" else "TEXT_FIELD_HELD_OUT"
        column = c["TEXT_FIELD"] if name == "train" else c["TEXT_FIELD_HELD_OUT"] or c["TEXT_FIELD"]
        try:
            documents = load_documents(dataset, split, column)
        except InputError as error:
            said = str(error).replace("DATASET=", f"{constant}=", 1).replace("set TEXT_FIELD", f"set {hint}")
            raise InputError(said) from None
        for field_name in ("LABEL_FIELD", "ATTRIBUTE_FIELD"):
            _require_field(documents, c, field_name, f"{constant}={dataset}")
        rows += documents
        where += [name] * len(documents)
        texts += [document[column] for document in documents]
    return rows, where, texts


def _sources(c: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """(our split, constant that names its data, data set, that set's split): training, and validation and test if any.

    Raises InputError where one split would hold another one's examples.
    """
    sources = [("train", "DATASET", c["DATASET"], c["TRAIN_SPLIT"])]
    if c["VAL_DATASET"] or c["VAL_SPLIT"]:
        sources.append(("val", "VAL_DATASET", c["VAL_DATASET"] or c["DATASET"], c["VAL_SPLIT"] or "validation"))
    if not cuts_test(c):
        sources.append(("test", "TEST_DATASET", c["TEST_DATASET"] or c["DATASET"], c["TEST_SPLIT"]))
    paths = [(constant, path) for _, constant, dataset, _ in sources
             if (path := local_path(dataset)) is not None and _is_in_one_piece(path)]
    for i, (constant, path) in enumerate(paths):
        for earlier, same in paths[:i]:
            if path == same:
                set_by = "VAL_SPLIT" if constant == "VAL_DATASET" and not c["VAL_DATASET"] else constant
                raise InputError(f"{constant} and {earlier} are the same data, {path.name}, which has no splits of its "
                                 f"own; set {set_by} to None to cut it from DATASET, or {constant} to other data")
    return sources


def cuts_test(c: dict[str, Any]) -> bool:
    """Whether TEST_FRAC of the texts are the test examples."""
    is_text = c["MODEL"] != "mlp" and c["DATASET"] is not None
    return is_text and not c["TEST_DATASET"] and _is_in_one_piece(local_path(c["DATASET"]))


def _is_in_one_piece(path: Path | None) -> bool:
    """Whether local data are one file, or a folder that datasets wrote without splits."""
    return path is not None and (path.is_file() or not (path / "dataset_dict.json").exists())


def _with_test(task: Task, texts: list[str], where: list[str], test_frac: float) -> list[str]:
    """`where` when a stratified test_frac of DATASET's texts, drawn by TEST_SEED, are the test examples.

    Texts that occur twice stay in one split.
    """
    own = [i for i, name in enumerate(where) if name == "train"]
    first = {texts[i].strip(): i for i in reversed(own)}
    kinds = sorted(first.values())
    try:
        _, chosen = train_test_split(kinds, test_size=test_frac, random_state=TEST_SEED,
                                     stratify=task.y[kinds].numpy())
    except ValueError as error:
        smallest = smallest_class(task.y[own], task.class_names)
        raise InputError(f"a test set can't be cut from DATASET: {smallest} ({error}); raise TEST_FRAC, or set "
                         "TEST_DATASET") from None
    test = set(chosen)
    where = ["test" if name == "train" and first[text.strip()] in test else name for text, name in zip(texts, where)]
    log.info("test: %s of %s texts of DATASET, the same for every seed (TEST_FRAC=%g; TEST_DATASET names a file)",
             f"{where.count('test'):,}", f"{len(own):,}", test_frac)
    return where


def _tell_repeated(texts: list[str], where: list[str]) -> None:
    """Warn of texts in two splits: their scores are of what was learnt by heart, or chosen on what is reported."""
    kinds = {name: {text.strip() for text, own in zip(texts, where) if own == name} for name in set(where)}
    for held_out, other in (("val", "train"), ("test", "train"), ("val", "test")):
        known = kinds.get(other, set())
        if n := sum(name == held_out and text.strip() in known for text, name in zip(texts, where)):
            words = "training" if other == "train" else other
            log.warning("%s of %s %s texts are %s texts too: take them out of one of the two", f"{n:,}",
                        f"{where.count(held_out):,}", held_out, words)


def are_stories(dataset: str | None) -> bool:
    """Whether a data set is one of the embedded stories' files."""
    path = local_path(dataset) if dataset else None
    return path is not None and path.parent == local_path(STORIES)


def _called(c: dict[str, Any], column: str) -> list[str] | None:
    """What the numbers 0..C-1 of a column are called: by the embedded stories, or by datasets' ClassLabel; or None."""
    if are_stories(c["DATASET"]):
        name = {"mood": "moods", "topic": "topics"}.get(column)
        folder = local_path(STORIES)
        return read_json(folder / "concepts.json", Schema({name: [str]}))[name] if name and folder else None
    path = local_path(c["DATASET"])
    if path is not None and path.is_file():
        return None
    import datasets

    try:
        if path is None:
            features = datasets.load_dataset_builder(c["DATASET"]).info.features or {}
        else:
            loaded = datasets.load_from_disk(str(path))
            features = (loaded[c["TRAIN_SPLIT"]] if isinstance(loaded, dict) else loaded).features
        return getattr(features.get(column), "names", None)
    except Exception as error:  # the rows could be read; only the names are missing
        log.warning("the names of %s's numbers can't be read (%s)", column, first_line(error))
        return None


def _require_field(documents: Rows, c: dict[str, Any], constant: str, source: str) -> None:
    """Raise InputError if the data set lacks the field; only the stories need have the stories' attribute."""
    wanted = c[constant]
    is_default = constant == "ATTRIBUTE_FIELD" and wanted == "topic" and not are_stories(c["DATASET"])
    if wanted and not is_default and not any(wanted in document for document in documents):
        raise InputError(f"{source} has no field {wanted!r}; it has {', '.join(map(str, documents[0]))}: set "
                         f"{constant}")
