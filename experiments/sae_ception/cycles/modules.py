"""Classifiers that are plain torch modules: the paper's small MLP, and modules of people's own; their weights.

    model = MLP(task.n_pixels, task.n_classes, "layers.1", seed)
    h, logits = model(task.batch(ids))       # h [B, D]: the target layer
"""
import torch
from torch import Tensor, nn

from cycles.sharding import is_sharded, receive
from lib.distributed import rank
from lib.environment import InputError
from lib.hooks import capture, resolve


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


class OwnModule(nn.Module):
    """Any module that takes x [B, ...] and gives logits [B, C]; of its layer's output, each example's is one row h."""

    def __init__(self, module: nn.Module, layer: str):
        super().__init__()
        self.module = module
        self.target = resolve(module, layer)

    def train(self, mode: bool = True) -> "OwnModule":
        """Train mode for what trains; a part whose parameters are all frozen stays as it is, a batch norm too."""
        super().train(mode)
        for part in self.modules():
            if any(True for _ in part.parameters()) and not any(p.requires_grad for p in part.parameters()):
                part.train(False)
        return self

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """batch["x"] [B, ...] -> h [B, D], logits [B, C]."""
        with capture(self.module, [self.target], stop=False) as seen:
            logits = self.module(batch["x"])
        return seen[self.target.signature].flatten(1), logits


def initialise(module: nn.Module, seed: int) -> None:
    """torch's default initialisation of every linear layer, drawn from `seed` without touching the global stream."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                bound = layer.in_features**-0.5
                for p in layer.parameters():
                    p.copy_((torch.rand(p.shape, generator=generator) * 2 - 1) * bound)


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of what trains, or of this rank's shares: all that a checkpoint needs beside the base model."""
    return {name: p.detach().clone() if is_sharded(p) else p.detach().cpu().clone()
            for name, p in _trained(model).items()}


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that train and, in a module of people's own, what else training changes: batch norms' means."""
    buffers = dict(model.named_buffers()) if isinstance(model, OwnModule) else {}
    return {name: p for name, p in model.named_parameters() if p.requires_grad} | buffers


def load_trained(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Put back what trained_state took, or whole tensors; where ranks hold shares, those of rank 0 count.

    Raises InputError if they came from other parameters.
    """
    own = _trained(model)
    receives = rank() > 0 and any(map(is_sharded, own.values()))  # and may have nothing itself
    if not receives and (own.keys() != state.keys() or any(own[name].shape != state[name].shape for name in own)):
        raise InputError("the checkpoint holds other parameters than this model trains; delete it and rerun its step")
    with torch.no_grad():
        for name, p in own.items():
            if is_sharded(p) and not is_sharded(state.get(name)):
                receive(p, state.get(name))
            else:
                p.copy_(state[name])
