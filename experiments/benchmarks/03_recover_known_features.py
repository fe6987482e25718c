"""Quality at equal tokens where the truth is known: which trainer finds the features that made the activations?

    python 03_recover_known_features.py         # learning rates chosen on one draw, five others report
    python 03_recover_known_features.py REPORT_SEEDS="(1, 2)" TRAINERS="('ours', 'sparsify')"

Ours takes its learning rate from its rule. Each peer gets the best of LEARNING_RATES by FVU on the draw CHOOSE_SEED,
which reports nothing. Held-out rows come from the same draw. `make peers` installs the peers.
Writes store/benchmarks/known_features.json
"""
import statistics
import tempfile
from pathlib import Path

from safetensors.torch import save_file
from side_by_side import Trainer, quality, sparse_features
from tqdm.auto import tqdm

from lib.constants import override
from lib.environment import run
from lib.store import experiment_dir, provenance, write_json

WIDTH = 288          # dimensions of the activations
N_FEATURES = 1000    # that they are made of
L0 = 8.0             # features on a row, on average
N_LATENTS = 1152
TOP_K = 8
N_ROWS = 819_200     # training rows, one pass
N_HELD_OUT = 50_000  # rows that score
BATCH_SIZE = 1024    # rows of a step
DEAD_AFTER = 10_000  # tokens of silence before AuxK acts, for every trainer that has AuxK
TRAINERS: tuple = ("ours", "overcomplete", "dictionary_learning", "sparsify", "sae_lens")
LEARNING_RATES: tuple = (5e-4, 1e-3, 2e-3, 4e-3)
CHOOSE_SEED = 100
REPORT_SEEDS: tuple = (0, 1, 2, 3, 4)
THREADS = 2
CONSTANTS = override(globals())
SHOWN = {"fvu": "FVU", "dead_pct": "dead %", "l0": "L0", "cosine": "mean max cosine", "found_pct": "found % (> .9)"}


def train(name: str, lr: float | None, rows: Path, seed: int) -> Path:
    settings = {"n_latents": N_LATENTS, "k": TOP_K, "batch": BATCH_SIZE, "lr": lr, "n_steps": N_ROWS // BATCH_SIZE,
                "seed": seed, "threads": THREADS, "dead_after": DEAD_AFTER}
    weights = rows.with_name(f"{name}.safetensors")
    trainer = Trainer(name, rows, settings)
    trainer.ask(steps=settings["n_steps"], save=str(weights))
    trainer.close()
    return weights


def draw(seed: int, folder: Path):
    """Rows for training on disk, held-out rows and the features."""
    x, features = sparse_features(N_ROWS + N_HELD_OUT, WIDTH, N_FEATURES, L0, seed)
    rows = folder / "rows.safetensors"
    save_file({"x": x[:N_ROWS].contiguous()}, rows)
    return rows, x[N_ROWS:], features


def main() -> None:
    results: dict[str, list[dict]] = {name: [] for name in TRAINERS}
    tried: dict[str, dict[str, dict]] = {}
    rates: dict[str, float | None] = {"ours": None}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows, held_out, features = draw(CHOOSE_SEED, folder)
        for peer in tqdm([t for t in TRAINERS if t != "ours"], desc="choosing learning rates"):
            tried[peer] = {
                str(lr): quality(train(peer, lr, rows, CHOOSE_SEED), held_out, features, TOP_K) for lr in LEARNING_RATES
            }
            rates[peer] = min(LEARNING_RATES, key=lambda lr: tried[peer][str(lr)]["fvu"])
        for seed in tqdm(REPORT_SEEDS, desc="draws that report"):
            rows, held_out, features = draw(seed, folder)
            for trainer in TRAINERS:
                results[trainer].append(quality(train(trainer, rates[trainer], rows, seed), held_out, features, TOP_K))
    for trainer, runs in results.items():
        at = f"lr {rates[trainer]:g}" if rates[trainer] else "lr by rule"
        shown = []
        for key, title in SHOWN.items():
            values = [result[key] for result in runs]
            shown.append(f"{title} {statistics.mean(values):.4g} +- {(max(values) - min(values)) / 2:.2g}")
        print(f"{trainer:20s} {at:12s} " + ", ".join(shown))
    print(f"mean and half the range over {len(REPORT_SEEDS)} draws, {N_ROWS:,} tokens each, held-out rows")
    write_json(experiment_dir("benchmarks") / "known_features.json",
               {"constants": CONSTANTS, "made_with": provenance(), "learning_rates": rates, "tried": tried, "results": results})


if __name__ == "__main__":
    run(main)
