"""Step 2: train a TopK sparse autoencoder on saved activations. Needs no language model, but with LIVE.

    python 02_train_sae.py                       # on the run that step 1 finished last
    python 02_train_sae.py PRESET=bielik         # the sizes of the original experiment
    python 02_train_sae.py TOP_K=16 EPOCHS=20    # any constant below, by its name
    python 02_train_sae.py START_FROM=<name>     # go on from a trained or public SAE, on the activations of now
    python 02_train_sae.py LIVE=True N_TOKENS=100_000_000    # on texts that the model reads meanwhile
    torchrun --nproc-per-node 4 02_train_sae.py  # four processes share every step; see experiments/at_scale

LIVE takes the run of step 1 as a sample, for statistics, held-out texts and notebooks, and trains on the whole of its
data set, read by the run's model: activations are mixed in memory and never written.

After an interruption, rerun the same command: it continues from the last checkpoint. Other constants make another SAE;
the same ones find the SAE that is there.

Reads  store/verify_sae_training/run_id.txt, runs/<run_id>/
Writes store/verify_sae_training/saes/<name>/: topk_sae.pt, topk_sae.json, training_history.json; and last_sae.txt
"""
import shutil
from typing import Annotated, Literal

import checkout  # noqa: F401  (first: finds lib)
from lib.constants import override
from lib.ranges import Count, Device, FileName, Location, Name, Part, Rate, Seed, Size, Tracker, at_least, at_most

PRESET = "standard"                       # standard: the values below; quick, full, large; bielik: the original's sizes
RUN_ID: FileName | None = None            # None: the run that 01_save_activations.py finished last
LAYER: Name | None = None                 # which of the run's hook points, as in step 1 (resid_post:3); None: the first
N_LATENTS_MULTIPLIER: Size = 8            # latents per activation dimension
TOP_K: Size = 4                           # latents that may fire on one token
START_K: Size | None = None               # as TOP_K, at the start of training, from where it falls; None: TOP_K
FALL: Part = 0.9                          # share of the training over which it falls, in a straight line
KIND: Literal["topk", "batchtopk", "jumprelu", "matryoshka", "lista"] = "topk"  # what decides which latents fire
EPOCHS: Size = 10                         # passes over the training tokens; the best one by validation is kept
BATCH_SIZE_TRAIN: Size = 1024             # tokens per step; larger is faster but learns less per token
LR: Rate | None = None                    # peak learning rate; None: a rule over shape and length of the run
DEAD_AFTER_TOKENS: Count | None = None    # silence before a latent is revived; None: max(3000, 10 F / k, 2 batches)
AUXK_ALPHA: Annotated[float, at_least(0), at_most(100)] = 1 / 32  # weight of the loss that revives latents; 0: off
WHITEN: Part = 1 / 8                      # power of the partial whitening, folded away at the end; 0: off
ALIGNED = True                            # encoder aligned with the dictionary up to a learnt gain; False: free
PRECISION: Literal["auto", "float32", "bfloat16", "int8"] = "auto"  # to propose candidates; auto: by processor
LOG_EVERY: Count = 50                     # steps between two points of the training curve
LIVE = False                              # True: train on all texts of the run's data set, while the model reads them
N_TOKENS: Count | None = None             # LIVE: tokens to train on, scored EPOCHS times; None: EPOCHS passes over all
BUFFER_TOKENS: Count = 262_144            # LIVE: tokens that are in memory to be mixed, width x 2 or 4 bytes each
TRUST_REMOTE_CODE = False                 # LIVE: run code that comes with a hub model; only for authors you trust
START_FROM: Location | None = None        # SAE to go on from: name, folder, or user/repository/folder on the hub
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

from lib.batches import rows_of_run
from lib.distributed import rank
from lib.environment import InputError, choose_device, log, log_to, run, say_next
from lib.exchange.rows import sae_for
from lib.files import read_json, write_json
from lib.origin import origin_of
from lib.outputs import in_use, is_current
from lib.sae import load_sae, sae_hash, save_sae
from lib.saes import ABOUT_FILE, HISTORY_FILE, MODEL_FILE, made_from, remember, sae_folder, trained_as
from lib.store import experiment_dir, open_run, provenance
from lib.trackers import open_tracker
from lib.training.checkpoints import HISTORY, Diverged
from lib.training.kinds import WITH_THRESHOLD
from lib.training.loop import TrainSettings, highest_codes, score, train_sae
from lib.training.start import kind_of

FOLDER = experiment_dir("verify_sae_training")
UNUSED = ({"START_FROM"} if START_FROM is None else set()) | ({"START_K", "FALL"} if START_K is None else set()) | (
    set() if LIVE else {"LIVE", "N_TOKENS", "BUFFER_TOKENS"})
NO_MATTER = {"VERIFY", "TRACKER", "TRUST_REMOTE_CODE"}
MADE_WITH = {name: value for name, value in CONSTANTS.items() if name not in NO_MATTER | UNUSED}


def source_of(name, rows):
    """The SAE that START_FROM names, and the constants that it decides."""
    sae = sae_for(name, rows)
    scores = score(sae, rows.sample(validation=True, limit=None))
    l0, multiplier = scores["l0_mean"], sae.n_latents / len(rows.mean)
    log.info("START_FROM, held out: EV %.4f, L0 %.2f", scores["ev"], l0)
    if kind_of(sae) in WITH_THRESHOLD and not l0 / 2 <= TOP_K <= 2 * l0:
        raise InputError(f"START_FROM has {l0:.1f} codes a token; set TOP_K={max(1, round(l0))}")
    whole = N_LATENTS_MULTIPLIER if multiplier.is_integer() else multiplier  # others have sizes that this can't give
    return sae, {"START_FROM_SAE": sae_hash(sae), "N_LATENTS_MULTIPLIER": whole}


