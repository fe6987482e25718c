"""SynthSAEBench-16k (arXiv 2602.14687) with this project's training step: fresh samples, the published scores.

    make peers                                                # once: the world is drawn with SAELens' own classes
    python 05_synth_sae_bench.py                              # 2 million samples, minutes
    python 05_synth_sae_bench.py N_SAMPLES=20_000_000 SEED=1  # every run has a folder of its own
    python 05_synth_sae_bench.py N_SAMPLES=200_000_000        # the protocol: hours; rerun the same command to resume
    python 05_synth_sae_bench.py LR=3e-4                      # at the protocol's own rate

Scores at 1, 2, 5, 10, 20, 50, 100, 200 million samples and at the end, on samples that no training sees: F1, MCC, EV
and dead latents by SAELens' formulas (synth_scores.py), for the SAE as it is and, to compare at equal L0, for rules at
the mean L0s of AT_L0: one threshold, leave-one-out pruning, and posterior odds, alone and given the other codes, chosen
on further samples without labels (synth_rules.py).

A run that was killed at any moment resumes; Ctrl-C keeps the step. 07_show_leaderboard.py compares all runs.
Reads and writes store/benchmarks/synth_world.safetensors, synth_sae_bench/<run>/report.json, state.safetensors
"""
from typing import Annotated, Literal

import checkout  # noqa: F401  (first: finds lib)
from lib.constants import override
from lib.ranges import Count, Part, Rate, Seed, Share, Size, at_least, at_most

MeanL0 = Annotated[float, at_least(0.01), at_most(1000)]
Scored = Annotated[int, at_least(1024), at_most(10**7)]
N_SAMPLES: Count = 2_000_000              # of training; each is drawn once
N_LATENTS: Size = 4096
KIND: Literal["topk", "batchtopk", "jumprelu", "matryoshka", "lista"] = "topk"  # as in step 2
TOP_K: Size = 25                          # latents of a sample at the end; on average, where a threshold decides
START_K: Size = 60                        # at the start; the same as TOP_K: k does not fall
FALL: Share = 0.9                         # share of the training over which k falls, linearly
BATCH_SIZE: Size = 1024
LR: Rate | None = None                    # peak learning rate; None: the rule of step 2
DEAD_AFTER: Count | None = None           # samples of silence before a latent is revived; None: the rule of step 2
WHITEN: Part = 1 / 8                      # power of the partial whitening; 0: off
SCALED: bool = True                       # children scaled by their parents' values: True in the published source,
                                          # False, it is said, in the published file
SEED: Seed = 0                            # of the weights and of the training samples
# What follows changes no training: a finished run is scored again where it was scored otherwise.
AT_L0: tuple[MeanL0, ...] = (15.0, 20.0, 25.0)  # mean L0 of the rules that score besides the SAE's own
PRUNE_FROM: Annotated[float, at_least(1), at_most(10)] = 1.4  # candidates of pruning and odds: so many times the L0
CONDITION_FROM: Annotated[float, at_least(1), at_most(10)] = 2.0  # of conditional odds
N_SCORED: Scored = 1_000_000              # samples that score at the end
N_CURVE: Scored = 200_000                 # samples that score at each milestone before
CONSTANTS = override(globals())

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from sampler import Sampler, World
from synth_reports import MILESTONES, N_CHOOSING, POINT, note_who_trains, score_sae, show, write_report
from synth_samples import batches, moments, open_world
from tqdm.auto import tqdm

from lib.environment import InputError, run
from lib.files import fingerprint, read_note, read_tensors, write_tensors
from lib.outputs import in_use
from lib.store import experiment_dir
from lib.training.fast_step import fast_step
from lib.training.kinds import KINDS, most_codes
from lib.training.loop import unfolded
from lib.training.settings import PRECISIONS, Plan, TrainSettings, aux_weight_at, falling_k, make_plan, schedule
from lib.training.step import folded_weights, init_state, whitening
from lib.training.stopping import stop_between_steps
from lib.training.workspace import Workspace, choose_precision

SETTINGS = TrainSettings(N_LATENTS, TOP_K, kind=KIND, epochs=1, batch_size=BATCH_SIZE, lr=LR, dead_after=DEAD_AFTER,
                         start_k=START_K, fall=FALL)
OF_SCORES = ("AT_L0", "PRUNE_FROM", "CONDITION_FROM", "N_SCORED", "N_CURVE")
SAVE_SECONDS = 120.0  # between two saved states
PROGRESS = {"precision": PRECISIONS, "seconds": float, "cpu_seconds": float, "commits": [str], "machines?": [str],
            "points": [POINT]}  # machines: not in runs of before it was noted
Made = dict[str, Any]  # what a saved run holds: the state, the mean of the samples, and PROGRESS


