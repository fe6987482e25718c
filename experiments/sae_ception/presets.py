"""The presets, each with the constants that differ from the scripts' defaults ("tiny"), and what constants may be."""
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

from cycles.arms import ARMS, unlabelled
from cycles.metrics import OPTIONAL
from lib.environment import PROJECT
from lib.ranges import Name, Percent, Rule, Seed, Size, at_least, at_most, like

Arm = Annotated[
    str,
    Rule(f"one of {', '.join(ARMS)}; a label may follow, as in per_class@weak", lambda arm: unlabelled(arm) in ARMS),
    like(r"[a-z0-9_]+(@[A-Za-z0-9_.\-]{1,100})?",
         "an arm's name, or that with a label of letters, digits, '_', '-' and '.'")._replace(shown=False),
]
Metric = Annotated[str, Rule(f"one of {', '.join(OPTIONAL)}", lambda group: group in OPTIONAL)]
TargetLayer = Name  # "last", a block's number, or a layer signature: the model knows which there are
Weight = Annotated[float, at_least(0), at_most(10**6)]
_METRICS = tuple(name for name in OPTIONAL if name != "concepts")  # which only the embedded stories have
TEXT_FILES = (".csv", ".tsv", ".jsonl", ".json", ".txt", ".parquet")


class ForArm(TypedDict, total=False):
    """Constants of a single arm."""

    AUX_WEIGHT: Weight | tuple[Weight, ...]
    AUX_CENTRED: bool
    KEEP_PCT: Percent
    KEEP_PER_EXAMPLE: Size | None
    SHARPEN_SEED: Seed
    INIT: Literal["continue", "scratch"]


