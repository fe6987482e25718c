"""Stored rows -> a trained SAE: the loop, its settings and checkpoints, the kinds of SAE, the step, dense and fast."""
