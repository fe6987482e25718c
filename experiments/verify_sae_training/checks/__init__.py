"""Which layer, which k, and did the SAE learn? Choices, evaluation, ground truth, controls, verdicts."""
