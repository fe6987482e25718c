"""How far a training has got: its history, and the checkpoint from which it resumes.

Progress is a dict, which is what checkpoints/last.pt holds: `key` and `settings` of the training, the `state` of
lib.training.step, the `precision` of the encoder product, the `history` so far, `best`: folded weights, EV and
number of the best epoch; and the `place` of a source of rows that has one (lib.batches.Source).
"""
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..distributed import agree, rank
from ..environment import InputError, log
from ..files import read_torch, write_torch
from ..outputs import is_current
from ..sae import SAE
from ..schemas import (
    CONSTANTS,
    COUNT,
    NAME,
    NUMBERS,
    POSITIVE,
    SHORT_HASH,
    Columns,
    Misfit,
    Schema,
    Text,
    check,
    check_tensors,
)
from .kinds import KINDS
from .settings import PRECISIONS, Plan, TrainSettings
from .start import state_of
from .step import init_state, read_stats
from .workspace import precision_of

CHECKPOINT_SECONDS = 30.0  # at least, between two checkpoints
CHECKPOINT_SHARE = 0.02  # of the time at most goes into checkpoints
UNITS = {
    "loss, recon, auxk": "training space, where rows have mean squared norm 1; recon is the FVU there",
    "recon_mse": "mean squared error per element, raw activation units",
    "l1": "mean sum of codes per token, units of x' = (x - mean) / scale",
    "ev, r2": "1 - SSE/SST about the per-dimension mean, held out in the block val and in epochs",
    "l0": "codes per token",
    "dead_pct": "0-100; in the block train and in epochs: silent for more than dead_after tokens; else: never fired on "
                "the scored rows",
}
VALIDATION = Columns(("step", "tokens", "recon_mse", "ev", "l0", "dead_pct"))
BLOCKS = {
    "train": Columns(("step", "tokens", "loss", "recon", "auxk", "l0", "dead_pct", "lr", "grad_norm")),
    "val": VALIDATION, "train_sample": VALIDATION,
    "epochs": Columns(("loss", "recon_mse", "l1", "r2", "l0", "dead_features_pct")),
}
CURVES = {"lr": float, "dead_after": COUNT, "n_steps": POSITIVE, **BLOCKS}
HISTORY = Schema(CURVES | {
    "schema_version": 1, "run_id": NAME, "sae_hash?": SHORT_HASH, "constants": CONSTANTS,
    "settings": {"top_k": POSITIVE, "epochs": POSITIVE},
    "units": {Text(".+"): str}, "best_epoch": POSITIVE, "final": NUMBERS,
}, sealed=True, remedy="delete it and run 02_train_sae.py again")
CHECKPOINT = {"key": SHORT_HASH, "settings": {"n_latents": POSITIVE}, "precision": PRECISIONS,
              "history": CURVES, "state": {}, "best": {}, "place?": {}}
TRAINING = {"aligned": bool, "kind": tuple(KINDS)}
STATE = {
    "transform": "float32 D D", "dec": "float32 F D", "enc": "float32 F D", "bias": "float32 F", "gain": "float32 F",
    "log_threshold": "float32 F", "log_threshold_first": "float32 F", "frequency": "float32 F",
    "silent": "int64 F", "step": "int64", "sums": "sums S",
}
BEST = {"ev": float, "epoch": POSITIVE}
BEST_WEIGHTS = {"W_enc": "float32 F D", "b_enc": "float32 F", "W_dec": "float32 F D", "threshold?": "float32 F",
                "threshold_first?": "float32 F"}


class Diverged(InputError):
    """A training whose loss or weights are no longer finite; nothing that it left is of use."""


def empty_history(plan: Plan) -> dict[str, Any]:
    """`train` gets a point every log_every steps; `val`, `train_sample` and `epochs` one an epoch."""
    return ({"lr": plan.learning_rate, "dead_after": plan.dead_after, "n_steps": plan.n_steps}
            | {block: {name: [] for name in BLOCKS[block].names} for block in BLOCKS})


def log_steps(progress: dict[str, Any], plan: Plan, lr: float) -> dict[str, float]:
    """Append the means over the steps since the last point to `train`, and return that point; lr: of the last step."""
    state = progress["state"]
    stats, step = read_stats(state), int(state["step"])
    if not all(map(math.isfinite, stats.values())):
        raise Diverged(f"the loss is no longer finite at step {step}; lower LR (now {lr:.1e} at this step) or check "
                       "the activations")
    dead_pct = 100 * stats.pop("dead") / progress["settings"]["n_latents"]
    point = {"step": step, "tokens": step * plan.rows_per_step, "lr": lr, "dead_pct": dead_pct, **stats}
    _append(progress["history"]["train"], point)
    return point


