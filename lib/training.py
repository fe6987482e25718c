"""Training an SAE on stored activations: shuffled batches, validation, checkpoints, history.

    rows = rows_of_run(run, hook)                       # or rows_of_tensor(x, is_val)
    sae, history = train_sae(rows, TrainSettings(n_latents=512, top_k=8), folder)

The mathematics of one step is in lib/sae_step.py. Killed at any moment and called again, the training goes on from
its last checkpoint and ends with the same bytes.
"""
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from . import schemas
from .batches import Rows, sample_rows, shuffled_batches, steps_per_epoch
from .checking import Misfit, check, check_tensors
from .distributed import agree, rank, world_size
from .environment import InputError, log
from .fast_step import Workspace, fast_step
from .files import fingerprint, read_torch, write_torch
from .metrics.reconstruction import Reconstruction
from .outputs import is_current
from .sae import SAE, make_sae
from .sae_step import (
    FROZEN,
    aux_after,
    dense_step,
    folded_threshold,
    folded_weights,
    init_state,
    learning_rate,
    read_stats,
    schedule,
    whitening,
)
from .variants import KINDS, RATES, SLOTS

CHECKPOINT_SECONDS = 30.0  # between two checkpoints, or longer:
CHECKPOINT_SHARE = 0.02  # of the time at most goes into them
UNITS = {
    "loss, recon, auxk": "training space, where rows have mean squared norm 1; recon is the FVU there",
    "recon_mse": "mean squared error per element, raw activation units",
    "l1": "mean sum of codes per token, units of x' = (x - mean) / scale",
    "ev, r2": "1 - SSE/SST about the per-dimension mean, held out in the block val and in epochs",
    "l0": "codes per token",
    "dead_pct": "0-100; in the block train and in epochs: silent for more than dead_after tokens; else: never fired on "
                "the scored rows",
}


class Diverged(InputError):
    """A training that came to nothing: what it left is of no use to anyone."""


@dataclass(frozen=True)
class TrainSettings:
    """What decides the weights of an SAE, besides its activations."""

    n_latents: int
    """Latents of the dictionary."""
    top_k: int
    """Latents that may fire on one token; on average, where a threshold decides (batchtopk, jumprelu)."""
    kind: str = "topk"
    """topk, batchtopk, jumprelu or matryoshka (lib.variants); only topk has the fast step, the others take dense
    steps.
    """
    epochs: int = 10
    """Passes over the training rows; the best validation epoch is kept."""
    batch_size: int = 1024
    """Rows of one step."""
    lr: float | None = None
    """Peak learning rate; None: lib.sae_step.learning_rate, a rule over shape and length of the run."""
    dead_after: int | None = None
    """Tokens of silence after which a latent counts as dead and AuxK works on it; None: lib.sae_step.aux_after, a
    rule.
    """
    aux_weight: float = 1 / 32
    """Weight of AuxK in the loss; 0 turns it off."""
    whiten: float = 1 / 8
    """Power of the partial whitening, folded away at the end; 0: one scalar only."""
    aligned: bool = True
    """Encoder tied to its dictionary row up to a learnt gain and an orthogonal part; False: free encoder."""
    precision: str = "auto"
    """Of the encoder product that proposes candidates (their codes are exact): auto, by shape and device; float32 or
    bfloat16.
    """
    log_every: int = 50
    """Steps between two points of the training curve."""
    seed: int = 0
    """Draws the start and the order of the rows."""
    frozen: str | None = None
    """decoder or encoder: that part keeps its random start, as a control (arXiv 2602.14111); needs whiten 0 and aligned
    False.
    """


def score(sae: SAE, batches: Iterator[Tensor]) -> dict[str, float]:
    """Reconstruction metrics of an SAE over raw activation batches; see lib/metrics/reconstruction.py."""
    sums = Reconstruction(sae.n_latents)
    for x in batches:
        x = x.to(sae.mean.device)
        values, indices = sae.encode(x)
        sums.add(x, sae.decode(values, indices), values, indices)
    return sums.result()


