"""The SAEs of step 2: what their constants come to, whether they are there, and how they are written."""
from pathlib import Path
from typing import Any, NamedTuple

from lib.batches import Source
from lib.environment import log
from lib.files import read_json, write_json
from lib.outputs import is_current
from lib.sae import SAE, load_sae, sae_hash, save_sae
from lib.saes import ABOUT_FILE, HISTORY_FILE, MODEL_FILE, made_from
from lib.store import provenance
from lib.training.checkpoints import HISTORY
from lib.training.loop import TrainSettings, highest_codes, score


class Planned(NamedTuple):
    """An SAE that step 2 is to make."""

    folder: Path
    origin: dict[str, Any]
    """What its file says of where it comes from: lib.origin.origin_of, n_latents, constants."""
    source: Source
    start: SAE | None
    """The SAE to go on from."""

    @property
    def settings(self) -> TrainSettings:
        """What its constants come to."""
        c = self.origin["constants"]
        return TrainSettings(
            n_latents=self.origin["n_latents"], top_k=c["TOP_K"], kind=c["KIND"], epochs=c["EPOCHS"],
            batch_size=c["BATCH_SIZE_TRAIN"], lr=c["LR"], dead_after=c["DEAD_AFTER_TOKENS"], aux_weight=c["AUXK_ALPHA"],
            whiten=c["WHITEN"], aligned=c["ALIGNED"], precision=c["PRECISION"], log_every=c["LOG_EVERY"],
            seed=c["SEED"], start_k=c.get("START_K"), fall=c.get("FALL", TrainSettings.fall),
        )


def is_trained(folder: Path, origin: dict[str, Any]) -> bool:
    """Whether the folder holds the finished SAE of this origin. Raises InputError if it is damaged, or another one."""
    if not all((folder / name).exists() for name in (MODEL_FILE, ABOUT_FILE, HISTORY_FILE)):
        return False  # the history is written last
    sae = load_sae(folder / MODEL_FILE)
    read_json(folder / HISTORY_FILE, HISTORY)
    return is_current(folder, made_from(sae.config), made_from(origin), "rename it")


def write_trained(planned: Planned, sae: SAE, history: dict[str, Any]) -> None:
    """Score the trained SAE on all held-out rows, and write it with its history."""
    folder, origin, rows, _ = planned
    final = score(sae, rows.sample(validation=True, limit=None))
    final["train_ev"] = history["train_sample"]["ev"][history["best_epoch"] - 1]
    n_tokens = history["n_steps"] * min(planned.settings.batch_size, rows.n_train)  # what fills no batch sits out
    sae.config.update(origin, steps=history["n_steps"], tokens_trained=n_tokens, provenance=provenance(), final=final)
    sae.maxima = highest_codes(sae, rows)
    save_sae(sae, folder / MODEL_FILE, probe=next(rows.sample(validation=True, limit=None)))
    about = {"schema_version": 1, "run_id": origin["run_id"], "sae_hash": sae_hash(sae),
             "constants": origin["constants"]}
    write_json(folder / HISTORY_FILE, {**about, **history, "final": final}, sealed=True)
    log.info("%s", folder)
    log.info("held out: EV %.4f, L0 %.2f, %.1f %% of latents never fired on %s tokens", final["ev"], final["l0_mean"],
             final["dead_pct"], f"{final['n_rows']:,}")
    if final["ev"] <= 0:
        log.warning("it explains less than the mean of the activations does: lower LR or train longer")