def log_epoch(
    progress: dict[str, Any], plan: Plan, weights: dict[str, Tensor], scores: dict[str, dict[str, float]]
) -> dict[str, float]:
    """Append the scores of an epoch, and keep the weights that earned them if they are the best so far.

    scores: of `val` and `train_sample`, each as lib.training.loop.score gives them. Returns the new point of `val`.
    """
    history, best, step = progress["history"], progress["best"], int(progress["state"]["step"])
    for block, found in scores.items():
        _append(history[block], {"step": step, "tokens": step * plan.rows_per_step, "recon_mse": found["mse"],
                                 "ev": found["ev"], "l0": found["l0_mean"], "dead_pct": found["dead_pct"]})
    val, train, epoch = scores["val"], history["train"], len(history["val"]["ev"])
    since = history["val"]["step"][-2] if epoch > 1 else 0
    losses = [loss for at, loss in zip(train["step"], train["loss"]) if at > since]
    _append(history["epochs"], {"loss": sum(losses) / len(losses), "recon_mse": val["mse"], "l1": val["l1_mean"],
                                "r2": val["ev"], "l0": val["l0_mean"], "dead_features_pct": train["dead_pct"][-1]})
    if not all(map(math.isfinite, (val["ev"], val["mse"], val["l1_mean"]))):
        raise Diverged(f"the SAE of epoch {epoch} reconstructs nothing (EV {val['ev']}); lower LR (now "
                       f"{history['lr']:.1e})")
    if not best or val["ev"] > best["ev"]:
        best |= {name: w.cpu() for name, w in weights.items()} | {"ev": val["ev"], "epoch": epoch}
    return {name: column[-1] for name, column in history["val"].items()}


def _append(block: dict[str, list[float]], point: dict[str, float]) -> None:
    for name, column in block.items():
        column.append(point[name])


def save_checkpoint(path: Path, progress: dict[str, Any]) -> None:
    """Write a checkpoint. Raises Diverged for weights that are not finite."""
    state = progress["state"]
    if not all(torch.isfinite(state[name]).all() for name in ("enc", "dec")):
        raise Diverged(f"the weights are no longer finite at step {int(state['step'])}; lower LR or check the "
                       "activations")
    if rank() == 0:
        write_torch(path, progress)


def next_due(start: float) -> float:
    """When to write checkpoints again, if writing the last ones began at `start` and ended now, by time.monotonic()."""
    end = time.monotonic()
    return end + max(CHECKPOINT_SECONDS, (end - start) / CHECKPOINT_SHARE)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What save_checkpoint wrote. Raises InputError if it is damaged."""
    found = read_torch(path, "train again", CHECKPOINT)
    settings, state, best = found["settings"], found["state"], found["best"]
    try:
        check(settings, TRAINING)
        names = init_state(torch.eye(2), 2, 0, aligned=settings["aligned"], kind=settings["kind"])
        check_tensors(state, {name: STATE[name.removesuffix("_m").removesuffix("_v")] for name in names},
                      F=settings["n_latents"])
        if best:
            check(best, BEST)
            check_tensors(best, BEST_WEIGHTS, F=settings["n_latents"], D=len(state["transform"]))
    except Misfit as misfit:
        raise InputError(f"{path} is damaged: {misfit}; delete it and train again") from None
    return found


def resume(path: Path | None, key: str, settings: TrainSettings) -> dict[str, Any] | None:
    """The progress that `path` holds; None if it holds none, or that of another training before its first step.

    Raises InputError if another training has made steps: its work is not thrown away unasked.
    """
    if path is None or not path.exists():
        return None
    found = read_checkpoint(path)
    step = int(found["state"]["step"])
    if not step and found["key"] != key:
        return None
    is_current(path.parent, {**found["settings"], "activations or device": found["key"]},
               {**asdict(settings), "activations or device": key},
               "finish that training with its own, or delete the folder to train anew")
    log.info("resuming at step %d", step)
    return found


def resumed_or_new(
    checkpoint: Path | None, key: str, settings: TrainSettings, plan: Plan, transform: Tensor, start: SAE | None
) -> dict[str, Any]:
    """The progress of the checkpoint, or that of a training at its start, which is saved at once."""
    made = resume(checkpoint, key, settings)
    if not agree(made is not None):
        raise InputError("only some ranks see the checkpoint; STORE_DIR must lie on a file system that all of them "
                         "share")
    if made is None:
        state = init_state(transform, settings.n_latents, settings.seed, aligned=settings.aligned, kind=settings.kind)
        state |= {} if start is None else state_of(start, transform, settings.aligned)
        made = {"key": key, "history": empty_history(plan), "settings": asdict(settings), "state": state,
                "best": {}, "precision": precision_of(settings.precision, state)}
        if checkpoint:  # keeps the precision, which another machine might choose otherwise
            save_checkpoint(checkpoint, made)
    made["state"] |= {name: tensor.to(transform.device) for name, tensor in made["state"].items() if name != "step"}
    return made
