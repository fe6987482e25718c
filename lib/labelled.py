"""Labelled examples for classification: images as vectors or texts as tokens, with a three-way split.

    task = load_task(constants, seed)
    task.splits["train"]            # ids of the examples of a split; an id never changes its example
    task.batch(ids)                 # what a model of lib/classifier.py takes

The official test set is the test split where there is one; validation is cut from training by the seed.
"""
import gzip
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor

from lib.environment import InputError
from lib.files import fingerprint
from lib.models import local_path
from lib.texts import Tokens, load_documents, pad, tokenise

DIGITS_TEST_SEED = 0  # scikit-learn's digits come in one piece; their test set is the same for every seed


@dataclass
class Task:
    """Examples 0..N-1 with a label each."""

    y: Tensor
    """Class of each example, int64 [N]."""
    n_classes: int
    splits: dict[str, Tensor]
    """train, val, test -> example ids, int64, disjoint."""
    attribute: Tensor | None = None
    """A label that is never trained on, int64 [N]."""
    images: Tensor | None = None
    """Pixels in 0..1 if so scaled, float32 [N, P]."""
    texts: list[str] = field(default_factory=list)
    """Empty for images."""
    tokens: list[Tokens] = field(default_factory=list)
    """Of each text, special tokens included."""
    pad_id: int = 0

    @property
    def n_pixels(self) -> int:
        """P, the pixels of an image; 0 for texts."""
        return 0 if self.images is None else self.images.shape[1]

    def batch(self, ids: Tensor, side: str = "right") -> dict[str, Tensor]:
        """The examples `ids` as a model takes them: y, ids, and x [B, P] or input_ids, attention_mask [B, T]."""
        batch = {"y": self.y[ids], "ids": ids}
        if self.images is not None:
            return batch | {"x": self.images[ids]}
        input_ids, mask = pad([self.tokens[i] for i in ids.tolist()], self.pad_id, side)
        batch |= {"input_ids": input_ids, "attention_mask": mask}
        if side == "left":  # models with learnt positions would otherwise count the padding
            batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        return batch

    def identity(self) -> str:
        """Fingerprint of the examples, labels and splits."""
        content = self.images if self.images is not None else [t.ids for t in self.tokens]
        return fingerprint([fingerprint(content), fingerprint(self.y), [fingerprint(ids) for ids in self.splits.values()]])


def load_task(constants: dict[str, Any], seed: int, tokenizer: Any = None) -> Task:
    """The task that the constants name; `tokenizer` for texts, None for images. `seed` cuts the validation split.

    Raises InputError for data that can't be reached, labels that are missing or hidden, and classes without examples.
    """
    if tokenizer is None:
        images, labels, where = _images(constants["DATASET"], constants["DATA_LIMIT"], constants["PIXEL_SCALE"])
        task = Task(labels, 0, {}, images=images)
    else:
        task, where = _texts(constants, tokenizer)
    _group(task, constants["LABEL_GROUPS"])
    task.splits = _split(task.y, where, constants["VAL_FRAC"], seed)
    return task


def _split(y: Tensor, where: list[str], val_frac: float, seed: int) -> dict[str, Tensor]:
    """Ids by the split each example came from; without validation examples, val_frac of training is cut, stratified."""
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
    """Merge classes: class c becomes groups[c], and the finer labels become the attribute that is never trained on."""
    n_classes = int(task.y.max()) + 1
    if groups is not None:
        if len(groups) != n_classes or set(groups) != set(range(max(groups) + 1)):
            raise InputError(f"LABEL_GROUPS={groups} must give a group, counted from 0, to each of the {n_classes} classes")
        task.attribute, task.y = task.y, torch.tensor(groups)[task.y]
        n_classes = max(groups) + 1
    if n_classes < 2:
        raise InputError("the labels have one value only; set another LABEL_FIELD")
    task.n_classes = n_classes


def _images(dataset: str, limit: int | None, scale: float) -> tuple[Tensor, Tensor, list[str]]:
    """Pixels times scale [N, P], labels [N] and the split of each; limit cuts the training images."""
    if dataset == "digits":
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        train, test = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=DIGITS_TEST_SEED, stratify=labels)
        train, test = np.sort(train)[:limit], np.sort(test)
        parts = [(pixels[train], labels[train], "train"), (pixels[test], labels[test], "test")]
    else:
        parts = [(*_image_split(dataset, w, limit if w == "train" else None), w) for w in ("train", "test")]
    pixels = torch.from_numpy(np.concatenate([p.reshape(len(p), -1) for p, _, _ in parts]).astype(np.float32))
    labels = torch.from_numpy(np.concatenate([y for _, y, _ in parts]).astype(np.int64))
    return pixels * scale, labels, [w for _, y, w in parts for _ in y]


