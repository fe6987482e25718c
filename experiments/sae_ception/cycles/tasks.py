"""A classification task: labelled examples, images as vectors or texts as tokens, in three splits.

    task = load_task(constants, seed)      # cycles/sources.py
    task.splits["train"]                   # ids of the examples of a split; an id never changes its example
    task.batch(ids)                        # what a model of cycles/classifier.py takes
"""
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cycles.labels import counts, draw
from lib.environment import log
from lib.files import fingerprint
from lib.metrics.interpretability import MIN_SUPPORT
from lib.texts import Tokens, pad

FEW = 4 * MIN_SUPPORT  # a base unit fires on about a quarter of the examples
DRAW_SEED = 0  # DATA_LIMIT leaves the same training examples for every seed, so that cached states serve all


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
    shortcut: Tensor | None = None
    """The class that a planted shortcut names in each image, int64 [N] (cycles/planted.py)."""
    images: Tensor | None = None
    """Pixels times PIXEL_SCALE, float32 [N, P]."""
    texts: list[str] = field(default_factory=list)
    """Empty for images."""
    tokens: list[Tokens] = field(default_factory=list)
    """Of each text, special tokens included."""
    pad_id: int = 0
    class_names: list[str] = field(default_factory=list)
    """Of classes 0..C-1, as tables and figures call them."""
    numbers: list[int] = field(default_factory=list)
    """Of classes 0..C-1 in the data set; empty where it writes them as words."""
    attribute_names: list[str] = field(default_factory=list)
    """Of the attribute's values."""
    reported: set[str] = field(default_factory=set)
    """Names of the samples that the log has described."""

    @property
    def n_pixels(self) -> int:
        """P, the pixels of an image; 0 for texts."""
        return 0 if self.images is None else self.images.shape[1]

    def batch(self, ids: Tensor) -> dict[str, Tensor]:
        """The examples `ids` as a model takes them: y, ids, and x [B, P] or input_ids, attention_mask [B, T]."""
        batch = {"y": self.y[ids], "ids": ids}
        if self.images is not None:
            return batch | {"x": self.images[ids]}
        input_ids, mask = pad([self.tokens[i] for i in ids.tolist()], self.pad_id)
        return batch | {"input_ids": input_ids, "attention_mask": mask}

    def sample(self, ids: Tensor, limit: int | None, seed: int, name: str) -> Tensor:
        """`limit` of the ids, drawn by seed with each class's share; the log describes each named sample once."""
        drawn = draw(ids, self.y, limit, seed)
        if len(drawn) < len(ids) and name not in self.reported:
            self.reported.add(name)
            log.info("%s: %s of %s drawn by seed %d: %s", name, f"{len(drawn):,}", f"{len(ids):,}", seed,
                     counts(drawn, self.y, self.class_names))
        return drawn

    def identity(self) -> str:
        """Fingerprint of the examples, labels, names of classes, the attribute and the splits."""
        content = self.images if self.images is not None else [t.ids for t in self.tokens]
        attribute = [] if self.attribute is None else [fingerprint(self.attribute), self.attribute_names]
        return fingerprint([fingerprint(content), fingerprint(self.y), self.class_names, *attribute,
                            [fingerprint(ids) for ids in self.splits.values()]])


def limited(task: Task, where: list[str], limit: int | None) -> list[int]:
    """The examples that DATA_LIMIT leaves: all held-out ones, and training ones with each class's share."""
    train = torch.tensor([i for i, w in enumerate(where) if w == "train"])
    kept = set(task.sample(train, limit, DRAW_SEED, "DATA_LIMIT, training examples").tolist())
    return [i for i, w in enumerate(where) if w != "train" or i in kept]


def say_what_is_scored(task: Task, c: dict[str, Any], seed: int) -> None:
    """Log the classes, what each split holds of them, and every sample that the evaluation draws from a split."""
    log.info("%s: %d classes", c["LABEL_FIELD"], task.n_classes)
    if task.attribute is not None:
        what = ("the planted shortcut" if task.shortcut is not None
                else "the classes that LABEL_GROUPS merges" if c["LABEL_GROUPS"] else c["ATTRIBUTE_FIELD"])
        log.info("scored but never trained on: %s, %d values", what, len(task.attribute_names))
    for name, ids in task.splits.items():
        log.info("%s: %s examples: %s", name, f"{len(ids):,}", counts(ids, task.y, task.class_names))
    for constant, name, what in (("EVAL_LIMIT", "val", "val"), ("EVAL_LIMIT", "test", "test"),
                                 ("PROBE_LIMIT", "train", "training")):
        if constant in c:
            task.sample(task.splits[name], c[constant], seed, f"{constant}, {what} examples")
    n_test = min(len(task.splits["test"]), c.get("EVAL_LIMIT") or len(task.splits["test"]))
    if n_test < FEW:
        log.warning("only %d test examples are scored: base U leaves out units that fire on fewer than %d, and with "
                    "few examples it leaves out all and has no value; give more rows, or raise TEST_FRAC or EVAL_LIMIT",
                    n_test, MIN_SUPPORT)
