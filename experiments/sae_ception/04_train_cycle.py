"""The main script: cycles of SAE-ception for several arms and seeds, evaluated and compared. Runs steps 1 to 3.

    python 04_train_cycle.py                                # the embedded model; minutes on two cores
    python 04_train_cycle.py DATASET=my.csv TEXT_FIELD=review LABEL_FIELD=stars    # texts of your own
    python 04_train_cycle.py PRESET=mlp_digits
    python 04_train_cycle.py PRESET=mlp_mnist DATASET=../shared/assets/data/mnist
    python 04_train_cycle.py PRESET=gpt2_sst2 CYCLES=1 SEEDS=0,1,2

Rerun after an interruption, it resumes. It uses the outputs of steps 1 to 3 that were made with these constants.
Writes store/sae_ception/<setting>/<arm>/seed_<s>/..., results.csv and summary.json
"""
from typing import Annotated, Literal

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
    Percent,
    Positive,
    Precision,
    Rate,
    Seed,
    Share,
    Size,
    Threads,
    Tracker,
    at_least,
    at_most,
)
from presets import Arm, ForArm, Metric, TargetLayer, Weight, presets_for

PRESET = "tiny"  # or tiny_topics, mlp_digits, mlp_mnist, paper, gpt2_sst2, gpt2_ag_news, gpt_neox_20b
SETTING: FileName | None = None           # folder of the outputs; None: the name of DATASET's file, or PRESET
ARMS: tuple[Arm, ...] = ("lambda0", "per_class", "class_mean", "shuffled_labels", "random_latents")  # all: README.md
SEEDS: tuple[Seed, ...] = (0, 1, 2)       # each: start, order, validation cut, SAE seed; arms are paired by seed
CYCLES: Size = 1                          # auxiliary cycles after the baseline
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
SAE_KIND: Literal["topk", "l1"] = "topk"  # l1: the paper's, uncentred, ReLU and an L1 penalty; it has no TOP_K
SAE_TRAINED: Literal["after", "along"] = "after"  # along (l1 only): on the classifier's batches while that trains
SAE_L1: Positive = 0.75                   # of l1: weight of the mean absolute code in its loss
N_LATENTS_MULTIPLIER: Size = 4            # latents per activation dimension
TOP_K: Size = 8                           # latents that may fire on one token; the same for all arms and cycles
SAE_EPOCHS: Size = 3                      # passes over the activations; TopK keeps the best one by validation
SAE_BATCH_SIZE: Size = 512                # activations of one step
SAE_LR: Rate | None = None                # peak learning rate; None: a rule over the SAE's shape, l1 1e-3
SAE_POSITIONS: Literal["tokens", "pooled"] = "tokens"  # all real tokens, or only what the head reads
N_SAE_SEEDS: Size = 1                     # SAEs per model; metrics are averaged over them before arms are compared
AUX_WEIGHT: Weight | tuple[Weight, ...] = 1.0  # lambda; a tuple gives each cycle its own
AUX_CENTRED = False                       # True: cosine about the mean activation; README.md says why it matters
KEEP_PCT: Percent = 2.0                   # latents that a class keeps, in percent
KEEP_PER_EXAMPLE: Size | None = None      # per_example: codes that an example keeps; None: half of TOP_K
INIT: Literal["continue", "scratch"] = "continue"  # start of a cycle's model: the last, or cycle 0's start
SHARPEN_SEED: Seed = 42                   # draws random targets and permutations
ARM_CONSTANTS: dict[Arm, ForArm] = {}     # for single arms: {"class_mean": {"AUX_WEIGHT": 0.3}}
EVAL_LIMIT: Count | None = 1000           # scored examples of a split, with each class's share; None: all
PROBE_LIMIT: Count | None = 1000          # training examples of thresholds and probes, drawn alike; None: all
SILHOUETTE_ROWS: Annotated[int, at_least(2), at_most(10_000)] = 1000  # examples; silhouettes need all pairs
ROBUST_LIMIT: NotNegative = 64            # examples under attack, and texts of the perplexity; 0: none
ROBUST_EPS: tuple[Positive, ...] = (0.05, 0.1)  # budgets: of the pixel range, or the median embedding norm
ABSORPTION_TOKENS: NotNegative = 2000     # tokens of scored examples for the absorption score; 0: none
METRICS: tuple[Metric, ...] | tuple[()] = ("probes", "clustering", "language")  # on test; "robustness" costs most
TRACKER: Tracker = "local"                # or tensorboard, wandb, trackio, mlflow; JSON is always written
DEVICE: Device = "auto"                   # auto, cpu, cuda, mps
WORKERS: Threads | None = None            # processes that share the seeds; None: several for small models on a CPU
CONSTANTS = override(globals(), presets_for(globals()))

