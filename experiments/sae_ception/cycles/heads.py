"""The head of a Hugging Face classifier: whether a model has one, which of its outputs are the data's classes, and
which token it reads.
"""
from typing import Any

import torch
from torch import Tensor, nn

from cycles.tasks import Task
from lib.blocks import blocks
from lib.environment import InputError, log
from lib.hooks import HookPoint, edit


def has_own_head(lm: Any) -> bool:
    """Whether a transformers model is a classifier of texts."""
    return type(lm).__name__.endswith("ForSequenceClassification")


def head_parts(lm: Any) -> list[nn.Module]:
    """The modules of a classifier's head: all outside its base model, and the pooler (BERT's) inside."""
    parts = [child for child in lm.children() if child is not lm.base_model]
    pooler = getattr(lm.base_model, "pooler", None)
    return [*parts, pooler] if isinstance(pooler, nn.Module) else parts


def columns_of(lm: Any, task: Task) -> list[int]:
    """The head's output for each class of the task, found by name, or by number where the labels are numbers.

    The task's classes take the head's names where they had none. Raises InputError if a class has no output.
    """
    named = {name.strip().casefold(): i for i, name in lm.config.id2label.items()}
    wanted = [name.casefold() for name in task.class_names]
    if all(name in named for name in wanted):
        found = [named[name] for name in wanted]
    elif task.numbers and max(task.numbers) < lm.config.num_labels and min(task.numbers) >= 0:
        found = task.numbers
    else:
        known = ", ".join(list(lm.config.id2label.values())[:5])
        raise InputError(f"the labels are {', '.join(task.class_names[:5])}, but MODEL's own head knows {known}; write "
                         "its names or numbers as labels, or set KEEP_HEAD=False for a new head")
    if getattr(lm.config, "problem_type", None) == "multi_label_classification":
        raise InputError("MODEL's own head gives each text several labels; set KEEP_HEAD=False for a new head")
    if len(set(found)) < len(found):
        raise InputError(f"the labels {', '.join(task.class_names[:5])} are not as many classes of MODEL's own head; "
                         "write alike what is one class, or set KEEP_HEAD=False for a new head")
    labels, names = list(task.class_names), [lm.config.id2label[i] for i in found]
    if task.class_names == [str(number) for number in task.numbers] and not all(
            name.startswith("LABEL_") for name in names):
        task.class_names = names
    if found == task.numbers and 0 not in found:
        log.warning("no label is 0, and MODEL's head counts from 0: if the labels count from 1, each stands for "
                    "another class than it should")
    left = lm.config.num_labels - len(found)
    log.info("MODEL keeps its own head: %s%s (KEEP_HEAD=False gives it a new one)",
             ", ".join(f"{label} = {name}" for label, name in zip(labels, names)),
             f"; its {left} other classes are not in the data and are left out" if left else "")
    return found


def padding_id(tokenizer: Any, config: Any, *, own_head: bool) -> int:
    """The token that fills up batches. transformers' causal heads skip it wherever it stands, so it must be the one
    that the config of a model's own head names, and no word: GPT-2 has no padding token, and its token 0 is "!".
    """
    of_tokenizer, of_model = tokenizer.pad_token_id, config.pad_token_id
    wanted = (of_model, of_tokenizer) if own_head else (of_tokenizer, of_model)
    return next((token for token in (*wanted, tokenizer.eos_token_id) if token is not None), 0)


def check_reads(model: Any) -> None:
    """Raise InputError unless the model's own head reads only the token at model.position().

    Two texts of unlike length; the derivative of the logits by every state that leaves the last block must vanish
    elsewhere.
    """
    path, stack = blocks(model.lm)
    ids = torch.arange(12).reshape(2, 6) % 5 + 1
    ids[ids == model.lm.config.pad_token_id] += 5
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    ids[1, 4:] = model.lm.config.pad_token_id
    batch = {name: part.to(next(model.parameters()).device) for name, part in
             (("input_ids", ids), ("attention_mask", mask))}
    states: list[Tensor] = []

    def leaf(x: Tensor) -> Tensor:
        states.append(x.detach().requires_grad_())
        return states[-1]

    model.eval()
    with torch.enable_grad(), edit(model.lm, HookPoint(f"{path}.{len(stack) - 1}", "output", "last"), leaf):
        logits = model.lm(**batch).logits
    (gradient,) = torch.autograd.grad(logits.float().square().sum(), states[-1])
    moved = gradient.abs().sum(2)
    at = model.position(batch["attention_mask"], batch["input_ids"])
    rows = torch.arange(2, device=at.device)
    others = moved.clone()
    others[rows, at] = 0
    if float(others.max()) > 0 or float(moved[rows, at].min()) == 0:
        raise InputError("MODEL's own head reads other tokens than the last one (of models like BERT: the first), so "
                         "no single activation can be pulled; set KEEP_HEAD=False for a new head")
