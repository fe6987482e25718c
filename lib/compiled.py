"""numba as the compiled loops use it: cached where that is possible, threads that torch's number decides.

Compiled code is cached in the folder that NUMBA_CACHE_DIR names, else beside the source, else in the user's cache
folder, whichever can be written; where none can, every process compiles anew.
"""
from collections.abc import Callable
from pathlib import Path

from numba import config, njit, set_num_threads

config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]  # tbb costs 30 %, workqueue 45 % of the speed at F = 1152
FAST = {"reassoc", "contract", "nsz", "arcp"}  # sums may be reordered and fused; NaN and infinity keep their meaning


def compiled(parallel: bool = False) -> Callable:
    """Decorator: compile a function, on all threads where its prange loops say so."""
    options = {"parallel": parallel, "nogil": True, "fastmath": FAST, "error_model": "numpy"}

    def decorate(function: Callable) -> Callable:
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:  # no folder to cache in can be written
            return njit(**options)(function)

    return decorate


def is_cached(function) -> bool:
    """Whether an earlier process has compiled `function`, so that its first call starts at once."""
    folder = function.stats.cache_path
    return folder is not None and any(Path(folder).glob(f"*.{function.__name__}-*.nbi"))


def use_threads(n: int) -> int:
    """Let the loops run on n threads, at most as many as numba has; returns how many that is."""
    n = min(n, config.NUMBA_NUM_THREADS)
    set_num_threads(n)
    return n
