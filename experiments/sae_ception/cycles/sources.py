"""Where a task's examples come from, and its three splits.

    task = load_task(constants, seed)      # images (cycles/images.py)
    task = load_task(constants, seed, tokenizer)      # texts (cycles/labelled_texts.py)

The official test set is the test split where there is one; without a validation set the seed cuts one from training.
"""
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor

from cycles.images import image_task
from cycles.labelled_texts import are_stories, cuts_test, text_task
from cycles.labels import smallest_class
from cycles.own import Own, file_of, is_own, own_task
from cycles.planted import flip_labels, plant_shortcut
from cycles.tasks import Task
from lib.environment import InputError, log

STORIES_LIMIT = 600  # DATA_LIMIT="auto" of the embedded stories: minutes on two cores
# Constants that decide nothing for images, whose splits and labels come with DATASET, and the values that say nothing.
NOT_OF_IMAGES = {
    "VAL_DATASET": (None,), "TEST_DATASET": (None,), "VAL_SPLIT": (None,), "TRAIN_SPLIT": ("train",),
    "TEST_SPLIT": ("test",), "TEST_FRAC": (0.2,), "LABEL_FIELD": ("digit", "mood"), "TEXT_FIELD": ("text",),
    "TEXT_FIELD_HELD_OUT": (None,),
}


def load_task(constants: dict[str, Any], seed: int, tokenizer: Any = None, own: Own | None = None) -> Task:
    """The task that the constants name; `tokenizer` for texts, None for images. `seed` cuts the validation split.

    own: a module of people's own, which brings its data.

    Raises InputError for data that can't be reached, for labels that are missing, mixed or hidden, and for a split
    without examples or with one class only.
    """
    if own is not None:
        task, where = own_task(own, constants["DATA_LIMIT"])
    else:
        task, where = image_task(constants) if tokenizer is None else text_task(constants, tokenizer)
    _group(task, constants["LABEL_GROUPS"])
    task.splits = _split(task, where, constants["VAL_FRAC"], seed)
    _check_held_out(task, constants)
    if constants["SHORTCUT"] is not None:
        plant_shortcut(task, constants["SHORTCUT"], seed)
    if constants["LABEL_NOISE"]:
        flip_labels(task, constants["LABEL_NOISE"], seed)
    return task


def _split(task: Task, where: list[str], val_frac: float, seed: int) -> dict[str, Tensor]:
    """Ids by the split that each example came from; without validation examples, a stratified val_frac of training.

    Examples that occur twice stay in one split.
    """
    ids = {name: torch.tensor([i for i, w in enumerate(where) if w == name]) for name in ("train", "val", "test")}
    if not len(ids["val"]):
        every = ids["train"].tolist()
        kind_of = {i: _kind(task, i) for i in every}
        first = {kind_of[i]: i for i in reversed(every)}
        kinds = np.array(sorted(first.values()), dtype=np.int64)
        try:
            _, chosen = train_test_split(kinds, test_size=val_frac, random_state=seed, stratify=task.y[kinds].numpy())
        except ValueError as error:
            smallest = smallest_class(task.y[ids["train"]], task.class_names)
            raise InputError(f"validation can't be cut from training: {smallest} ({error}); raise DATA_LIMIT or "
                             "VAL_FRAC, or set VAL_DATASET") from None
        held_out = set(chosen.tolist())
        is_val = torch.tensor([first[kind_of[i]] in held_out for i in every])
        ids |= {"train": ids["train"][~is_val], "val": ids["train"][is_val]}
    empty = [name for name, part in ids.items() if not len(part)]
    if empty:
        raise InputError(f"the {empty[0]} split has no examples; raise DATA_LIMIT or set another data set")
    return ids


def _kind(task: Task, i: int) -> str | bytes:
    """What two examples share if they are the same one."""
    if task.images is None:
        return task.texts[i].strip()
    return blake2b(task.images[i].numpy().tobytes(), digest_size=16).digest()


