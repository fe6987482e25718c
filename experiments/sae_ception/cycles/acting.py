"""What an arm adds to the training of a cycle's model, made from the model and SAE of the cycle before.

    made, share = act(session, "per_class", 0, aux, weight=1.0)  # targets, penalty or ablation; shares for the history
"""
from typing import Any

import torch
from torch import Tensor

from cycles import schemas
from cycles.ablation import Ablation, telling_latents
from cycles.arms import definition
from cycles.auxiliary import Auxiliary, Penalty, Targets, probe_ids
from cycles.penalties import Frozen, penalty
from cycles.scored import dense_codes
from cycles.sealed import read_sealed, write_sealed
from cycles.session import Session
from cycles.sharpening import n_kept
from cycles.stamps import Constants
from cycles.targets import Source, random_sae, targets
from lib.distributed import rank
from lib.environment import InputError
from lib.sae import SAE

Acting = tuple[Auxiliary | None, dict[str, float]]


def act(session: Session, arm: str, cycle: int, aux: Constants, *, weight: float) -> Acting:
    """What the arm does to the training of the model after `cycle`, and shares for its history; None: nothing.

    aux: the arm's constants; weight: lambda. Raises InputError where the arm can't be carried out with them.
    """
    how = definition(arm).acts
    if how == "pull":
        return make_targets(session, arm, cycle, aux)
    if how == "penalty":
        return Penalty(penalty(arm, _frozen(session, arm, cycle, aux))), {}
    if how == "ablation":
        return _ablation(session, arm, cycle, aux, weight=weight), {}
    return None, {}


def make_targets(session: Session, arm: str, cycle: int, aux: Constants) -> tuple[Targets, dict[str, float]]:
    """The targets that a cycle gives to the next, computed once by its frozen model and SAE, and kept on disk."""
    session.load(arm, cycle)
    sae = session.sae(arm, cycle)
    seed = aux["SHARPEN_SEED"] + session.seed
    if definition(arm).untrained_sae:
        sae = random_sae(sae, seed)
    ids = session.task.splits["train"]
    h, _ = session.outputs(ids)
    values, indices = (part.cpu() for part in sae.encode(h.to(sae.mean.device)))
    sae = sae.to("cpu")
    centre = _centre(session, h, sae.mean, aux)
    half = max(1, round(float((values > 0).sum(1).double().mean()) / 2)) if session.c["SAE_KIND"] == "l1" else (
        sae.top_k // 2)
    t, share = targets(arm, Source(
        h=h, values=values, indices=indices, y=session.task.y[ids], ids=ids, decode=sae.decode,
        n_classes=session.task.n_classes, n_latents=sae.n_latents, keep=n_kept(sae.n_latents, aux["KEEP_PCT"]),
        keep_per_example=aux["KEEP_PER_EXAMPLE"] or half, seed=seed, centre=centre, unit=code_unit(sae),
    ))
    variance = float(h.var(0, correction=0).mean()) if definition(arm).loss == "mse" else None
    made = Targets(ids, t, centre, variance)
    share["cos_source"] = 1 - float(made.distance(h, ids).double().mean())
    folder = session.root / arm / f"seed_{session.seed}"
    if rank() == 0:
        content = {"example_id": ids, "t": t.float()} | ({} if centre is None else {"centre": centre})
        write_sealed(folder / f"targets_cycle_{cycle}.safetensors", content)
    return made, share


def code_unit(sae: SAE) -> Tensor:
    """What each latent's codes are divided by before latents are ranked, [F]: 1, or what cycles/l1_sae.py put in."""
    return torch.tensor(sae.config.get("decoder_norm", [1.0] * sae.n_latents), dtype=torch.float64)


def _centre(session: Session, h: Tensor, sae_mean: Tensor, aux: Constants) -> Tensor | None:
    """What the arm's cosine is taken about, [D]; None: the origin."""
    if not aux["AUX_CENTRED"]:
        return None
    # An SAE over all tokens knows their mean, not that of the position that is pulled; the paper's SAE knows none.
    elsewhere = session.is_text and session.c["SAE_POSITIONS"] == "tokens" or session.c["SAE_KIND"] == "l1"
    return h.mean(0) if elsewhere else sae_mean


def _frozen(session: Session, arm: str, cycle: int, aux: Constants) -> Frozen:
    session.load(arm, cycle)
    ids = session.task.splits["train"]
    h, _ = session.outputs(ids)
    centre = _centre(session, h, h.mean(0), aux)
    held = Targets(ids, h if centre is None else h - centre)
    return Frozen(y=session.task.y, embedding=lambda some: held.at(some, torch.device("cpu")))


def _ablation(session: Session, arm: str, cycle: int, aux: Constants, *, weight: float) -> Ablation:
    task = session.task
    if task.attribute is None:
        raise InputError(f"{arm} ablates the concept that ATTRIBUTE_FIELD, LABEL_GROUPS or SHORTCUT gives; set one of "
                         "them")
    session.load(arm, cycle)
    sae = session.sae(arm, cycle)
    ids = task.splits["train"]
    h, _ = session.outputs(ids)
    found = telling_latents(dense_codes(sae, h), task.attribute[ids], n_kept(sae.n_latents, aux["KEEP_PCT"]),
                            y=task.y[ids])
    return Ablation(sae.W_dec.cpu()[found], weight)


def lambda0_cosine(session: Session, arm: str, cycle: int) -> float:
    """Mean cosine of lambda0's model to the targets of `arm`, over the examples and about the centre of the arm's own.

    Only what the arm's cosine has beyond this is owed to its pull.
    """
    path = session.root / arm / f"seed_{session.seed}" / f"targets_cycle_{cycle - 1}.safetensors"
    stored: dict[str, Any] = read_sealed(path, schemas.TARGETS)
    made = Targets(stored["example_id"], stored["t"], stored.get("centre"))
    session.load("lambda0", cycle)
    ids = probe_ids(session.task)
    h, _ = session.outputs(ids)
    return 1 - float(made.distance(h, ids).double().mean())
