"""Two packages that need care when they are imported, in whatever order that happens.

`import overcomplete` would load its half for images, which needs packages that the project doesn't install (timm,
OpenCV ...). Here it is a bare package: its parts, such as `overcomplete.sae`, are imported without its own __init__.

transformers imports torchvision with every model class. Nothing here installs torchvision, but an environment may have
one that doesn't match torch: its import fails and takes the model class with it. So transformers is told that a
torchvision that can't be imported is not installed. `import torchvision` itself fails as before.
"""
import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

ASKED = "transformers.utils.import_utils"  # where transformers asks which packages are installed


def watch() -> None:
    """Take care of both packages from now on; of transformers also if it is already imported."""
    if not any(isinstance(finder, Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, Watch())
    if ASKED in sys.modules:
        hide_broken_torchvision(sys.modules[ASKED])


class Watch:
    """Finds the two packages as Python does, and changes how they are loaded."""

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
    """Let transformers try to import torchvision when it first asks whether it is installed."""
    ask: Callable[..., Any] | None = getattr(module, "_is_package_available", None)
    if ask is None or ask.__module__ == __name__:
        return

    def answer(name: str, *arguments: Any, **named: Any) -> Any:
        if name == "torchvision" and not can_import("torchvision.transforms.functional"):  # what transformers uses
            return ask("a_package_that_is_not_there", *arguments, **named)  # the form of the answer varies
        return ask(name, *arguments, **named)

    module._is_package_available = answer  # type: ignore[attr-defined]
    for name in ("is_torchvision_available", "is_torchvision_v2_available"):
        if forget := getattr(getattr(module, name, None), "cache_clear", None):
            forget()  # the answer from before


@functools.cache
def can_import(name: str) -> bool:
    """Whether a module can be imported; whatever it raises counts as no."""
    try:
        importlib.import_module(name)
    except Exception:  # a library built for another torch may raise anything
        return False
    return True
