import os

# torch and numba bring an OpenMP runtime each, whose idle threads spin by default and take the processors from one
# another: up to ten times slower training where the machine is busy. Read when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import lib.environment  # noqa: E402, F401  (its import guards must come before transformers, whichever file of lib is imported first)
