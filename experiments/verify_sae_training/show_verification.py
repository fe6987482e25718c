"""Print the verification table that notebook 03 wrote.

    python show_verification.py

Reads  store/verify_sae_training/verification.json
"""
import checkout  # noqa: F401  (first: finds lib)
from checks.verification import VERIFICATION, format_table
from lib.environment import run
from lib.files import read_json
from lib.store import experiment_dir


def main() -> None:
    path = experiment_dir("verify_sae_training") / "verification.json"
    print(format_table(read_json(path, VERIFICATION)["checks"]))


if __name__ == "__main__":
    run(main)
