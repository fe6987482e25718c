"""The SAE of a cycle: TopK or the paper's L1 SAE, on the frozen model's activations or along with its training.

    sae, probe = trained_sae(session, "per_class", 1, 0, work=folder)     # probe: activations [n, D] to save it with
"""
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cycles.fitting import fit
from cycles.l1_sae import L1Training
from cycles.modules import load_trained, trained_state
from cycles.session import Session
from lib.activations import SaveSettings, save_activations
from lib.batches import Rows, rows_of_run, rows_of_tensor
from lib.environment import InputError
from lib.metrics.reconstruction import explained_variance
from lib.sae import SAE
from lib.training.loop import TrainSettings, train_sae

PROBE_ROWS = 64


def trained_sae(session: Session, arm: str, cycle: int, sae_seed: int, *, work: Path) -> tuple[SAE, Tensor]:
    """An SAE of the finished model, and activations [n, D] that it codes; session.model is then that model.

    work: where the activations of all tokens are kept meanwhile. Another start for each cycle, the same in all arms:
    latents that survive a cycle then owe it to the model.
    """
    session.load(arm, cycle)
    start = 1_000_000 * cycle + 10 * session.seed + sae_seed
    l1 = session.c["SAE_KIND"] == "l1"
    made = _l1(session, arm, cycle, start) if l1 else _topk(session, arm, cycle, start, work=work)
    made[0].config |= {"model": session.c["MODEL"], "arm": arm, "cycle": cycle, "seed": start,
                       "hook": session.model.target.signature}
    return made


def _topk(session: Session, arm: str, cycle: int, seed: int, *, work: Path) -> tuple[SAE, Tensor]:
    rows = _sae_rows(session, work, session.key("model", arm, cycle))
    sae = _topk_of(session, rows, seed, folder=work if work.exists() else None)
    return sae, rows.shards[0][:PROBE_ROWS].float()


def _topk_of(session: Session, rows: Rows, seed: int, *, folder: Path | None = None) -> SAE:
    c = session.c
    settings = TrainSettings(c["N_LATENTS_MULTIPLIER"] * len(rows.mean), c["TOP_K"], epochs=c["SAE_EPOCHS"],
                             batch_size=c["SAE_BATCH_SIZE"], lr=c["SAE_LR"], seed=seed)
    threads = torch.get_num_threads()
    sae, history = train_sae(rows, settings, folder, session.device, progress=False)
    # The compiled SAE step may leave torch with another number of threads, which changes the last bits of later models.
    torch.set_num_threads(threads)
    sae.config["val_ev"] = history["val"]["ev"][history["best_epoch"] - 1]
    return sae


def sae_of_rows(session: Session, x: Tensor, is_val: Tensor, seed: int) -> SAE:
    """An SAE trained as the session's SAEs are, but on the rows x [N, D] where is_val [N] is false."""
    c = session.c
    if c["SAE_KIND"] == "topk":
        return _topk_of(session, rows_of_tensor(x, is_val), seed)
    training = L1Training(x.shape[1], c["N_LATENTS_MULTIPLIER"] * x.shape[1], seed, l1=c["SAE_L1"], lr=c["SAE_LR"],
                          device=session.device)
    along = c["SAE_TRAINED"] == "along"
    training.epochs(x[~is_val], c["EPOCHS_PER_CYCLE" if along else "SAE_EPOCHS"],
                    c["BATCH_SIZE" if along else "SAE_BATCH_SIZE"], seed)
    return training.sae().to(session.device)


def _sae_rows(session: Session, work: Path, model_key: str) -> Rows:
    """Activations of the training and validation examples at the target layer; those of all tokens lie in `work`."""
    c, task = session.c, session.task
    ids = torch.cat([task.splits["train"], task.splits["val"]])
    is_val = torch.arange(len(ids)) >= len(task.splits["train"])
    if not session.is_text or c["SAE_POSITIONS"] == "pooled":
        return rows_of_tensor(session.outputs(ids)[0], is_val)
    run = save_activations(
        work, session.model.lm, session.tokenizer, [session.model.target], texts=[task.texts[i] for i in ids.tolist()],
        splits=["val" if v else "train" for v in is_val.tolist()], settings=SaveSettings(max_length=c["MAX_LENGTH"]),
        meta={"model": {"name": c["MODEL"], "key": model_key}},
    )
    return rows_of_run(run, run.hooks[0])


def _l1(session: Session, arm: str, cycle: int, seed: int) -> tuple[SAE, Tensor]:
    """The paper's SAE, after its last epoch."""
    c, splits = session.c, session.task.splits
    h = session.outputs(splits["train"])[0]
    training = L1Training(h.shape[1], c["N_LATENTS_MULTIPLIER"] * h.shape[1], seed, l1=c["SAE_L1"], lr=c["SAE_LR"],
                          device=session.device)
    if c["SAE_TRAINED"] == "along":
        _learn_along(session, arm, cycle, training)
    else:
        training.epochs(h, c["SAE_EPOCHS"], c["SAE_BATCH_SIZE"], seed)
    sae = training.sae()
    held_out = session.outputs(splits["val"])[0]
    sae.config["val_ev"] = explained_variance(held_out, sae.decode(*sae.encode(held_out)))
    return sae.to(session.device), h[:PROBE_ROWS]


def _learn_along(session: Session, arm: str, cycle: int, training: L1Training) -> None:
    """Train the classifier of the cycle once more, and the SAE on each of its batches as the classifier passes it.

    The SAE leaves no mark on the classifier, so its training can be repeated after the fact, and ends with the weights
    that are stored. Raises InputError if it does not.
    """
    def learn(model: Any, _batch: Any, given: tuple[Tensor, Tensor]) -> None:
        if model.training:
            training.step(given[0])

    stored = trained_state(session.model)
    watching = session.model.register_forward_hook(learn)
    try:
        fit(session, arm, cycle)
    finally:
        watching.remove()
    again = trained_state(session.model)
    if any(not torch.equal(stored[name], again[name]) for name in stored):
        load_trained(session.model, stored)
        raise InputError(f"training {session.model_path(arm, cycle)} again gave other weights, so no SAE can be "
                         "trained along with it; set SAE_TRAINED=after")
