"""Quality at equal tokens where the truth is known: which trainer finds the features that made the activations?

    python 03_recover_known_features.py                   # learning rates chosen on one draw, five others report
    python 03_recover_known_features.py PRESET=wide       # 768 dimensions, 6,144 latents
    python 03_recover_known_features.py PRESET=synth_sae_bench
    python 03_recover_known_features.py TRAINERS="('ours', 'sparsify')" REPORT_SEEDS="(1, 2)"

Ours takes its learning rate and its silence before AuxK from its rules. Each peer gets the best of LEARNING_RATES by
FVU on the draw CHOOSE_SEED, which reports nothing. Held-out rows come from the same draw. `make peers` installs the
peers; what one of them reached is kept, so that an interrupted run goes on and only ours is trained again.
Writes store/benchmarks/known_features_<preset>.json
"""
import statistics
import tempfile
from pathlib import Path
from typing import Annotated, Literal

import checkout  # noqa: F401  (first: finds lib)
from lib.constants import override
from lib.ranges import Count, Positive, Rate, Seed, Size, Threads, at_least, at_most

Trained = Literal["ours", "overcomplete", "dictionary_learning", "sparsify", "sae_lens"]
PRESET = "small"                          # small, wide or synth_sae_bench
SOURCE: Literal["features", "synth_sae_bench"] = "features"  # features: independent ones; synth_sae_bench:
                                          # hierarchical and correlated ones, made by SAELens
WIDTH: Size = 288                         # dimensions of the activations
N_FEATURES: Size = 1000                   # that they are made of
L0: Positive = 8.0                        # features on a row, on average
N_LATENTS: Size = 1152
TOP_K: Size = 8
N_ROWS: Count = 819_200                   # training rows, one pass
N_HELD_OUT: Annotated[int, at_least(2), at_most(10**9)] = 50_000  # rows that score
BATCH_SIZE: Size = 1024                   # rows of a step
DEAD_AFTER: Count = 10_000                # tokens of silence before AuxK acts, for every peer that has AuxK
TRAINERS: tuple[Trained, ...] = ("ours", "overcomplete", "dictionary_learning", "sparsify", "sae_lens")
LEARNING_RATES: tuple[Rate, ...] = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
CHOOSE_SEED: Seed = 100
REPORT_SEEDS: tuple[Seed, ...] = (0, 1, 2, 3, 4)
THREADS: Threads = 2

PRESETS = {
    "small": {},
    "wide": {"WIDTH": 768, "N_FEATURES": 4000, "L0": 32.0, "N_LATENTS": 6144, "TOP_K": 32, "N_ROWS": 204_800,
             "N_HELD_OUT": 20_000,
             "LEARNING_RATES": (1e-3, 2e-3, 4e-3, 8e-3), "REPORT_SEEDS": (0, 1, 2)},
    "synth_sae_bench": {"SOURCE": "synth_sae_bench", "WIDTH": 768, "N_FEATURES": 16_384, "L0": 34.0, "N_LATENTS": 4096,
                        "TOP_K": 25,
                        "N_ROWS": 204_800, "N_HELD_OUT": 10_000,
                        "TRAINERS": ("ours", "sparsify", "dictionary_learning", "sae_lens"),
                        "LEARNING_RATES": (2e-3, 4e-3, 8e-3), "REPORT_SEEDS": (0, 1, 2)},
}
CONSTANTS = override(globals(), PRESETS)

from safetensors.torch import save_file
from side_by_side import Draw, Trainer, quality, sparse_features, synth_sae_bench
from tqdm.auto import tqdm

from lib.checking import Schema
from lib.environment import run, say_next
from lib.files import fingerprint, read_json, write_json
from lib.outputs import differences
from lib.schemas import CONSTANTS as ANY_CONSTANTS
from lib.schemas import SHORT_HASH
from lib.statistics import interval
from lib.store import experiment_dir, provenance

SHOWN = {"fvu": "FVU", "dead_pct": "dead %", "l0": "L0", "cosine": "mean max cosine", "found_pct": "found % (> .9)",
         "mcc": "MCC", "f1": "F1"}
KNOWN_FEATURES = Schema({"settings": ANY_CONSTANTS | {"key": SHORT_HASH},
                         "runs": [{"trainer": str, "lr": (float, None), "seed": int}]})
NOT_OF_A_RUN = ("PRESET", "TRAINERS", "LEARNING_RATES", "REPORT_SEEDS", "CHOOSE_SEED", "THREADS")


