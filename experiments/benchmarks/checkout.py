"""Puts this checkout's root on the path, so that `lib` is the one beside these experiments, whatever is installed.

Import it before torch: lib decides how torch's idle threads wait.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import lib  # noqa: E402, F401
