"""A model's weights spread over the ranks of torchrun (FSDP): each rank keeps its share of every part."""
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lib.distributed import world_size


def shard_weights(model: nn.Module, parts: list[nn.Module]) -> None:
    """Keep only this rank's share of each part's weights, gradients and moments; what no part holds is a part too.

    A part is gathered on every rank while it runs. The weights must not be tied across parts, and must have one
    precision within each. The backward pass leaves the mean over the ranks in the gradients.
    """
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (world_size(),))
    for part in [*parts, model]:
        # Freeing after a pass includes the model's own part: left gathered by an evaluation, it would miss the next
        # update.
        fully_shard(part, mesh=mesh, reshard_after_forward=True)


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank holds only a share of it."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, gathered if this rank holds only a share of it; every rank must call it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined, operator]


def shared_like(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor`, or this rank's share of it where `like` is a share of a tensor of the same shape."""
    if not is_sharded(like) or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)  # type: ignore[attr-defined]