def train_sae(
    rows: Rows, settings: TrainSettings, folder: Path | None = None, device: torch.device | str = "cpu",
    progress: bool = True,
    track: Callable[[dict[str, float]], None] = lambda record: None,
) -> tuple[SAE, dict[str, Any]]:
    """Train an SAE on the training rows; returns that of the best epoch by validation EV, and the history.

    folder: where checkpoints/last.pt is kept; None keeps nothing. A checkpoint of the same settings and rows is
    continued. history: see UNITS; `val` and `train_sample` have one entry an epoch, `train` one every log_every steps.
    track: is given each entry of `train`, and of `val` as val_<name>, as soon as it is there (lib/trackers.py).

    Several ranks train one SAE: each takes its part of every batch, their gradients are added up, and only the first
    writes.

    Raises InputError for settings that can't work, for a loss that is no longer finite, and if `folder` holds an
    unfinished training with other settings.
    """
    _check(rows, settings)
    per_epoch = steps_per_epoch(rows.n_train, settings.batch_size)
    n_steps, n_tokens = settings.epochs * per_epoch, settings.epochs * rows.n_train
    rate = RATES[settings.kind] * learning_rate(settings.n_latents, n_tokens) if settings.lr is None else settings.lr
    batch = min(settings.batch_size, rows.n_train)
    dead_after = (aux_after(settings.n_latents, settings.top_k, batch) if settings.dead_after is None
                  else settings.dead_after)
    transform = whitening(rows.covariance, settings.whiten).to(device)
    key = fingerprint([asdict(settings), fingerprint(rows.mean), rows.n_train, str(device)])
    checkpoint = folder / "checkpoints" / "last.pt" if folder else None
    progress_made = _load_checkpoint(checkpoint, key, settings) if checkpoint and checkpoint.exists() else None
    if not agree(progress_made is not None):
        raise InputError("only some ranks see the checkpoint; STORE_DIR must lie on a file system that all of them "
                         "share")
    if progress_made is None:
        progress_made = {"key": key, "history": _empty_history(rate, dead_after, n_steps),
                         **_start(transform, settings)}
        if checkpoint:  # keeps the precision, which another machine might choose otherwise
            _save_checkpoint(checkpoint, progress_made)
    state, history, best = progress_made["state"], progress_made["history"], progress_made["best"]
    state |= {name: tensor.to(device) for name, tensor in state.items() if name != "step"}
    work = Workspace(state, progress_made["precision"], shared=world_size() > 1)
    log.info("peak learning rate %.1e, %s steps", rate, f"{n_steps:,}")
    cache: dict[str, Tensor] = {}
    due = time.monotonic() + CHECKPOINT_SECONDS
    with tqdm(total=n_steps, initial=int(state["step"]), unit="step", desc="training the SAE",
              disable=not progress or rank() > 0) as bar:
        while int(state["step"]) < n_steps:
            epoch, done = divmod(int(state["step"]), per_epoch)
            batches = shuffled_batches(rows, transform, settings.batch_size, seed=settings.seed, epoch=epoch,
                                       cache=cache)
            for i, x in enumerate(batches):
                if i < done:
                    continue
                lr = rate * schedule(int(state["step"]), n_steps)
                arguments: dict[str, Any] = {"k": settings.top_k, "lr": lr, "dead_after": dead_after,
                                             "aux_weight": settings.aux_weight}
                arguments["frozen"] = settings.frozen
                if settings.kind == "topk":
                    fast_step(state, x, work=work, **arguments)
                else:
                    dense_step(state, x, kind=settings.kind, **arguments)
                bar.update()
                if (i + 1) % settings.log_every == 0 or i + 1 == per_epoch:
                    _log_point(history["train"], state, settings, lr)
                    track({name: column[-1] for name, column in history["train"].items()})
                if i + 1 == per_epoch:
                    _end_epoch(progress_made, rows, settings, device)
                    track({"step": int(state["step"])}
                          | {f"val_{name}": column[-1] for name, column in history["val"].items() if name != "step"})
                    bar.set_postfix(ev=f"{history['val']['ev'][-1]:.3f}",
                                    dead=f"{history['train']['dead_pct'][-1]:.1f}%")
                if checkpoint and time.monotonic() > due:
                    due = _save_checkpoint(checkpoint, progress_made)
    if checkpoint:
        _save_checkpoint(checkpoint, progress_made)
    sae = _sae_of(best, rows, settings, device)
    made = {"settings": asdict(settings), "precision": progress_made["precision"], "units": UNITS,
            "best_epoch": best["epoch"]}
    return sae, {**history, **made}


