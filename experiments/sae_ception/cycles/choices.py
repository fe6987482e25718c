"""Constants of SAE-ception with few right values, checked when a session opens: before data and models are read."""
import difflib
from typing import Any

from transformers import AutoConfig

from cycles.arms import ARMS, CONSTANTS, unlabelled
from cycles.classifier import block_in_range
from cycles.metrics import OPTIONAL
from cycles.modules import MLP
from cycles.own import is_own
from lib.environment import InputError
from lib.models import local_path

CHOICES = {
    "SAE_POSITIONS": ("tokens", "pooled"), "INIT": ("continue", "scratch"), "OPTIMIZER": ("adam", "adamw"),
    "SELECT_EPOCH": ("last", "best"), "SAE_KIND": ("topk", "l1"), "SAE_TRAINED": ("after", "along"),
}


def check_choices(c: dict[str, Any]) -> None:
    """Raise InputError for a value that would otherwise be mistaken for another, or ignored."""
    for name, allowed in CHOICES.items():
        if name in c:
            _one_of(name, c[name], allowed)
    _check_sae(c)
    for group in c.get("METRICS", ()):
        _one_of("METRICS", group, OPTIONAL)
    of_arms, arms = c.get("ARM_CONSTANTS", {}), c.get("ARMS", ())
    for name, values in (("ARMS", arms), ("ARM_CONSTANTS", of_arms), ("ARM", [c["ARM"]] if "ARM" in c else [])):
        for arm in values:
            _one_of(name, unlabelled(arm), list(ARMS))
    for arm, constants in of_arms.items():
        for name, value in constants.items():
            _one_of(f"ARM_CONSTANTS of {arm}", name, sorted(CONSTANTS))
            if name in CHOICES:
                _one_of(f"{name} of {arm} in ARM_CONSTANTS", value, CHOICES[name])
    for arm in arms:
        if "@" in arm and arm not in of_arms:
            raise InputError(f"ARMS has {arm}, but ARM_CONSTANTS has nothing for it{_nearest(arm, list(of_arms))}; it "
                             f"would be {unlabelled(arm)} itself")
    for arm in of_arms if arms else ():
        if "@" in arm and arm not in arms:
            raise InputError(f"ARM_CONSTANTS has {arm}, which is not in ARMS{_nearest(arm, list(arms))}; add it, or "
                             "leave its constants out")
    _check_target(c)


def _check_sae(c: dict[str, Any]) -> None:
    """Raise InputError for an SAE that can't be trained in the way that is asked for."""
    kind, along = c.get("SAE_KIND", "topk"), c.get("SAE_TRAINED", "after") == "along"
    if along and kind != "l1":
        raise InputError("SAE_TRAINED=along is for SAE_KIND=l1; a TopK SAE is trained after the classifier")
    if kind == "l1" and c["MODEL"] != "mlp" and c.get("SAE_POSITIONS") != "pooled":
        raise InputError("SAE_KIND=l1 learns from the position that the head reads; set SAE_POSITIONS=pooled")
    arms = (*c.get("ARMS", ()), *([c["ARM"]] if "ARM" in c else []))
    if kind == "topk" and c.get("TOP_K") == 1 and "per_example" in map(unlabelled, arms):
        raise InputError("per_example keeps some of an example's codes, and TOP_K=1 leaves one: raise TOP_K, or leave "
                         "per_example out")
    if along and c.get("SELECT_EPOCH") == "best":
        raise InputError("SAE_TRAINED=along follows the classifier to its last epoch; set SELECT_EPOCH=last")


def _check_target(c: dict[str, Any]) -> None:
    """Raise InputError if TARGET_LAYER is a number out of the model's range, or not a layer of the small network."""
    if is_own(c["MODEL"]):  # its layer is looked for when it is made
        return
    if c["MODEL"] == "mlp":
        MLP(1, 2, c["TARGET_LAYER"], 0)
        return
    try:
        config = AutoConfig.from_pretrained(local_path(c["MODEL"]) or c["MODEL"],
                                            trust_remote_code=False).get_text_config()
    except InputError:
        raise
    except Exception:  # loading the model will say what is wrong with it
        return
    if isinstance(getattr(config, "num_hidden_layers", None), int):
        block_in_range(c["TARGET_LAYER"], config.num_hidden_layers)


def _one_of(name: str, value: Any, allowed: tuple[str, ...] | list[str]) -> None:
    if value not in allowed:
        raise InputError(f"{name}: {value!r} must be one of {', '.join(allowed)}{_nearest(str(value), list(allowed))}")


def _nearest(value: str, names: list[str]) -> str:
    close = difflib.get_close_matches(value, names, n=1)
    return f" (did you mean {close[0]}?)" if close else ""
