"""An SAE in this project's own files, as they are shared: with its names, and without a path of this machine.

    from lib import load_encoder
    encoder = load_encoder("user/repository")
"""
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

from concepts.dictionary import read_concepts
from concepts.firings import read_latent_stats
from exchange.facts import public_name
from lib.files import read_torch
from lib.sae import SAE, sae_hash, save_sae
from lib.saes import MODEL_FILE

LIBRARY = "sae-workbench"
UNITS = ("Its file holds the name of its language model,\nthe place that it reads, how texts were cut and masked, "
         "centring and scale, and each latent's highest code.")
LOADING = '''from lib import load_encoder  # of the SAE workbench
encoder = load_encoder("{repo}")
print(encoder.encode("Once upon a time"))'''


def write_workbench(folder: Path, source: Path, sae: SAE) -> list[Path]:
    """Write the SAE in the folder `source` to `folder` as load_encoder() reads it, with its names; returns the files.

    Its language model and data set are told by public_name(), so a model that is a local folder must be given to
    load_encoder().
    """
    probe = read_torch(source / MODEL_FILE, "run 02_train_sae.py again")["probe"]["x"]
    maxima = sae.maxima
    if maxima is None and (stats := source / "latent_stats.safetensors").exists():
        maxima = read_latent_stats(stats, sae.n_latents)["max"]
    shared = sae.to("cpu")
    shared.config, shared.maxima = public_config(sae.config), maxima
    save_sae(shared, folder / MODEL_FILE, probe=probe)
    written = [folder / MODEL_FILE, (folder / MODEL_FILE).with_suffix(".json")]
    if (names := source / "concepts.json").exists():
        read_concepts(names, sae_hash(sae))
        written.append(Path(shutil.copyfile(names, folder / names.name)))
    return written


def public_config(config: dict[str, Any]) -> dict[str, Any]:
    """An SAE's config as others may see it: hub names as they are, of local paths the last part."""
    shared = deepcopy(dict(config))
    origin = shared.get("origin", {})
    for about in (shared.get("model"), origin.get("dataset")):
        if about and about.get("path") is not None:
            # What comes with the project is found in any checkout; anything else must be given.
            name = public_name(about["name"])
            about["name"] = about["path"] = f"store/{name}" if name.startswith("embedded/") else name
    for constants in (shared.get("constants", {}), origin.get("constants", {})):
        constants |= {name: public_name(value) for name, value in constants.items()
                      if name in ("MODEL", "DATASET", "SOURCE", "START_FROM") and isinstance(value, str)}
    if "imported" in shared:
        shared["imported"]["source"] = public_name(shared["imported"]["source"])
    return shared
