"""The studies of 07_run_study.py: the constants of 04_train_cycle.py that each has, its lambdas, and its endpoints."""
from typing import Annotated, Any

from lib.ranges import Rule

_COMMON = {"CYCLES": 1, "N_SAE_SEEDS": 2, "METRICS": ("beyond",), "AUX_CENTRED": True}
_ARMS = (
    "lambda0", "per_class", "per_class@25", "per_example", "per_example@2", "random_latents", "full_recon",
    "class_mean", "permuted_in_class", "shuffled_labels", "random_unit", "to_zero", "mse_loss", "untrained_sae",
    "pca_targets", "l1_activation", "weight_decay", "monoloss", "nonneg_contrastive",
)
_OF_ARMS: dict[str, dict[str, Any]] = {"per_class@25": {"KEEP_PCT": 10.0}, "per_example@2": {"KEEP_PER_EXAMPLE": 2}}
# Scales of lambda at which an arm costs little accuracy at the grid's lower end and much at its upper end.
_SCALES = {"class_mean": 0.1, "permuted_in_class": 0.03, "to_zero": 0.03, "random_unit": 0.3, "mse_loss": 0.1,
           "l1_activation": 0.03, "monoloss": 0.03, "nonneg_contrastive": 0.03, "weight_decay": 0.3, "caft": 0.1}


def _of(arms: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    return {arm: own for arm, own in (_OF_ARMS | {arm: {"AUX_WEIGHT": x} for arm, x in _SCALES.items()}).items()
            if arm in arms}


_MNIST = _COMMON | {
    "PRESET": "mlp_mnist", "DATA_LIMIT": 9960, "SAE_EPOCHS": 20, "ARMS": _ARMS, "ARM_CONSTANTS": _of(_ARMS),
    "LAMBDAS": (0.1, 0.3, 1.0, 3.0, 10.0),
}
_PARITY = _MNIST | {"LABEL_GROUPS": (0, 1) * 5}

_DIGITS = _COMMON | {
    "PRESET": "mlp_digits", "SAE_EPOCHS": 20, "ARMS": _ARMS, "ARM_CONSTANTS": _of(_ARMS), "LAMBDAS": _MNIST["LAMBDAS"],
    "LABEL_GROUPS": (0, 1) * 5,
}
_FEW_ARMS = ("lambda0", "per_class", "per_example", "random_latents", "class_mean", "l1_activation", "weight_decay",
             "monoloss", "nonneg_contrastive")
_FEW = {"ARMS": _FEW_ARMS, "ARM_CONSTANTS": _of(_FEW_ARMS), "N_SAE_SEEDS": 1, "METRICS": (),
        "LAMBDAS": (0.1, 0.3, 1.0, 3.0)}

STUDIES: dict[str, dict[str, Any]] = {
    "parity": _PARITY | {"SEEDS": tuple(range(1000, 1030))},
    # The method with the paper's SAE: uncentred, trained along with the network, the cosine about the origin.
    "paper": _PARITY | {
        "SAE_KIND": "l1", "SAE_TRAINED": "along", "SAE_LR": None, "AUX_CENTRED": False, "N_SAE_SEEDS": 1,
        "ARMS": ("lambda0", "per_class", "per_class@25", "class_mean", "permuted_in_class", "shuffled_labels"),
        "ARM_CONSTANTS": {"per_class@25": {"KEEP_PCT": 10.0}}, "SEEDS": tuple(range(1000, 1030)),
    },
    "digits": _DIGITS | {"SEEDS": tuple(range(2000, 2030))},
    "noise": _MNIST | _FEW | {"LABEL_NOISE": 0.3, "SEEDS": tuple(range(3000, 3015))},
    "few": _MNIST | _FEW | {"DATA_LIMIT": 300, "SEEDS": tuple(range(3100, 3115))},
    "shortcut": _PARITY | _FEW | {"ARMS": (*_FEW_ARMS, "caft"), "SHORTCUT": 0.95, "SEEDS": tuple(range(3200, 3215)),
                                  "ARM_CONSTANTS": _of((*_FEW_ARMS, "caft"))},
    "stories": _COMMON | _FEW | {"PRESET": "tiny", "SEEDS": tuple(range(4000, 4010)), "METRICS": ("beyond",)},
    "sst2": _COMMON | _FEW | {"PRESET": "gpt2_sst2", "DATA_LIMIT": 2000, "MAX_LENGTH": 256, "N_LATENTS_MULTIPLIER": 4,
                              "TOP_K": 8, "SAE_EPOCHS": 3, "EVAL_LIMIT": 1000, "PROBE_LIMIT": 1000,
                              "SEEDS": tuple(range(4100, 4106))},
}
_INFORMATION = "base_information_attribute_given_label"
_BEYOND = {"base_u_weighted_attribute_given_label": 0.01, _INFORMATION: 0.05, "base_probe_within_accuracy": 0.01}
_ACCURACY = {"task_accuracy": 0.005}
# Study -> margins of the endpoints, the first one first, and what an arm's lambda may cost (cycles/frontier.Endpoints).
# Units that hardly ever fire have a high U and tell little, so U counts only where their information is kept.
ENDPOINTS = {
    **{study: (_BEYOND, _ACCURACY | {_INFORMATION: 0.05}) for study in ("parity", "paper", "digits", "stories")},
    "noise": (_ACCURACY, _ACCURACY), "few": (_ACCURACY, _ACCURACY), "sst2": ({"base_u": 0.01}, _ACCURACY),
    "shortcut": ({"task_worst_group_accuracy": 0.01}, _ACCURACY),
}
Study = Annotated[str, Rule(f"one of {', '.join(STUDIES)}", lambda study: study in STUDIES)]
