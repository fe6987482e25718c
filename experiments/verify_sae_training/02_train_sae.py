"""Step 2: train a TopK sparse autoencoder on saved activations. Needs no language model.

    python 02_train_sae.py                       # on the run that step 1 finished last
    python 02_train_sae.py PRESET=bielik         # the sizes of the original experiment
    python 02_train_sae.py TOP_K=16 EPOCHS=20    # any constant below, by its name
    torchrun --nproc-per-node 4 02_train_sae.py  # four processes share every step; see experiments/at_scale

After an interruption, rerun the same command: it continues from the last checkpoint. An SAE of other constants is kept
as sae_model_<its hash>/, and taken back when its constants come again.

Reads  store/verify_sae_training/run_id.txt, runs/<run_id>/
Writes store/verify_sae_training/sae_model/topk_sae.pt, topk_sae.json and training_history.json
"""
import shutil
from typing import Annotated, Literal

import checkout  # noqa: F401  (first: finds lib)
from lib.constants import override
from lib.ranges import Count, Device, FileName, Name, Part, Rate, Seed, Size, Tracker, at_least, at_most

PRESET = "standard"                       # standard: the values below; quick, full, large; bielik: the original's sizes
RUN_ID: FileName | None = None            # None: the run that 01_save_activations.py finished last
LAYER: Name | None = None                 # which of the run's hook points, as in step 1 (resid_post:3); None: the first
N_LATENTS_MULTIPLIER: Size = 8            # latents per activation dimension
TOP_K: Size = 4                           # latents that may fire on one token
KIND: Literal["topk", "batchtopk", "jumprelu", "matryoshka"] = "topk"  # only topk has the fast step
EPOCHS: Size = 10                         # passes over the training tokens; the best one by validation is kept
BATCH_SIZE_TRAIN: Size = 1024             # tokens per step; larger is faster but learns less per token
LR: Rate | None = None                    # peak learning rate; None: a rule over shape and length of the run
DEAD_AFTER_TOKENS: Count | None = None    # silence before a latent is revived; None: max(3000, 10 F / k, 2 batches)
AUXK_ALPHA: Annotated[float, at_least(0), at_most(100)] = 1 / 32  # weight of the loss that revives latents; 0: off
WHITEN: Part = 1 / 8                      # power of the partial whitening, folded away at the end; 0: off
ALIGNED = True                            # encoder aligned with the dictionary up to a learnt gain; False: free
PRECISION: Literal["auto", "float32", "bfloat16"] = "auto"  # to propose candidates; auto: by shape and processor
LOG_EVERY: Count = 50                     # steps between two points of the training curve
VERIFY = False                            # first compare the checksums of all activations: reads the whole run
TRACKER: Tracker = "local"                # where curves are shown; the history is always written as JSON too
DEVICE: Device = "auto"                   # auto, cpu, cuda, mps
SEED: Seed = 0                            # start of the weights and order of the tokens

PRESETS = {
    "quick": {"N_LATENTS_MULTIPLIER": 4, "EPOCHS": 3},
    "standard": {},
    "full": {"EPOCHS": 20},
    "large": {"N_LATENTS_MULTIPLIER": 32, "TOP_K": 8, "EPOCHS": 20},
    "bielik": {"N_LATENTS_MULTIPLIER": 4, "TOP_K": 8, "EPOCHS": 100},
}
CONSTANTS = override(globals(), PRESETS)

import kept_saes
from lib.batches import rows_of_run, sample_rows
from lib.distributed import rank, wait_for_all
from lib.environment import choose_device, log, log_to, run, say_next
from lib.files import read_json, write_json
from lib.outputs import in_use
from lib.sae import sae_hash, save_sae
from lib.store import experiment_dir, open_run, provenance
from lib.trackers import open_tracker
from lib.training.checkpoints import HISTORY, Diverged, read_checkpoint
from lib.training.loop import TrainSettings, score, train_sae

