"""Print the verification table that notebook 03 wrote.

    python show_verification.py
    python show_verification.py SAE=<name>

Reads  store/verify_sae_training/saes/<name>/verification.json
"""
import checkout  # noqa: F401  (first: finds lib)
from lib.constants import override
from lib.ranges import Location

SAE: Location | None = None               # name or folder of an SAE; None: the one trained or imported last
CONSTANTS = override(globals())

from checks.verification import VERIFICATION, format_table
from lib.environment import run
from lib.files import read_json
from lib.saes import find_sae


def main() -> None:
    print(format_table(read_json(find_sae(SAE) / "verification.json", VERIFICATION)["checks"]))


if __name__ == "__main__":
    run(main)
