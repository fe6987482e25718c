"""Classifiers of texts whose activations at one layer can be read, and pulled towards targets while they train.

    model = text_classifier(constants, task, seed, tokenizer=tokenizer, device=device)     # others: cycles/modules.py
    h, logits = model(task.batch(ids))       # h [B, D]: the target layer at the position that the head reads
"""
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from cycles.heads import check_reads, columns_of, has_own_head, head_parts, padding_id
from cycles.modules import initialise
from cycles.sharding import spread
from cycles.tasks import Task
from lib.blocks import require_positions
from lib.environment import InputError
from lib.hooks import HookPoint, blocks, capture, edit, resolve
from lib.models import choose_dtype, load_model, local_path


class TextClassifier(nn.Module):
    """A transformers model with a linear head on its last real token (causal models) or its first (BERT and the like).

    The embeddings and the blocks below the target layer are frozen and stay in eval mode, unless train_below. A
    transformers classifier may keep its own head: its outputs `columns` are those of classes 0..C-1. A new head of a
    causal model has no bias, as those of transformers' own classifiers, so that it can be saved as one.
    """

    def __init__(
        self, lm: Any, n_classes: int, target_layer: str, seed: int, *, train_below: bool = False,
        columns: list[int] | None = None,
    ):
        super().__init__()
        self.lm: Any = lm
        self.columns = columns
        path, stack = blocks(lm)
        if target_layer == "last":
            target_layer = f"resid_post:{len(stack) - 1}"
        elif (block := block_in_range(target_layer, len(stack))) is not None:
            target_layer = f"resid_post:{block}"
        self.target = resolve(lm, target_layer)
        self.first_trained = 0 if train_below else _block_number(self.target, path)
        self.frozen_blocks = list(stack[: self.first_trained])
        self.entry = HookPoint(f"{path}.{self.first_trained}", "input", "entry")
        self.reads_first = reads_first_token(lm.config)
        if columns is None:
            self.head = nn.Linear(lm.config.hidden_size, n_classes, bias=self.reads_first)
            initialise(self.head, seed)
            self.head.to(next(lm.parameters()).device)
        self._choose_trained(stack, train_below)
        if columns is not None and not next(lm.parameters()).is_meta:  # rank 0 checks for all
            check_reads(self)

    def _choose_trained(self, stack: nn.ModuleList, train_below: bool) -> None:
        self.lm.requires_grad_(False)
        embeddings = {id(p) for p in self.lm.get_input_embeddings().parameters()}
        trained = [self.lm.base_model] if train_below else [*stack[self.first_trained :], final_norm(self.lm, stack)]
        head = [self.head] if self.columns is None else head_parts(self.lm)
        self.trained_modules = [module for module in [*trained, *head] if module is not None]
        for module in self.trained_modules:
            # Trained weights are kept in float32: updates of 1e-4 vanish in bfloat16.
            module.float()
            for p in module.parameters():
                p.requires_grad_(train_below or id(p) not in embeddings)

    def share_weights(self, device: torch.device) -> None:
        """Keep only this rank's share of rank 0's weights, on the device; the other ranks' may be on the meta device.

        The language model's own head is dropped: no classifier uses it.
        """
        if self.lm.get_output_embeddings() is not None:
            self.lm.set_output_embeddings(nn.Identity())
        stack = blocks(self.lm)[1]
        others = [child for child in self.lm.base_model.children()
                  if child is not stack and any(True for _ in child.parameters())]
        spread(self, [*stack, *others], device)

    def train(self, mode: bool = True) -> "TextClassifier":
        """Train mode for the trained modules only, so that what is frozen is the same in every pass."""
        super().train(False)
        self.training = mode
        for module in self.trained_modules:
            module.train(mode)
        return self

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """input_ids and attention_mask [B, T] -> h [B, D], logits [B, C]; batch["entry"] replaces the frozen blocks."""
        at = self.position(batch["attention_mask"], batch["input_ids"])
        rows = torch.arange(len(at), device=at.device)
        with capture(self.lm, [self.target], stop=False) as seen:
            if self.columns is not None:
                logits = self._run(self.lm, batch).logits[:, self.columns].float()
            else:  # float32: under autocast the states may have less
                logits = self.head(self.states(batch)[rows, at].to(self.head.weight.dtype))
        return seen[self.target.signature][rows, at].to(logits.dtype), logits

    def position(self, mask: Tensor, input_ids: Tensor) -> Tensor:
        """The position that the head reads in each row [B, T]: the last real token, or the first; int64 [B].

        A causal classifier's own head skips padding tokens even where they are real, as transformers does.
        """
        order = torch.arange(mask.shape[1], device=mask.device)
        if self.reads_first:
            return mask.long().argmax(1)
        real = mask.bool() if self.columns is None else input_ids != self.lm.config.pad_token_id
        return torch.where(real, order, -1).argmax(1)

    def states(self, batch: dict[str, Tensor]) -> Tensor:
        """The model's final hidden states [B, T, D]."""
        return self._run(self.lm.base_model, batch).last_hidden_state

    def _run(self, module: Any, batch: dict[str, Tensor]) -> Any:
        """The output of the language model, or of its base, for a batch."""
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        mixed = any(p.dtype != torch.float32 for p in self.lm.parameters())
        with ExitStack() as stack:
            if mixed:
                stack.enter_context(torch.autocast(inputs["input_ids"].device.type, torch.bfloat16))
            if "entry" in batch:
                stack.enter_context(_skipped(self.frozen_blocks))
                stack.enter_context(edit(self.lm, self.entry, lambda _: batch["entry"]))
            keywords = {} if self.reads_first else {"use_cache": False}
            return module(**inputs, **keywords)

    @torch.no_grad()
    def token_states(self, batch: dict[str, Tensor], point: HookPoint) -> list[Tensor]:
        """The real tokens' states at a hook point, [T_i, D] for each example; deeper layers do not run."""
        with capture(self.lm, [point]) as seen:
            self.states(batch)
        return [row[mask.bool()] for row, mask in zip(seen[point.signature], batch["attention_mask"])]


