"""Classifiers whose activations at one layer can be read and pulled towards targets while they train.

    model = build_model(constants, task, tokenizer_model, seed)
    h, logits = model(task.batch(ids))       # h [B, D]: the target layer at the position that the head reads
    history = fine_tune(model, task, settings, targets)

L_total = L_task + weight * L_aux with L_task the cross-entropy and L_aux = mean(1 - cos(h_i, t_i)); h_i is live, so
its gradient reaches the target layer and what stands below it, and t_i is a constant that belongs to example i.
"""
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from cycles.sharding import shard_weights, shared_like, whole
from cycles.tasks import Task
from lib.distributed import add_up, own_part
from lib.environment import InputError
from lib.hooks import HookPoint, blocks, capture, edit, resolve

COSINE_EPS = 1e-8  # rows with a smaller norm get no auxiliary gradient


class MLP(nn.Module):
    """inputs - 16 - 16 - classes with ReLUs, the paper's model for images; the layers are layers.0 to layers.4."""

    def __init__(self, n_inputs: int, n_classes: int, target_layer: str, seed: int, hidden: int = 16):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(n_inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, n_classes)
        )
        initialise(self, seed)
        self.target = resolve(self, target_layer)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """batch["x"] [B, P] -> h [B, D], logits [B, C]."""
        with capture(self, [self.target], stop=False) as seen:
            logits = self.layers(batch["x"])
        return seen[self.target.signature], logits


class TextClassifier(nn.Module):
    """A transformers model with a linear head on its last real token (causal) or its first one (BERT and the like).

    Blocks below the target layer and the embeddings are frozen and stay in eval mode, unless train_below.
    """

    def __init__(self, lm: Any, n_classes: int, target_layer: str, seed: int, train_below: bool = False):
        super().__init__()
        self.lm: Any = lm
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
        self.head = nn.Linear(lm.config.hidden_size, n_classes)
        initialise(self.head, seed)
        self.head.to(next(lm.parameters()).device)
        self._choose_trained(stack, train_below)

    def _choose_trained(self, stack: nn.ModuleList, train_below: bool) -> None:
        self.lm.requires_grad_(False)
        embeddings = {id(p) for p in self.lm.get_input_embeddings().parameters()}
        trained = [self.lm.base_model] if train_below else [*stack[self.first_trained :], final_norm(self.lm, stack)]
        self.trained_modules = [module for module in trained if module is not None]
        for module in self.trained_modules:
            # Trained weights are kept in float32: updates of 1e-4 vanish in bfloat16.
            module.float()
            for p in module.parameters():
                p.requires_grad_(train_below or id(p) not in embeddings)

    def shard(self) -> None:
        """Keep only this rank's share of the weights. The language model's own head, which a classifier never runs,
        goes.
        """
        if self.lm.get_output_embeddings() is not None:
            self.lm.set_output_embeddings(nn.Identity())
        stack = blocks(self.lm)[1]
        others = [child for child in self.lm.base_model.children()
                  if child is not stack and any(True for _ in child.parameters())]
        shard_weights(self, [*stack, *others])

    def train(self, mode: bool = True) -> "TextClassifier":
        """Train mode for the trained modules only, so that what is frozen is the same in every pass."""
        super().train(False)
        self.training = mode
        for module in [*self.trained_modules, self.head]:
            module.train(mode)
        return self

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """input_ids and attention_mask [B, T] -> h [B, D], logits [B, C]; batch["entry"] replaces the frozen blocks."""
        with capture(self.lm, [self.target], stop=False) as seen:
            states = self.states(batch)
        at = self.position(batch["attention_mask"])
        rows = torch.arange(len(at), device=at.device)
        precision = self.head.weight.dtype  # float32: under autocast the states may have less
        h = seen[self.target.signature][rows, at].to(precision)
        return h, self.head(states[rows, at].to(precision))

    def position(self, mask: Tensor) -> Tensor:
        """The position that the head reads in each row of mask [B, T]: the last real token, or the first; int64 [B]."""
        order = torch.arange(mask.shape[1], device=mask.device)
        if self.reads_first:
            return mask.long().argmax(1)
        return torch.where(mask.bool(), order, -1).argmax(1)

    def states(self, batch: dict[str, Tensor]) -> Tensor:
        """The model's final hidden states [B, T, D]."""
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        mixed = any(p.dtype != torch.float32 for p in self.lm.parameters())
        with ExitStack() as stack:
            if mixed:
                stack.enter_context(torch.autocast(inputs["input_ids"].device.type, torch.bfloat16))
            if "entry" in batch:
                stack.enter_context(_skipped(self.frozen_blocks))
                stack.enter_context(edit(self.lm, self.entry, lambda _: batch["entry"]))
            keywords = {} if self.reads_first else {"use_cache": False}
            return self.lm.base_model(**inputs, **keywords).last_hidden_state

    @torch.no_grad()
    def token_states(self, batch: dict[str, Tensor], point: HookPoint) -> list[Tensor]:
        """The real tokens' states at a hook point, [T_i, D] for each example of the batch; deeper layers are not
        run.
        """
        with capture(self.lm, [point]) as seen:
            self.states(batch)
        return [row[mask.bool()] for row, mask in zip(seen[point.signature], batch["attention_mask"])]


