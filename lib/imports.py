"""Two packages of others that need care when they are imported, in whatever order that happens.

transformers imports torchvision with every model class. Where torchvision does not match torch, that import fails and
takes the model class with it; nothing here needs images through it. So transformers is told that a torchvision that
can't be imported is not there. `import torchvision` itself is left as it is.

`import overcomplete` would load its vision half (timm, OpenCV ...). Here it is a bare package, whose parts
(`overcomplete.sae`) are imported without running the package's own __init__.
"""
import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

ASKED = "transformers.utils.import_utils"  # answers which packages there are


def watch() -> None:
    """Stand before the two packages; does nothing for one that is already imported and needs nothing more."""
    if not any(isinstance(finder, Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, Watch())
    if ASKED in sys.modules:
        hide_broken_torchvision(sys.modules[ASKED])


class Watch:
    """Finds the two packages as Python would, and changes how they are loaded."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in (ASKED, "overcomplete"):
            return None
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            own = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                if name == ASKED:
                    own(module)
                    hide_broken_torchvision(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def hide_broken_torchvision(module: ModuleType) -> None:
    """Let transformers' question for torchvision be answered by an import of it, when it is first asked."""
    ask: Callable[..., Any] | None = getattr(module, "_is_package_available", None)
    if ask is None or ask.__module__ == __name__:
        return

    def answer(name: str, *arguments: Any, **named: Any) -> Any:
        # what transformers takes from it
        if name == "torchvision" and not can_import("torchvision.transforms.functional"):
            return ask("a_package_that_is_not_there", *arguments, **named)  # in whatever form it answers
        return ask(name, *arguments, **named)

    module._is_package_available = answer  # type: ignore[attr-defined]
    for name in ("is_torchvision_available", "is_torchvision_v2_available"):
        if forget := getattr(getattr(module, name, None), "cache_clear", None):
            forget()  # it was asked before


@functools.cache
def can_import(name: str) -> bool:
    """Whether a package can be imported; whatever it raises counts as no."""
    try:
        importlib.import_module(name)
    except Exception:  # a library of another build raises what it likes
        return False
    return True
