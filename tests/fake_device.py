"""A device made of CPU memory that refuses what a real one refuses, so that code for GPUs is tested without one.

    with FakeDevice():
        x = torch.randn(3).to(DEVICE)
        x.double()                # TypeError, as on Apple's MPS, which has no float64
        x + torch.ones(3)         # RuntimeError: two devices
        x + x.to(SECOND)          # RuntimeError as well: there are two of them
        float(x.sum())            # and WAITS gets a line: a host that reads the device waits for all that it was asked

Its tensors call themselves "lazy", a device type that every build of torch knows and none of the project's code does.
"""
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE, SECOND = "lazy", "lazy:1"
WAITS: list[str] = []  # what has made the host wait for the device, as torch.cuda.set_sync_debug_mode tells it
READS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "bincount", "equal")
MOVES = ("_to_copy", "copy_", "_copy_from", "lift_fresh")  # what may read from one device and write to another
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")  # their indices may lie on the CPU


class OnDevice(torch.Tensor):
    """A tensor on the fake device; `inner` holds its numbers."""

    @staticmethod
    def __new__(cls, inner, device):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=device
        )

    def __init__(self, inner, device):
        self.inner = inner

    def tolist(self):
        WAITS.append("tolist")
        return self.inner.tolist()  # torch has it for no tensor of another class

    def __reduce_ex__(self, protocol):
        return self.inner.__reduce_ex__(protocol)  # torch.save

    def __repr__(self):
        return f"OnDevice({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class FakeDevice(TorchDispatchMode):
    """Inside this block tensors can be made on and moved to DEVICE."""

    def __init__(self):
        super().__init__()
        self.before = []

    def __enter__(self):
        self.before.append(torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=DEVICE) would bypass this mode
        return super().__enter__()

    def __exit__(self, *error):
        torch._C._set_only_lift_cpu_tensors(self.before.pop())
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # in inference mode operations come that others, such as _to_copy, are made of
                return func.decompose(*args, **kwargs or {})
        return _run(func, args, kwargs or {})


def _run(func, args, kwargs):
    name = func._schema.name.removeprefix("aten::")
    leaves = tree_leaves((args, kwargs))
    wrappers = {id(t.inner): t for t in leaves if isinstance(t, OnDevice)}
    places = {t.device.index or 0 for t in wrappers.values()}
    target = kwargs.get("device")
    if name not in MOVES:
        operands = tree_leaves((args[:1], args[2:], kwargs)) if name in INDEXING else leaves
        mixed = wrappers and any(type(t) is not OnDevice and isinstance(t, torch.Tensor) and t.ndim for t in operands)
        if mixed or len(places) > 1:
            raise RuntimeError(f"{name}: expected all tensors to be on the same device")
    if _waits(name, args, target):
        WAITS.append(name)
    place = torch.device(target) if target is not None else next((t.device for t in wrappers.values()), None)
    on_device = place is not None and place.type == DEVICE
    inside = tree_map(lambda t: t.inner if isinstance(t, OnDevice) else t, (args, kwargs))
    if target is not None:
        inside[1]["device"] = torch.device("cpu")
    out = func(*inside[0], **inside[1])
    if wrappers and torch.Tag.inplace_view in func.tags:
        args[0].data = OnDevice(args[0].inner, args[0].device)  # the wrapper takes the new shape, as its numbers have

    def wrap(value):
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) in wrappers:  # written in place
            return wrappers[id(value)]
        if not on_device:
            return value.clone() if any(value is t.inner for t in wrappers.values()) else value
        if value.dtype == torch.float64:
            raise TypeError(f"{name}: this device does not support float64")
        with torch.inference_mode(False):  # wrappers have no version counter to share
            return OnDevice(value, place)

    return tree_map(wrap, out)


def _waits(name, args, target):
    """Whether the host waits: it reads what the device holds, or copies from one to the other."""
    if name in READS:
        return isinstance(args[0], OnDevice)
    if name in INDEXING:
        return any(isinstance(t, OnDevice) and t.dtype == torch.bool for t in tree_leaves(args[1]))
    if name == "_to_copy":
        return target is not None and torch.device(target).type != args[0].device.type
    return name in ("copy_", "_copy_from") and len({t.device.type for t in args[:2]}) > 1