def block_in_range(target_layer: str, n_blocks: int) -> int | None:
    """The block 0..n_blocks-1 that a numeric TARGET_LAYER means, counting negative ones from the end; None for a name.

    Raises InputError for a number out of range.
    """
    digits = target_layer.removeprefix("-")
    if not (digits.isascii() and digits.isdigit()):
        return None
    number = int(target_layer) if len(digits) < 10 else n_blocks
    if not -n_blocks <= number < n_blocks:
        raise InputError(f"TARGET_LAYER={target_layer} is out of range: the model has {n_blocks} blocks, 0 to "
                         f"{n_blocks - 1} or -{n_blocks} to -1")
    return number % n_blocks


def reads_first_token(config: Any) -> bool:
    """Whether a classifier on this model reads the first token: true for bidirectional models such as BERT."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)


def final_norm(lm: Any, stack: nn.ModuleList) -> nn.Module | None:
    """The norm after the last block: the base model's direct child that follows the list of blocks, if it is a norm."""
    children = list(lm.base_model.children())
    after = [child for child in children if "norm" in type(child).__name__.lower()]
    before_blocks = children[: children.index(stack)] if stack in children else children
    return next((child for child in after if child not in before_blocks), None)


def _block_number(point: HookPoint, path: str) -> int:
    if not point.path.startswith(f"{path}."):
        raise InputError(f"TARGET_LAYER {point.path} lies in no block; name a block or something inside one")
    return int(point.path[len(path) + 1 :].split(".")[0])


@contextmanager
def _skipped(frozen: list[nn.Module]) -> Iterator[None]:
    """Make the blocks return their input: what the first trained block reads comes from a cache."""
    try:
        for block in frozen:
            block.forward = lambda hidden_states, *_args, **_keywords: hidden_states
        yield
    finally:
        for block in frozen:
            block.__dict__.pop("forward", None)


def text_classifier(
    c: dict[str, Any], task: Task, seed: int, *, tokenizer: Any, device: torch.device
) -> TextClassifier:
    """The classifier of the constants on a language model. A transformers classifier keeps its head with KEEP_HEAD.

    Raises InputError if the model can't be loaded, or if its own head does not know the task's classes.
    """
    lm = load_base(c, device)
    require_positions(lm, c["MAX_LENGTH"])
    columns = columns_of(lm, task) if has_own_head(lm) and c["KEEP_HEAD"] else None
    lm.config.pad_token_id = task.pad_id = padding_id(tokenizer, lm.config, own_head=columns is not None)
    if columns is not None and c["LOAD_BITS"]:
        raise InputError("LOAD_BITS quantises MODEL's own head, which trains; set LOAD_BITS=None or KEEP_HEAD=False")
    model = TextClassifier(lm, task.n_classes, c["TARGET_LAYER"], seed, train_below=c["TRAIN_BELOW"], columns=columns)
    if c["GRADIENT_CHECKPOINTING"]:
        # The reentrant kind would cut the graph of what the hooks capture.
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def load_base(c: dict[str, Any], device: torch.device) -> Any:
    """The language model of the constants. LOAD_BITS quantises its frozen blocks; what is trained can't be quantised.

    Raises InputError if it can't be reached, or a package that these constants need is not installed.
    """
    if c["DEVICE_MAP"] == "disk":
        raise InputError("DEVICE_MAP=disk is for saving activations: blocks that train can't stay on disk; set auto, "
                         "or FSDP=True under torchrun")
    dtype = choose_dtype(c["MODEL_DTYPE"], device)
    trained: tuple[str, ...] = ()
    if c["LOAD_BITS"]:
        with torch.device("meta"):
            config = transformers.AutoConfig.from_pretrained(local_path(c["MODEL"]) or c["MODEL"],
                                                             trust_remote_code=False)
            empty = transformers.AutoModelForCausalLM.from_config(config)
            skeleton = TextClassifier(empty, 2, c["TARGET_LAYER"], 0, train_below=c["TRAIN_BELOW"])
        path, stack = blocks(empty)
        trained = tuple(f"{path}.{i}" for i in range(skeleton.first_trained, len(stack)))
    return load_model(c["MODEL"], device, dtype, bits=c["LOAD_BITS"], device_map=c["DEVICE_MAP"], whole_modules=trained)
