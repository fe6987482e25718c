"""What a token costs, stage by stage, and what a million to a trillion of them take: stored and live.

    python 01_large_shapes.py && python 02_plan.py
    python 02_plan.py WIDTH=4096 PEAK_FLOPS=3.12e14 HBM_BYTES_PER_S=2e12    # a wider model on A100s

The column of this machine is measured by step 1 at d = 1536 (per token of one core's processor time; other widths and
numbers of latents are scaled by operations and bytes). The GPUs' columns are arithmetic, from the constants below:
operations over a share of the peak, bytes over bandwidth. What the processor does beside a GPU is taken from this
machine, for one core a GPU.
Stages are added up as if none overlapped.
Reads store/at_scale/measured.json
"""
from typing import Annotated, Literal

import checkout  # noqa: F401  (first: finds lib)
from lib.constants import override
from lib.ranges import Count, Positive, Size, above, at_least, at_most

Efficiency = Annotated[float, above(0), at_most(1)]
TOKENS: tuple[Annotated[int, at_least(1), at_most(10**18)], ...] = (10**6, 10**8, 10**9, 10**10, 10**12)
WIDTH: Literal[1536, 4096, 12288] = 1536  # of the language model, whose parameters PARAMETERS gives
N_LATENTS_MULTIPLIER: Size = 4            # latents per dimension of the SAE
BYTES_PER_NUMBER: Literal[1, 2, 4, 8] = 2  # of the store: bfloat16
PEAK_FLOPS: Positive = 9.89e14            # of one GPU, bfloat16 without sparsity: an H100
HBM_BYTES_PER_S: Positive = 3.35e12       # its memory's bandwidth
USE_OF_PEAK_MODEL: Efficiency = 0.4       # assumed share of the peak in the forward pass
USE_OF_PEAK_SAE: Efficiency = 0.3         # assumed share of peak and bandwidth in an SAE step
GPU_BATCH: Count = 4096                   # rows of a step on each GPU ...
MAX_BATCH: Count = 65536                  # ... up to this on all together: more GPUs get fewer each
DISK_BYTES_PER_S: Positive = 5e9          # assumed bandwidth of the store, for each node
LINK_BYTES_PER_S: Positive = 3e11         # assumed bandwidth at which the GPUs of a node add up gradients
NETWORK_BYTES_PER_S: Positive = 5e10      # the same between nodes
NODE_GPUS: Size = 8
MANY_NODES: Size = 100
CONSTANTS = override(globals())

from lib.environment import InputError, run
from lib.files import read_json
from lib.schemas import POSITIVE, POSITIVE_NUMBER, Schema
from lib.store import experiment_dir

PARAMETERS = {1536: 1.6e9, 4096: 8.0e9, 12288: 1.75e11}  # half lie below the middle layer, where activations are saved
RATE = {"tokens_per_s": POSITIVE_NUMBER}
STAGES = ("tokenising", "saving", "reading", "whitening")
MEASURED = Schema({"models": {"bielik_1.5b": RATE}, "saes": [RATE | {"width": POSITIVE, "n_latents": POSITIVE}],
                   "host": dict.fromkeys(STAGES, POSITIVE_NUMBER)},
                  remedy="delete it and run 01_large_shapes.py again")
STORED_FIRST, STORED_THEN = ("tokenising", "model pass", "saving"), ("reading", "whitening", "SAE step")
LIVE = ("tokenising", "model pass", "reading", "whitening", "SAE step")  # mixing in memory costs what reading does
HOST = {"tokenising": "tokenising", "saving": "checks, statistics, writing", "reading": "reading or mixing rows"}


def model_flops(width: int) -> float:
    """Per token: two for each parameter below the middle layer, which are half of all."""
    return PARAMETERS[width]


def step_flops(width: int) -> float:
    """Per token: the encoder's product, beside which the k active latents cost little."""
    return 2 * N_LATENTS_MULTIPLIER * width**2


def here(measured: dict, width: int = WIDTH) -> dict[str, float]:
    """Seconds per token on one core of the machine of step 1."""
    step = next((1536 * N_LATENTS_MULTIPLIER / found["n_latents"] / found["tokens_per_s"]
                 for found in measured["saes"] if found["width"] == 1536), None)
    if step is None:
        raise InputError("measured.json has no SAE of width 1536; run 01_large_shapes.py again")
    host, wider = measured["host"], width / 1536
    return {"tokenising": host["tokenising"],
            "model pass": model_flops(width) / model_flops(1536) / measured["models"]["bielik_1.5b"]["tokens_per_s"],
            "saving": host["saving"] * wider**2, "reading": host["reading"] * wider,
            "whitening": host["whitening"] * wider**2, "SAE step": step * wider**2}