FOLDER = experiment_dir("verify_sae_training")
SAE_PATH, HISTORY_PATH = FOLDER / "sae_model" / "topk_sae.pt", FOLDER / "training_history.json"
MADE_WITH = {name: value for name, value in CONSTANTS.items() if name not in ("VERIFY", "TRACKER")}


def train(saved, hook, rows):
    """Train the SAE and write it with its history."""
    settings = TrainSettings(
        n_latents=N_LATENTS_MULTIPLIER * len(rows.mean), top_k=TOP_K, kind=KIND, epochs=EPOCHS,
        batch_size=BATCH_SIZE_TRAIN, lr=LR, dead_after=DEAD_AFTER_TOKENS, aux_weight=AUXK_ALPHA, whiten=WHITEN,
        aligned=ALIGNED, precision=PRECISION, log_every=LOG_EVERY, seed=SEED,
    )
    with open_tracker("local" if rank() else TRACKER, FOLDER / "tracker", MADE_WITH) as track:
        try:
            sae, history = train_sae(rows, settings, SAE_PATH.parent, choose_device(DEVICE), track=track)
        except Diverged:  # its checkpoint is of no use, and would bar other constants
            if rank() == 0:
                shutil.rmtree(SAE_PATH.parent / "checkpoints", ignore_errors=True)
            raise
    if rank():
        return
    final = score(sae, sample_rows(rows, validation=True, limit=None))
    final["train_ev"] = history["train_sample"]["ev"][history["best_epoch"] - 1]
    sae.config.update(
        model=saved.meta["model"], hook=hook, run_id=saved.run_id, data_digest=saved.digest(hook),
        tokens_trained=EPOCHS * rows.n_train, constants=MADE_WITH, provenance=provenance(), final=final,
    )
    kept_saes.keep(FOLDER, kept_saes.made_from(sae.config))
    save_sae(sae, SAE_PATH, probe=next(sample_rows(rows, validation=True, limit=None)))
    about = {"schema_version": 1, "run_id": saved.run_id, "sae_hash": sae_hash(sae), "constants": MADE_WITH}
    write_json(HISTORY_PATH, {**about, **history, "final": final}, sealed=True)
    log.info("held out: EV %.4f, L0 %.2f, %.1f %% of latents never fired on %s tokens", final["ev"], final["l0_mean"],
             final["dead_pct"], f"{final['n_rows']:,}")
    if final["ev"] <= 0:
        log.warning("it explains less than the mean of the activations does: lower LR or train longer")


def forget_checkpoint():
    """Remove the checkpoint of the training whose SAE is saved; that of another, unfinished one stays."""
    checkpoint = SAE_PATH.parent / "checkpoints" / "last.pt"
    if not checkpoint.exists():
        return
    if read_checkpoint(checkpoint)["history"]["val"] == read_json(HISTORY_PATH, HISTORY)["val"]:
        shutil.rmtree(checkpoint.parent)


def main():
    log_to(FOLDER / "02_train_sae.log")
    saved = open_run("verify_sae_training", RUN_ID, VERIFY)
    hook = saved.hook(LAYER)
    rows = rows_of_run(saved, hook)
    log.info("run %s: %s training tokens at %s, width %d", saved.run_id, f"{rows.n_train:,}", hook, len(rows.mean))
    with in_use(SAE_PATH.parent):
        now = {"constants": MADE_WITH, "activations": saved.digest(hook)}
        found = kept_saes.find(FOLDER, now)
        wait_for_all()  # all ranks have looked before rank 0 moves anything
        if found is None:
            train(saved, hook, rows)
        elif found == SAE_PATH.parent:
            log.info("this SAE is already trained")
        elif rank() == 0:
            kept_saes.keep(FOLDER, now)
            kept_saes.put_back(FOLDER, found)
            log.info("this SAE was trained before; it is taken back from %s", found)
        if rank() == 0:
            forget_checkpoint()
    log.info("%s and %s", SAE_PATH, HISTORY_PATH)
    say_next("03_analyze_training.ipynb")


if __name__ == "__main__":
    run(main, parallel=True)
