"""What is planted in a task to see whether a classifier copes with it: wrong labels, and a shortcut in the images.

    flip_labels(task, 0.2, seed)        # of the training labels a fifth is wrong
    plant_shortcut(task, 0.95, seed)    # a bright corner block names the class, rightly for 95 % of training images
"""
import torch
from torch import Tensor

from cycles.tasks import Task
from lib.environment import InputError

BLOCK = 2  # pixels of a side of the block


def flip_labels(task: Task, share: float, seed: int) -> None:
    """Give `share` of the training examples another class, drawn evenly. Validation and test keep their labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = task.splits["train"]
    chosen = ids[torch.randperm(len(ids), generator=generator)[: round(share * len(ids))]]
    task.y = task.y.clone()
    task.y[chosen] = _another(task.y[chosen], task.n_classes, generator)


def plant_shortcut(task: Task, agreement: float, seed: int) -> None:
    """Paint a bright block at the top of every image, at a place for each class, and keep its value as task.shortcut.

    It becomes the task's attribute, too: what a method may know to be unwanted. On training and validation images it
    names the image's class with probability `agreement`, else another one; on test images it is drawn evenly from all
    classes, whatever the label. Raises InputError for texts, and for images too narrow for a block of each class.
    """
    side = round(task.n_pixels**0.5)
    if task.images is None or side * side != task.n_pixels or side < BLOCK * task.n_classes:
        raise InputError(f"SHORTCUT needs square images of at least {BLOCK * task.n_classes} pixels a side, "
                         f"{BLOCK} for each class; set SHORTCUT=None")
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.rand(len(task.y), generator=generator) >= agreement
    value = torch.where(wrong, _another(task.y, task.n_classes, generator), task.y)
    test = task.splits["test"]
    value[test] = torch.randint(task.n_classes, (len(test),), generator=generator)
    images = task.images.clone().view(-1, side, side)
    images[:, :BLOCK, : BLOCK * task.n_classes] = 0
    rows = torch.arange(len(images))
    for down in range(BLOCK):
        for right in range(BLOCK):
            images[rows, down, BLOCK * value + right] = task.images.max()
    task.images, task.shortcut = images.view(len(images), -1), value
    task.attribute, task.attribute_names = value, task.class_names


def _another(y: Tensor, n_classes: int, generator: torch.Generator) -> Tensor:
    return (y + torch.randint(1, n_classes, y.shape, generator=generator)) % n_classes
