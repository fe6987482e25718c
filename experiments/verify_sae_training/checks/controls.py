"""SAEs that lack what training finds: whatever is claimed of a trained SAE's latents, it has to beat these.

    saes = control_saes(run, hook, settings, folder)     # {"untrained", "frozen_decoder", "frozen_encoder"}

The untrained one is the start of the training itself. The frozen ones (arXiv 2602.14111) are trained on the same rows
for as many steps, with the same k and number of latents, but their decoder (or encoder) stays at its random start.
They have neither whitening nor an aligned encoder, which would fit the frozen part to the data. Each is trained once
and kept in `folder`, named by its settings and data.
"""
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import torch

from checks.evaluation import untrained_sae
from lib.batches import rows_of_run, sample_rows
from lib.files import fingerprint
from lib.outputs import in_use
from lib.sae import SAE, load_sae, save_sae
from lib.store import Run
from lib.training.loop import TrainSettings, train_sae
from lib.training.settings import learning_rate

# Times the rule of lib.training.settings.learning_rate: the best of .03, .1, .3, 1 and 3 by held-out EV
# (observations.md).
CONTROL_RATES = {"decoder": 1.0, "encoder": 0.1}


def control_settings(settings: TrainSettings, frozen: str, n_train: int) -> TrainSettings:
    """The settings of the control with a frozen "decoder" or "encoder". n_train: rows of one epoch."""
    rate = CONTROL_RATES[frozen] * learning_rate(settings.n_latents, settings.epochs * n_train)
    return replace(settings, kind="topk", lr=rate, whiten=0, aligned=False, frozen=frozen)


def control_saes(
    run: Run, hook: str, settings: TrainSettings, folder: Path, device: torch.device | str = "cpu"
) -> dict[str, SAE]:
    """Kind -> SAE; trains those that `folder` does not hold yet, each in about the time of the SAE itself.

    settings: those of the trained SAE. All controls are TopK, whatever kind the SAE is.
    """
    rows = rows_of_run(run, hook)
    found = {"untrained": untrained_sae(rows, settings).to(device)}
    for part in CONTROL_RATES:
        chosen = control_settings(settings, part, rows.n_train)
        place = folder / f"frozen_{part}_{fingerprint([asdict(chosen), run.digest(hook)])[:8]}"
        path = place / "topk_sae.pt"
        with in_use(place):
            if not path.exists():
                sae, history = train_sae(rows, chosen, place, device)
                sae.config.update(hook=hook, run_id=run.run_id, data_digest=run.digest(hook), settings=asdict(chosen),
                                  ev=max(history["val"]["ev"]))
                save_sae(sae, path, probe=next(sample_rows(rows, validation=True)))
            shutil.rmtree(place / "checkpoints", ignore_errors=True)
        found[f"frozen_{part}"] = load_sae(path, device)
    return found


def relative_change(sae: SAE, start: SAE) -> dict[str, float]:
    """How far dictionary and encoder moved from `start`, relative to its norm; a frozen one only by rounding."""
    pairs = {"dictionary": (sae.W_dec, start.W_dec), "encoder": (sae.W_enc, start.W_enc)}
    return {name: float((now.cpu() - then.cpu()).norm() / then.norm()) for name, (now, then) in pairs.items()}