def _start(transform: Tensor, settings: TrainSettings) -> dict[str, Any]:
    """What a training begins with: its state, and the encoder product's precision, the same on all ranks."""
    state = init_state(transform, settings.n_latents, settings.seed, settings.aligned, settings.kind)
    work = Workspace(state, settings.precision if settings.kind == "topk" else "float32")
    log.info(work.choice)
    precision = work.precision if agree(work.precision == "bfloat16") else "float32"
    return {"settings": asdict(settings), "state": state, "best": {}, "precision": precision}


def _sae_of(weights: dict[str, Any], rows: Rows, settings: TrainSettings, device: torch.device | str) -> SAE:
    """The SAE of folded weights W_enc, b_enc, W_dec and, where there is one, threshold."""
    threshold = weights.get("threshold")
    slots = settings.top_k if threshold is None else min(settings.n_latents, SLOTS * settings.top_k)
    return make_sae(weights["W_enc"], weights["b_enc"], weights["W_dec"], rows.mean, rows.scale, slots, device=device,
                    threshold=threshold)


def _check(rows: Rows, settings: TrainSettings) -> None:
    if not 1 <= settings.top_k <= settings.n_latents:
        raise InputError(f"TOP_K={settings.top_k} must be between 1 and the number of latents, {settings.n_latents}")
    if settings.precision not in ("auto", "float32", "bfloat16"):
        raise InputError(f"PRECISION={settings.precision} must be auto, float32 or bfloat16")
    for name in ("epochs", "batch_size", "log_every"):
        if getattr(settings, name) < 1:
            raise InputError(f"{name}={getattr(settings, name)} must be at least 1")
    if settings.lr is not None and not 0 < settings.lr < math.inf:
        raise InputError(f"LR={settings.lr} must be a number above 0; None lets a rule choose it")
    if settings.dead_after is not None and settings.dead_after < 0:
        raise InputError(f"DEAD_AFTER_TOKENS={settings.dead_after} must be at least 0; None lets a rule choose it")
    if settings.kind not in KINDS:
        raise InputError(f"KIND={settings.kind} is unknown; choose one of {', '.join(KINDS)}")
    if settings.frozen not in (None, *FROZEN):
        raise InputError(f"frozen={settings.frozen} is unknown; choose one of {', '.join(FROZEN)}")
    if settings.frozen and (settings.whiten or settings.aligned):
        raise InputError("a frozen part must be random: train it with whiten=0 and aligned=False, which shape it after "
                         "the data or the dictionary")
    if settings.kind != "topk" and world_size() > 1:
        raise InputError(f"KIND={settings.kind} trains in one process only; use KIND=topk with several ranks")
    n_val = len(rows.is_val) - rows.n_train
    if rows.n_train == 0 or n_val < 2:  # a single one has no variance to explain
        raise InputError("the run needs rows of training texts and two of validation texts at least; raise DATA_LIMIT "
                         "in 01_save_activations.py")
    if min(settings.batch_size, rows.n_train) < world_size():
        raise InputError(f"batch_size={settings.batch_size} leaves some of {world_size()} ranks without a row; raise "
                         "it")


def _empty_history(rate: float, dead_after: int, n_steps: int) -> dict[str, Any]:
    names = {
        "train": "step tokens loss recon auxk l0 dead_pct lr grad_norm",
        "val": "step tokens recon_mse ev l0 dead_pct",
        "train_sample": "step tokens recon_mse ev l0 dead_pct",
        "epochs": "loss recon_mse l1 r2 l0 dead_features_pct",
    }
    return ({"lr": rate, "dead_after": dead_after, "n_steps": n_steps}
            | {block: {name: [] for name in text.split()} for block, text in names.items()})


def _append(block: dict[str, list[float]], **values: float) -> None:
    for name, column in block.items():
        column.append(values[name])


def _log_point(block: dict[str, list[float]], state: dict[str, Tensor], settings: TrainSettings, lr: float) -> None:
    stats, step = read_stats(state), int(state["step"])
    if not all(map(math.isfinite, stats.values())):
        raise Diverged(f"the loss is no longer finite at step {step}; lower LR (now {lr:.1e} at this step) or check "
                       "the activations")
    _append(block, step=step, tokens=step * settings.batch_size, lr=lr,
            dead_pct=100 * stats.pop("dead") / settings.n_latents, **stats)


