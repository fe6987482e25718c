"""The reports of 05 and 06, which 07 reads.

A report holds script, constants, kind_numbers (what lib.training.kinds sets for the kind; of 05), made_with, machine
and commits (machines and code that took the steps), date (when it was last written) and points, one for each milestone:
samples, seconds and cpu_seconds (of training alone), how it was scored, mcc, unique, chosen (thresholds, prices and
odds) and scores: rule -> f1, precision, recall, l0, ev, dead_pct. synth_rules.py says which rules there are.
"""
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from sampler import Sampler, World
from synth_rules import codings_of
from synth_scores import Dictionary, matching, score

from lib.files import read_json, write_json
from lib.sae import SAE
from lib.schemas import CONSTANTS, COUNT, NAME, POSITIVE, Number, Schema
from lib.store import provenance

SHARE = Number(float, -1e9, 1)
SCORES = {"f1": SHARE, "precision": SHARE, "recall": SHARE, "l0": float, "ev": SHARE, "dead_pct": float}
POINT = {"samples": POSITIVE, "seconds": float, "cpu_seconds": float, "how": {"n": POSITIVE}, "mcc": SHARE,
         "unique": SHARE, "chosen": {}, "scores": {}}
REPORT = Schema({"script": str, "constants": CONSTANTS, "machine": str, "commits": [str], "machines?": [str],
                 "date": str,
                 "points": [POINT]})
RESUMED = {"samples": COUNT, "seconds": float, "cpu_seconds": float, "checkpoint": (NAME, None)}
MILESTONES = [m * 1_000_000 for m in (1, 2, 5, 10, 20, 50, 100, 200)]  # samples at which a run is scored
SCORING, CHOOSING = 1 << 61, 1 << 60  # seeds of other samples: no training has one as large
N_CHOOSING = 1 << 17  # samples on which rules are chosen


def note_who_trains(made: dict[str, Any], report: Path, steps_left: bool) -> None:
    """Note this code's commit and this machine in what a run holds, if it is to take steps.

    Runs of before machines were noted have the one that their report names.
    """
    if not made["machines"] and report.exists():
        made["machines"] = [read_json(report, REPORT)["machine"]]
    if not steps_left:
        return
    for name, value in (("commits", str(provenance()["git"])), ("machines", machine())):
        made[name] = [*made[name], *([value] if value not in made[name] else [])]


def machine() -> str:
    """The processor's name, how many threads train, and which of the instructions that matter it has."""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            name = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), name)
    found = torch.cpu.get_capabilities()
    extras = [word for flag, word in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX-512 BF16")) if found.get(flag)]
    return ", ".join([name, f"{torch.get_num_threads()} threads", *extras])


def score_sae(sae: SAE, world: World, scaled: bool, how: dict[str, Any]) -> dict[str, Any]:
    """A point's scores; how: samples "n" that score, "n_choosing" that choose, and what codings_of takes."""
    rules = {name: value for name, value in how.items() if name not in ("n", "n_choosing")}
    codings, chosen = codings_of(sae, Sampler(world, scaled, CHOOSING)(0, how["n_choosing"])[0], **rules)
    best, mcc, unique = matching(sae.W_dec, world.features)
    scores = score(codings, Dictionary(sae.W_dec, sae.mean), best, draw=Sampler(world, scaled, SCORING), n=how["n"],
                   n_features=len(world.features))
    return {"how": how, "mcc": mcc, "unique": unique, "chosen": chosen, "scores": scores}


def write_report(folder: Path, script: str, constants: dict[str, Any], made: dict[str, Any]) -> None:
    """made: among others commits and points; tensors in it are left out."""
    names = ("commits", "machines", "points", "kind_numbers", *RESUMED)
    kept = {name: value for name, value in made.items() if name in names}
    write_json(folder / "report.json", {
        "script": script, "constants": constants, "made_with": provenance(), "machine": "; ".join(made["machines"]),
        "date": datetime.now(UTC).date().isoformat(), **kept})


def read_report(path: Path) -> dict[str, Any]:
    """One report of 06, with all that it resumes from."""
    return read_json(path, Schema(REPORT.content | RESUMED))


def read_reports(*folders: Path) -> list[dict[str, Any]]:
    """All reports in folders of these that have a point, by name; of one run in several that of the last."""
    found = {path.parent.name: path for folder in folders for path in folder.glob("*/report.json")}
    return [report for _, path in sorted(found.items()) if (report := read_json(path, REPORT))["points"]]


def show(point: dict[str, Any]) -> str:
    parts = [f"{name}: F1 {p['f1']:.3f} at L0 {p['l0']:.1f}, EV {p['ev']:.3f}" for name, p in point["scores"].items()]
    return f"{point['samples']:,} samples, {point['seconds'] / 60:.1f} min: MCC {point['mcc']:.3f}; {'; '.join(parts)}"
