"""What two or more experiments share. Importing it is cheap: torch and transformers come with the files that need
them.
"""
import os

# torch and numba bring an OpenMP runtime each, whose idle threads spin by default and take the processors from one
# another: up to ten times slower training where the machine is busy. Read when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Fast tokenizers warn on every fork once they have run threads; nothing here tokenises in a fork.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from .imports import watch  # noqa: E402

watch()
