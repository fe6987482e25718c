"""SAEs that lack what training finds: whatever is claimed of a trained SAE's latents, it has to beat these.

    saes = control_saes(run, hook, settings, folder)     # {"untrained", "frozen_decoder", "frozen_encoder"}

The untrained one is the start of the training itself. The frozen ones (arXiv 2602.14111) are trained on the same rows
for as many steps, with the same k and number of latents, but their decoder (or encoder) stays at its random start.
They have neither whitening nor an aligned encoder, which would fit the frozen part to the data. Each is trained once
and kept in `folder`, named by its settings and data.
"""
import shutil
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import torch

from checks.evaluation import untrained_sae
from lib.batches import rows_of_run, sample_rows, steps_per_epoch
from lib.files import fingerprint
from lib.outputs import in_use
from lib.sae import SAE, load_sae, save_sae
from lib.saes import MODEL_FILE
from lib.store import Run
from lib.training.loop import TrainSettings
from lib.training.many import Job, train_saes
from lib.training.settings import learning_rate

# Times the rule of lib.training.settings.learning_rate: the best of .03, .1, .3, 1 and 3 by held-out EV
# (observations.md).
CONTROL_RATES = {"decoder": 1.0, "encoder": 0.1}


def control_settings(settings: TrainSettings, frozen: str, n_train: int) -> TrainSettings:
    """The settings of the control with a frozen "decoder" or "encoder". n_train: rows of one epoch."""
    rate = CONTROL_RATES[frozen] * learning_rate(settings.n_latents, settings.epochs * n_train)
    return replace(settings, kind="topk", lr=rate, whiten=0, aligned=False, frozen=frozen)


def control_saes(
    run: Run, hook: str, settings: TrainSettings, folder: Path, *, n_steps: int | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, SAE]:
    """Kind -> SAE; trains those that `folder` lacks, from one read, each in about the time of the SAE itself.

    settings: those of the trained SAE. n_steps: its steps, if it was not trained on the run's own rows but while the
    model read: the controls then pass over the run's rows until they have taken as many. All controls are TopK,
    whatever kind the SAE is.
    """
    rows = rows_of_run(run, hook)
    if n_steps:
        settings = replace(settings, epochs=max(1, round(n_steps / steps_per_epoch(rows.n_train, settings.batch_size))))
    chosen = {part: control_settings(settings, part, rows.n_train) for part in CONTROL_RATES}
    places = {part: folder / f"frozen_{part}_{fingerprint([asdict(of_part), run.digest(hook)])[:8]}"
              for part, of_part in chosen.items()}
    with ExitStack() as held:
        for place in places.values():
            held.enter_context(in_use(place))
        missing = [part for part, place in places.items() if not (place / MODEL_FILE).exists()]
        for number, sae, history in train_saes([Job(rows, chosen[part], places[part]) for part in missing], device):
            part = missing[number]
            sae.config.update(hook=hook, run_id=run.run_id, data_digest=run.digest(hook), settings=asdict(chosen[part]),
                              ev=max(history["val"]["ev"]))
            save_sae(sae, places[part] / MODEL_FILE, probe=next(sample_rows(rows, validation=True)))
        for place in places.values():
            shutil.rmtree(place / "checkpoints", ignore_errors=True)
    found = {"untrained": untrained_sae(rows, settings).to(device)}
    return found | {f"frozen_{part}": load_sae(place / MODEL_FILE, device) for part, place in places.items()}


def relative_change(sae: SAE, start: SAE) -> dict[str, float]:
    """How far dictionary and encoder moved from `start`, relative to its norm; a frozen one only by rounding."""
    pairs = {"dictionary": (sae.W_dec, start.W_dec), "encoder": (sae.W_enc, start.W_enc)}
    return {name: float((now.cpu() - then.cpu()).norm() / then.norm()) for name, (now, then) in pairs.items()}
