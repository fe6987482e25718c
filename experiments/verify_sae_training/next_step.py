"""What the command of the next step keeps of this one's constants, so that it goes on with the same data.

    say_next("02_train_sae.py", TOP_K=k, **kept_for("02_train_sae.py", CONSTANTS, ("RUN_ID", "LAYER")))
"""
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lib.constants import constants_of


def kept_for(script: str, constants: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Those of the named constants whose value here is not the one that `script`, beside this file, has by itself.

    So it holds what the command line gave and what was edited in either of the two scripts.
    """
    theirs = constants_of(Path(__file__).with_name(script))["CONSTANTS"]
    return {name: constants[name] for name in names if constants[name] != theirs[name]}
