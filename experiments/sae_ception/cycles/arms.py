"""The arms: one row for each way of training on after the baseline. All code reads this table, and README.md shows it.

To add an arm:
1. Add its row to ARMS.
2. If it pulls towards targets, write a function of its name in cycles/targets.py that makes them; if it has a loss of
   another form, one in cycles/penalties.py.
3. If it takes a constant of its own, declare that in 03_train_auxiliary.py, 04_train_cycle.py and presets.ForArm.
4. Add its line to the table of README.md; a test compares the two.

Nothing here needs torch, so that scripts refuse a wrong arm at once.
"""
from typing import Any, Literal, NamedTuple

WEIGHTED = ("INIT", "AUX_WEIGHT")
PULLED = (*WEIGHTED, "AUX_CENTRED")
MASKED = (*PULLED, "KEEP_PCT")


class Arm(NamedTuple):
    """One way of training on."""

    target: str
    """What example i is pulled to, or what else is done to the training."""
    asks: str
    """What comparing it with per_class tells."""
    takes: tuple[str, ...] = PULLED
    """Constants that decide what it does."""
    must_be_beaten: bool = False
    """per_class succeeds only if it beats this arm."""
    own_seed: bool = False
    """Starts from weights, and takes the examples in an order, that no other arm has."""
    acts: Literal["pull", "penalty", "decay", "ablation", "nothing"] = "pull"
    """Where lambda acts: a loss that pulls to targets, one on the activations alone, the optimiser's weight decay, a
    projection while the network trains; nothing: the task loss alone."""
    loss: Literal["cosine", "mse"] = "cosine"
    """How far it is to the targets: 1 - cosine, or the mean squared error over the activations' variance."""
    untrained_sae: bool = False
    """Whether an SAE with random weights, of the same shape, takes the place of the trained one."""

    @property
    def has_targets(self) -> bool:
        """Whether it pulls to targets, which are kept on disk."""
        return self.acts == "pull"


ARMS = {
    "lambda0": Arm(
        "none: the same further training with lambda 0", "does anything beyond more training happen?",
        takes=("INIT",), must_be_beaten=True, acts="nothing",
    ),
    "new_seed": Arm(
        "none; from scratch with another start (of a text classifier: another new head) and order",
        "how large is the noise? (for `INIT=scratch`, where lambda0 repeats the baseline bit for bit)",
        takes=("INIT",), own_seed=True, acts="nothing",
    ),
    "per_class": Arm("decode(codes of the latents with the largest class means)", "**the method**", MASKED),
    "per_example": Arm(
        "decode(the example's own largest codes)", "is label information needed?", (*PULLED, "KEEP_PER_EXAMPLE")
    ),
    "full_recon": Arm("decode(all codes)", "is sharpening needed?"),
    "random_unit": Arm(
        "a fixed random direction for each example; about the mean where the cosine is", "does any pull do it?",
        (*PULLED, "SHARPEN_SEED"), must_be_beaten=True,
    ),
    "permuted": Arm(
        "the per_class target of another example", "does pairing matter?", (*MASKED, "SHARPEN_SEED"),
        must_be_beaten=True,
    ),
    "permuted_in_class": Arm(
        "the per_class target of another example of its class", "does pairing within a class matter?",
        (*MASKED, "SHARPEN_SEED"),
    ),
    "random_latents": Arm(
        "as many of the example's codes as per_class keeps, at random, same norm",
        "does the choice of latents matter?", (*MASKED, "SHARPEN_SEED"), must_be_beaten=True,
    ),
    "shuffled_labels": Arm(
        "per_class with the mask of another example's class", "is it label information?", (*MASKED, "SHARPEN_SEED"),
        must_be_beaten=True,
    ),
    "global_mask": Arm(
        "per_class with masks computed from shuffled labels", "do nearly the same latents for every class do it?",
        (*MASKED, "SHARPEN_SEED"),
    ),
    "class_mean": Arm(
        "mean activation of the class, no SAE", "does the SAE add anything?", must_be_beaten=True,
    ),
    "constant": Arm(
        "decode(0); with `AUX_CENTRED` one random direction about the mean for all", "does one target for all do it?",
        (*PULLED, "SHARPEN_SEED"),
    ),
    "to_zero": Arm("0, with `AUX_CENTRED` only: activations shrink", "does shrinking alone move the metric?"),
    "complement": Arm("decode(the codes that per_class drops)", "do the dropped codes do as well?", MASKED),
    "contrast": Arm(
        "per_class with latents ranked by class mean minus the other classes'", "does the ranking matter?", MASKED
    ),
    "mse_loss": Arm(
        "the per_class target, by mean squared error over the variance of the activations", "does the cosine matter?",
        MASKED, loss="mse",
    ),
    "untrained_sae": Arm(
        "per_class with an SAE of random weights", "must the SAE have learnt anything?", (*MASKED, "SHARPEN_SEED"),
        untrained_sae=True,
    ),
    "pca_targets": Arm(
        "its projection onto as many principal directions as per_class keeps latents, about the mean",
        "does any small basis do it?", MASKED,
    ),
    "l1_activation": Arm(
        "none; lambda times the mean absolute activation", "does plain sparsity do it?", WEIGHTED, acts="penalty"
    ),
    "weight_decay": Arm(
        "none; lambda is the optimiser's decoupled weight decay, added to `WEIGHT_DECAY`",
        "does any regulariser do it?", WEIGHTED, acts="decay",
    ),
    "monoloss": Arm(
        "none; 1 - MonoScore of the units in each batch (arXiv 2602.12403), similarities by the model before",
        "does a loss that rewards units which fire on like examples do better?", PULLED, acts="penalty",
    ),
    "nonneg_contrastive": Arm(
        "none; supervised contrastive loss of the non-negative activations in each batch (arXiv 2410.21331)",
        "does a non-negative contrastive loss do better?", WEIGHTED, acts="penalty",
    ),
    "caft": Arm(
        "none; while it trains, lambda (0-1) of the activations in the span of the latents that tell most of "
        "`ATTRIBUTE_FIELD` beyond the label is taken out (arXiv 2507.16795)",
        "does ablating an unwanted concept while fine-tuning do better?", (*WEIGHTED, "KEEP_PCT"), acts="ablation",
    ),
}
CONSTANTS = {name for arm in ARMS.values() for name in arm.takes}


def unlabelled(arm: str) -> str:
    """The name in ARMS of an arm that may carry a label: "per_class@weak" is per_class with constants of its own."""
    return arm.partition("@")[0]


def definition(arm: str) -> Arm:
    """The row of an arm that may carry a label."""
    return ARMS[unlabelled(arm)]


def pull_of(arm: str, own: dict[str, Any]) -> str:
    """The sizes that an arm takes: lambda, and the share of the latents that its masks keep."""
    takes = {"AUX_WEIGHT": "lambda {}", "KEEP_PCT": "keeps {} % of the latents"}
    told = [words.format(own[name]) for name, words in takes.items() if name in definition(arm).takes]
    return ", ".join(told) or "none"