def rows_to_train_on(saved, hook):
    """The run's own rows or, with LIVE, those of its whole data set; and the constants that this decides."""
    if not LIVE:
        if N_TOKENS is not None:
            raise InputError("N_TOKENS says how long LIVE=True trains; on saved activations EPOCHS does: leave it out")
        return rows_of_run(saved, hook), {}
    from activation_buffer.reading import live_rows  # loads what a language model needs

    def require_batches(n_tokens):
        if min(n_tokens // EPOCHS, BUFFER_TOKENS) < BATCH_SIZE_TRAIN:
            raise InputError(f"N_TOKENS / EPOCHS ({n_tokens // EPOCHS:,}) and BUFFER_TOKENS must hold a batch of "
                             f"{BATCH_SIZE_TRAIN:,}; raise them, or lower BATCH_SIZE_TRAIN")

    if N_TOKENS is not None:
        require_batches(N_TOKENS)  # before the model is loaded
    rows = live_rows(saved, hook, n_tokens=N_TOKENS, epochs=EPOCHS, buffer_tokens=BUFFER_TOKENS, seed=SEED,
                     device=DEVICE, trust_remote_code=TRUST_REMOTE_CODE)
    require_batches(rows.n_tokens)
    return rows, {"N_TOKENS": rows.n_tokens}


def train(folder, origin, saved, rows, start):
    """Train the SAE and write it with its history.

    origin: what the SAE's file says of where it comes from. start: the SAE to go on from, or None.
    """
    settings = TrainSettings(
        n_latents=origin["n_latents"], top_k=TOP_K, kind=KIND, epochs=EPOCHS,
        batch_size=BATCH_SIZE_TRAIN, lr=LR, dead_after=DEAD_AFTER_TOKENS, aux_weight=AUXK_ALPHA, whiten=WHITEN,
        aligned=ALIGNED, precision=PRECISION, log_every=LOG_EVERY, seed=SEED, start_k=START_K, fall=FALL,
    )
    with open_tracker("local" if rank() else TRACKER, folder / "tracker", MADE_WITH) as track:
        try:
            sae, history = train_sae(rows, settings, folder, choose_device(DEVICE), track=track, start=start)
        except Diverged:  # its checkpoint is of no use
            if rank() == 0:
                shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            raise
    if rank():
        return
    final = score(sae, rows.sample(validation=True, limit=None))
    final["train_ev"] = history["train_sample"]["ev"][history["best_epoch"] - 1]
    sae.config.update(origin, tokens_trained=EPOCHS * rows.n_train, provenance=provenance(), final=final)
    sae.maxima = highest_codes(sae, rows)
    save_sae(sae, folder / MODEL_FILE, probe=next(rows.sample(validation=True, limit=None)))
    about = {"schema_version": 1, "run_id": saved.run_id, "sae_hash": sae_hash(sae),
             "constants": origin["constants"]}
    write_json(folder / HISTORY_FILE, {**about, **history, "final": final}, sealed=True)
    log.info("held out: EV %.4f, L0 %.2f, %.1f %% of latents never fired on %s tokens", final["ev"], final["l0_mean"],
             final["dead_pct"], f"{final['n_rows']:,}")
    if final["ev"] <= 0:
        log.warning("it explains less than the mean of the activations does: lower LR or train longer")


def is_trained(folder, origin):
    """Whether the folder holds the finished SAE of this origin. Raises InputError if it is damaged, or another one."""
    if not all((folder / name).exists() for name in (MODEL_FILE, ABOUT_FILE, HISTORY_FILE)):
        return False  # the history is written last
    sae = load_sae(folder / MODEL_FILE)
    read_json(folder / HISTORY_FILE, HISTORY)
    return is_current(folder, made_from(sae.config), made_from(origin), "rename it")


def main():
    log_to(FOLDER / "02_train_sae.log")
    saved = open_run("verify_sae_training", RUN_ID, VERIFY)
    hook = saved.hook(LAYER)
    rows, tokens = rows_to_train_on(saved, hook)
    log.info("run %s: %s training tokens at %s, width %d", saved.run_id, f"{rows.n_train:,}", hook, len(rows.mean))
    start, decided = source_of(START_FROM, rows) if START_FROM else (None, {})
    constants = MADE_WITH | tokens | decided
    n_latents = round(constants["N_LATENTS_MULTIPLIER"] * len(rows.mean))
    origin = origin_of(saved, hook) | {"n_latents": n_latents, "constants": constants}
    folder = trained_as(made_from(origin)) or sae_folder(origin)
    with in_use(folder):
        if is_trained(folder, origin):
            log.info("this SAE is already trained")
        else:
            train(folder, origin, saved, rows, start=start)
        if rank() == 0:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            remember(folder)
    log.info("%s", folder)
    say_next("03_analyze_training.ipynb", "04_name_sae_concepts.ipynb", "05_show_concepts.ipynb", SAE=folder.name)


if __name__ == "__main__":
    run(main, parallel=True)
