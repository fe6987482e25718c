"""Step 1, cycle 0: train a classifier with the task loss alone.

    python 01_train_baseline.py                             # the embedded model on the mood of a story
    python 01_train_baseline.py PRESET=mlp_digits           # the paper's small MLP on scikit-learn's digits
    python 01_train_baseline.py MODEL=gpt2 DATASET=my.csv LABEL_FIELD=label      # outputs: .../sae_ception/my
    torchrun --nproc-per-node 4 01_train_baseline.py        # four processes share every batch; see experiments/at_scale

Writes store/sae_ception/<setting>/baseline/seed_<s>/checkpoints/model_cycle_0_best.pt, history_cycle_0.json
"""
from typing import Literal

import checkout  # noqa: F401  (first: finds lib)
from lib.constants import override
from lib.ranges import (
    Amount,
    Count,
    Device,
    FileName,
    Location,
    Name,
    NotNegative,
    Part,
    Positive,
    Precision,
    Rate,
    Seed,
    Share,
    Size,
    Tracker,
)
from presets import TargetLayer, presets_for

PRESET = "tiny"  # or tiny_topics, mlp_digits, mlp_mnist, paper, gpt2_sst2, gpt2_ag_news, gpt_neox_20b
SETTING: FileName | None = None           # folder of the outputs; None: the name of DATASET's file, or PRESET
SEED: Seed = 0                            # start of the weights, order of the examples, cut of the validation split
DATASET: Location = "store/embedded/stories/train.jsonl"  # or a hub name; images: "digits" or idx.gz folder
TRAIN_SPLIT: Name = "train"               # hub data sets: split to train on
VAL_DATASET: Location | None = "store/embedded/stories/val.jsonl"  # None: VAL_FRAC of the training examples
VAL_SPLIT: Name | None = None             # hub data sets: split to validate on; None: cut from training
TEST_DATASET: Location | None = "store/embedded/stories/test.jsonl"  # None: TEST_SPLIT of DATASET, or TEST_FRAC
TEST_SPLIT: Name = "test"                 # hub data sets: split that is only reported
TEXT_FIELD: Name = "text"                 # column of the text
TEXT_FIELD_HELD_OUT: Name | None = None   # its name in the validation and test files; None: the same
LABEL_FIELD: Name = "mood"                # column of the class
ATTRIBUTE_FIELD: Name | None = "topic"    # a label never trained on, whose selectivity is measured too; None: none
LABEL_GROUPS: tuple[NotNegative, ...] | None = None  # (0, 0, 1, 1): train on groups, measure classes too
DATA_LIMIT: Count | Literal["auto"] | None = "auto"  # training examples; auto: 600 of the stories, else all
VAL_FRAC: Share = 0.1                     # of the training examples; validates where there is no validation set
TEST_FRAC: Share = 0.2                    # of a file's rows; tests where there is no test set, the same for every seed
LABEL_NOISE: Part = 0.0                   # share of training labels that the seed replaces by wrong ones
SHORTCUT: Part | None = None              # images: share of training images whose class a planted corner block names
MAX_LENGTH: Size = 128                    # tokens of a text, special tokens included
PIXEL_SCALE: Positive = 1.0               # images: pixels are multiplied by this
MODEL: Location = "store/embedded/model"  # hub name, directory, "mlp", or my_model.py:make_classifier (README.md)
MODEL_DTYPE: Precision = "float32"        # of the frozen layers; auto: bfloat16 on CUDA. Trained ones are float32
LOAD_BITS: Literal[4, 8] | None = None    # 8 or 4: frozen layers quantised on loading (needs bitsandbytes and CUDA)
DEVICE_MAP: Literal["auto"] | None = None  # auto: spread the model over the devices (needs accelerate)
FSDP = False                              # under torchrun: each rank keeps a share of the weights
KEEP_HEAD = True                          # a transformers classifier keeps its own head; False: a new one
TARGET_LAYER: TargetLayer = "last"        # whose output is pulled: last, a block's number, or a layer signature
TRAIN_BELOW = False                       # also train what stands below the target layer
GRADIENT_CHECKPOINTING = False            # less memory, one more forward pass
CACHE_ENTRIES = True                      # keep what enters the first trained block: epochs cost the trained layers
EPOCHS_PER_CYCLE: Size = 3                # passes over the training examples
SELECT_EPOCH: Literal["last", "best"] = "last"  # last: all arms train equally long; best: the best epoch by validation
BATCH_SIZE: Size = 32                     # examples of one pass
ACCUMULATE: Size = 1                      # passes of one optimiser step
LR: Rate = 1e-3                           # peak learning rate
OPTIMIZER: Literal["adamw", "adam"] = "adamw"  # adamw, or adam without weight decay
WEIGHT_DECAY: Amount = 0.01
WARMUP_STEPS: NotNegative = 10            # steps of linear warm-up
LR_DECAY = True                           # linear to 0 after the warm-up
CLIP_NORM: Positive | None = 1.0          # gradient norm; None: off
TRACKER: Tracker = "local"                # or tensorboard, wandb, trackio, mlflow; JSON is always written
DEVICE: Device = "auto"                   # auto, cpu, cuda, mps
CONSTANTS = override(globals(), presets_for(globals()))

from cycles.session import Session
from cycles.steps import train_model
from cycles.tasks import say_what_is_scored
from lib.environment import log, log_to, run, say_next
from lib.outputs import in_use


def main():
    session = Session(CONSTANTS, SEED)
    log_to(session.root / "01_train_baseline.log")
    log.info("%s: target %s", session.root.name, session.model.target.path)
    say_what_is_scored(session.task, session.c, SEED)
    with in_use(session.folder("baseline", 0)):
        train_model(session, "baseline", 0)
    log.info("%s", session.folder("baseline", 0) / "checkpoints" / "model_cycle_0_best.pt")
    setting = None if session.root.name == PRESET else session.root.name
    say_next("02_train_sae.py", PRESET=PRESET, SETTING=setting, SEED=SEED)


if __name__ == "__main__":
    run(main, parallel=True)
