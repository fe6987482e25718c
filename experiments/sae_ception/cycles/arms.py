"""The arms: one row for each way of training on after the baseline. All code reads this table, and README.md shows it.

To add an arm:
1. Add its row to ARMS.
2. If it pulls towards targets, write a function of its name in cycles/targets.py that makes them.
3. If it takes a constant of its own, declare that in 03_train_auxiliary.py, 04_train_cycle.py and presets.ForArm.
4. Add its line to the table of README.md; a test compares the two.

Nothing here needs torch, so that scripts refuse a wrong arm at once.
"""
from typing import NamedTuple

PULLED = ("INIT", "AUX_WEIGHT", "AUX_CENTRED")
MASKED = (*PULLED, "KEEP_PCT")


class Arm(NamedTuple):
    """One way of training on."""

    target: str
    """What example i is pulled to."""
    asks: str
    """What comparing it with per_class tells."""
    takes: tuple[str, ...] = PULLED
    """Constants that decide what it does."""
    must_be_beaten: bool = False
    """per_class succeeds only if it beats this arm."""
    own_seed: bool = False
    """Starts from weights, and takes the examples in an order, that no other arm has."""

    @property
    def has_targets(self) -> bool:
        """Whether it pulls at all; else it trains with the task loss alone."""
        return "AUX_WEIGHT" in self.takes


ARMS = {
    "lambda0": Arm(
        "none: the same further training with lambda 0", "does anything beyond more training happen?",
        takes=("INIT",), must_be_beaten=True,
    ),
    "new_seed": Arm(
        "none; from scratch with another start and order",
        "how large is the noise? (for `INIT=scratch`, where lambda0 repeats the baseline bit for bit)",
        takes=("INIT",), own_seed=True,
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
}
CONSTANTS = {name for arm in ARMS.values() for name in arm.takes}


def unlabelled(arm: str) -> str:
    """The name in ARMS of an arm that may carry a label: "per_class@weak" is per_class with constants of its own."""
    return arm.partition("@")[0]


def definition(arm: str) -> Arm:
    """The row of an arm that may carry a label."""
    return ARMS[unlabelled(arm)]
