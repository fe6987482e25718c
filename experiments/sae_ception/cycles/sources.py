"""Where a task's examples come from: scikit-learn's digits, idx.gz files, hub data sets, files of texts.

    task = load_task(constants, seed)      # images
    task = load_task(constants, seed, tokenizer)

The official test set is the test split where there is one; without a validation set the seed cuts one from training.
"""
import gzip
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor

from cycles.labels import classes
from cycles.planted import flip_labels, plant_shortcut
from cycles.tasks import Task
from lib.environment import InputError, first_line, log
from lib.files import read_json
from lib.models import local_path
from lib.schemas import Schema
from lib.texts import filler_id, load_documents, tokenise

DIGITS_TEST_SEED = 0  # scikit-learn's digits come in one piece; every seed has the same test set
DRAW_SEED = 0  # DATA_LIMIT leaves the same training examples for every seed, so that cached states serve all
STORIES = "store/embedded/stories"  # the default data; its validation and test files go when DATASET changes


def load_task(constants: dict[str, Any], seed: int, tokenizer: Any = None) -> Task:
    """The task that the constants name; `tokenizer` for texts, None for images. `seed` cuts the validation split.

    Raises InputError for data that can't be reached, for labels that are missing, mixed or hidden, and for a split
    without examples.
    """
    if tokenizer is None:
        task, where = _images(constants)
    else:
        task, where = _texts(constants, tokenizer)
    _group(task, constants["LABEL_GROUPS"])
    task.splits = _split(task.y, where, constants["VAL_FRAC"], seed)
    if constants["SHORTCUT"] is not None:
        plant_shortcut(task, constants["SHORTCUT"], seed)
    if constants["LABEL_NOISE"]:
        flip_labels(task, constants["LABEL_NOISE"], seed)
    return task


def _split(y: Tensor, where: list[str], val_frac: float, seed: int) -> dict[str, Tensor]:
    """Ids by the split that each example came from; without validation examples, a stratified val_frac of training."""
    ids = {name: torch.tensor([i for i, w in enumerate(where) if w == name]) for name in ("train", "val", "test")}
    if not len(ids["val"]):
        try:
            labels = y[ids["train"]].numpy()
            train, val = train_test_split(ids["train"].numpy(), test_size=val_frac, random_state=seed, stratify=labels)
        except ValueError as error:
            raise InputError(f"validation can't be cut from training ({error}); raise DATA_LIMIT or VAL_FRAC") from None
        ids |= {"train": torch.from_numpy(np.sort(train)), "val": torch.from_numpy(np.sort(val))}
    empty = [name for name, part in ids.items() if not len(part)]
    if empty:
        raise InputError(f"the {empty[0]} split has no examples; raise DATA_LIMIT or set another data set")
    return ids


def _group(task: Task, groups: tuple[int, ...] | None) -> None:
    """Merge classes: class c becomes groups[c], and the finer labels the attribute that is never trained on."""
    n_classes = len(task.class_names)
    if groups is not None:
        if len(groups) != n_classes or set(groups) != set(range(max(groups) + 1)):
            raise InputError(f"LABEL_GROUPS={groups} must give a group, counted from 0, to each of the {n_classes} "
                             "classes")
        task.attribute, task.attribute_names = task.y, task.class_names
        task.y, n_classes = torch.tensor(groups)[task.y], max(groups) + 1
        task.class_names = ["/".join(name for name, group in zip(task.attribute_names, groups) if group == c)
                            for c in range(n_classes)]
    if n_classes < 2:
        raise InputError("the labels have only one value; set another LABEL_FIELD")
    task.n_classes = n_classes


def _limited(task: Task, where: list[str], limit: int | None) -> list[int]:
    """The examples that DATA_LIMIT leaves: all held-out ones, and training ones with each class's share."""
    train = torch.tensor([i for i, w in enumerate(where) if w == "train"])
    kept = set(task.sample(train, limit, DRAW_SEED, "DATA_LIMIT, training examples").tolist())
    return [i for i, w in enumerate(where) if w != "train" or i in kept]


def _images(c: dict[str, Any]) -> tuple[Task, list[str]]:
    """Pixels times PIXEL_SCALE with their classes, and the split of each."""
    dataset = c["DATASET"]
    if dataset == "digits":
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        train, test = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=DIGITS_TEST_SEED,
                                       stratify=labels)
        parts = [(pixels[ids], labels[ids].tolist(), name)
                 for name, ids in (("train", np.sort(train)), ("test", np.sort(test)))]
    else:
        parts = [(*_image_split(dataset, name), name) for name in ("train", "test")]
    shapes = [images.shape[1:] for images, _, _ in parts]
    if shapes[0] != shapes[1]:
        raise InputError(f"DATASET={dataset} has training images of {shapes[0]} pixels and test images of {shapes[1]}; "
                         "they must have one size")
    where = [name for _, labels, name in parts for _ in labels]
    y, names = classes([label for _, labels, _ in parts for label in labels], where, f"DATASET={dataset}")
    task = Task(y, 0, {}, class_names=names)
    kept = _limited(task, where, c["DATA_LIMIT"])
    pixels = np.concatenate([images.reshape(len(images), -1) for images, _, _ in parts])[kept].astype(np.float32)
    task.images, task.y = torch.from_numpy(pixels) * c["PIXEL_SCALE"], y[kept]
    return task, [where[i] for i in kept]