def _image_split(dataset: str, split: str, limit: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Pixels and labels of one split of a folder of idx.gz files, or of a hub data set with image and label columns."""
    folder = local_path(dataset)
    if folder is not None:
        prefix = "t10k" if split == "test" else "train"
        files = (folder / f"{prefix}-{name}-ubyte.gz" for name in ("images-idx3", "labels-idx1"))
        images, labels = (read_idx(path)[:limit] for path in files)
        return images, labels
    import datasets

    try:
        rows = datasets.load_dataset(dataset, split=split if limit is None else f"{split}[:{limit}]")
    except Exception as error:  # datasets raises many kinds for what it can't reach
        first = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise InputError(f"DATASET={dataset} can't be read ({first}); set a folder with MNIST's four idx.gz files") from None
    return np.stack([np.asarray(row["image"]) for row in rows]), np.array([row["label"] for row in rows])


def read_idx(path: Path) -> np.ndarray:
    """An idx.gz file of unsigned bytes, the format of MNIST. Raises InputError if it is missing or damaged."""
    try:
        data = gzip.decompress(path.read_bytes())
        n_dims = data[3]
        shape = np.frombuffer(data, ">i4", n_dims, 4)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * n_dims).reshape(shape)
    except FileNotFoundError:
        raise InputError(f"{path} is missing; set DATASET to a folder with all four idx.gz files, or a hub name") from None
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise InputError(f"{path} is no idx.gz file ({error})") from None


def _texts(constants: dict[str, Any], tokenizer: Any) -> tuple[Task, list[str]]:
    c = constants
    held_out = c["TEXT_FIELD_HELD_OUT"] or c["TEXT_FIELD"]
    sources = [("train", c["DATASET"], c["TRAIN_SPLIT"], c["TEXT_FIELD"], c["DATA_LIMIT"])]
    if c["VAL_DATASET"] or c["VAL_SPLIT"]:
        sources.append(("val", c["VAL_DATASET"] or c["DATASET"], c["VAL_SPLIT"] or "validation", held_out, None))
    sources.append(("test", c["TEST_DATASET"] or c["DATASET"], c["TEST_SPLIT"], held_out, None))
    texts, rows, where = [], [], []
    for name, dataset, split, column, limit in sources:
        documents = load_documents(dataset, split, column, limit)
        texts += [document[column] for document in documents]
        rows += documents
        where += [name] * len(documents)
    tokens = tokenise(tokenizer, texts, 0, c["MAX_LENGTH"])
    filled = [i for i, item in enumerate(tokens) if item.ids]  # a text without a token has no activation to read
    tokens = [tokens[i]._replace(text_id=new) for new, i in enumerate(filled)]
    texts, rows, where = [texts[i] for i in filled], [rows[i] for i in filled], [where[i] for i in filled]
    attribute = _labels(rows, c["ATTRIBUTE_FIELD"], where) if c["ATTRIBUTE_FIELD"] else None
    y = _labels(rows, c["LABEL_FIELD"], where)
    task = Task(y, 0, {}, attribute, texts=texts, tokens=tokens, pad_id=tokenizer.pad_token_id)
    return task, where


def _labels(rows: list[dict[str, Any]], field: str, where: list[str]) -> Tensor:
    """Classes 0..C-1 in the order of the sorted training labels."""
    if field not in rows[0]:
        raise InputError(f"the data set has no field {field!r}; it has {', '.join(map(str, rows[0]))}")
    values: list[Any] = [row.get(field) for row in rows]
    classes: list[Any] = sorted({value for value, w in zip(values, where) if w == "train"})
    number = {value: i for i, value in enumerate(classes)}
    unknown = next((value for value in values if value not in number), None)
    if unknown is not None:
        why = "hidden test labels can't be used: set TEST_SPLIT or TEST_DATASET"
        raise InputError(f"label {unknown!r} of a held-out example is no training label; {why}")
    return torch.tensor([number[value] for value in values])
