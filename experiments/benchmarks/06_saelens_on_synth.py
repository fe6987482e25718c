"""SAELens' own BatchTopK and Matryoshka on this world: is it the published one, and where do their curves head?

    python 06_saelens_on_synth.py                                # BatchTopK, an hour of training
    python 06_saelens_on_synth.py KIND=matryoshka MINUTES=120    # rerun with more minutes to go on

Its code and the settings of the benchmark's sweeps, installed by `make peers`; samples come from this project's
sampler. Its rate is constant, so a shorter run is the beginning of a longer one. Scored as 05 scores; "batch 25" is how
SAELens scores such an SAE, "own" the threshold with which it is saved. A run that was killed resumes.
Reads and writes store/benchmarks/synth_world.safetensors, synth_sae_bench/<run>/report.json, checkpoint_<samples>/
"""
from typing import Annotated, Literal

import checkout  # noqa: F401  (first: finds lib)
from lib.constants import override
from lib.ranges import Count, Positive, Rate, Seed, Size, Threads, at_least, at_most

MeanL0 = Annotated[float, at_least(0.01), at_most(1000)]
Scored = Annotated[int, at_least(1024), at_most(10**7)]
KIND: Literal["batchtopk", "matryoshka"] = "batchtopk"
N_LATENTS: Size = 4096
TOP_K: Size = 25                          # latents of a sample, on average over a batch
BATCH_SIZE: Size = 1024
LR: Rate = 3e-4                           # constant, as in the protocol
AUTOCAST: bool = True                     # bfloat16 products, as in the protocol
SCALED: bool = True                       # children scaled by their parents' values; see 05
SEED: Seed = 0                            # of the weights and of the training samples
# What follows changes no training.
MINUTES: Positive = 60.0                  # of training, without scoring
N_SAMPLES: Count = 200_000_000            # at most
THREADS: Threads = 2
AT_L0: tuple[MeanL0, ...] = (15.0, 20.0, 25.0)  # mean L0 of the rules that score too
PRUNE_FROM: Annotated[float, at_least(1), at_most(10)] = 1.4  # candidates of pruning and odds: so many times the L0
CONDITION_FROM: Annotated[float, at_least(1), at_most(10)] = 2.0  # of conditional odds
N_SCORED: Scored = 1_000_000              # samples that score at the end
N_CURVE: Scored = 200_000                 # samples that score at each milestone before
CONSTANTS = override(globals())

import shutil
import time
from pathlib import Path
from typing import Any

import torch
from sampler import Sampler, World
from side_by_side import Trainer
from synth_reports import MILESTONES, N_CHOOSING, note_who_trains, read_report, score_sae, show, write_report
from synth_samples import batches, open_world
from torch import Tensor
from tqdm.auto import tqdm

from lib.environment import InputError, run
from lib.files import fingerprint, read_tensors
from lib.outputs import in_use
from lib.sae import make_sae
from lib.store import experiment_dir
from lib.training.stopping import stop_between_steps

OF_A_RUN = ("KIND", "N_LATENTS", "TOP_K", "BATCH_SIZE", "LR", "AUTOCAST", "SCALED", "SEED")
SAVE_SECONDS = 300.0  # between two checkpoints
WEIGHTS = {"W_enc": "float32 F D", "b_enc": "float32 F", "W_dec": "float32 F D", "mean": "float32 D",
           "threshold": "float32 F"}


def is_over(made: dict[str, Any]) -> bool:
    return made["seconds"] >= 60 * MINUTES or made["samples"] + BATCH_SIZE > N_SAMPLES


def unscored(made: dict[str, Any]) -> dict[str, Any] | None:
    """How to score the SAE as it is now; None between the milestones, and where it was scored so."""
    how = {"n": N_SCORED if is_over(made) else N_CURVE, "n_choosing": N_CHOOSING, "mean_l0": list(AT_L0),
           "prune_from": PRUNE_FROM, "condition_from": CONDITION_FROM, "batch_k": float(TOP_K)}
    if not is_over(made) and not any(made["samples"] - BATCH_SIZE < m <= made["samples"] for m in MILESTONES):
        return None
    return None if any(p["samples"] == made["samples"] and p["how"] == how for p in made["points"]) else how


