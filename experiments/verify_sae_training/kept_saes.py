"""The SAE in sae_model/ with its training history, and those it replaced, each kept in sae_model_<its hash>/."""
import shutil
from pathlib import Path
from typing import Any

from lib.environment import InputError, log
from lib.files import atomic_write, read_json
from lib.outputs import Parts, differences
from lib.sae import SAE, load_sae, sae_hash
from lib.schemas import SAE_SIDECAR
from lib.training.checkpoints import HISTORY

MODEL_FILE, HISTORY_FILE = "topk_sae.pt", "training_history.json"


def history_of(sae: SAE, path: Path) -> dict[str, Any] | None:
    """The training history at `path`, if it is this SAE's. Older histories have no hash: constants tell whose they are.
    """
    if not path.exists():
        return None
    history = read_json(path, HISTORY)
    own = (history["constants"] == sae.config.get("constants") if "sae_hash" not in history
           else history["sae_hash"] == sae_hash(sae))
    return history if own else None


def made_from(config: dict[str, Any]) -> Parts:
    """What an SAE says that it was made from."""
    return {"constants": config.get("constants", {}), "activations": config.get("data_digest")}


def is_trained(folder: Path, history: Path, now: Parts) -> bool:
    """Whether the SAE in `folder` is the one that `now` gives, and finished: its history is written last."""
    if not (folder / MODEL_FILE).exists():
        return False
    sae = load_sae(folder / MODEL_FILE)
    return not differences(made_from(sae.config), now) and history_of(sae, history) is not None


def find(root: Path, now: Parts) -> Path | None:
    """The folder of the trained SAE that these constants and activations give: sae_model, or one that was kept."""
    if is_trained(root / "sae_model", root / HISTORY_FILE, now):
        return root / "sae_model"
    for folder in sorted(root.glob("sae_model_*")):
        try:  # the small file says whether to read the large one
            about = read_json((folder / MODEL_FILE).with_suffix(".json"), SAE_SIDECAR)
            if not differences(made_from(about), now) and is_trained(folder, folder / HISTORY_FILE, now):
                return folder
        except InputError as error:
            log.warning("skipping a kept SAE: %s", error)
    return None


def keep(root: Path, now: Parts) -> None:
    """Copy the SAE in sae_model and its history to the folder of its hash, unless it is the one that `now` gives."""
    path, history_path = root / "sae_model" / MODEL_FILE, root / HISTORY_FILE
    if path.exists():
        sae = load_sae(path)
        # One that `now` gives is no other SAE: a killed run left it before it wrote the history.
        if why := differences(made_from(sae.config), now):
            kept = root / f"sae_model_{sae_hash(sae)}"
            own = [] if history_of(sae, history_path) is None else [history_path]
            # The same weights may have been trained here and come back by an import: what was trained says more.
            wanted = [] if not own and (kept / MODEL_FILE).exists() else [path, path.with_suffix(".json"), *own]
            for source in wanted:
                if source.exists():
                    copy(source, kept / source.name)
            log.info("sae_model holds an SAE made with other constants or data (%s); a copy is kept in %s", why, kept)
    if history_path.exists() and (owner := read_json(history_path, HISTORY).get("sae_hash")):
        kept_history = root / f"sae_model_{owner}" / HISTORY_FILE
        if not kept_history.exists() and not (path.exists() and sae_hash(load_sae(path)) == owner):
            copy(history_path, kept_history)


def put_back(root: Path, folder: Path) -> None:
    """Make a kept SAE the one in sae_model again; its history comes last, and marks it as whole."""
    for name in (MODEL_FILE, Path(MODEL_FILE).with_suffix(".json").name):
        copy(folder / name, root / "sae_model" / name)
    copy(folder / HISTORY_FILE, root / HISTORY_FILE)


def copy(source: Path, to: Path) -> None:
    """Copy a file, whole or not at all."""
    atomic_write(to, lambda temporary: shutil.copyfile(source, temporary))