_MLP = {
    "MODEL": "mlp", "TARGET_LAYER": "layers.1", "LABEL_FIELD": "digit", "ATTRIBUTE_FIELD": None, "DATA_LIMIT": None,
    "VAL_DATASET": None, "INIT": "scratch", "EPOCHS_PER_CYCLE": 20, "BATCH_SIZE": 64, "LR": 1e-3, "OPTIMIZER": "adam",
    "WEIGHT_DECAY": 0.0, "WARMUP_STEPS": 0, "LR_DECAY": False, "CLIP_NORM": None,
    "N_LATENTS_MULTIPLIER": 16, "TOP_K": 8, "SAE_EPOCHS": 50, "SAE_BATCH_SIZE": 256, "SAE_POSITIONS": "pooled",
    # At a width of 16 the rule's 2e-2 leaves 88 % of 256 latents dead (EV .985); 3e-3 leaves 21 % (EV .978).
    "SAE_LR": 3e-3,
    "AUX_WEIGHT": 1.0, "KEEP_PCT": 2.0, "CYCLES": 3, "SEEDS": tuple(range(10)), "N_SAE_SEEDS": 2,
    "ARMS": ("new_seed", "lambda0", "per_class", "per_example", "full_recon", "random_unit", "permuted",
             "random_latents", "shuffled_labels", "global_mask", "class_mean", "constant"),
    "EVAL_LIMIT": 10_000, "PROBE_LIMIT": 10_000, "SILHOUETTE_ROWS": 2_000, "ROBUST_LIMIT": 2_000,
    "ABSORPTION_TOKENS": 0, "METRICS": _METRICS,
}
_MNIST = {"DATASET": "ylecun/mnist", "TEST_DATASET": None, "PIXEL_SCALE": 1 / 255, "VAL_FRAC": 1 / 6}
_GPT2 = {
    "MODEL": "gpt2", "TARGET_LAYER": "last", "ATTRIBUTE_FIELD": None, "DATA_LIMIT": None, "VAL_DATASET": None,
    "EPOCHS_PER_CYCLE": 3, "BATCH_SIZE": 32, "LR": 1e-4, "OPTIMIZER": "adamw", "WEIGHT_DECAY": 0.01,
    "WARMUP_STEPS": 100, "LR_DECAY": True, "CLIP_NORM": 1.0,
    "N_LATENTS_MULTIPLIER": 8, "TOP_K": 50, "SAE_EPOCHS": 5, "SAE_BATCH_SIZE": 1024, "SAE_POSITIONS": "tokens",
    "KEEP_PCT": 1.0, "CYCLES": 3, "SEEDS": tuple(range(5)), "N_SAE_SEEDS": 2,
    "EVAL_LIMIT": 10_000, "PROBE_LIMIT": 10_000, "SILHOUETTE_ROWS": 10_000, "ROBUST_LIMIT": 500,
    "ABSORPTION_TOKENS": 20_000, "METRICS": _METRICS,
}
_AG_NEWS = {"DATASET": "fancyzhx/ag_news", "TEST_DATASET": None, "TEST_SPLIT": "test", "TEXT_FIELD": "text",
            "LABEL_FIELD": "label", "MAX_LENGTH": 256}

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "tiny_topics": {"LABEL_FIELD": "topic", "ATTRIBUTE_FIELD": "mood"},
    "mlp_digits": _MLP | {"DATASET": "digits", "TEST_DATASET": None, "PIXEL_SCALE": 1 / 16, "VAL_FRAC": 0.25},
    "mlp_mnist": _MLP | _MNIST,
    # As the paper's public MNIST code: 25 of 256 latents, lambda of cycles 1, 2 and 3, its own SAE.
    "paper": _MLP | _MNIST | {
        "SAE_KIND": "l1", "SAE_TRAINED": "along", "SAE_LR": None, "KEEP_PCT": 10.0, "AUX_WEIGHT": (0.14, 0.06, 0.18),
    },
    "gpt2_sst2": _GPT2 | {
        "DATASET": "stanfordnlp/sst2", "TEST_DATASET": None, "TEST_SPLIT": "validation", "TEXT_FIELD": "sentence",
        "LABEL_FIELD": "label", "MAX_LENGTH": 128, "VAL_FRAC": 0.05,
    },
    "gpt2_ag_news": _GPT2 | _AG_NEWS | {"VAL_FRAC": 0.05, "SEEDS": (0, 1, 2)},
    "gpt_neox_20b": _GPT2 | _AG_NEWS | {
        "MODEL": "EleutherAI/gpt-neox-20b", "MODEL_DTYPE": "bfloat16", "GRADIENT_CHECKPOINTING": True,
        "CACHE_ENTRIES": False, "WEIGHT_DECAY": 0.1, "WARMUP_STEPS": 500, "BATCH_SIZE": 4, "ACCUMULATE": 16,
        "EPOCHS_PER_CYCLE": 1, "TOP_K": 64, "SAE_EPOCHS": 1, "VAL_FRAC": 0.05, "CYCLES": 1, "SEEDS": (0,),
        "N_SAE_SEEDS": 1, "ARMS": ("lambda0", "per_class"), "PROBE_LIMIT": 2_000, "EVAL_LIMIT": 2_000,
        "ABSORPTION_TOKENS": 0,
    },
}


def presets_for(namespace: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """PRESETS cut down to the constants that a script has (its globals())."""
    return {name: {k: v for k, v in values.items() if k in namespace} for name, values in PRESETS.items()}


def setting_name(c: dict[str, Any]) -> str:
    """The folder of a setting's outputs: SETTING, else the name of the file of own data or model, else the preset."""
    own_model = re.fullmatch(r"(.+\.py):\w+", c.get("MODEL") or "")
    path = Path(own_model[1] if own_model else c.get("DATASET") or "")
    stories = Path("store", "embedded", "stories")
    is_own = own_model or path.suffix in TEXT_FILES and path.parent not in (stories, PROJECT / stories)
    return c.get("SETTING") or (re.sub(r"[^A-Za-z0-9_.\-]|^[.\-]", "_", path.stem)[:200] if is_own else c["PRESET"])