def _image_split(dataset: str, split: str) -> tuple[np.ndarray, list[Any]]:
    """Pixels and labels of one split of a folder of idx.gz files, or of a hub data set with image and label columns."""
    folder = local_path(dataset)
    if folder is not None:
        prefix = "t10k" if split == "test" else "train"
        files = [folder / f"{prefix}-{name}-ubyte.gz" for name in ("images-idx3", "labels-idx1")]
        images, labels = (read_idx(path, n_dims) for path, n_dims in zip(files, (3, 1)))
        if len(images) != len(labels):
            raise InputError(f"{files[0].name} holds {len(images):,} images and {files[1].name} {len(labels):,} "
                             "labels; get both files again")
        return images, labels.tolist()
    import datasets

    try:
        rows = datasets.load_dataset(dataset, split=split)
        return np.stack([np.asarray(row["image"]) for row in rows]), [row["label"] for row in rows]
    except Exception as error:  # datasets raises many kinds for what it can't reach
        raise InputError(f"DATASET={dataset} can't be read ({first_line(error)}); set a folder with MNIST's four "
                         "idx.gz files") from None


def read_idx(path: Path, n_dims: int) -> np.ndarray:
    """An idx.gz file of unsigned bytes in n_dims dimensions, MNIST's format. Raises InputError if it can't be read."""
    try:
        data = gzip.decompress(path.read_bytes())
        if data[:4] != bytes([0, 0, 8, n_dims]):
            raise ValueError(f"it does not begin as unsigned bytes in {n_dims} dimension(s) do")
        shape = np.frombuffer(data, ">i4", n_dims, 4)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * n_dims).reshape(shape)
    except FileNotFoundError:
        raise InputError(f"{path} is missing; set DATASET to a folder with all four idx.gz files, or a hub "
                         "name") from None
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise InputError(f"{path} is damaged or not an idx.gz file ({error}); get it again") from None


def are_stories(dataset: str | None) -> bool:
    """Whether a data set is one of the embedded stories' files."""
    path = local_path(dataset) if dataset else None
    return path is not None and path.parent == local_path(STORIES)


def names_of_classes(c: dict[str, Any], task: Task) -> list[str]:
    """What tables call the classes: their labels, which for the embedded stories are numbers with a name."""
    field_name = {"mood": "moods", "topic": "topics"}.get(c["LABEL_FIELD"])
    folder = local_path(STORIES)
    if field_name is None or folder is None or not are_stories(c["DATASET"]) or c["LABEL_GROUPS"] is not None:
        return task.class_names
    names = read_json(folder / "concepts.json", Schema({field_name: [str]}))[field_name]
    return [names[int(name)] for name in task.class_names]


def own_data(c: dict[str, Any]) -> dict[str, Any]:
    """The constants; without the embedded stories' validation and test files where DATASET is other data."""
    if are_stories(c["DATASET"]):
        return c
    left = [name for name in ("VAL_DATASET", "TEST_DATASET") if are_stories(c[name])]
    if left:
        log.info("%s: the embedded stories' file is left out, because DATASET=%s is other data", " and ".join(left),
                 c["DATASET"])
    return c | dict.fromkeys(left)


def _sources(c: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """(our split, constant that names its data, data set, that set's split): training, validation if any, and test."""
    sources = [("train", "DATASET", c["DATASET"], c["TRAIN_SPLIT"])]
    if c["VAL_DATASET"] or c["VAL_SPLIT"]:
        sources.append(("val", "VAL_DATASET", c["VAL_DATASET"] or c["DATASET"], c["VAL_SPLIT"] or "validation"))
    path = local_path(c["DATASET"])
    if not c["TEST_DATASET"] and path is not None and path.is_file():
        raise InputError(f"TEST_DATASET is not set, and {path.name} has no test split; set TEST_DATASET to a file of "
                         "its own")
    return [*sources, ("test", "TEST_DATASET", c["TEST_DATASET"] or c["DATASET"], c["TEST_SPLIT"])]


def _labelled_rows(c: dict[str, Any]) -> tuple[list[dict[str, Any]], list[str], list[str]]:
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


def _texts(c: dict[str, Any], tokenizer: Any) -> tuple[Task, list[str]]:
    """Tokens with their classes, and the split of each text."""
    rows, where, texts = _labelled_rows(c)
    y, names = classes([row.get(c["LABEL_FIELD"]) for row in rows], where, f"LABEL_FIELD={c['LABEL_FIELD']}")
    task = Task(y, 0, {}, class_names=names, pad_id=filler_id(tokenizer))
    attribute = c["ATTRIBUTE_FIELD"]
    if attribute and attribute in rows[0]:
        values = [row.get(attribute) for row in rows]
        task.attribute, task.attribute_names = classes(values, where, f"ATTRIBUTE_FIELD={attribute}", trained_on=False)
    kept = _limited(task, where, c["DATA_LIMIT"])
    tokens = tokenise(tokenizer, [texts[i] for i in kept], 0, c["MAX_LENGTH"])
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


def _require_field(documents: list[dict[str, Any]], c: dict[str, Any], constant: str, source: str) -> None:
    """Raise InputError if the data set lacks the field; only the stories need have the stories' attribute."""
    wanted = c[constant]
    is_default = constant == "ATTRIBUTE_FIELD" and wanted == "topic" and not are_stories(c["DATASET"])
    if wanted and not is_default and not any(wanted in document for document in documents):
        raise InputError(f"{source} has no field {wanted!r}; it has {', '.join(map(str, documents[0]))}: set "
                         f"{constant}")