def _check_held_out(task: Task, c: dict[str, Any]) -> None:
    """Refuse a held-out split of one class, and warn of one that lacks a class: its scores would say less than they do.
    """
    for name, constant in (("val", "VAL_DATASET"), ("test", "TEST_DATASET")):
        whole = f"MODEL={c['MODEL']} brings its data: give it" if is_own(c["MODEL"]) else "set DATASET to"
        remedy = f"{whole} data with every class in both parts, and DATA_LIMIT and VAL_FRAC large enough"
        if task.texts:
            remedy = f"set {constant} to data with every class, or to None to cut it from DATASET"
        there = torch.bincount(task.y[task.splits[name]], minlength=task.n_classes) > 0
        missing = [task.class_names[i] for i in (~there).nonzero()[:, 0].tolist()]
        if int(there.sum()) == 1:
            only = task.class_names[int(there.nonzero())]
            raise InputError(f"all {len(task.splits[name]):,} {name} examples are of the class {only!r}; {remedy}")
        if missing:
            log.warning("%s has no example of %s: no score of it counts this class; %s", name,
                        ", ".join(map(repr, missing[:5])), remedy)


def _group(task: Task, groups: tuple[int, ...] | None) -> None:
    """Merge classes: class c becomes groups[c], and the finer labels the attribute that is never trained on."""
    n_classes = len(task.class_names)
    if groups is not None:
        if len(groups) != n_classes or set(groups) != set(range(max(groups) + 1)):
            raise InputError(f"LABEL_GROUPS={groups} must give a group, counted from 0, to each of the {n_classes} "
                             "classes")
        task.attribute, task.attribute_names, task.numbers = task.y, task.class_names, []
        task.y, n_classes = torch.tensor(groups)[task.y], max(groups) + 1
        task.class_names = ["/".join(name for name, group in zip(task.attribute_names, groups) if group == c)
                            for c in range(n_classes)]
    if n_classes < 2:
        raise InputError(f"the labels have only one value, {', '.join(task.class_names)}; set LABEL_FIELD to a column "
                         "of two or more classes, or DATASET to data that has them")
    task.n_classes = n_classes


def own_data(c: dict[str, Any]) -> dict[str, Any]:
    """The constants; what belongs to the embedded stories is left out where DATASET is other data.

    A module of people's own brings its data, so it needs no DATASET. Raises InputError for a constant that images do
    not use.
    """
    if is_own(c["MODEL"]):
        for name in ("DATASET", "VAL_DATASET", "TEST_DATASET"):
            if c[name] and not are_stories(c[name]):
                log.warning("%s=%s is not used: MODEL=%s brings its own data", name, c[name], c["MODEL"])
        c = c | {"MODEL": f"{file_of(c['MODEL'])}:{c['MODEL'].rpartition(':')[2]}", "LABEL_FIELD": "class"}
        c |= dict.fromkeys(("DATASET", "VAL_DATASET", "TEST_DATASET", "ATTRIBUTE_FIELD"))
    stories = are_stories(c["DATASET"])
    if c["DATA_LIMIT"] == "auto":
        c = c | {"DATA_LIMIT": STORIES_LIMIT if stories else None}
    left = [] if stories else [name for name in ("VAL_DATASET", "TEST_DATASET") if are_stories(c[name])]
    if left:
        log.info("%s: the embedded stories' file is left out, because DATASET=%s is other data", " and ".join(left),
                 c["DATASET"])
    c = c | dict.fromkeys(left)
    for name, silent in NOT_OF_IMAGES.items() if c["MODEL"] == "mlp" else ():
        if c.get(name, silent[0]) not in silent:
            raise InputError(f"{name}={c[name]} would be ignored: the training and test images of DATASET and their "
                             f"labels come together, and VAL_FRAC of them validate; leave {name} out")
    unused = () if cuts_test(c) else ("TEST_FRAC",)  # what decides nothing makes no output stale
    return {name: value for name, value in c.items() if name not in unused}
