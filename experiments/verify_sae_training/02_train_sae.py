"""Step 2: train a TopK sparse autoencoder on saved activations. Needs no language model, but with LIVE.

    python 02_train_sae.py                       # on the run that step 1 finished last
    python 02_train_sae.py PRESET=bielik         # the sizes of the original experiment
    python 02_train_sae.py TOP_K=16 EPOCHS=20    # any constant below, by its name
    python 02_train_sae.py START_FROM=<name>     # go on from a trained or public SAE, on the activations of now
    python 02_train_sae.py SAES="TOP_K=4,8,16 SEED=0,1"      # six SAEs from one read
    python 02_train_sae.py LIVE=True N_TOKENS=100_000_000    # on texts that the model reads meanwhile
    torchrun --nproc-per-node 4 02_train_sae.py  # four processes share every step; see experiments/at_scale

LIVE takes the run of step 1 as a sample, for statistics, held-out texts and notebooks, and trains on the whole of its
data set, read by the run's model: activations are mixed in memory and never written. SAES may name its layers too.

SAES trains many SAEs at once, each the same to the byte as if it were trained alone, in a folder of its own; reading is
paid once (lib/training/many.py). Values between commas make a grid, several grids are parted by ";".

After an interruption, rerun the same command: it continues from the last checkpoint. Other constants make another SAE;
the same ones find the SAE that is there.

Reads  store/verify_sae_training/run_id.txt, runs/<run_id>/
Writes store/verify_sae_training/saes/<name>/: topk_sae.pt, topk_sae.json, training_history.json; and last_sae.txt
"""
import shutil
from contextlib import ExitStack
from typing import Annotated, Literal

import checkout  # noqa: F401  (first: finds lib)
from lib.constants import override, read_grid
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
SAES: Name | None = None                  # many from one read: "TOP_K=4,8 SEED=0,1; KIND=lista" is five; None: one
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
GRID = ("LAYER", "N_LATENTS_MULTIPLIER", "TOP_K", "START_K", "FALL", "KIND", "EPOCHS", "BATCH_SIZE_TRAIN", "LR",
        "DEAD_AFTER_TOKENS", "AUXK_ALPHA", "WHITEN", "ALIGNED", "PRECISION", "SEED")  # what SAES may name
EACH = read_grid("SAES", globals(), GRID)  # for each SAE, the constants in which it differs from those above

from trained_saes import Planned, is_trained, write_trained

from lib.batches import rows_of_run
from lib.distributed import rank
from lib.environment import InputError, choose_device, log, log_to, run, say_next
from lib.exchange.rows import sae_for
from lib.origin import origin_of
from lib.outputs import in_use
from lib.sae import sae_hash
from lib.saes import made_from, remember, require_same_split, sae_folder, trained_as
from lib.store import experiment_dir, open_run
from lib.trackers import open_tracker
from lib.training.kinds import WITH_THRESHOLD
from lib.training.loop import score
from lib.training.many import Job, train_saes
from lib.training.start import kind_of

FOLDER = experiment_dir("verify_sae_training")
NO_MATTER = {"VERIFY", "TRACKER", "TRUST_REMOTE_CODE", "SAES"}


def made_with(constants):
    """Those of these constants that an SAE is made with."""
    unused = NO_MATTER | (set() if LIVE else {"LIVE", "N_TOKENS", "BUFFER_TOKENS"})
    unused |= {"START_FROM"} if START_FROM is None else set()
    unused |= {"START_K", "FALL"} if constants["START_K"] is None else set()
    return {name: value for name, value in constants.items() if name not in unused}


def source_of(name, rows, top_k):
    """The SAE that START_FROM names, and the constants that it decides."""
    sae = sae_for(name, rows)
    scores = score(sae, rows.sample(validation=True, limit=None))
    l0, multiplier = scores["l0_mean"], sae.n_latents / len(rows.mean)
    log.info("START_FROM, held out: EV %.4f, L0 %.2f", scores["ev"], l0)
    if kind_of(sae) in WITH_THRESHOLD and not l0 / 2 <= top_k <= 2 * l0:
        raise InputError(f"START_FROM has {l0:.1f} codes a token; set TOP_K={max(1, round(l0))}")
    whole = N_LATENTS_MULTIPLIER if multiplier.is_integer() else multiplier  # others have sizes that this can't give
    return sae, {"START_FROM_SAE": sae_hash(sae), "N_LATENTS_MULTIPLIER": whole}