def train(name: str, lr: float | None, seed: int, rows: Path, drawn: Draw) -> dict:
    """Quality of one trainer's weights on the held-out rows, with the seconds that its steps took."""
    settings = {"n_latents": N_LATENTS, "k": TOP_K, "batch": BATCH_SIZE, "lr": lr, "n_steps": N_ROWS // BATCH_SIZE,
                "seed": seed, "threads": THREADS, "dead_after": None if name == "ours" else DEAD_AFTER}
    weights = rows.with_name(f"{name}.safetensors")
    trainer = Trainer(name, rows, settings)
    took = trainer.ask(steps=settings["n_steps"], save=str(weights))
    trainer.close()
    return {"trainer": name, "lr": lr, "seed": seed, **took, **quality(weights, drawn, TOP_K)}


class Results:
    """Every run's result by (trainer, learning rate, draw), written after each; peers' results are trained once."""

    def __init__(self, path: Path):
        self.path, self.settings = path, {k: v for k, v in CONSTANTS.items() if k not in NOT_OF_A_RUN}
        self.runs: list[dict] = []
        found = read_json(path, KNOWN_FEATURES) if path.exists() else None
        if found and not differences(found["settings"], self.settings | {"key": self.key}):
            self.runs = [run for run in found["runs"] if run["trainer"] != "ours"]

    @property
    def key(self) -> str:
        return fingerprint([self.settings, Path(__file__).with_name("trainers.py").read_text()])

    def get(self, name: str, lr: float | None, seed: int, rows: Path, drawn: Draw) -> dict:
        for done in self.runs:
            if (done["trainer"], done["lr"], done["seed"]) == (name, lr, seed):
                return done
        self.runs.append(train(name, lr, seed, rows, drawn))
        write_json(self.path, {"settings": self.settings | {"key": self.key}, "constants": CONSTANTS,
                               "made_with": provenance(), "runs": self.runs})
        return self.runs[-1]


def draw(seed: int, folder: Path) -> tuple[Path, Draw]:
    """The training rows on disk for the trainers, and the draw."""
    make = synth_sae_bench if SOURCE == "synth_sae_bench" else sparse_features
    drawn = make(N_ROWS, N_HELD_OUT, WIDTH, N_FEATURES, L0, seed)
    rows = folder / "rows.safetensors"
    save_file({"x": drawn.x}, rows)
    return rows, drawn


def print_table(reported: dict[str, list[dict]]) -> None:
    for name, runs in reported.items():
        at = f"lr {runs[0]['lr']:g}" if runs[0]["lr"] else "lr by rule"
        columns = [(title, interval([run[key] for run in runs])) for key, title in SHOWN.items()]
        print(f"{name:20s} {at:12s} " + ", ".join(f"{title} {x.mean:.4g} ± {x.half:.2g}" for title, x in columns))
    peers = [name for name in reported if name != "ours"]
    if "ours" in reported and peers:
        for key, better in (("fvu", min), ("found_pct", max), ("f1", max)):
            best = better(peers, key=lambda name: statistics.mean(run[key] for run in reported[name]))
            differences = [mine[key] - theirs[key] for mine, theirs in zip(reported["ours"], reported[best])]
            found = interval(differences)
            print(f"ours - {best}, {SHOWN[key]}: {found.mean:+.4g} ± {found.half:.2g}")
    print(f"mean and 95 % interval over {len(REPORT_SEEDS)} draws, {N_ROWS:,} tokens each, held-out rows")


def main() -> None:
    results = Results(experiment_dir("benchmarks") / f"known_features_{PRESET}.json")
    rates: dict[str, float | None] = {"ours": None}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows, drawn = draw(CHOOSE_SEED, folder)
        for peer in tqdm([t for t in TRAINERS if t != "ours"], desc="choosing learning rates"):
            tried = [results.get(peer, lr, CHOOSE_SEED, rows, drawn) for lr in LEARNING_RATES]
            rates[peer] = min(tried, key=lambda run: run["fvu"])["lr"]
        reported: dict[str, list[dict]] = {name: [] for name in TRAINERS}
        for seed in tqdm(REPORT_SEEDS, desc="draws that report"):
            rows, drawn = draw(seed, folder)
            for trainer in TRAINERS:
                reported[trainer].append(results.get(trainer, rates[trainer], seed, rows, drawn))
    print_table(reported)
    say_next("04_show_benchmarks.ipynb")


if __name__ == "__main__":
    run(main)