def begin_or_resume(saved: Path, world: World, plan: Plan) -> Made:
    """The saved run, or the state at step 0; code and machine are noted in it if steps are left to take."""
    if saved.exists():
        state = {name: tensor.clone() for name, tensor in read_tensors(saved).items()}
        made = {"state": state, "mean": state.pop("mean"), "machines": [], **read_note(saved, PROGRESS)}
    else:
        mean, covariance = moments(world, SCALED)
        precision, _ = choose_precision(N_LATENTS, len(mean), mean.device)
        made = {"state": init_state(whitening(covariance, WHITEN), N_LATENTS, SEED, kind=KIND), "mean": mean,
                "precision": precision, "seconds": 0.0, "cpu_seconds": 0.0, "commits": [], "machines": [],
                "points": []}
    note_who_trains(made, saved.with_name("report.json"), steps_left=int(made["state"]["step"]) < plan.n_steps)
    return made


def save(saved: Path, made: Made) -> None:
    """Everything that the run needs to go on, in one file."""
    note = {name.rstrip("?"): made[name.rstrip("?")] for name in PROGRESS}
    write_tensors(saved, made["state"] | {"mean": made["mean"]}, note=note)


def unscored(made: Made, plan: Plan) -> dict[str, Any] | None:
    """How to score the SAE as it is now; None if it stands at no milestone, or was scored so."""
    steps = int(made["state"]["step"])
    samples, is_end = steps * BATCH_SIZE, steps == plan.n_steps
    if not is_end and not any(samples - BATCH_SIZE < milestone <= samples for milestone in MILESTONES):
        return None
    how = {"n": N_SCORED if is_end else N_CURVE, "n_choosing": N_CHOOSING, "mean_l0": list(AT_L0),
           "prune_from": PRUNE_FROM, "condition_from": CONDITION_FROM,
           "batch_k": TOP_K if KIND == "batchtopk" else None}
    return None if any(p["samples"] == samples and p["how"] == how for p in made["points"]) else how


def add_point(folder: Path, made: Made, world: World, how: dict[str, Any]) -> None:
    """Score the SAE as it is, and write the report; an older point of the same samples goes."""
    samples = int(made["state"]["step"]) * BATCH_SIZE
    sae = unfolded(folded_weights(made["state"], 1.0), KIND, mean=made["mean"], scale=1.0,
                   top_k=most_codes(KIND, TOP_K, N_LATENTS))
    point = {"samples": samples, "seconds": made["seconds"], "cpu_seconds": made["cpu_seconds"],
             **score_sae(sae, world, SCALED, how)}
    made["points"] = [p for p in made["points"] if p["samples"] != samples] + [point]
    save(folder / "state.safetensors", made)
    write_report(folder, Path(__file__).name, CONSTANTS, made)
    tqdm.write(show(point))


def train(folder: Path, made: Made, world: World, plan: Plan) -> None:
    """The steps up to the next milestone, where the run is saved. Scoring comes after: Ctrl-C ends it at once."""
    state, work = made["state"], Workspace(made["state"], made["precision"], kind=KIND)
    draw = Sampler(replace(world, bias=world.bias - made["mean"]), scaled=SCALED, seed=SEED,
                   transform=state["transform"])
    wall, used = time.monotonic(), time.process_time()
    with stop_between_steps() as stopped, tqdm(total=plan.n_steps * BATCH_SIZE, initial=int(state["step"]) * BATCH_SIZE,
                                               unit="sample", unit_scale=True) as bar:
        for step, x in batches(draw, BATCH_SIZE, int(state["step"]), plan.n_steps):
            lr = plan.learning_rate * schedule(step, plan.n_steps)
            fast_step(state, x, k=falling_k(SETTINGS, step, plan.n_steps), lr=lr, dead_after=plan.dead_after, work=work,
                      aux_weight=aux_weight_at(SETTINGS, step, plan.n_steps))
            bar.update(BATCH_SIZE)
            how = unscored(made, plan)
            if how or stopped() or time.monotonic() > wall + SAVE_SECONDS:
                made["seconds"] += time.monotonic() - wall
                made["cpu_seconds"] += time.process_time() - used
                save(folder / "state.safetensors", made)
                if stopped():
                    raise KeyboardInterrupt
                if how:
                    return
                wall, used = time.monotonic(), time.process_time()


def main() -> None:
    if max(START_K, TOP_K) > N_LATENTS:
        raise InputError(f"TOP_K={TOP_K} and START_K={START_K} must be at most N_LATENTS={N_LATENTS}")
    plan = make_plan(SETTINGS, N_SAMPLES)
    numbers = {name: value for name, value in KINDS[KIND]._asdict().items() if isinstance(value, float)}
    key = fingerprint([{name: value for name, value in CONSTANTS.items() if name not in OF_SCORES}, numbers])
    folder = experiment_dir("benchmarks") / "synth_sae_bench" / f"{KIND}_{N_SAMPLES}_seed{SEED}_{key}"
    with in_use(folder):
        world = open_world()
        made = begin_or_resume(folder / "state.safetensors", world, plan) | {"kind_numbers": numbers}
        while True:
            if how := unscored(made, plan):
                add_point(folder, made, world, how)
            if int(made["state"]["step"]) == plan.n_steps:
                break
            train(folder, made, world, plan)
    for point in made["points"]:
        print(show(point))
    print(f"written: {folder / 'report.json'}")


if __name__ == "__main__":
    run(main)
