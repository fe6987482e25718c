"""Stamps: what an output was made from, kept beside it, so that one made otherwise is never used silently.

A stamp holds the output's key (one hash of constants, data, seed and all that came before), its checksum and its
constants. An output with another key is stale: the error names the constants that differ. One with another checksum
is not the file that was stamped.
"""
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cycles import arms, schemas
from cycles.own import is_own
from lib.environment import InputError
from lib.files import fingerprint, read_json, sha256, write_json
from lib.models import local_path
from lib.outputs import is_current
from lib.store import provenance

if TYPE_CHECKING:
    from cycles.session import Session

# Constants that say which outputs to make and where, and leave each single result as it is.
SCOPE_ONLY = {"PRESET", "SETTING", "SEED", "SEEDS", "ARM", "ARMS", "CYCLE", "CYCLES", "DEVICE", "FSDP", "TRACKER",
              "N_SAE_SEEDS", "WORKERS"}
SAE_ONLY = {"SAE_KIND", "SAE_TRAINED", "SAE_L1", "N_LATENTS_MULTIPLIER", "TOP_K", "SAE_EPOCHS", "SAE_BATCH_SIZE",
            "SAE_LR", "SAE_POSITIONS"}
AUX_ONLY = {"ARM_CONSTANTS", *arms.CONSTANTS}
EVAL_ONLY = {"EVAL_LIMIT", "PROBE_LIMIT", "SILHOUETTE_ROWS", "ROBUST_LIMIT", "ROBUST_EPS", "ABSORPTION_TOKENS",
             "METRICS"}
PLACES = ("MODEL", "DATASET", "VAL_DATASET", "TEST_DATASET")  # constants that may name a file or directory
Constants = dict[str, Any]


def stage_constants(c: Constants, stage: str, arm: str) -> Constants:
    """The constants that decide the output of a stage: "model" (cycle 0), "sae", "aux" (later models) or "eval".

    Whatever is in none of the groups belongs to "model", so a forgotten constant makes results stale, not wrong.
    """
    groups = {"sae": SAE_ONLY, "aux": AUX_ONLY, "eval": EVAL_ONLY}
    if stage == "model":
        return {k: v for k, v in c.items() if k not in SCOPE_ONLY | SAE_ONLY | AUX_ONLY | EVAL_ONLY}
    own = c | c.get("ARM_CONSTANTS", {}).get(arm, {}) if stage == "aux" else c
    return {k: own[k] for k in sorted(groups[stage] - {"ARM_CONSTANTS"}) if k in own}


def stamp_path(path: Path) -> Path:
    """Where the stamp of an output lies."""
    return path.with_name(f"{path.stem}.stamp.json")


def finished(path: Path, key: str, c: Constants, data: str = "", model: str = "") -> bool:
    """Whether `path` exists with the wanted key. Raises InputError if it was made with other constants or inputs.

    data, model: Session.task_key and .model_key, so that the error can say which of them has changed.
    """
    stamp = stamp_path(path)
    if not path.exists() or not stamp.exists():
        return False
    found = read_json(stamp, schemas.STAMP)
    if found["file"] != sha256(path):
        raise InputError(f"{path} is not the file that its stamp was made for; delete both and rerun its step")
    if found["key"] == key:
        return True
    stored = found["constants"]
    constants = {k: v for k, v in c.items() if k in stored and k not in SCOPE_ONLY}
    return is_current(
        path,
        {**stored, "data or tokenizer": found["data"], "weights of MODEL": found["model"],
         "output of an earlier step": found["key"]},
        {**constants, "data or tokenizer": data, "weights of MODEL": model, "output of an earlier step": key},
        f"set SETTING to a new name, or delete {arm_folder(path)}",
    )


def arm_folder(path: Path) -> Path:
    """The folder of the arm that an output belongs to."""
    return next(parent for parent in path.parents if parent.name.startswith("seed_")).parent


def write_stamp(session: "Session", path: Path, key: str) -> None:
    """The stamp beside an output, and the folder's constants.json and meta.json."""
    folder = path.parent if path.parent.name != "checkpoints" else path.parent.parent
    constants = _as_json(session.c)
    write_json(folder / "constants.json", constants, sealed=True)
    made_from = {"data": session.task_key, "model": session.model_key}
    paths = {name: str(local) for name in PLACES
             if (value := constants.get(name)) not in (None, "mlp", "digits") and not is_own(value)
             and (local := local_path(value))}
    meta = {"constants_hash": fingerprint(constants), "seed": session.seed, "paths": paths, **made_from}
    write_json(folder / "meta.json", meta | provenance(), sealed=True)
    write_json(stamp_path(path), {"key": key, "file": sha256(path), **made_from, "constants": constants}, sealed=True)


def _as_json(c: Constants) -> Constants:
    """Constants as JSON gives them back: tuples become lists."""
    return json.loads(json.dumps(c))
