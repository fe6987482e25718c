"""SAE-ception: labelled tasks, a classifier, targets from its SAE, and the cycles that train on them."""
