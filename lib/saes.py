"""Trained SAEs by name. store/verify_sae_training/saes/<name>/ holds everything about one SAE:

    topk_sae.pt, topk_sae.json   its weights; what it was made from
    training_history.json        its training; absent if it was imported
    ...                          what later steps write: verification, firings, names, figures, pages, exports

    folder = find_sae("model-model_layers_0-topk4-1024-seed0-5f3a91")    # None: the one trained or imported last
    sae = load_sae(folder / MODEL_FILE)

A folder may be renamed by hand: its name is only a name. Nothing in it is ever replaced by another SAE's.
"""
import difflib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from .environment import InputError, log
from .files import atomic_write, fingerprint, read_bytes, read_json, write_text
from .outputs import Parts, differences
from .schemas import SAE_SIDECAR
from .store import Run, experiment_dir, open_run

MODEL_FILE, ABOUT_FILE, HISTORY_FILE = "topk_sae.pt", "topk_sae.json", "training_history.json"
LAST = "last_sae.txt"
# Constants of a training that say where its activations are or what it shows, not what it computes.
# START_FROM_SAE, the hash of the one that it names, decides.
NOT_DECISIVE = ("PRESET", "RUN_ID", "LAYER", "LOG_EVERY", "VERIFY", "TRACKER", "START_FROM")


def find_sae(which: str | os.PathLike[str] | None = None) -> Path:
    """The folder of an SAE, by its name or the path of its folder or file; None: the one trained or imported last.

    Raises InputError if there is none.
    """
    root = _root()
    if which is None:
        last = root / LAST
        if not last.exists() and not list_saes():
            raise InputError(f"there is no trained SAE under {root}; run 02_train_sae.py first")
        which = read_bytes(last, 1000).decode(errors="replace").strip() if last.exists() else list_saes()[-1].name
    name, path = str(which), Path(which).expanduser()
    for folder in (root / "saes" / name, path, path.parent):
        if (folder / MODEL_FILE).is_file() and (folder != path.parent or path.name == MODEL_FILE):
            return folder
    names = [folder.name for folder in list_saes()]
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.3) or names[-3:]
    there = f"there are {', '.join(near)}" if near else "run 02_train_sae.py first"
    raise InputError(f"there is no SAE called {name!r} under {root / 'saes'}, and no such folder; {there}")


def list_saes() -> list[Path]:
    """The folders of all SAEs in the store, oldest first."""
    _take_over(_root())
    return _present(_root())


def trained_as(now: Parts) -> Path | None:
    """The folder of the finished SAE that was trained with these constants on these activations, by made_from()."""
    for folder in list_saes():
        try:
            about = read_json(folder / ABOUT_FILE, SAE_SIDECAR)
            finished = "imported" in about or (folder / HISTORY_FILE).exists()
            if finished and not differences(made_from(about), now):
                return folder
        except InputError as error:
            log.warning("skipping an SAE: %s", error)
    return None


def made_from(about: dict[str, Any]) -> Parts:
    """What an SAE says that it was made from: the constants that decide its weights, its activations, and what divided
    their texts into training and validation: all are stored, so that the activations' hash does not tell.
    """
    constants = {name: value for name, value in about.get("constants", {}).items() if name not in NOT_DECISIVE}
    return {"constants": constants, "activations": about.get("data_digest"), "split": _split(about.get("origin", {}))}


def _split(about: dict[str, Any]) -> Parts:
    """What divided the texts into training and validation."""
    return {name: value for name, value in about.get("constants", {}).items() if name in ("VAL_FRAC", "SEED")}


def require_same_split(sae_config: dict[str, Any], run: Run, hook: str) -> None:
    """Raise InputError if the SAE was trained on these activations otherwise divided, and has seen what is held out."""
    then = made_from(sae_config)
    if then["activations"] == run.digest(hook) and then["split"] and then["split"] != _split(run.meta):
        given = " ".join(f"{name}={value}" for name, value in then["split"].items())
        raise InputError(f"the SAE was trained on the texts of run {run.run_id}, otherwise divided into training and "
                         f"validation ({given}): it has seen what this run holds out; use run {sae_config['run_id']}")


