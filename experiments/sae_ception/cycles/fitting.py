"""The training of one cycle's classifier, from its start to its last epoch: what can be done twice with one result.

    history = fit(session, "per_class", 1)     # session.model then holds the weights of cycle 1
"""
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from cycles.acting import act
from cycles.arms import definition
from cycles.fine_tuning import TuneSettings, fine_tune
from cycles.modules import initialise, load_trained, trained_state
from cycles.session import Session
from cycles.stamps import Constants, stage_constants
from cycles.unfinished import Checkpoint
from lib.environment import InputError


def fit(
    session: Session, arm: str, cycle: int, *, checkpoint: Checkpoint | None = None,
    log: Callable[[dict[str, float]], None] | None = None,
) -> dict[str, Any]:
    """Train session.model for a cycle, 0 being the baseline; returns its history (cycles.fine_tuning.fine_tune).

    One seed gives one result. Raises InputError where the model or SAE before is missing.
    """
    aux = stage_constants(session.c, "aux", arm) if cycle else {}
    settings = tune_settings(session, arm, cycle, aux)
    made, share = act(session, arm, cycle - 1, aux, weight=settings.aux_weight) if cycle else (None, {})
    start_from(session, arm, cycle, aux)
    history = fine_tune(session.model, session.task, settings, made, entries=session.entries, log=log,
                        checkpoint=checkpoint, label=f"{arm} cycle {cycle}")
    if made is not None:
        history["aux"] |= share
    return history


def tune_settings(session: Session, arm: str, cycle: int, aux: Constants) -> TuneSettings:
    """The training settings of a cycle. Cycles that start from scratch share one data order; others have their own."""
    c = session.c
    order = session.seed + (1000 * cycle if aux.get("INIT") == "continue" else 0)
    if cycle and definition(arm).own_seed:
        order += 500_000 + 1000 * cycle
    how = definition(arm).acts if cycle else "nothing"
    weight = 0.0 if how == "nothing" else aux_weight(aux, cycle)
    optimizer, decay = c["OPTIMIZER"], c["WEIGHT_DECAY"]
    if how == "decay":
        decay, optimizer, weight = weight + (decay if optimizer == "adamw" else 0.0), "adamw", 0.0
    return TuneSettings(
        epochs=c["EPOCHS_PER_CYCLE"], batch_size=c["BATCH_SIZE"], lr=c["LR"], optimizer=optimizer,
        weight_decay=decay, warmup_steps=c["WARMUP_STEPS"], decay=c["LR_DECAY"], clip_norm=c["CLIP_NORM"],
        accumulate=c["ACCUMULATE"], aux_weight=weight, seed=order, select=c["SELECT_EPOCH"],
    )


def aux_weight(aux: Constants, cycle: int) -> float:
    """lambda of a cycle: one number for all, or one for each cycle, the last of which stays."""
    weight = aux["AUX_WEIGHT"]
    return float(weight if isinstance(weight, (int, float)) else weight[min(cycle, len(weight)) - 1])


def start_from(session: Session, arm: str, cycle: int, aux: Constants) -> None:
    """Put the starting weights of a cycle into session.model."""
    if cycle and definition(arm).own_seed:
        load_trained(session.model, drawn_start(session, session.seed + 500_000 + cycle))
    elif cycle and aux["INIT"] == "continue":
        session.load(arm, cycle - 1)
    elif cycle and aux["INIT"] != "scratch":
        raise InputError(f"INIT={aux['INIT']!r} must be 'scratch' or 'continue'")
    else:
        load_trained(session.model, session.initial)


def drawn_start(session: Session, seed: int) -> dict[str, Tensor]:
    """What a module starts from under another seed; of a text classifier its new head alone is drawn."""
    if not session.is_text:
        return trained_state(session.fresh_module(seed))
    if session.model.columns is not None:  # the head that came with it: nothing is drawn
        return session.initial
    old = session.model.head
    head = nn.Linear(old.in_features, old.out_features, bias=old.bias is not None)
    initialise(head, seed)
    return session.initial | {f"head.{name}": p.detach() for name, p in head.named_parameters()}
