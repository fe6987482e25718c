"""A model's weights spread over the ranks of torchrun (FSDP): each rank keeps its share of every part.

Only rank 0 reads the model; the others build it on torch's meta device, without memory, and receive their shares.
"""
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lib.distributed import rank, wait_for_all, world_size

CPU = torch.device("cpu")


def spread(model: nn.Module, parts: list[nn.Module], device: torch.device) -> None:
    """Replace the model by this rank's share of rank 0's, on the device; on other ranks it may be on the meta device.

    What no part holds is a part too. A part is gathered on every rank while it runs. The weights must not be tied
    across parts, and must have one precision within each. The backward pass leaves the mean over the ranks in the
    gradients. Memory: rank 0 has the whole model once, the others never more than their shares and one tensor.
    """
    from torch.distributed.fsdp import fully_shard

    wait_for_all()  # rank 0 may still be reading
    kept = [tensor.detach() for tensor in _tensors(model)]
    shapes = [f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in kept]
    if from_first(shapes) != shapes:
        raise RuntimeError("the ranks built different models; give all of them the same packages and the same files")
    model.to("meta")
    mesh = dist.init_device_mesh(device.type, (world_size(),))
    for part in [*parts, model]:
        # Freeing after a pass includes the model's own part: left gathered by an evaluation, it would miss the next
        # update.
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    model.to_empty(device=device)
    with torch.no_grad():
        for tensor in _tensors(model):
            receive(tensor, kept.pop(0))


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def receive(out: Tensor, value: Tensor | None) -> None:
    """Copy rank 0's whole `value` into `out` on every rank, or each rank's share of it where `out` is one."""
    whole_value = torch.empty(out.shape, dtype=out.dtype, device=out.device)
    if rank() == 0 and value is not None:
        whole_value.copy_(value)
    if is_sharded(out):
        from torch.distributed.tensor import distribute_tensor

        out.copy_(distribute_tensor(whole_value, out.device_mesh, out.placements))  # type: ignore[attr-defined]
    else:
        dist.broadcast(whole_value, src=0)
        out.copy_(whole_value)


def from_first(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=CPU)
    return box[0]


def is_sharded(tensor: Tensor | None) -> bool:
    """Whether this rank holds only a share of it."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, gathered if this rank holds only a share of it; every rank must call it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined, operator]


def gathered(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The whole tensors of a state, on the CPU; where they are shares only rank 0 keeps them: {} on the others."""
    found = {}
    for name, tensor in state.items():
        all_of_it = whole(tensor)
        if rank() == 0 or not is_sharded(tensor):
            found[name] = all_of_it.cpu()
    return found
