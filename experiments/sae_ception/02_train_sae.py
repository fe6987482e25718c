"""Step 2: train an SAE on the activations of a finished model, at its target layer. The model stays frozen.

    python 02_train_sae.py                                  # on the baseline
    python 02_train_sae.py CYCLE=1 ARM=per_class            # on the model of a later cycle
    python 02_train_sae.py PRESET=mlp_digits TOP_K=4 SETTING=digits_k4    # after step 1 with that PRESET and SETTING

Data, model and layer are those of the setting's step 1.
Reads  store/sae_ception/<setting>/<arm>/seed_<s>/checkpoints/model_cycle_<n>_best.pt
Writes .../checkpoints/sae_cycle_<n>_best.pt and .json
"""
from typing import Literal

import checkout  # noqa: F401  (first: finds lib)
from lib.constants import override
from lib.ranges import Device, FileName, NotNegative, Positive, Rate, Seed, Size
from presets import Arm, presets_for

PRESET = "tiny"                           # as in step 1
SETTING: FileName | None = None           # as in step 1
SEED: Seed = 0                            # as in step 1
CYCLE: NotNegative = 0                    # which cycle's model
ARM: Arm = "per_class"                    # whose model; cycle 0 is the same for all arms
SAE_KIND: Literal["topk", "l1"] = "topk"  # l1: the paper's, uncentred, ReLU and an L1 penalty; it has no TOP_K
SAE_TRAINED: Literal["after", "along"] = "after"  # along (l1 only): on the classifier's batches while that trains
SAE_L1: Positive = 0.75                   # of l1: weight of the mean absolute code in its loss
N_LATENTS_MULTIPLIER: Size = 4            # latents per activation dimension
TOP_K: Size = 8                           # latents that may fire on one token; the same for all arms and cycles
SAE_EPOCHS: Size = 3                      # passes over the activations; TopK keeps the best one by validation
SAE_BATCH_SIZE: Size = 512                # activations of one step
SAE_LR: Rate | None = None                # peak learning rate; None: a rule over the SAE's shape, l1 1e-3
SAE_POSITIONS: Literal["tokens", "pooled"] = "tokens"  # all real tokens, or only what the head reads
DEVICE: Device = "auto"                   # auto, cpu, cuda, mps
CONSTANTS = override(globals(), presets_for(globals()))

from cycles.session import Session, inherited
from cycles.steps import train_cycle_sae
from lib.environment import log, log_to, run, say_next
from lib.outputs import in_use


def main():
    session = Session(inherited(CONSTANTS, SEED, ARM), SEED)
    log_to(session.root / "02_train_sae.log")
    with in_use(session.folder("baseline", 0)):
        train_cycle_sae(session, ARM, CYCLE)
    log.info("%s", session.folder(ARM, CYCLE) / "checkpoints" / f"sae_cycle_{CYCLE}_best.pt")
    say_next("03_train_auxiliary.py", PRESET=PRESET, SETTING=SETTING, SEED=SEED, CYCLE=CYCLE, ARM=ARM)


if __name__ == "__main__":
    run(main)
