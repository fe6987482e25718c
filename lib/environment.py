"""The ground every script stands on: import guards, device choice, and how a script ends.

Import this module before transformers or overcomplete. It is the only place that touches `sys.modules`.
"""
import errno
import importlib.util
import logging
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path

# A torchvision that does not match torch breaks every transformers model class on import, and nothing
# here needs images through it. None makes `import torchvision` an ImportError and find_spec return None.
sys.modules.setdefault("torchvision", None)  # type: ignore[arg-type]
# Fast tokenizers warn on every fork once they have run threads; nothing here tokenises in a fork.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# `import overcomplete` would load its vision half (timm, OpenCV ...). A bare module with the package's
# path lets `overcomplete.sae` be imported without running the package's own __init__.
if "overcomplete" not in sys.modules:
    _spec = importlib.util.find_spec("overcomplete")
    if _spec is None or _spec.submodule_search_locations is None:
        raise ImportError("overcomplete is not installed: pip install -r requirements.txt")
    _bare = types.ModuleType("overcomplete")
    _bare.__path__ = list(_spec.submodule_search_locations)
    sys.modules["overcomplete"] = _bare

import torch  # noqa: E402  (the guards above come first)

from lib.distributed import rank, ranks  # noqa: E402

PROJECT = Path(__file__).resolve().parent.parent
log = logging.getLogger("workbench")


class InputError(ValueError):
    """Something the user can put right; its message is one line that says what to do."""


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that the disk, or the user's share of it, is full."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of a device, or of the machine, is full."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and "allocate memory" in str(error))


def run(main: Callable[[], None], parallel: bool = False) -> None:
    """Run a script's main(): InputError, a full disk and full memory end with one line and exit code 2, Ctrl-C with 130.

    parallel: torchrun may start it as several processes that share the work; any other script refuses that.
    """
    try:
        if not parallel and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise InputError(f"{Path(sys.argv[0]).name} runs in one process; start it without torchrun")
        with ranks():
            main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        if is_disk_full(error):
            print(f"error: the disk is full ({error}); make room, then the same command goes on", file=sys.stderr)
        elif is_out_of_memory(error):
            first = str(error).strip().splitlines()[0][:160] if str(error).strip() else "MemoryError"
            print(f"error: the memory is full ({first}); lower the constants that set batch or buffer sizes, or use a smaller model", file=sys.stderr)
        else:
            raise
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; the same command continues where it was", file=sys.stderr)
        sys.exit(130)


def log_to(path: Path) -> None:
    """Send the log to the console and append it to the file `path`; of several ranks the first one does, the others only warn."""
    if rank():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    logging.raiseExceptions = False  # a full disk costs the log its lines, not the run
    log.setLevel(logging.INFO)
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    console, file = logging.StreamHandler(sys.stdout), logging.FileHandler(path)
    file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(console)
    log.addHandler(file)


def choose_device(wanted: str = "auto") -> torch.device:
    """The device named by `wanted`, or for "auto" CUDA, then MPS, then the CPU; logs the choice.

    Raises InputError if `wanted` is not available here.
    """
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available.insert(0, "cuda")
    if wanted == "auto":
        log.info("device: %s (auto; available: %s)", available[0], ", ".join(available))
        return torch.device(available[0])  # of several GPUs the one that lib.distributed gave this rank
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise InputError(f"DEVICE={wanted!r} is no device; use one of auto, {', '.join(available)}") from None
    if device.type not in available or (device.index or 0) >= max(1, torch.cuda.device_count()):
        raise InputError(f"DEVICE={wanted!r} is not available here; use one of auto, {', '.join(available)}")
    return device
