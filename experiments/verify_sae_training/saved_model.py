"""The model, tokenizer and hook point that a run was saved from, or that an SAE reads, opened again.

    model, tokenizer, point = model_of_run(run, hook, "cpu")
    model, tokenizer, point = model_of_sae(sae, "cpu")             # needs no run
"""
from typing import Any

import torch

from lib.environment import InputError
from lib.hooks import HookPoint
from lib.origin import about_sae
from lib.reopen import open_model
from lib.sae import SAE
from lib.store import Run


def model_of_run(
    run: Run, hook: str, device: torch.device | str = "auto", trust_remote_code: bool = False
) -> tuple[Any, Any, HookPoint]:
    """The model, its tokenizer and the hook point `hook` (in any spelling of step 1) that a run was saved from; see
    lib.reopen.open_model.
    """
    point = hook_of_run(run, run.hook(hook))
    return open_model(run.meta | {"hooks": [point._asdict()]}, device, trust_remote_code)


def model_of_sae(
    sae: SAE, device: torch.device | str = "auto", trust_remote_code: bool = False
) -> tuple[Any, Any, HookPoint]:
    """The model that an SAE reads, its tokenizer and the hook point, by the SAE's own file; see lib.reopen.open_model.
    """
    return open_model(about_sae(sae.config), device, trust_remote_code)


def hook_of_run(run: Run, hook: str) -> HookPoint:
    """The hook point with that signature, as the run's meta.json describes it."""
    saved = next((point for point in run.meta["hooks"] if point["signature"] == hook), None)
    if saved is None:
        raise InputError(f"{run.path / 'meta.json'} does not say where {hook} is; run 01_save_activations.py again")
    return HookPoint(saved["path"], saved["point"], saved["signature"])
