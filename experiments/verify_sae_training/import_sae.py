"""In place of step 2: take an SAE that was trained elsewhere; notebooks 03 to 05 then open it like one of ours.

    python 01_save_activations.py MODEL=... LAYER_SIGNATURE=...      # of the model and layer it was trained on
    python import_sae.py SOURCE=/path/to/folder
    python import_sae.py SOURCE=user/repository SUBFOLDER=blocks.8.hook_resid_post

Reads SAEs of SAELens, dictionary_learning, sparsify, Gemma Scope and Llama Scope (the guide has the table of kinds).
What can't be represented exactly is refused by its name.

Reads  store/verify_sae_training/runs/<run_id>/
Writes store/verify_sae_training/saes/<name>/topk_sae.pt, topk_sae.json; and last_sae.txt
"""
import math

import checkout  # noqa: F401  (first: finds lib)
from lib.constants import override
from lib.ranges import FileName, Location, Name

SOURCE: Location | None = None            # folder of one SAE, or a hub repository
SUBFOLDER: str = ""                       # folder of the SAE inside SOURCE
RUN_ID: FileName | None = None            # activations to judge it by; None: the run that step 1 finished last
LAYER: Name | None = None                 # which of the run's hook points; None: the one that the SAE names
CONSTANTS = override(globals())

from lib.batches import rows_of_run, sample_rows
from lib.environment import InputError, log, log_to, run, say_next
from lib.exchange.formats import read_foreign
from lib.exchange.hub import folder_of
from lib.exchange.places import hook_in_run, same_model
from lib.exchange.rows import fitted
from lib.origin import origin_of
from lib.sae import sae_hash, save_sae
from lib.saes import MODEL_FILE, remember, sae_folder
from lib.store import experiment_dir, open_run, provenance
from lib.training.loop import highest_codes, score

FOLDER = experiment_dir("verify_sae_training")


def hook_of(saved, facts):
    """The run's hook point that the SAE belongs to: the one that LAYER or else its files name, or the first."""
    named, model = facts.get("hook"), saved.meta["model"]["name"]
    if "model_name" in facts and not same_model(facts["model_name"], model):
        log.warning("the SAE was trained on %s, the run is of %s", facts["model_name"], model)
    hook = hook_in_run(saved, named) if named else None
    if named and hook is None and LAYER is None:
        raise InputError(f"the SAE belongs at {facts['hook_name']}, which run {saved.run_id} does not hold; run "
                         f"01_save_activations.py with LAYER_SIGNATURE={named}")
    if LAYER is None and hook:
        return hook
    if named is None:
        log.warning("the files don't say which layer the SAE belongs to; EV tells whether it is this one")
    elif saved.hook(LAYER) != hook:
        log.warning("the SAE belongs at %s, not at LAYER=%s", facts["hook_name"], LAYER)
    return saved.hook(LAYER)


def main():
    log_to(FOLDER / "import_sae.log")
    if not SOURCE:
        raise InputError("SOURCE is missing; set the folder of an SAE, or a hub repository")
    found = read_foreign(folder_of(SOURCE, SUBFOLDER), f"{SOURCE}/{SUBFOLDER}")
    saved = open_run("verify_sae_training", RUN_ID)
    hook = hook_of(saved, found.facts)
    rows = rows_of_run(saved, hook)
    if len(rows.mean) != len(found.sae.b_dec):
        raise InputError(f"the SAE is for activations of width {len(found.sae.b_dec)}, {hook} has {len(rows.mean)}; "
                         "save those of its own layer")
    sae = fitted(found.sae, rows)
    final = score(sae, sample_rows(rows, validation=True, limit=None))
    if not all(math.isfinite(value) for value in final.values() if isinstance(value, float)):
        raise InputError("the SAE's reconstructions are not finite, so it was not trained on these activations; check "
                         "SOURCE and the layer of the run")
    sae.config.update(
        origin_of(saved, hook),
        imported={"format": found.format, "source": SOURCE, "subfolder": SUBFOLDER, **found.facts},
        constants=CONSTANTS, provenance=provenance(), final=final,
    )
    folder = sae_folder(sae.config | {"n_latents": sae.n_latents, "sae_hash": sae_hash(sae)})
    sae.maxima = highest_codes(sae, rows)
    save_sae(sae, folder / MODEL_FILE, probe=next(sample_rows(rows, validation=True, limit=None)))
    remember(folder)
    log.info("%s, %s: %d latents, %s, on %s of %s", found.format, found.facts["kind"], sae.n_latents,
             "thresholds" if sae.threshold is not None else f"k={sae.top_k}", hook, saved.meta["model"]["name"])
    log.info("held out: EV %.4f, L0 %.2f, %.1f %% of latents never fired on %s tokens", final["ev"], final["l0_mean"],
             final["dead_pct"], f"{final['n_rows']:,}")
    if final["ev"] <= 0:
        log.warning("it explains less than the mean does: check model, layer and side (input, output) of the layer")
    log.info("%s", folder)
    say_next("03_analyze_training.ipynb", "04_name_sae_concepts.ipynb", "05_show_concepts.ipynb", SAE=folder.name)


if __name__ == "__main__":
    run(main)
