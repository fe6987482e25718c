"""The steps of one SAE-ception cycle, and what they leave on disk.

    session = Session(constants, seed)         # cycles/session.py: data, model and cache of one seed, loaded once
    train_model(session, "baseline", 0)        # cycle 0: task loss only; shared by all arms
    train_cycle_sae(session, "baseline", 0)    # an SAE on the frozen model's target layer
    train_model(session, "per_class", 1)       # targets from model and SAE 0, then model 1
    evaluate_cycle(session, "per_class", 1)

The folder store/sae_ception/<setting>/<arm>/seed_<s>/ holds constants.json, meta.json, checkpoints/,
targets_cycle_<n>.safetensors, history_cycle_<n>.json and results_cycle_<n>.json; cycle 0 lives in the arm "baseline".
A step whose output is finished does nothing. One that finds an output or an input made with other constants stops and
says which.
"""
import math
import shutil
from typing import Any

from cycles import schemas
from cycles.evaluation import evaluate
from cycles.fitting import fit
from cycles.modules import trained_state
from cycles.sae_training import trained_sae
from cycles.session import Session
from cycles.sharding import gathered
from cycles.stamps import Constants, stage_constants, write_stamp
from cycles.unfinished import Checkpoint
from lib.distributed import rank
from lib.environment import InputError, log
from lib.files import fingerprint, read_json, write_json, write_torch
from lib.sae import save_sae
from lib.trackers import open_tracker


def train_model(session: Session, arm: str, cycle: int) -> None:
    """Train the model of a cycle: 0 is the baseline, later ones start from the model and SAE before them."""
    path, folder = session.model_path(arm, cycle), session.folder(arm, cycle)
    key = session.key("model", arm, cycle)
    unfinished = Checkpoint(path.with_name(f"model_cycle_{cycle}_unfinished.pt"), key)
    if session.finished(path, key):
        unfinished.remove()
        return
    tracker = "local" if rank() else session.c["TRACKER"]
    with open_tracker(tracker, folder / f"tracker_cycle_{cycle}", session.c) as track:
        may_last = session.is_text or session.own is not None  # the paper's MLP trains in seconds
        history = fit(session, arm, cycle, log=track, checkpoint=unfinished if may_last else None)
    trained = gathered(trained_state(session.model))
    if rank():
        return
    write_json(folder / f"history_cycle_{cycle}.json", {"key": key, **history}, sealed=True)
    write_torch(path, trained)
    write_stamp(session, path, key)
    unfinished.remove()
    _report_training(history, f"{arm} seed {session.seed} cycle {cycle}")


def _report_training(history: dict[str, Any], label: str) -> None:
    aux = history.get("aux")
    if aux and "cos_source" in aux and (aux["cos_source"] > 0.99 or aux["grad_ratio"] < 0.01):
        log.warning("%s: the auxiliary loss hardly pulls (the model that made the targets has a cosine of %.3f to "
                    "them, gradient ratio %.3f); keep fewer latents or raise AUX_WEIGHT before reading a null result",
                    label, aux["cos_source"], aux["grad_ratio"])
    kept = history["epochs"][history["kept_epoch"] - 1]
    log.info("%s: validation accuracy %.4f", label, kept["val_accuracy"])


def train_cycle_sae(session: Session, arm: str, cycle: int, sae_seed: int = 0) -> None:
    """Train an SAE on the frozen model's target layer: all kept tokens, or the position the head reads."""
    arm = "baseline" if cycle == 0 else arm
    path, key = session.sae_path(arm, cycle, sae_seed), session.key("sae", arm, cycle, sae_seed)
    work = session.folder(arm, cycle) / f"activations_cycle_{cycle}"
    if not session.finished(path, key):
        sae, probe = trained_sae(session, arm, cycle, sae_seed, work=work)
        save_sae(sae, path, probe)
        write_stamp(session, path, key)
        log.info("%s seed %d cycle %d: SAE validation EV %.3f", arm, session.seed, cycle, sae.config["val_ev"])
    shutil.rmtree(work, ignore_errors=True)  # as large as all tokens times the width; the same step makes it again


def evaluate_cycle(session: Session, arm: str, cycle: int) -> Constants:
    """results_cycle_<n>.json: validation and test metrics of a finished model and its SAEs; returns it."""
    path, c = session.folder(arm, cycle) / f"results_cycle_{cycle}.json", session.c
    keys = [session.key("sae", arm, cycle, s) for s in range(c["N_SAE_SEEDS"])]
    key = fingerprint([keys, stage_constants(c, "eval", arm)])
    if session.finished(path, key):
        return read_json(path, schemas.RESULTS)
    session.load(arm, cycle)
    history_path = path.with_name(f"history_cycle_{cycle}.json")
    history = read_json(history_path, schemas.CYCLE_HISTORY)
    if history["key"] != session.key("model", arm, cycle):
        raise InputError(f"{history_path} is another model's; delete it with its model and rerun their step")
    results: dict[str, Any] = {"meta": {"arm": arm, "cycle": cycle, "seed": session.seed, "key": key}}
    for sae_seed in range(c["N_SAE_SEEDS"]):
        sae = session.sae(arm, cycle, sae_seed)
        found = {"val": evaluate(session, sae, "val", ()),
                 "test": evaluate(session, sae, "test", () if sae_seed else c["METRICS"])}
        if not sae_seed:
            found["val"] |= {f"aux_{name}": value for name, value in history.get("aux", {}).items()}
            results |= found
        else:
            results.setdefault("other_sae_seeds", []).append({"sae_seed": sae_seed, **found})
    pooled_ev = results["val"]["sae_explained_variance_pooled"]
    if pooled_ev < 0.7:
        remedy = "set SAE_POSITIONS=pooled or " if session.is_text and c["SAE_POSITIONS"] == "tokens" else ""
        log.warning("%s cycle %d: at the position that the head reads the SAE explains only %.2f of the variance; "
                    "%sraise SAE_EPOCHS", arm, cycle, pooled_ev, remedy)
    write_json(path, drop_undefined(results), sealed=True)
    write_stamp(session, path, key)
    return read_json(path, schemas.RESULTS)


def drop_undefined(value: Any) -> Any:
    """Leave out scores that are not finite, which JSON can't hold."""
    if isinstance(value, dict):
        return {k: drop_undefined(v) for k, v in value.items() if not isinstance(v, float) or math.isfinite(v)}
    return [drop_undefined(v) for v in value] if isinstance(value, list) else value
