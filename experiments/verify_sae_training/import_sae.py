"""In place of step 2: take an SAE that was trained elsewhere; notebooks 03 to 05 then open it like one of ours.

    python 01_save_activations.py MODEL=... LAYER_SIGNATURE=...      # of the model and layer it was trained on
    python import_sae.py SOURCE=/path/to/folder
    python import_sae.py SOURCE=user/repository SUBFOLDER=blocks.8.hook_resid_post

Reads TopK SAEs of SAELens, dictionary_learning and sparsify, and JumpReLU SAEs of SAELens. An SAE that is already
there is never replaced.

Reads  store/verify_sae_training/runs/<run_id>/
Writes store/verify_sae_training/sae_model/topk_sae.pt, topk_sae.json
"""
import math
from pathlib import Path

import checkout  # noqa: F401  (first: finds lib)
from lib.constants import override
from lib.ranges import FileName, Location, Name

SOURCE: Location | None = None            # folder of one SAE, or a hub repository
SUBFOLDER: str = ""                       # folder of the SAE inside SOURCE
RUN_ID: FileName | None = None            # activations to judge it by; None: the run that step 1 finished last
LAYER: Name | None = None                 # which of the run's hook points; None: the first
CONSTANTS = override(globals())

import kept_saes
from exchange.folded import unfold
from exchange.formats import read_foreign
from exchange.hub import pull
from lib.batches import rows_of_run, sample_rows
from lib.environment import InputError, log, log_to, run, say_next
from lib.models import local_path
from lib.sae import load_sae, sae_hash, save_sae
from lib.store import experiment_dir, open_run, provenance
from lib.training.loop import score

FOLDER = experiment_dir("verify_sae_training")


def source_folder():
    """The folder that SOURCE and SUBFOLDER name, fetched from the hub unless it is local."""
    if not SOURCE:
        raise InputError("SOURCE is missing; set the folder of an SAE, or a hub repository")
    if Path(SUBFOLDER).is_absolute() or ".." in Path(SUBFOLDER).parts:
        raise InputError(f"SUBFOLDER={SUBFOLDER} must be a folder inside SOURCE")
    path = local_path(SOURCE)
    return pull(SOURCE, SUBFOLDER) if path is None else path / SUBFOLDER


def main():
    log_to(FOLDER / "import_sae.log")
    kind, folded = read_foreign(source_folder())
    saved = open_run("verify_sae_training", RUN_ID)
    hook = saved.hook(LAYER)
    rows = rows_of_run(saved, hook)
    if len(rows.mean) != len(folded.b_dec):
        raise InputError(f"the SAE is for activations of width {len(folded.b_dec)}, {hook} has {len(rows.mean)}; save "
                         "those of its own layer")
    sae = unfold(folded, rows.scale)
    path = FOLDER / "sae_model" / "topk_sae.pt"
    if path.exists() and sae_hash(load_sae(path)) != sae_hash(sae):
        raise InputError(f"{path} holds another SAE; move the folder sae_model away, or set STORE_DIR to another store")
    final = score(sae, sample_rows(rows, validation=True, limit=None))
    if not all(math.isfinite(value) for value in final.values() if isinstance(value, float)):
        raise InputError("the SAE's reconstructions are not finite, so it was not trained on these activations; check "
                         "SOURCE and the layer of the run")
    sae.config.update(
        model=saved.meta["model"], hook=hook, run_id=saved.run_id, data_digest=saved.digest(hook),
        imported={"format": kind, "source": SOURCE, "subfolder": SUBFOLDER}, constants=CONSTANTS,
        provenance=provenance(), final=final,
    )
    kept_saes.keep(FOLDER, kept_saes.made_from(sae.config))  # a history may remain of an SAE that was moved away
    save_sae(sae, path, probe=next(sample_rows(rows, validation=True, limit=None)))
    log.info("%s: %d latents, k=%d, on %s of %s", kind, sae.n_latents, sae.top_k, hook, saved.meta["model"]["name"])
    log.info("held out: EV %.4f, L0 %.2f, %.1f %% of latents never fired on %s tokens", final["ev"], final["l0_mean"],
             final["dead_pct"], f"{final['n_rows']:,}")
    if final["ev"] <= 0:
        log.warning("it explains less than the mean does: check model, layer and side (input, output) of the layer")
    log.info("%s", path)
    say_next("03_analyze_training.ipynb")


if __name__ == "__main__":
    run(main)
