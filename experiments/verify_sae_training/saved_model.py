"""The model, tokenizer and hook point that a run was saved from, opened again.

    model, tokenizer, point = model_of_run(run, hook, device)
"""
from typing import Any

import torch

from lib.environment import InputError
from lib.hooks import HookPoint, resolve
from lib.models import choose_dtype, load_model, load_tokenizer, require_same_model, source_of_run, tokenizer_identity
from lib.store import Run


def model_of_run(
    run: Run, hook: str, device: torch.device | str, trust_remote_code: bool = False
) -> tuple[Any, Any, HookPoint]:
    """The model, its tokenizer and the hook point `hook` (in any spelling of step 1) that a run was saved from.

    trust_remote_code: the user's answer, not the run's: whoever wrote the store could have set that one. Raises
    InputError if model or tokenizer can't be reached, have changed since, or come with code that is not trusted.
    """
    saved, constants = run.meta.get("model"), run.meta.get("constants", {})
    if not isinstance(saved, dict) or "MODEL_DTYPE" not in constants:
        raise InputError(f"{run.path / 'meta.json'} names no model; run 01_save_activations.py again")
    if constants.get("TRUST_REMOTE_CODE") and not trust_remote_code:
        raise InputError(f"the run was saved with code that comes with {saved['name']}; set TRUST_REMOTE_CODE=True if "
                         "you trust its author")
    source, device = source_of_run(saved), torch.device(device)
    model = load_model(source, device, choose_dtype(constants["MODEL_DTYPE"], device),
                       trust_remote_code=trust_remote_code, bits=constants.get("LOAD_BITS"),
                       device_map=constants.get("DEVICE_MAP"))
    require_same_model(model, saved)
    tokenizer = load_tokenizer(source, trust_remote_code)
    if tokenizer_identity(tokenizer) != run.meta.get("tokenizer"):
        raise InputError(f"the tokenizer of {saved['name']} has changed since its activations were saved; run step 1 "
                         "again")
    point = hook_of_run(run, run.hook(hook))
    return model, tokenizer, resolve(model, point.path, point.point)


def hook_of_run(run: Run, hook: str) -> HookPoint:
    """The hook point with that signature, as the run's meta.json describes it."""
    saved = next((point for point in run.meta["hooks"] if point["signature"] == hook), None)
    if saved is None:
        raise InputError(f"{run.path / 'meta.json'} does not say where {hook} is; run 01_save_activations.py again")
    return HookPoint(saved["path"], saved["point"], saved["signature"])
