"""Trainings that are compared with plain TopK: arms, each from several seeds, all at one L0.

    settings = arm_settings("batchtopk", settings, seed)
    place = arm_place(run, hook, settings, folder=folder, arm="batchtopk")
    train_arms(run, hook, {place: settings})                     # those that are not there yet, from one read
    with arm_sae(place) as sae:

A new arm is one row of ARMS.
"""
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch

from lib.batches import Rows, rows_of_run, sample_rows
from lib.environment import InputError
from lib.files import fingerprint
from lib.outputs import in_use
from lib.sae import SAE, load_sae, save_sae
from lib.saes import MODEL_FILE
from lib.store import Run
from lib.training.kinds import KINDS
from lib.training.loop import TrainSettings
from lib.training.many import Job, train_saes
from lib.training.settings import make_plan

REFERENCE = "topk"  # the arm that all others are compared with


def falling(top_k: int) -> int:
    """Where k starts: 60 for 25, as on SynthSAEBench."""
    return round(2.4 * top_k)


# Arm -> the settings in which it differs from step 2's defaults; a function of TOP_K where it gives the value.
ARMS: dict[str, dict[str, Any]] = {
    "topk": {},
    "falling_k": {"start_k": falling},
    "batchtopk": {"kind": "batchtopk"},
    "matryoshka": {"kind": "matryoshka"},
    "jumprelu": {"kind": "jumprelu"},
    "lista": {"kind": "lista", "start_k": falling},
    "not_whitened": {"whiten": 0.0},
    "free_encoder": {"aligned": False},
    "frozen_decoder": {"frozen": "decoder", "whiten": 0.0, "aligned": False},  # which measure does it win?
}
HALVINGS = 18  # of the interval in which the factor on the thresholds lies: it is found to 1 in 50,000
WIDEST = 16.0  # the factor is sought from 1 / WIDEST to WIDEST


def arm_settings(arm: str, settings: TrainSettings, seed: int) -> TrainSettings:
    """Settings as the arm has them with this seed. Raises InputError for an arm that there is not."""
    if arm not in ARMS:
        raise InputError(f"ARMS holds {arm}, which is unknown; choose from {', '.join(ARMS)}")
    changes = {name: value(settings.top_k) if callable(value) else value for name, value in ARMS[arm].items()}
    return replace(settings, **changes, seed=seed)


def arm_place(run: Run, hook: str, settings: TrainSettings, *, folder: Path, arm: str) -> Path:
    """Where in `folder` this arm's SAE lies, named by all that decides its weights.

    settings: of arm_settings. Those at their defaults are not in the name, so that a new setting changes none; nor is
    what follows from the others.
    """
    plan = make_plan(settings, rows_of_run(run, hook).n_train)
    changed = {field.name: value for field in fields(settings)
               if (value := getattr(settings, field.name)) != field.default}
    kind = KINDS[settings.kind]
    twice = [kind.refine, kind.own, kind.ridge, "first as trained"] if kind.refine else []
    key = fingerprint([changed, list(plan[:4]), run.digest(hook), *twice])
    return folder / f"{arm}_seed{settings.seed}_{key[:8]}"


def train_arms(
    run: Run, hook: str, planned: dict[Path, TrainSettings], device: torch.device | str = "cpu"
) -> None:
    """Train the SAEs that their folders lack, from one read, each at a mean L0 of top_k on training rows.

    planned: folder of arm_place -> settings. This process holds all folders meanwhile; trainings that were killed go
    on.
    """
    rows = rows_of_run(run, hook)
    with ExitStack() as held:
        for place in planned:
            held.enter_context(in_use(place))
        missing = [place for place in planned if not (place / MODEL_FILE).exists()]
        for number, sae, _ in train_saes([Job(rows, planned[place], place) for place in missing], device):
            place, settings = missing[number], planned[missing[number]]
            sae = at_mean_l0(sae, rows, settings.top_k)
            sae.config.update(hook=hook, run_id=run.run_id, data_digest=run.digest(hook), settings=asdict(settings))
            save_sae(sae, place / MODEL_FILE, probe=next(sample_rows(rows, validation=True)))
        for place in planned:
            shutil.rmtree(place / "checkpoints", ignore_errors=True)


@contextmanager
def arm_sae(place: Path, device: torch.device | str = "cpu") -> Iterator[SAE]:
    """The SAE of a folder that train_arms filled, while this process holds it."""
    with in_use(place):
        yield load_sae(place / MODEL_FILE, device)


def at_mean_l0(sae: SAE, rows: Rows, l0: float) -> SAE:
    """The SAE with all its thresholds times one factor, chosen so that on average `l0` codes of a training row fire.

    As it is where it has no thresholds: the k largest codes fire. On about 16,000 rows. A threshold of 0 stays 0. So do
    those of a first coding: with them a higher factor may let more codes fire, and several factors give one L0.
    Raises InputError where no factor between 1 / WIDEST and WIDEST does it.
    """
    if (threshold := sae.threshold) is None:
        return sae

    def scaled(power: float) -> SAE:
        return replace(sae, threshold=threshold * WIDEST**power, config=dict(sae.config))

    def fires(power: float) -> float:
        counts = [(scaled(power).encode(x.to(sae.mean.device))[0] > 0).sum(1) for x in sample_rows(rows, False)]
        return float(torch.cat(counts).double().mean())

    low, high = -1.0, 1.0
    if not fires(high) <= l0 <= fires(low):
        raise InputError(f"no factor on the thresholds gives a mean L0 of {l0:g}: between {fires(high):.2f} and "
                         f"{fires(low):.2f} codes fire; set another TOP_K")
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if fires(middle) > l0 else (low, middle)
    return scaled(high)
