"""Step 3: one auxiliary cycle of one arm. Model and SAE of cycle n give targets; model n + 1 is pulled to them.

    python 03_train_auxiliary.py                            # per_class targets from the baseline: cycle 1
    python 03_train_auxiliary.py CYCLE=1 ARM=random_unit    # from cycle 1 to cycle 2
    python 03_train_auxiliary.py AUX_WEIGHT=0.1 KEEP_PCT=2 SETTING=weaker    # after steps 1 and 2 with that SETTING
    torchrun --nproc-per-node 4 03_train_auxiliary.py       # four processes share every batch, as in step 1

L_total = L_task + AUX_WEIGHT * mean(1 - cos(h, target)); README.md says what arms without targets do instead.
Data, model and SAE are those of the setting's steps 1 and 2.
Reads  store/sae_ception/<setting>/<arm>/seed_<s>/checkpoints/{model,sae}_cycle_<n>_best.pt
Writes .../targets_cycle_<n>.safetensors, checkpoints/model_cycle_<n+1>_best.pt, history_cycle_<n+1>.json
"""
from typing import Literal

import checkout  # noqa: F401  (first: finds lib)
from lib.constants import override
from lib.ranges import Device, FileName, NotNegative, Percent, Seed, Size, Tracker
from presets import Arm, ForArm, Weight, presets_for

PRESET = "tiny"                           # as in step 1
SETTING: FileName | None = None           # as in step 1
SEED: Seed = 0                            # as in step 1
CYCLE: NotNegative = 0                    # the cycle that gives the targets; its successor is trained
ARM: Arm = "per_class"                    # way of training on; README.md lists all
AUX_WEIGHT: Weight | tuple[Weight, ...] = 1.0  # lambda; a tuple gives each cycle its own
AUX_CENTRED = False                       # True: cosine about the mean activation; README.md says why it matters
KEEP_PCT: Percent = 2.0                   # latents that a class keeps, in percent
KEEP_PER_EXAMPLE: Size | None = None      # per_example: codes that an example keeps; None: half of TOP_K
INIT: Literal["continue", "scratch"] = "continue"  # start of the next model: this cycle's, or cycle 0's start
SHARPEN_SEED: Seed = 42                   # draws random targets and permutations
ARM_CONSTANTS: dict[Arm, ForArm] = {}     # for single arms: {"class_mean": {"AUX_WEIGHT": 0.3}}
TRACKER: Tracker = "local"                # local, tensorboard, wandb, trackio, mlflow
DEVICE: Device = "auto"                   # auto, cpu, cuda, mps
CONSTANTS = override(globals(), presets_for(globals()))

from cycles import schemas
from cycles.session import Session, inherited
from cycles.steps import train_model
from lib.distributed import rank
from lib.environment import log, log_to, run, say_next
from lib.files import read_json
from lib.outputs import in_use


def main():
    session = Session(inherited(CONSTANTS, SEED, ARM), SEED)
    log_to(session.root / "03_train_auxiliary.log")
    with in_use(session.folder("baseline", 0)):
        train_model(session, ARM, CYCLE + 1)
    folder = session.folder(ARM, CYCLE + 1)
    if rank() == 0:
        history = read_json(folder / f"history_cycle_{CYCLE + 1}.json", schemas.CYCLE_HISTORY)
        for name, value in history.get("aux", {}).items():
            log.info("  %-18s %.4f", name, value)
    log.info("%s", folder / "checkpoints" / f"model_cycle_{CYCLE + 1}_best.pt")
    say_next("02_train_sae.py", PRESET=PRESET, SETTING=SETTING, SEED=SEED, CYCLE=CYCLE + 1, ARM=ARM)


if __name__ == "__main__":
    run(main, parallel=True)
