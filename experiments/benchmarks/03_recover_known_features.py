"""Quality at equal tokens where the truth is known: which trainer finds the features that made the activations?

    python 03_recover_known_features.py                   # learning rates chosen on one draw, five others report
    python 03_recover_known_features.py PRESET=wide       # 768 dimensions, 6,144 latents
    python 03_recover_known_features.py PRESET=synth_sae_bench
    python 03_recover_known_features.py TRAINERS="('ours', 'sparsify')" REPORT_SEEDS="(1, 2)"

Ours takes its learning rate and its silence before AuxK from its rules. Each peer gets the best of LEARNING_RATES by
FVU on the draw CHOOSE_SEED, which reports nothing. Held-out rows come from the same draw. `make peers` installs the
peers. Their results are kept: rerun the same command to resume, or after a change of ours to train only ours again.
Writes store/benchmarks/known_features_<preset>.json
"""
import tempfile
from pathlib import Path
from typing import Annotated, Literal

import checkout  # noqa: F401  (first: finds lib)
from lib.constants import override
from lib.ranges import Count, Positive, Rate, Seed, Size, Threads, at_least, at_most

Trained = Literal["ours", "overcomplete", "dictionary_learning", "sparsify", "sae_lens"]
PRESET = "small"                          # small, wide or synth_sae_bench
SOURCE: Literal["features", "synth_sae_bench"] = "features"  # independent features, or SAELens' hierarchical and
                                          # correlated ones
WIDTH: Size = 288                         # dimensions of the activations
N_FEATURES: Size = 1000                   # that they are made of
L0: Positive = 8.0                        # features on a row, on average; synth_sae_bench: about 34, not a choice
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
             "N_HELD_OUT": 20_000, "LEARNING_RATES": (1e-3, 2e-3, 4e-3, 8e-3), "REPORT_SEEDS": (0, 1, 2)},
    "synth_sae_bench": {"SOURCE": "synth_sae_bench", "WIDTH": 768, "N_FEATURES": 16_384, "L0": 34.0, "N_LATENTS": 4096,
                        "TOP_K": 25, "N_ROWS": 204_800, "N_HELD_OUT": 10_000,
                        "TRAINERS": ("ours", "sparsify", "dictionary_learning", "sae_lens"),
                        "LEARNING_RATES": (2e-3, 4e-3, 8e-3), "REPORT_SEEDS": (0, 1, 2)},
}
CONSTANTS = override(globals(), PRESETS)

import pandas
from safetensors.torch import save_file
from side_by_side import (
    SHOWN,
    Draw,
    Trainer,
    chosen_rate,
    quality,
    quality_table,
    reported,
    sparse_features,
    synth_sae_bench,
)
from tqdm.auto import tqdm

from lib.environment import InputError, run, say_next
from lib.files import fingerprint, read_json, write_json
from lib.outputs import differences
from lib.schemas import CONSTANTS as ANY_CONSTANTS
from lib.schemas import SHORT_HASH, Schema
from lib.statistics import paired
from lib.store import experiment_dir, provenance

KNOWN_FEATURES = Schema({"settings": ANY_CONSTANTS | {"key": SHORT_HASH},
                         "runs": [{"trainer": str, "lr": (float, None), "seed": int}]})
NOT_OF_A_RUN = ("PRESET", "TRAINERS", "LEARNING_RATES", "REPORT_SEEDS", "CHOOSE_SEED", "THREADS")


def train(name: str, lr: float | None, seed: int, *, rows: Path, drawn: Draw) -> dict:
    """Quality of one trainer's weights on the held-out rows, with the seconds that its steps took."""
    settings = {"n_latents": N_LATENTS, "k": TOP_K, "batch": BATCH_SIZE, "lr": lr, "n_steps": N_ROWS // BATCH_SIZE,
                "seed": seed, "threads": THREADS, "dead_after": None if name == "ours" else DEAD_AFTER}
    weights = rows.with_name(f"{name}.safetensors")
    trainer = Trainer(name, rows, settings)
    took = trainer.ask(steps=settings["n_steps"], save=str(weights))
    trainer.close()
    return {"trainer": name, "lr": lr, "seed": seed, **took, **quality(weights, drawn, TOP_K)}


class Results:
    """The results so far, written after each training. Those of the peers are read back; ours are trained anew."""

    def __init__(self, path: Path):
        self.path = path
        code = [Path(__file__).with_name(name).read_text() for name in ("trainers.py", "side_by_side.py")]
        settings = {name: value for name, value in CONSTANTS.items() if name not in NOT_OF_A_RUN}
        self.settings = settings | {"key": fingerprint([settings, *code])}
        self.runs: list[dict] = []
        if path.exists():
            found = read_json(path, KNOWN_FEATURES)
            if other := differences(found["settings"], self.settings):
                raise InputError(f"{path} holds results of other settings ({other}), which are not thrown away; move "
                                 "it elsewhere to measure anew")
            self.runs = [run for run in found["runs"] if run["trainer"] != "ours"]

    def add(self, name: str, lr: float | None, seed: int, *, rows: Path, drawn: Draw) -> None:
        """Train where no result is kept."""
        if any((run["trainer"], run["lr"], run["seed"]) == (name, lr, seed) for run in self.runs):
            return
        found = train(name, lr, seed, rows=rows, drawn=drawn)
        self.runs.append(found | {"made_with": provenance(), "threads": THREADS})
        write_json(self.path, {"settings": self.settings, "constants": CONSTANTS, "made_with": provenance(),
                               "runs": self.runs})


def draw(seed: int, folder: Path) -> tuple[Path, Draw]:
    """The training rows on disk for the trainers, and the draw."""
    sizes = {"n_rows": N_ROWS, "n_held_out": N_HELD_OUT, "width": WIDTH, "n_features": N_FEATURES, "seed": seed}
    drawn = sparse_features(**sizes, l0=L0) if SOURCE == "features" else synth_sae_bench(folder, **sizes)
    rows = folder / "rows.safetensors"
    save_file({"x": drawn.x}, rows)
    return rows, drawn


def print_results(found: dict[str, list[dict]]) -> None:
    print(f"mean and 95 % interval over {len(REPORT_SEEDS)} draws, {N_ROWS:,} tokens each, held-out rows")
    print(quality_table(found).to_string(index=False))
    scores = {name: pandas.DataFrame(runs).set_index("seed") for name, runs in found.items()}
    ours = scores.pop("ours", None)
    if ours is None or not scores:
        return
    for key, best_of in (("fvu", min), ("found_pct", max), ("f1", max)):
        best = best_of(scores, key=lambda name: scores[name][key].mean())
        gap = paired(ours[key], scores[best][key])
        print(f"ours - {best}, {SHOWN[key]}: {gap['mean']:+.4g} ± {gap['high'] - gap['mean']:.2g}")


def main() -> None:
    results = Results(experiment_dir("benchmarks") / f"known_features_{PRESET}.json")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows, drawn = draw(CHOOSE_SEED, folder)
        for peer in tqdm([name for name in TRAINERS if name != "ours"], desc="choosing learning rates"):
            for lr in LEARNING_RATES:
                results.add(peer, lr, CHOOSE_SEED, rows=rows, drawn=drawn)
        for seed in tqdm(REPORT_SEEDS, desc="draws that report"):
            rows, drawn = draw(seed, folder)
            for trainer in TRAINERS:
                results.add(trainer, chosen_rate(results.runs, trainer, CONSTANTS), seed, rows=rows, drawn=drawn)
    print_results(reported(results.runs, CONSTANTS))
    say_next("04_show_benchmarks.ipynb")


if __name__ == "__main__":
    run(main)