def _end_epoch(progress_made: dict[str, Any], rows: Rows, settings: TrainSettings, device: torch.device | str) -> None:
    """Score the SAE as it would be saved now, append to the history, and keep it if it is the best so far."""
    state, history, best = progress_made["state"], progress_made["history"], progress_made["best"]
    weights: dict[str, Any] = dict(zip(("W_enc", "b_enc", "W_dec"), folded_weights(state, rows.scale)))
    if (threshold := folded_threshold(state, rows.scale)) is not None:
        weights["threshold"] = threshold
    sae = _sae_of(weights, rows, settings, device)
    step = int(state["step"])
    for block, validation in (("val", True), ("train_sample", False)):
        result = score(sae, sample_rows(rows, validation))
        values = {"recon_mse": result["mse"], "ev": result["ev"], "l0": result["l0_mean"],
                  "dead_pct": result["dead_pct"]}
        _append(history[block], step=step, tokens=step * settings.batch_size, **values)
        if validation:
            val = result
    since = history["val"]["step"][-2] if len(history["val"]["step"]) > 1 else 0
    losses = [loss for at, loss in zip(history["train"]["step"], history["train"]["loss"]) if at > since]
    _append(
        history["epochs"], loss=sum(losses) / len(losses), recon_mse=val["mse"], l1=val["l1_mean"], r2=val["ev"],
        l0=val["l0_mean"],
        dead_features_pct=history["train"]["dead_pct"][-1],
    )
    if not all(map(math.isfinite, (val["ev"], val["mse"], val["l1_mean"]))):
        raise Diverged(f"the SAE of epoch {len(history['val']['ev'])} rebuilds nothing (EV {val['ev']}); lower LR (now "
                       f"{history['lr']:.1e})")
    if not best or val["ev"] > best["ev"]:
        best |= {name: w.cpu() for name, w in weights.items()} | {"ev": val["ev"], "epoch": len(history["val"]["ev"])}


def _save_checkpoint(path: Path, progress_made: dict[str, Any]) -> float:
    """Write a checkpoint; returns when the next one is due, so that they take at most CHECKPOINT_SHARE of the time."""
    state = progress_made["state"]
    if not all(torch.isfinite(state[name]).all() for name in ("enc", "dec")):
        raise Diverged(f"the weights are no longer finite at step {int(state['step'])}; lower LR or check the "
                       "activations")
    start = time.monotonic()
    if rank() == 0:
        write_torch(path, progress_made)
    end = time.monotonic()
    return end + max(CHECKPOINT_SECONDS, (end - start) / CHECKPOINT_SHARE)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What _save_checkpoint wrote. Raises InputError if it is damaged, or its parts do not fit together."""
    found = read_torch(path, "train again", schemas.CHECKPOINT)
    settings, state, best = found["settings"], found["state"], found["best"]
    try:
        check(settings, schemas.TRAINING)
        names = init_state(torch.eye(2), 2, 0, settings["aligned"], settings["kind"])
        check_tensors(state, {name: schemas.STATE[name.removesuffix("_m").removesuffix("_v")] for name in names},
                      F=settings["n_latents"])
        if best:
            check(best, schemas.BEST)
            check_tensors(best, schemas.BEST_WEIGHTS, F=settings["n_latents"], D=len(state["transform"]))
    except Misfit as misfit:
        raise InputError(f"{path} is damaged: {misfit}; delete it, then train again") from None
    return found


def _load_checkpoint(path: Path, key: str, settings: TrainSettings) -> dict[str, Any] | None:
    """What _save_checkpoint wrote, or None if it is of another training that has hardly begun.

    Raises InputError if it is of another training: its work is not thrown away unasked.
    """
    found = read_checkpoint(path)
    step = int(found["state"]["step"])
    if not step and found["key"] != key:
        return None
    is_current(path.parent, {**found["settings"], "activations or device": found["key"]},
               {**asdict(settings), "activations or device": key},
               "finish that training with its own, or delete the folder to train anew")
    log.info("continuing at step %d", step)
    return found