def sae_folder(about: dict[str, Any]) -> Path:
    """Where the SAE of this origin belongs: model, layer, kind, k, latents and seed, then a hash of what it was made
    from.

    about: an SAE's config, with n_latents; for an imported one also its sae_hash.
    """
    model, constants = about.get("model") or {}, about.get("constants", {})
    layer = about.get("layer") or about["hook"].removeprefix(model.get("class", "").lower() + "_")
    if "imported" in about:
        imported = about["imported"]
        parts = [imported["format"], imported.get("kind", ""), about["n_latents"], about["sae_hash"][:6]]
    else:
        parts = [f"{constants.get('KIND', 'topk')}{constants.get('TOP_K', about.get('top_k'))}", about["n_latents"],
                 f"seed{constants.get('SEED', 0)}", fingerprint(made_from(about))[:6]]
    words = [Path(model.get("name", "model")).name, layer, *map(str, parts)]
    name = "-".join(re.sub(r"[^A-Za-z0-9_.]+", "_", word).strip("_.") for word in words if word)
    return _root() / "saes" / name


def remember(folder: Path) -> None:
    """Make this SAE the last one, which later steps take by default."""
    write_text(_root() / LAST, folder.name + "\n")


def _root() -> Path:
    return experiment_dir("verify_sae_training")


def _present(root: Path) -> list[Path]:
    files = [path for path in (root / "saes").glob(f"*/{MODEL_FILE}") if path.with_name(ABOUT_FILE).is_file()]
    return [path.parent for path in sorted(files, key=lambda path: (path.stat().st_mtime_ns, path))]


def _take_over(root: Path) -> None:
    """Give the SAEs of a store from before SAEs had names a folder each. Everything stays where it was, too.

    There the SAE was sae_model/, with its files beside runs/, and those it had replaced were sae_model_<its hash>/.
    """
    old = [path.parent for path in sorted(root.glob(f"sae_model_*/{ABOUT_FILE}")) + [root / "sae_model" / ABOUT_FILE]]
    for folder in old:
        if not (folder / MODEL_FILE).is_file() or not (folder / ABOUT_FILE).is_file():
            continue
        about = read_json(folder / ABOUT_FILE, SAE_SIDECAR)
        if any(read_json(there / ABOUT_FILE).get("sae_hash") == about["sae_hash"] for there in _present(root)):
            continue
        target = sae_folder(about | {"layer": _layer(root, about)})
        for source, name in _files_of(about["sae_hash"], root, folder).items():
            link(source, target / name)
        for name in (MODEL_FILE, ABOUT_FILE):  # last, for they make it a trained SAE
            link(folder / name, target / name)
        log.info("%s is an SAE from before SAEs had names; it is now also %s", folder, target)
        if folder.name == "sae_model":
            remember(target)


def _layer(root: Path, about: dict[str, Any]) -> str | None:
    """The short name of the SAE's layer, if its run is still there."""
    try:
        return open_run(root.name, about.get("run_id")).short_name(about["hook"])
    except (InputError, KeyError):
        return None


def _files_of(sae_hash: str, root: Path, folder: Path) -> dict[Path, str]:
    """The old files that belong to the SAE in `folder`, and what they are called now."""
    found = {path: str(path.relative_to(root)) for path in (root / "controls").rglob("*.*")
             if folder.name == "sae_model" and path.is_file()}
    for path in [root / f"concepts_{sae_hash}.json", *root.glob("*.json"), folder / HISTORY_FILE]:
        if path.is_file() and (path.parent == folder or _is_about(path, sae_hash)):
            found[path] = "concepts.json" if path.stem == f"concepts_{sae_hash}" else path.name
    beside = {"concepts.json": ("concepts.csv",), "top_texts.json": ("latent_stats.safetensors",)}
    for name, others in beside.items():
        if root / name in found:
            found |= {root / other: other for other in others if (root / other).is_file()}
    return found


def _is_about(path: Path, sae_hash: str) -> bool:
    try:
        content = json.loads(path.read_bytes())
    except ValueError:  # damaged: the step that reads it says so
        return False
    meta = content.get("meta") if isinstance(content, dict) else None
    return isinstance(content, dict) and sae_hash in (content.get("sae_hash"), (meta or {}).get("sae_hash"))


def link(source: Path, target: Path) -> None:
    """The same file at a second place; a copy where the file system has no links. Every write replaces a file, so
    that the other place keeps what it had.
    """
    def write(temporary: Path) -> None:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)

    atomic_write(target, write)