def start(folder: Path, made: dict[str, Any], width: int) -> tuple[Trainer, Tensor]:
    """The process that trains, and the rows that it reads: a file's memory."""
    path = folder / "rows.bin"
    path.write_bytes(bytes(4 * BATCH_SIZE * width))
    rows = torch.from_file(str(path), shared=True, size=BATCH_SIZE * width).view(BATCH_SIZE, width)
    settings = {"n_latents": N_LATENTS, "width": width, "k": TOP_K, "batch": BATCH_SIZE, "lr": LR,
                "autocast": AUTOCAST, "seed": SEED, "threads": THREADS,
                "resume": str(folder / made["checkpoint"]) if made["checkpoint"] else None}
    trainer = Trainer(KIND, path, settings, script="saelens_stream.py")
    trainer.ask()  # it answers when it has loaded SAELens
    return trainer, rows


def save(folder: Path, made: dict[str, Any], trainer: Trainer) -> None:
    """A checkpoint and the report that names it; older checkpoints go."""
    name = f"checkpoint_{made['samples']}"
    if made["checkpoint"] != name:
        for left in folder.glob(f"{name}*"):  # of a process that was killed before the report named it
            shutil.rmtree(left)
        trainer.ask(save=str(folder / name))
        made["checkpoint"] = name
    write_report(folder, Path(__file__).name, CONSTANTS, made)
    for left in folder.glob("checkpoint_*"):
        if left.name != name:
            shutil.rmtree(left)


def add_point(folder: Path, made: dict[str, Any], world: World, how: dict[str, Any]) -> None:
    """Score the last checkpoint, and write the report."""
    weights: dict[str, Any] = dict(read_tensors(folder / made["checkpoint"] / "weights.safetensors", WEIGHTS))
    sae = make_sae(**weights, scale=1.0, top_k=N_LATENTS)
    point = {"samples": made["samples"], "seconds": made["seconds"], "cpu_seconds": made["cpu_seconds"],
             **score_sae(sae, world, SCALED, how)}
    made["points"] = [p for p in made["points"] if p["samples"] != made["samples"]] + [point]
    write_report(folder, Path(__file__).name, CONSTANTS, made)
    tqdm.write(show(point))


def train(folder: Path, made: dict[str, Any], world: World) -> None:
    """Until MINUTES of training or N_SAMPLES are over, with points at the milestones and at the end."""
    trainer, rows = start(folder, made, len(world.bias))
    first, n_steps = made["samples"] // BATCH_SIZE, N_SAMPLES // BATCH_SIZE
    wall, used, due = time.monotonic(), time.process_time(), time.monotonic() + SAVE_SECONDS
    with stop_between_steps() as stopped, tqdm(initial=made["samples"], unit="sample", unit_scale=True) as bar:
        for _, x in batches(Sampler(world, SCALED, SEED), BATCH_SIZE, first, n_steps):
            rows.copy_(x)
            made["cpu_seconds"] += trainer.ask(step=True)["cpu_seconds"]
            made["samples"] += BATCH_SIZE
            bar.update(BATCH_SIZE)
            now = time.monotonic()
            made["seconds"], wall = made["seconds"] + now - wall, now
            made["cpu_seconds"], used = made["cpu_seconds"] + time.process_time() - used, time.process_time()
            how = unscored(made)
            if how or stopped() or now > due:
                save(folder, made, trainer)
                if stopped():
                    raise KeyboardInterrupt
                if how:
                    add_point(folder, made, world, how)
                wall, used, due = time.monotonic(), time.process_time(), time.monotonic() + SAVE_SECONDS
            if is_over(made):
                break
    trainer.close()


def main() -> None:
    if KIND == "matryoshka" and N_LATENTS <= 128:
        raise InputError(f"N_LATENTS={N_LATENTS} must be above 128, the width of the innermost level")
    world = open_world()
    key = fingerprint([{name: CONSTANTS[name] for name in OF_A_RUN}])
    folder = experiment_dir("benchmarks") / "synth_sae_bench" / f"saelens_{KIND}_seed{SEED}_{key}"
    with in_use(folder):
        made: dict[str, Any] = {"samples": 0, "seconds": 0.0, "cpu_seconds": 0.0, "commits": [], "machines": [],
                                "points": [], "checkpoint": None}
        if (folder / "report.json").exists():
            made |= read_report(folder / "report.json")
        note_who_trains(made, folder / "report.json", steps_left=not is_over(made))
        if made["checkpoint"] and (how := unscored(made)):  # killed while scoring, or to be scored otherwise
            add_point(folder, made, world, how)
        if not is_over(made):
            train(folder, made, world)
    for point in made["points"]:
        print(show(point))
    print(f"written: {folder / 'report.json'}")


if __name__ == "__main__":
    run(main)
