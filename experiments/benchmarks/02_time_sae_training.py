"""Tokens per second of one SAE training step, ours and the peers', taking turns in one run.

    python 02_time_sae_training.py                          # every shape; about half an hour on two cores
    python 02_time_sae_training.py PRESET=kinds             # BatchTopK, JumpReLU, Matryoshka and lista beside TopK
    python 02_time_sae_training.py SHAPES="((288, 1152, 8, 1024),)" THREADS=1

A step is forward, backward and optimiser on synthetic activations, with AuxK on and no dead latents. On an idle machine
wall time is what a user feels; processor time also holds on a busy one. `make peers` installs the peers.
Writes store/benchmarks/sae_training_speed.json, of other presets sae_training_speed_<preset>.json
"""
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Literal

import checkout  # noqa: F401  (first: finds lib)
from lib.constants import override
from lib.ranges import Positive, Size, Threads, at_least, at_most

Trained = Literal[  # a trainer, and its kind of SAE if that is not TopK
    "ours", "overcomplete", "dictionary_learning", "sparsify", "sae_lens", "ours batchtopk", "ours jumprelu",
    "ours matryoshka", "ours lista", "dictionary_learning batchtopk", "dictionary_learning jumprelu",
    "sae_lens batchtopk", "sae_lens jumprelu"]
PRESET = "topk"                           # topk: TopK at every shape; kinds: the other kinds beside it
SHAPES: tuple[tuple[Size, Size, Size, Size], ...] = (  # (width, latents, k, rows of a step)
    (288, 1152, 8, 1024), (288, 1152, 8, 4096), (768, 6144, 32, 1024), (768, 6144, 32, 4096), (768, 24576, 32, 1024),
    (768, 24576, 32, 4096),
)
TRAINERS: tuple[Trained, ...] = ("ours", "overcomplete", "dictionary_learning", "sparsify", "sae_lens")
ROUNDS: Annotated[int, at_least(2), at_most(1000)] = 7  # turns of each trainer; the median without the first
SECONDS: Positive = 1.0                   # of one turn, at least one step
THREADS: Threads = 2                      # processor cores each may use
PRESETS = {"topk": {}, "kinds": {
    "SHAPES": ((288, 1152, 8, 1024), (768, 6144, 32, 4096)),
    "TRAINERS": ("ours", "ours batchtopk", "ours jumprelu", "ours matryoshka", "ours lista",
                 "dictionary_learning batchtopk", "dictionary_learning jumprelu", "sae_lens batchtopk",
                 "sae_lens jumprelu"),
}}
CONSTANTS = override(globals(), PRESETS)

import pandas
import torch
from safetensors.torch import save_file
from side_by_side import Trainer, sparse_features

from lib.environment import run, say_next
from lib.files import write_json
from lib.store import experiment_dir, provenance
from lib.training.workspace import choose_precision


def encoder_floor(n_latents: int, width: int, batch: int) -> float:
    """Seconds of one step's encoder product in bfloat16: the least that a step which forms it can take."""
    x, w = torch.randn(batch, width).bfloat16(), torch.randn(n_latents, width).bfloat16()
    out = torch.empty(batch, n_latents, dtype=torch.bfloat16)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        torch.mm(x, w.T, out=out)
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def time_shape(shape: tuple, folder: Path) -> dict:
    """Median seconds and processor seconds of each trainer's step, the trainers taking turns, and of the floor."""
    width, n_latents, k, batch = shape
    rows = folder / "rows.safetensors"
    drawn = sparse_features(n_rows=16 * batch, n_held_out=0, width=width, n_features=4 * width, l0=k, seed=0)
    save_file({"x": drawn.x}, rows)
    settings = {"n_latents": n_latents, "k": k, "batch": batch, "lr": 1e-3, "n_steps": 10_000, "seed": 0,
                "threads": THREADS, "dead_after": 10_000_000}
    trainers = [Trainer(name, rows, settings) for name in TRAINERS]
    steps = {}
    for trainer in trainers:
        trainer.ask(steps=2)  # the first steps pay for set-up
        steps[trainer.name] = max(1, round(SECONDS / trainer.ask(steps=1)["seconds"]))
    turns: dict[str, list[dict[str, float]]] = {t.name: [] for t in trainers}
    floors = []
    for _ in range(ROUNDS):
        floors.append(encoder_floor(n_latents, width, batch))
        for trainer in trainers:
            n = steps[trainer.name]
            turns[trainer.name].append({unit: value / n for unit, value in trainer.ask(steps=n).items()})
    for trainer in trainers:
        trainer.close()
    medians = {name: {unit: statistics.median(t[unit] for t in ts[1:]) for unit in ts[0]} for name, ts in turns.items()}
    return {"shape": shape, "floor": statistics.median(floors), "per_step": medians, "turns": turns}


def print_shape(timed: dict) -> None:
    batch, step = timed["shape"][3], pandas.DataFrame(timed["per_step"]).T
    table = pandas.DataFrame({
        "tokens/s": batch / step["seconds"], "x floor": step["seconds"] / timed["floor"],
        "per processor second": batch / step["cpu_seconds"],
    })
    if "ours" in step.index:
        table[["x ours", "x ours, processor"]] = step / step.loc["ours"]
    print("D {}, F {}, k {}, batch {}:".format(*timed["shape"]), f"floor {batch / timed['floor']:,.0f} tokens/s")
    print(table.to_string(float_format="{:,.1f}".format), flush=True)


def main() -> None:
    torch.set_num_threads(THREADS)
    print(choose_precision(6144, 768, torch.device("cpu"))[1])
    timed = []
    with tempfile.TemporaryDirectory() as folder:
        for shape in SHAPES:
            timed.append(time_shape(shape, Path(folder)))
            print_shape(timed[-1])
    name = "sae_training_speed.json" if PRESET == "topk" else f"sae_training_speed_{PRESET}.json"
    write_json(experiment_dir("benchmarks") / name,
               {"constants": CONSTANTS, "made_with": provenance(), "timed": timed})
    say_next("04_show_benchmarks.ipynb")


if __name__ == "__main__":
    run(main)
