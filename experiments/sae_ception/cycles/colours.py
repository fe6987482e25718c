"""One colour and one mark for each arm, the same in every figure."""
from cycles.arms import ARMS, unlabelled

# The method is blue, its label-free form orange, what knows the classes red to brown, regularisers green.
_LOOKS = {
    "lambda0": ("#30343b", "o"), "new_seed": ("#8a8f98", "o"), "baseline": ("#5b6069", "s"),
    "per_class": ("#1f5fa8", "o"), "contrast": ("#5c9ad6", "s"), "mse_loss": ("#0d2c54", "s"),
    "complement": ("#9cc4ea", "^"), "untrained_sae": ("#7a88c9", "D"), "global_mask": ("#5c9ad6", "v"),
    "per_example": ("#d9822b", "o"), "full_recon": ("#f0b268", "s"), "random_latents": ("#8c5a1e", "D"),
    "pca_targets": ("#c9a227", "^"),
    "class_mean": ("#b5484b", "o"), "permuted_in_class": ("#d98385", "s"), "permuted": ("#e8b1b2", "D"),
    "shuffled_labels": ("#7d2b45", "^"), "nonneg_contrastive": ("#c2559d", "v"), "caft": ("#8e6bbf", "P"),
    "random_unit": ("#8a8f98", "D"), "constant": ("#b9bdc4", "^"), "to_zero": ("#57a99a", "s"),
    "l1_activation": ("#2f7d4f", "o"), "weight_decay": ("#84b84c", "D"), "monoloss": ("#3b8fa6", "P"),
}


def colour(arm: str) -> str:
    """The colour of an arm, which may carry a label."""
    return _LOOKS[unlabelled(arm)][0]


def look(arm: str) -> dict[str, str]:
    """Colour, mark and line of an arm for matplotlib; one with a label has a dashed line."""
    shade, mark = _LOOKS[unlabelled(arm)]
    return {"color": shade, "marker": mark, "linestyle": "--" if "@" in arm else "-"}


def title(arm: str) -> str:
    """An arm's name in figures and tables."""
    name, _, label = arm.partition("@")
    return name.replace("_", " ") + (f" ({label})" if label else "")


assert set(_LOOKS) == {"baseline", *ARMS}, "every arm needs a look of its own"
