"""Step 2: train a TopK sparse autoencoder on saved activations. Needs no language model.

    python 02_train_sae.py                       # on the run that step 1 finished last
    python 02_train_sae.py PRESET=bielik         # the sizes of the original experiment
    python 02_train_sae.py TOP_K=16 EPOCHS=20    # any constant below, by its name
    torchrun --nproc-per-node 4 02_train_sae.py  # four processes share every step; see experiments/at_scale

Started again after an interruption, it continues from its last checkpoint.

Reads  store/verify_sae_training/run_id.txt, runs/<run_id>/
Writes store/verify_sae_training/sae_model/topk_sae.pt, topk_sae.json and training_history.json
"""
from lib.constants import override
from lib.distributed import rank
from lib.environment import InputError, choose_device, log, log_to, run
from lib.rows import rows_of_run, sample_rows
from lib.sae import load_sae, save_sae
from lib.store import experiment_dir, open_run, provenance, read_json, write_json
from lib.training import TrainSettings, score, train_sae

PRESET = "tiny"                    # tiny: sizes for the embedded model; bielik: those of the original experiment
RUN_ID: str | None = None          # None: the run that 01_save_activations.py finished last
LAYER: str | None = None           # which of the run's hook points, by its folder's name; None: the first
N_LATENTS_MULTIPLIER = 8           # latents per activation dimension
TOP_K = 4                          # latents that may fire on one token
EPOCHS = 10                        # passes over the training tokens; the best one by validation is kept
BATCH_SIZE_TRAIN = 1024            # tokens per step; larger is faster but learns less per token
LR: float | None = None            # peak learning rate; None: a rule over shape and length of the run
DEAD_AFTER_TOKENS: int | None = None  # silence after which a latent is revived; None: max(3000, 10 F / k)
AUXK_ALPHA = 1 / 32                # weight of the loss that revives dead latents; 0: off
WHITEN = 1 / 8                     # power of the partial whitening, folded away at the end; 0: off
ALIGNED = True                     # encoder aligned with the dictionary up to a learnt gain; False: free encoder
PRECISION = "auto"                 # of the product that proposes candidates: auto (measured), float32, bfloat16
LOG_EVERY = 50                     # steps between two points of the training curve
DEVICE = "auto"                    # auto, cpu, cuda, mps
SEED = 0                           # start of the weights and order of the tokens

PRESETS = {"tiny": {}, "bielik": {"N_LATENTS_MULTIPLIER": 4, "TOP_K": 8, "EPOCHS": 100}}
CONSTANTS = override(globals(), PRESETS)
FOLDER = experiment_dir("verify_sae_training")


def finished(sae_path, history_path, data_digest) -> bool:
    """Whether the SAE on disk is already what these constants would train."""
    if not (sae_path.exists() and history_path.exists()):
        return False
    history = read_json(history_path)
    return history["constants"] == CONSTANTS and load_sae(sae_path).config.get("data_digest") == data_digest


def main():
    if N_LATENTS_MULTIPLIER < 1:
        raise InputError(f"N_LATENTS_MULTIPLIER={N_LATENTS_MULTIPLIER} must be at least 1")
    log_to(FOLDER / "02_train_sae.log")
    saved = open_run("verify_sae_training", RUN_ID)
    hook = saved.hook(LAYER)
    rows = rows_of_run(saved, hook)
    n_latents = N_LATENTS_MULTIPLIER * len(rows.mean)
    log.info("run %s: %s training tokens at %s, width %d -> %d latents, k=%d", saved.run_id, f"{rows.n_train:,}", hook, len(rows.mean), n_latents, TOP_K)
    sae_path, history_path = FOLDER / "sae_model" / "topk_sae.pt", FOLDER / "training_history.json"
    if finished(sae_path, history_path, saved.digest(hook)):
        log.info("this SAE is already trained: %s", sae_path)
        return
    settings = TrainSettings(
        n_latents, TOP_K, EPOCHS, BATCH_SIZE_TRAIN, LR, DEAD_AFTER_TOKENS, AUXK_ALPHA, WHITEN, ALIGNED, PRECISION, LOG_EVERY, SEED
    )  # fmt: skip
    sae, history = train_sae(rows, settings, FOLDER / "sae_model", choose_device(DEVICE))
    if rank():
        return
    final = score(sae, sample_rows(rows, validation=True, limit=None))
    final["train_ev"] = history["train_sample"]["ev"][history["best_epoch"] - 1]
    sae.config.update(
        model=saved.meta["model"], hook=hook, run_id=saved.run_id, data_digest=saved.digest(hook), tokens_trained=EPOCHS * rows.n_train,
        constants=CONSTANTS, provenance=provenance(), final=final,
    )  # fmt: skip
    save_sae(sae, sae_path, probe=next(sample_rows(rows, validation=True, limit=None)))
    write_json(history_path, {"schema_version": 1, "run_id": saved.run_id, "constants": CONSTANTS, **history, "final": final})
    dead, n_rows = final["dead_pct"], f"{final['n_rows']:,}"
    log.info("held out: EV %.4f, L0 %.2f, %.1f %% of latents never fired on %s tokens", final["ev"], final["l0_mean"], dead, n_rows)
    log.info("%s and %s", sae_path, history_path)


if __name__ == "__main__":
    run(main, parallel=True)
