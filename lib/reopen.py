"""The language model that activations were saved from, opened again: for a run, or for an SAE without its run.

    model, tokenizer, point = open_model(run.meta)                    # at the run's first hook point
    model, tokenizer, point = open_model(about_sae(sae.config))       # lib/origin.py
"""
from typing import Any

import torch

from .activations import STORE_DTYPES
from .environment import InputError, choose_device
from .hooks import HookPoint, resolve
from .models import choose_dtype, load_model, load_tokenizer, require_same_model, source_of_run, tokenizer_identity
from .schemas import Misfit, check
from .store import META


def open_model(
    about: dict[str, Any], device: str | torch.device = "auto", trust_remote_code: bool = False,
    *, model: str | None = None, hook: str | None = None,
) -> tuple[Any, Any, HookPoint]:
    """A language model in the precision that activations were saved in, its tokenizer, and a place in it.

    about: a run's meta.json, or lib.origin.about_sae(). model: its name or folder; None: where `about` says it is, if
    its weights and tokenizer are still the same. hook: as LAYER_SIGNATURE; None: the first of `about`.
    trust_remote_code: the user's answer, not that of the file: whoever wrote it could have set that one.

    Raises InputError if model or tokenizer can't be reached, have changed, or come with code that is not trusted.
    """
    device, saved, constants = choose_device(device), about.get("model"), about.get("constants", {})
    if constants.get("TRUST_REMOTE_CODE") and not trust_remote_code:
        raise InputError(f"the activations were saved with code that comes with {(saved or {}).get('name')}; set "
                         "TRUST_REMOTE_CODE=True if you trust its author")
    if model is None:
        try:
            check(about, {"model": META.content["model?"]})
        except Misfit:
            raise InputError("the language model is not named; save the activations and train the SAE again") from None
    source, dtype = model or source_of_run(about["model"]), (saved or {}).get("dtype", "auto")
    loaded = load_model(source, device, choose_dtype(dtype if dtype in STORE_DTYPES else "auto", device),
                        trust_remote_code=trust_remote_code, bits=constants.get("LOAD_BITS"),
                        device_map=constants.get("DEVICE_MAP"))
    tokenizer = load_tokenizer(source, trust_remote_code)
    if model is None:
        require_same_model(loaded, about["model"])
        if isinstance(known := about.get("tokenizer"), dict) and tokenizer_identity(tokenizer) != known:
            raise InputError(f"the tokenizer of {source} has changed since its activations were saved; run step 1 "
                             "again")
    if hook is not None:
        return loaded, tokenizer, resolve(loaded, hook)
    point = about["hooks"][0]
    return loaded, tokenizer, resolve(loaded, point.get("path", point["signature"]), point.get("point", "output"))

