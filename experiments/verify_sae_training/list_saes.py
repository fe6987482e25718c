"""List the trained and imported SAEs; the one that later steps take by default has a star.

    python list_saes.py              # oldest first
    python list_saes.py SORT=EV      # or by another column, largest last

EV, L0 and dead (the percentage of latents that never fired) are of the held-out tokens. recovered is the share of the
language-model loss, from step 3; names the mean balanced accuracy of the names on held-out texts, from step 4.

Reads  store/verify_sae_training/saes/
"""
import time
from statistics import mean
from typing import Literal

import checkout  # noqa: F401  (first: finds lib)
from lib.constants import override

SORT: Literal["age", "name", "layer", "latents", "k", "EV", "L0", "dead", "recovered", "names"] = "age"  # a column
CONSTANTS = override(globals())

import pandas

from checks.verification import VERIFICATION
from concepts.dictionary import read_concepts
from lib.environment import InputError, log, run
from lib.files import read_json
from lib.saes import ABOUT_FILE, MODEL_FILE, find_sae, list_saes
from lib.schemas import SAE_SIDECAR

UNITS = ((86400, "d"), (3600, "h"), (60, "min"))


def age(seconds):
    """A time span in its largest whole unit."""
    return next((f"{seconds / size:.0f} {unit}" for size, unit in UNITS if seconds >= size), "now")


def row_of(folder):
    """What the files of one SAE say of it; None where a step has not run."""
    about = read_json(folder / ABOUT_FILE, SAE_SIDECAR)
    final, of_this = about.get("final", {}), about["sae_hash"]
    most = about["top_k"] if about["top_k"] < about["n_latents"] else None  # all: thresholds decide, and there is no k
    k = about.get("constants", {}).get("TOP_K", most)
    row = {"name": folder.name, "layer": about.get("layer") or about.get("hook"), "latents": about["n_latents"],
           "k": k, "EV": final.get("ev"), "L0": final.get("l0_mean"), "dead": final.get("dead_pct")}
    if (path := folder / "verification.json").exists():
        found = read_json(path, VERIFICATION)
        checks = {check["check"]: check["value"] for check in found["checks"] if found["sae_hash"] == of_this}
        row["recovered"] = checks.get("ce_recovered")
    if (path := folder / "concepts.json").exists():
        scores = [entry["score"] for entry in read_concepts(path, of_this)["concepts"].values()
                  if entry.get("score") is not None]
        row["names"] = mean(scores) if scores else None
    return row | {"age": age(time.time() - (folder / MODEL_FILE).stat().st_mtime)}


def main():
    try:
        last = find_sae()
    except InputError as error:
        if not list_saes():
            raise
        log.warning("%s", error)  # the last one was renamed: the others are listed, without a star
        last = None
    rows = []
    for folder in list_saes():
        try:
            rows.append(row_of(folder) | {"": "*" if folder == last else ""})
        except InputError as error:
            log.warning("%s: %s", folder.name, error)
    table = pandas.DataFrame(rows)
    if SORT != "age":  # the folders come by age
        table = table.sort_values(SORT, na_position="first") if SORT in table else table
    order = ["", "name", "layer", "latents", "k", "EV", "L0", "dead", "recovered", "names", "age"]
    formats = {name: f"{{:.{digits}f}}".format
               for name, digits in {"k": 0, "EV": 4, "L0": 1, "dead": 1, "recovered": 3, "names": 2}.items()}
    print(table[[name for name in order if name in table]].to_string(index=False, na_rep="-", formatters=formats))


if __name__ == "__main__":
    run(main)