def rows_to_train_on(saved, wanted):
    """Rows for each of these hook points and seeds: the run's own or, with LIVE, those of its whole data set."""
    if not LIVE:
        if N_TOKENS is not None:
            raise InputError("N_TOKENS says how long LIVE=True trains; on saved activations EPOCHS does: leave it out")
        stored = {hook: rows_of_run(saved, hook) for hook, _ in wanted}
        return {(hook, seed): stored[hook] for hook, seed in wanted}
    from activation_buffer.reading import live_rows  # loads what a language model needs

    def require_batches(n_tokens):
        if min(n_tokens // EPOCHS, BUFFER_TOKENS) < BATCH_SIZE_TRAIN:
            raise InputError(f"N_TOKENS / EPOCHS ({n_tokens // EPOCHS:,}) and BUFFER_TOKENS must hold a batch of "
                             f"{BATCH_SIZE_TRAIN:,}; raise them, or lower BATCH_SIZE_TRAIN")

    if N_TOKENS is not None:
        require_batches(N_TOKENS)  # before the model is loaded
    found = live_rows(saved, wanted, n_tokens=N_TOKENS, epochs=EPOCHS, buffer_tokens=BUFFER_TOKENS, device=DEVICE,
                      trust_remote_code=TRUST_REMOTE_CODE)
    require_batches(found[wanted[0]].n_tokens)
    return found


def plan_saes(saved):
    """The SAEs to make, each once."""
    if len(EACH) > 1 and TRACKER in ("wandb", "trackio"):
        raise InputError(f"TRACKER={TRACKER} shows one training at a time; with SAES set local, tensorboard or mlflow")
    fixed = {"EPOCHS", "BATCH_SIZE_TRAIN"} if LIVE else set()
    if varied := fixed & {name for changes in EACH for name in changes}:
        raise InputError(f"with LIVE=True, SAES can't name {', '.join(sorted(varied))}: its SAEs see the same batches")
    grid = [CONSTANTS | changes for changes in EACH]
    read = [(saved.hook(constants["LAYER"]), constants["SEED"]) for constants in grid]
    sources, planned = rows_to_train_on(saved, list(dict.fromkeys(read))), {}
    for hook, rows in {hook: rows for (hook, _), rows in sources.items()}.items():
        log.info("run %s: %s training tokens at %s, width %d", saved.run_id, f"{rows.n_train:,}", hook, len(rows.mean))
    for constants, place in zip(grid, read):
        hook, rows = place[0], sources[place]
        start, decided = source_of(START_FROM, rows, constants["TOP_K"]) if START_FROM else (None, {})
        if start is not None:
            require_same_split(start.config, saved, hook)
        constants = made_with(constants) | decided | ({"N_TOKENS": rows.n_tokens} if LIVE else {})
        n_latents = round(constants["N_LATENTS_MULTIPLIER"] * len(rows.mean))
        origin = origin_of(saved, hook) | {"n_latents": n_latents, "constants": constants}
        folder = trained_as(made_from(origin)) or sae_folder(origin)
        planned[folder] = Planned(folder, origin, rows, start)
    return list(planned.values())


def train(planned):
    """Train those that are not there, and write each as soon as it is finished."""
    missing = []
    for each in planned:
        if not is_trained(each.folder, each.origin):
            missing.append(each)
        elif rank() == 0:  # left by a run that was killed between its last file and this
            shutil.rmtree(each.folder / "checkpoints", ignore_errors=True)
    if done := len(planned) - len(missing):
        log.info("this SAE is already trained" if len(planned) == 1 else f"{done} of these SAEs are already trained")
    with ExitStack() as shown:
        jobs = []
        for each in missing:
            track = shown.enter_context(open_tracker("local" if rank() else TRACKER, each.folder / "tracker",
                                                     each.origin["constants"]))
            jobs.append(Job(each.source, each.settings, each.folder, track=track, start=each.start))
        for number, sae, history in train_saes(jobs, choose_device(DEVICE)):
            if rank() == 0:
                write_trained(missing[number], sae, history)
                shutil.rmtree(missing[number].folder / "checkpoints", ignore_errors=True)


def main():
    log_to(FOLDER / "02_train_sae.log")
    planned = plan_saes(open_run("verify_sae_training", RUN_ID, VERIFY))
    with ExitStack() as held:
        for each in planned:
            held.enter_context(in_use(each.folder))
        train(planned)
        if rank() == 0:
            remember(planned[-1].folder)
    log.info("%s", planned[-1].folder)
    steps = ("03_analyze_training.ipynb", "04_name_sae_concepts.ipynb", "05_show_concepts.ipynb")
    say_next(*steps, *(["09_compare_saes.ipynb"] if len(planned) > 1 else []), SAE=planned[-1].folder.name)


if __name__ == "__main__":
    run(main, parallel=True)