def on_gpus(measured: dict, n_gpus: int) -> dict[str, float]:
    """Seconds per token of all these GPUs together, one core of step 1's machine beside each."""
    core, disk = here(measured), WIDTH * BYTES_PER_NUMBER / DISK_BYTES_PER_S / -(-n_gpus // NODE_GPUS)
    flops = PEAK_FLOPS * n_gpus
    return {"tokenising": core["tokenising"] / n_gpus, "model pass": model_flops(WIDTH) / flops / USE_OF_PEAK_MODEL,
            "saving": max(core["saving"] / n_gpus, disk), "reading": max(core["reading"] / n_gpus, disk),
            "whitening": 2 * WIDTH**2 / flops / USE_OF_PEAK_SAE, "SAE step": step_seconds(n_gpus)}


def step_seconds(n_gpus: int) -> float:
    """Per token: the products are shared out; every GPU goes over all weights, and gradients are added up."""
    batch = min(GPU_BATCH * n_gpus, MAX_BATCH)
    n_weights = 2 * N_LATENTS_MULTIPLIER * WIDTH**2  # dictionary and encoder
    products = batch / n_gpus * step_flops(WIDTH) / PEAK_FLOPS
    sweep = 32 * n_weights / HBM_BYTES_PER_S  # weight, gradient and two moments in float32, read and written
    link = LINK_BYTES_PER_S if n_gpus <= NODE_GPUS else NETWORK_BYTES_PER_S
    adding_up = 8 * n_weights / link if n_gpus > 1 else 0.0  # a ring passes every gradient twice
    return (max(products, sweep) / USE_OF_PEAK_SAE + adding_up) / batch


def in_words(n_bytes: float) -> str:
    for unit, size in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9)):
        if n_bytes >= size:
            return f"{n_bytes / size:.3g} {unit}"
    return f"{n_bytes / 1e6:.3g} MB"


def microseconds(seconds: float) -> str:
    return f"{1e6 * seconds:,.0f}" if seconds >= 1e-4 else f"{1e6 * seconds:.2g}"


def duration(seconds: float) -> str:
    for unit, size in (("years", 365 * 86400), ("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.{0 if seconds >= 20 * size else 1}f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"


def table(title: str, heads: list[str], rows: list[list[str]]) -> None:
    print(f"\n{title}\n\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def main():
    measured = read_json(experiment_dir("at_scale") / "measured.json", MEASURED)
    is_measured = "measured, the SAE step scaled to its latents" if WIDTH == 1536 else "scaled from d = 1536"
    machines = {f"one core here ({is_measured})": here(measured), "1 GPU (arithmetic)": on_gpus(measured, 1),
                f"{NODE_GPUS} GPUs (arithmetic)": on_gpus(measured, NODE_GPUS),
                f"{MANY_NODES} nodes of {NODE_GPUS} (arithmetic)": on_gpus(measured, MANY_NODES * NODE_GPUS)}
    table(f"What a token costs, in microseconds (d = {WIDTH}, {N_LATENTS_MULTIPLIER * WIDTH:,} latents)",
          ["stage", *machines], [[HOST.get(stage, stage), *(microseconds(of[stage]) for of in machines.values())]
                                 for stage in (*STORED_FIRST, *STORED_THEN)])

    def times(stages: tuple[str, ...], of: dict[str, float], tokens: int) -> str:
        return duration(tokens * sum(of[stage] for stage in stages))

    table("Stored: time to save + time of one pass of training", ["tokens", "room", *machines],
          [[f"{tokens:.0e}".replace("e+", "e"), in_words(tokens * WIDTH * BYTES_PER_NUMBER),
            *(" + ".join(times(part, of, tokens) for part in (STORED_FIRST, STORED_THEN)) for of in machines.values())]
           for tokens in TOKENS])
    table("Live (LIVE=True): time of one pass, nothing on disk", ["tokens", *machines],
          [[f"{tokens:.0e}".replace("e+", "e"), *(times(LIVE, of, tokens) for of in machines.values())]
           for tokens in TOKENS])
    most = {name: max((*STORED_FIRST, *STORED_THEN), key=of.__getitem__) for name, of in machines.items()}
    print("\nThe dearest stage: " + "; ".join(f"{name.split(' (')[0]}, {HOST.get(stage, stage)}"
                                             for name, stage in most.items()))


if __name__ == "__main__":
    run(main)
