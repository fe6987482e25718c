"""The SAE in sae_model/ with its training history, and those that it replaced: each in sae_model_<its hash>/ with its
own.
"""
import shutil
from pathlib import Path
from typing import Any

from lib import schemas
from lib.environment import InputError, log
from lib.files import atomic_write, read_json
from lib.guards import differences
from lib.sae import SAE, load_sae, sae_hash

MODEL, HISTORY = "topk_sae.pt", "training_history.json"


def history_of(sae: SAE, path: Path) -> dict[str, Any] | None:
    """The training history at `path`, if it is this SAE's. Older ones have no hash: they tell by their constants."""
    if not path.exists():
        return None
    history = read_json(path, schemas.HISTORY)
    own = (history["constants"] == sae.config.get("constants") if "sae_hash" not in history
           else history["sae_hash"] == sae_hash(sae))
    return history if own else None


def is_trained(folder: Path, history: Path, constants: dict[str, Any], data_digest: str) -> bool:
    """Whether the SAE in `folder` is whole, and what these constants and activations give: its file says so, and its
    history.
    """
    if not (folder / MODEL).exists():
        return False
    sae = load_sae(folder / MODEL)
    return (sae.config.get("constants") == constants and sae.config.get("data_digest") == data_digest
            and history_of(sae, history) is not None)


def find(root: Path, constants: dict[str, Any], data_digest: str) -> Path | None:
    """The folder of the trained SAE of these constants and activations: sae_model, or one that was kept. None: there is
    none.
    """
    if is_trained(root / "sae_model", root / HISTORY, constants, data_digest):
        return root / "sae_model"
    for folder in sorted(root.glob("sae_model_*")):
        try:
            # says at little cost whether to look
            about = read_json((folder / MODEL).with_suffix(".json"), schemas.SAE_SIDECAR)
            wanted = about.get("constants") == constants and about.get("data_digest") == data_digest
            if wanted and is_trained(folder, folder / HISTORY, constants, data_digest):
                return folder
        except InputError as error:
            log.warning("a kept SAE is passed over: %s", error)
    return None


def keep(root: Path, constants: dict[str, Any], data_digest: str) -> None:
    """Copy the SAE in sae_model, if it is another than these constants give, and the history, to the folders of their
    hashes.
    """
    path, history_path = root / "sae_model" / MODEL, root / HISTORY
    if path.exists():
        sae = load_sae(path)
        then = sae.config.get("constants", {})
        # else a killed run left it before its history
        if (then, sae.config.get("data_digest")) != (constants, data_digest):
            kept = root / f"sae_model_{sae_hash(sae)}"
            own = [] if history_of(sae, history_path) is None else [history_path]
            for source in (path, path.with_suffix(".json"), *own):
                if source.exists():
                    copy(source, kept / source.name)
            log.info("the SAE that is there was made otherwise (%s); a copy is kept in %s",
                     differences(then, constants) or "other activations", kept)
    if history_path.exists() and (owner := read_json(history_path, schemas.HISTORY).get("sae_hash")):
        kept_history = root / f"sae_model_{owner}" / HISTORY
        if not kept_history.exists() and not (path.exists() and sae_hash(load_sae(path)) == owner):
            copy(history_path, kept_history)


def put_back(root: Path, folder: Path) -> None:
    """Make a kept SAE the one in sae_model again; its history comes last and makes it whole."""
    for name in (MODEL, Path(MODEL).with_suffix(".json").name):
        copy(folder / name, root / "sae_model" / name)
    copy(folder / HISTORY, root / HISTORY)


def copy(source: Path, to: Path) -> None:
    """Copy a file, whole or not at all."""
    atomic_write(to, lambda temporary: shutil.copyfile(source, temporary))