def block_in_range(target_layer: str, n_blocks: int) -> int | None:
    """The block 0..n_blocks-1 that a TARGET_LAYER given as a number means, negative ones from the end; None for a name.

    Raises InputError for a number that no block has.
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
    """Let the blocks hand their input on: what the first trained block reads comes from a cache."""
    try:
        for block in frozen:
            block.forward = lambda hidden_states, *_args, **_keywords: hidden_states
        yield
    finally:
        for block in frozen:
            block.__dict__.pop("forward", None)


def initialise(module: nn.Module, seed: int) -> None:
    """torch's default initialisation of every linear layer, drawn from `seed` without touching the global stream."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                bound = layer.in_features**-0.5
                for p in layer.parameters():
                    p.copy_((torch.rand(p.shape, generator=generator) * 2 - 1) * bound)


def auxiliary_loss(h: Tensor, t: Tensor, centre: Tensor | None = None) -> Tensor:
    """1 - cos(h_i, t_i) of each row of h [B, D], live, and t [B, D], constant: [B]; about `centre` [D] if given."""
    t = t.detach()
    if centre is not None:
        h, t = h - centre, t - centre
    return 1 - cosine_similarity(h, t, dim=1, eps=COSINE_EPS)


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters that are trained, which is all that a checkpoint needs beside the base model."""
    return {name: whole(p.detach()).cpu().clone() for name, p in model.named_parameters() if p.requires_grad}


def load_trained(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Put back what trained_state took. Raises InputError if the parameters are others."""
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if own.keys() != state.keys() or any(own[name].shape != state[name].shape for name in own):
        raise InputError("the checkpoint holds other parameters than this model trains; delete it and run its step "
                         "again")
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(shared_like(state[name], p))


@dataclass(frozen=True)
class Entries:
    """Cached states at the entry of the first trained block, so that an epoch costs only the trained layers."""

    shards: list[Tensor]
    """[tokens, D] each, memory-mapped."""
    places: list[tuple[int, int, int]]
    """example id -> shard, first row, end row."""

    def batch(self, ids: Tensor, n_positions: int) -> Tensor:
        """The entry states of the examples, right-padded with zeros to [B, n_positions, D]."""
        parts = [self.shards[shard][start:end] for shard, start, end in (self.places[i] for i in ids.tolist())]
        out = parts[0].new_zeros(len(parts), n_positions, parts[0].shape[1])
        for row, part in zip(out, parts):
            row[: len(part)] = part
        return out


def make_batch(task: Task, ids: Tensor, device: torch.device, entries: Entries | None = None) -> dict[str, Tensor]:
    """task.batch on the device, with the cached entry states where there are some."""
    batch = task.batch(ids)
    if entries is not None:
        batch["entry"] = entries.batch(ids, batch["input_ids"].shape[1])
    return {name: value.to(device) for name, value in batch.items()}


def own_examples(batch: Tensor) -> tuple[Tensor, int]:
    """The examples of a batch [B] that this rank runs, and how many of them count.

    A rank without one of its own runs the first, which does not count: sharded weights are gathered by all ranks
    together.
    """
    own = batch[own_part(len(batch))]
    return (own if len(own) else batch[:1]), len(own)


@torch.no_grad()
def outputs(
    model: nn.Module, task: Task, ids: Tensor, batch_size: int, entries: Entries | None = None
) -> tuple[Tensor, Tensor]:
    """h [N, D] and logits [N, C] of the examples, in the order of ids, on the CPU; the model in eval mode.

    Several ranks share the work, and all of them get the whole.
    """
    model.eval()
    device = next(model.parameters()).device
    order = torch.arange(len(ids))
    if task.tokens:  # like lengths together: less padding
        order = torch.tensor([len(task.tokens[i].ids) for i in ids.tolist()]).argsort(stable=True)
    found = []
    for part in order.split(batch_size):
        own, n = own_examples(part)
        h, logits = model(make_batch(task, ids[own], device, entries))
        found.append((own[:n], h[:n].float().cpu(), logits[:n].float().cpu()))
    whole_h, whole_logits = (torch.zeros(len(ids), found[0][i].shape[1]) for i in (1, 2))
    for own, h, logits in found:
        whole_h[own], whole_logits[own] = h, logits
    add_up(whole_h, whole_logits)
    return whole_h, whole_logits
