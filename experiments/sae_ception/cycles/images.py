"""Labelled images: scikit-learn's digits, folders of idx.gz files, hub data sets with image and label columns."""
import gzip
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.model_selection import train_test_split

from cycles.labels import classes, in_words
from cycles.tasks import Task, limited
from lib.environment import InputError, first_line
from lib.models import local_path

DIGITS_TEST_SEED = 0  # scikit-learn's digits come in one piece; every seed has the same test set


class Images(NamedTuple):
    """The images of one split."""

    pixels: np.ndarray
    """[N, ...]."""
    labels: list[Any]
    names: list[str] | None = None
    """What the labels 0..C-1 are called, where the data set says so."""


def image_task(c: dict[str, Any]) -> tuple[Task, list[str]]:
    """Pixels times PIXEL_SCALE with their classes, and the split of each."""
    dataset = c["DATASET"]
    parts = {"train": _digits("train"), "test": _digits("test")} if dataset == "digits" else {
        name: _image_split(dataset, name) for name in ("train", "test")}
    shapes = [part.pixels.shape[1:] for part in parts.values()]
    if shapes[0] != shapes[1]:
        raise InputError(f"DATASET={dataset} has training images of {shapes[0]} pixels and test images of {shapes[1]}; "
                         "they must have one size")
    where = [name for name, part in parts.items() for _ in part.labels]
    labels = [label for part in parts.values() for label in part.labels]
    y, known = classes(labels, where, f"DATASET={dataset}")
    task = Task(y, 0, {}, class_names=in_words(known, parts["train"].names))
    kept = limited(task, where, c["DATA_LIMIT"])
    pixels = np.concatenate([part.pixels.reshape(len(part.pixels), -1) for part in parts.values()])
    task.images, task.y = torch.from_numpy(pixels[kept].astype(np.float32)) * c["PIXEL_SCALE"], y[kept]
    return task, [where[i] for i in kept]


def _digits(split: str) -> Images:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=DIGITS_TEST_SEED,
                                   stratify=labels)
    ids = np.sort(train if split == "train" else test)
    return Images(pixels[ids], labels[ids].tolist())


def _image_split(dataset: str, split: str) -> Images:
    """One split of a folder of idx.gz files, or of a hub data set with image and label columns."""
    folder = local_path(dataset)
    if folder is not None:
        prefix = "t10k" if split == "test" else "train"
        files = [folder / f"{prefix}-{name}-ubyte.gz" for name in ("images-idx3", "labels-idx1")]
        images, labels = (read_idx(path, n_dims) for path, n_dims in zip(files, (3, 1)))
        if len(images) != len(labels):
            raise InputError(f"{files[0].name} holds {len(images):,} images and {files[1].name} {len(labels):,} "
                             "labels; get both files again")
        return Images(images, labels.tolist())
    import datasets

    try:
        rows = datasets.load_dataset(dataset, split=split)
        names = getattr(rows.features["label"], "names", None)
        return Images(np.stack([np.asarray(row["image"]) for row in rows]), [row["label"] for row in rows], names)
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
