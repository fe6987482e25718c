"""Step 1, cycle 0: train a classifier with the task loss alone.

    python 01_train_baseline.py                             # the embedded model on the mood of a story
    python 01_train_baseline.py PRESET=mlp_digits           # the paper's small MLP on scikit-learn's digits
    python 01_train_baseline.py MODEL=gpt2 DATASET=my.jsonl TEST_DATASET=test.jsonl LABEL_FIELD=label SETTING=mine
    torchrun --nproc-per-node 4 01_train_baseline.py        # four processes share every batch; see experiments/at_scale

Writes store/sae_ception/<setting>/baseline/seed_<s>/checkpoints/model_cycle_0_best.pt, history_cycle_0.json
"""
from presets import presets_for

from lib.bench import Bench
from lib.constants import override
from lib.cycles import train_model
from lib.environment import log, log_to, run
from lib.guards import in_use

PRESET = "tiny"                    # tiny, tiny_topics, mlp_digits, mlp_mnist, gpt2_sst2, gpt2_ag_news, gpt_neox_20b
SETTING: str | None = None         # folder of the outputs; None: the preset's name. Other constants need another one
SEED = 0                           # start of the weights, order of the examples, cut of the validation split
DATASET = "store/embedded/stories/train.jsonl"  # hub name or file; images: "digits", a folder of idx.gz, a hub name
TRAIN_SPLIT = "train"              # hub data sets: split to train on
VAL_DATASET: str | None = "store/embedded/stories/val.jsonl"  # None: VAL_FRAC of the training examples
VAL_SPLIT: str | None = None       # hub data sets: split to validate on; None: cut from training
TEST_DATASET: str | None = "store/embedded/stories/test.jsonl"  # None: TEST_SPLIT of DATASET
TEST_SPLIT = "test"                # hub data sets: split that is only reported
TEXT_FIELD = "text"                # column of the text
TEXT_FIELD_HELD_OUT: str | None = None  # its name in the validation and test files; None: the same
LABEL_FIELD = "mood"               # column of the class
ATTRIBUTE_FIELD: str | None = "topic"  # a label never trained on, whose selectivity is measured too; None: none
LABEL_GROUPS: tuple | None = None  # group of each class, e.g. (0, 0, 1, 1): train on the groups, measure the classes too
DATA_LIMIT: int | None = 600       # training examples; None: all
VAL_FRAC = 0.1                     # share of the training examples that validates, where there is no validation set
MAX_LENGTH = 128                   # tokens of a text, special tokens included
PIXEL_SCALE = 1.0                  # images: pixels are multiplied by this
MODEL = "store/embedded/model"     # hub name or directory of a transformers model; "mlp": inputs-16-16-classes
MODEL_DTYPE = "float32"            # precision of the frozen layers; auto: bfloat16 on CUDA. Trained layers are float32
LOAD_BITS: int | None = None       # 8 or 4: frozen layers quantised on loading (needs bitsandbytes and CUDA)
DEVICE_MAP: str | None = None      # auto: spread the model over the devices (needs accelerate)
FSDP = False                       # under torchrun: each rank keeps a share of the weights, for models beyond one GPU
TARGET_LAYER = "last"              # whose output is pulled: last, a block's number, or a layer signature
TRAIN_BELOW = False                # also train what stands below the target layer
GRADIENT_CHECKPOINTING = False     # less memory, one more forward pass
CACHE_ENTRIES = True               # keep what enters the first trained block, so that an epoch costs the trained layers
EPOCHS_PER_CYCLE = 3               # passes over the training examples; the best one by validation is kept
BATCH_SIZE = 32                    # examples of one pass
ACCUMULATE = 1                     # passes of one optimiser step
LR = 1e-3                          # peak learning rate
OPTIMIZER = "adamw"                # adamw, or adam without weight decay
WEIGHT_DECAY = 0.01
WARMUP_STEPS = 10                  # steps of linear warm-up
LR_DECAY = True                    # linear to 0 after the warm-up
CLIP_NORM: float | None = 1.0      # gradient norm; None: off
TRACKER = "local"                  # local, tensorboard, wandb, trackio, mlflow; the history is always written as JSON
DEVICE = "auto"                    # auto, cpu, cuda, mps
CONSTANTS = override(globals(), presets_for(globals()))


def main():
    bench = Bench(CONSTANTS, SEED)
    log_to(bench.root / "01_train_baseline.log")
    sizes = ", ".join(f"{len(ids):,} {name}" for name, ids in bench.task.splits.items())
    log.info("%s: %d classes, %s; target %s", bench.root.name, bench.task.n_classes, sizes, bench.model.target.path)
    with in_use(bench.folder("baseline", 0)):
        train_model(bench, "baseline", 0)
    log.info("%s", bench.folder("baseline", 0) / "checkpoints" / "model_cycle_0_best.pt")


if __name__ == "__main__":
    run(main, parallel=True)
