"""Save a trained classifier for others: transformers or torch loads it without this project.

    python save_model.py SETTING=reviews                       # per_class after one cycle, seed 0
    python save_model.py SETTING=reviews ARM=lambda0 SEED=2 TO=my_classifier

Reads  store/sae_ception/<setting>/<arm>/seed_<s>/checkpoints/model_cycle_<n>_best.pt
Writes store/sae_ception/<setting>/<arm>/seed_<s>/model_cycle_<n>/: weights, tokenizer, the classes' names, README.md
"""
from pathlib import Path

import checkout  # noqa: F401  (first: finds lib)
from lib.constants import override
from lib.ranges import Device, FileName, Location, NotNegative, Seed
from presets import Arm

PRESET = "tiny"                           # as in step 4
SETTING: FileName | None = None           # as step 4 printed it; None: PRESET
ARM: Arm = "per_class"                    # whose model
CYCLE: NotNegative = 1                    # 0: the baseline
SEED: Seed = 0
TO: Location | None = None                # folder; None: beside the checkpoints
DEVICE: Device = "auto"                   # auto, cpu, cuda, mps
CONSTANTS = override(globals())

from cycles.export import save_for_others
from cycles.session import trained_session
from lib.environment import InputError, log, log_to, run


def main():
    session = trained_session(CONSTANTS)
    log_to(session.root / "save_model.log")
    folder = Path(TO).expanduser() if TO else session.folder(ARM, CYCLE) / f"model_cycle_{CYCLE}"
    if TO and folder.exists():
        raise InputError(f"{folder} is there already; set TO to a new folder")
    print(save_for_others(session, folder.resolve()))
    log.info("%s", folder)


if __name__ == "__main__":
    run(main)
