"""What two or more experiments share; installed, it is the package sae_workbench.

Importing it is cheap: torch and transformers come with the files that need them, and with the names below.
"""
import importlib
import os
from typing import TYPE_CHECKING, Any

# torch and numba bring an OpenMP runtime each, whose idle threads spin by default and take the processors from one
# another: up to ten times slower training where the machine is busy. Read when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Fast tokenizers warn on every fork once they have run threads; nothing here tokenises in a fork.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from .imports import watch  # noqa: E402

watch()

# What code of your own imports from here -> the file that has it.
PUBLIC = {"load_encoder": "encoder", "load_sae": "sae", "steer": "steering", "Edit": "steering", "Spare": "steering"}
__all__ = ["Edit", "Spare", "load_encoder", "load_sae", "steer"]

if TYPE_CHECKING:
    from .encoder import load_encoder
    from .sae import load_sae
    from .steering import Edit, Spare, steer


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{PUBLIC[name]}", __name__), name)
