"""What an SAE's file says of where it comes from: enough to use the SAE without the run that it was trained on.

    sae.config.update(origin_of(run, hook))      # when it is saved: model, place in it, how texts were cut and masked
    about = about_sae(sae.config)                # when it is used: the same in the form of a run's meta.json
"""
import json
from dataclasses import asdict
from typing import Any

from .environment import InputError, log
from .files import read_json
from .outputs import safe_name
from .schemas import COUNT, Misfit, check
from .store import HOOK, META, SETTINGS, Run, store_root

PARTS = ("tokenizer", "dataset", "constants")
ORIGIN = {"settings": SETTINGS, "hook": HOOK, "first_position?": COUNT} | {
    f"{name}?": META.content[f"{name}?"] for name in PARTS}


class Config(dict):
    """A loaded SAE's config; asking for what it does not say is an InputError."""

    def __missing__(self, name: str) -> Any:
        raise InputError(f"the SAE does not say its {name}; train it with 02_train_sae.py, or take it with "
                         "import_sae.py")


def origin_of(run: Run, hook: str) -> dict[str, Any]:
    """What an SAE of these activations keeps in its config: model, hook, run_id, data_digest and, under "origin", the
    hook point, the settings that cut and masked the texts, tokenizer, data set and constants of step 1.
    """
    point = next((point for point in run.meta["hooks"] if point["signature"] == hook), None)
    if point is None:
        raise InputError(f"{run.path / 'meta.json'} does not say where {hook} is; run 01_save_activations.py again")
    origin = {name: run.meta[name] for name in ("settings", *PARTS) if name in run.meta}
    found = {"hook": hook, "layer": next(iter(point.get("names", [])), hook), "run_id": run.run_id,
             "data_digest": run.digest(hook)} | ({"model": run.meta["model"]} if "model" in run.meta else {})
    whole = origin | {"hook": point, "first_position": run.first_position}
    return found | {"origin": json.loads(json.dumps(whole))}  # a run just saved still has tuples there


def about_sae(config: dict[str, Any]) -> dict[str, Any]:
    """Model, tokenizer, data set, constants, settings and the one hook point of an SAE, as in a run's meta.json.

    A file of before this was kept is completed from its run, as far as that is in the store, and else from defaults,
    with a warning. Raises InputError for an SAE that does not say where it reads.
    """
    about = {"model": config["model"]} if "model" in config else {}
    if (origin := config.get("origin")) is not None:
        try:
            check({"origin": origin, **about}, {"origin": ORIGIN, "model?": META.content["model?"]})
        except Misfit as misfit:
            raise InputError(f"the SAE's file is damaged: {misfit}; train it again") from None
        return about | {name: value for name, value in origin.items() if name != "hook"} | {"hooks": [origin["hook"]]}
    run_id = safe_name(config.get("run_id", "unknown"))
    for path in store_root().glob(f"*/runs/{run_id}/meta.json"):
        meta = read_json(path, META)
        if hooks := [point for point in meta["hooks"] if point["signature"] == config.get("hook")]:
            return meta | about | {"hooks": hooks}
    from .activations import SaveSettings  # the language model's part is heavy

    log.warning("the SAE's file does not say how its texts were cut and masked, and its run is gone: the defaults of "
                "01_save_activations.py are taken")
    return about | {"settings": asdict(SaveSettings()), "constants": {}, "hooks": [{"signature": config["hook"]}]}