import pandas
import torch
from tqdm.auto import tqdm

from cycles.comparison import by_seed, pulls, result_table, summary
from cycles.metrics import PRIMARY, REPORTED
from cycles.seeds import Cosines, all_cycles, as_they_end, in_processes, n_evaluated, n_workers, of_seed, stages
from cycles.session import Session, setting_root
from cycles.steps import drop_undefined
from cycles.tasks import say_what_is_scored
from lib.environment import log, log_to, run, say_next
from lib.files import write_json, write_text
from lib.statistics import interval

LOG = "04_train_cycle.log"
WITH_INTERVAL = ("task_accuracy", *PRIMARY)


def train_all() -> Cosines:
    """Every arm and cycle of every seed, in this process or in several."""
    first = [Session(CONSTANTS, SEEDS[0])]
    say_what_is_scored(first[0].task, first[0].c, first[0].seed)
    workers, root = WORKERS or n_workers(first[0], SEEDS), first[0].root
    cosines: Cosines = {}
    with tqdm(total=len(SEEDS) * len(stages(CONSTANTS)), unit="model", desc="cycles") as bar:
        if workers == 1:
            for seed in SEEDS:
                # A session's model is gone before the next seed loads one.
                cosines |= all_cycles(first.pop() if first else Session(CONSTANTS, seed), bar.update)
            return cosines
        log.info("%d seeds in %d processes, whose messages alternate", len(SEEDS), workers)
        threads = max(1, torch.get_num_threads() // workers)
        with in_processes(of_seed, CONSTANTS, SEEDS, workers=workers, threads=threads,
                          log_file=root / LOG) as jobs:
            for found in as_they_end(jobs, lambda: bar.update(n_evaluated(root, CONSTANTS) - bar.n)):
                cosines |= found
    return {of: cosines[of] for seed in SEEDS for of in cosines if of[1] == seed}  # in the order of one process


def print_pulls(table) -> None:
    """How hard each arm was pulled: one lambda does not make arms pull equally hard."""
    for cycle in range(1, CYCLES + 1):
        found = pulls(table, list(ARMS), cycle)
        if len(found):
            print(f"\ncycle {cycle}: the pull of each arm")
            shown = found[["arm", "cos_end", "cos_lambda0", "loss_ratio", "grad_ratio", "verdict"]]
            print(shown.to_string(index=False, float_format="{:.3f}".format))


def print_table(table) -> None:
    """Test means over seeds; for accuracy and the primary metrics ± half the 95 % t interval."""
    columns = {key: metric.column for key, metric in REPORTED.items() if metric.column}
    rows = []
    for arm in ("baseline", *ARMS):
        for cycle in [0] if arm == "baseline" else range(1, CYCLES + 1):
            rows.append({"arm": arm, "cycle": cycle})
            for key, name in columns.items():
                found = interval(by_seed(table, arm, cycle, key))
                rows[-1][name] = f"{found.mean:.4f} ± {found.half:.4f}" if key in WITH_INTERVAL else found.mean
    print("\n" + pandas.DataFrame(rows).to_string(index=False, float_format="{:.3f}".format))


def print_comparison(found) -> None:
    print(f"\n{found['arm']} at cycle {found['chosen_cycle']} (chosen on validation) minus each control, test, "
          f"{found['n_seeds']} seeds")
    frame = pandas.DataFrame([*found["primary"], *found["accuracy"]])
    print(frame[["metric", "control", "mean", "low", "high", "p_holm"]].to_string(
        index=False, float_format="{:+.4f}".format, formatters={"p_holm": "{:.3f}".format}))
    if found["n_seeds"] < 3:
        print("fewer than 3 seeds: no claim can be made")


def main():
    root = setting_root(CONSTANTS)
    log_to(root / LOG)
    cosines = train_all()
    table = result_table(root, tuple(ARMS), seeds=tuple(SEEDS), cycles=CYCLES, cosines=cosines)
    write_text(root / "results.csv", table.to_csv(index=False))
    found = summary(table, tuple(ARMS), CYCLES)
    write_json(root / "summary.json", drop_undefined(found), sealed=True)
    print_table(table)
    print_pulls(table)
    if "primary" in found:
        print_comparison(found)
    log.info("%s", root / "results.csv")
    say_next("05_compare_cycles.ipynb", SETTING=root.name)


if __name__ == "__main__":
    run(main)
