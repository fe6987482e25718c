"""Bytes and time for a million, a billion and a trillion tokens: on this machine, one GPU, one node, many nodes.

    python 01_large_shapes.py && python 02_plan.py
    python 02_plan.py PEAK_FLOPS=3.12e14 HBM_BYTES_PER_S=2e12    # an A100

This machine's times come from the rates that step 1 measured at d = 1536, scaled to wider models by floating-point
operations. The GPUs' times are arithmetic, not a measurement. Each is the slowest of: operations over peak times
utilisation; for an SAE step, the bytes of weights, gradients and moments over memory bandwidth; the store's bytes over
disk bandwidth.
Reads store/at_scale/measured.json
"""
from typing import Annotated, Literal

import checkout  # noqa: F401  (first: finds lib)
from lib.constants import override
from lib.ranges import Count, Positive, Size, above, at_least, at_most

Efficiency = Annotated[float, above(0), at_most(1)]
TOKENS: tuple[Annotated[int, at_least(1), at_most(10**18)], ...] = (10**6, 10**9, 10**12)
# width: parameters of a language model of that width. Half lie below the middle layer, where activations are saved.
MODELS: dict[Size, Positive] = {1536: 1.6e9, 4096: 8.0e9, 12288: 1.75e11}
N_LATENTS_MULTIPLIER: Size = 4            # latents per dimension of the SAE
BYTES_PER_NUMBER: Literal[1, 2, 4, 8] = 2  # of the store: bfloat16
PEAK_FLOPS: Positive = 9.89e14            # of one GPU, bfloat16 without sparsity: an H100
HBM_BYTES_PER_S: Positive = 3.35e12       # its memory's bandwidth
USE_OF_PEAK_SAVING: Efficiency = 0.4      # assumed share of the peak in the forward pass
USE_OF_PEAK_SAE: Efficiency = 0.3         # assumed share of peak and bandwidth in an SAE step
GPU_BATCH: Count = 16384                  # tokens of one SAE step on all GPUs together
DISK_BYTES_PER_S: Positive = 5e9          # assumed bandwidth of the store, for each node
NODE_GPUS: Size = 8
MANY_NODES: Size = 8
EFFICIENCY_NODE: Efficiency = 0.9         # assumed speed of 8 GPUs over 8 times one
EFFICIENCY_NODES: Efficiency = 0.75       # the same for 64
CONSTANTS = override(globals())

from lib.environment import InputError, run
from lib.files import read_json
from lib.schemas import POSITIVE, POSITIVE_NUMBER, Schema
from lib.store import experiment_dir

RATE = {"tokens_per_s": POSITIVE_NUMBER}
MEASURED = Schema({"models": {"bielik_1.5b": RATE}, "saes": [RATE | {"width": POSITIVE}]},
                  remedy="delete it and run 01_large_shapes.py again")


def flops_to_save(width: int) -> float:
    """Per token: two for each parameter below the middle layer, which are half of all."""
    return MODELS[width]


def flops_to_train(width: int) -> float:
    """Per token and pass: the encoder's product, beside which the k active latents cost little."""
    return 2 * N_LATENTS_MULTIPLIER * width**2


def gpu_seconds(width: int) -> tuple[float, float]:
    """Per token on one GPU: saving, one pass of SAE training."""
    # Dictionary and encoder, each with gradient and two moments in float32: 16 bytes read and 16 written per weight.
    weight_bytes = 32 * 2 * N_LATENTS_MULTIPLIER * width**2
    train = max(flops_to_train(width) / PEAK_FLOPS, weight_bytes / GPU_BATCH / HBM_BYTES_PER_S) / USE_OF_PEAK_SAE
    return flops_to_save(width) / (PEAK_FLOPS * USE_OF_PEAK_SAVING), train


def own_seconds(width: int, measured: dict) -> tuple[float, float]:
    """Per token on the machine of step 1: saving, one pass of SAE training."""
    save = 1 / measured["models"]["bielik_1.5b"]["tokens_per_s"]
    train = next((1 / found["tokens_per_s"] for found in measured["saes"] if found["width"] == 1536), None)
    if train is None:
        raise InputError("measured.json has no SAE of width 1536; run 01_large_shapes.py again")
    return save * flops_to_save(width) / flops_to_save(1536), train * flops_to_train(width) / flops_to_train(1536)


def in_words(n_bytes: float) -> str:
    for unit, size in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9)):
        if n_bytes >= size:
            return f"{n_bytes / size:.3g} {unit}"
    return f"{n_bytes / 1e6:.3g} MB"


def duration(seconds: float) -> str:
    for unit, size in (("years", 365 * 86400), ("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.{0 if seconds >= 20 * size else 1}f} {unit}"
    return f"{seconds:.2g} s"


def place(n_bytes: float) -> str:
    """Where a store of that size should lie."""
    if n_bytes < 1e12:
        return "local disk"
    if n_bytes < 2e13:
        return "NVMe of one node"
    if n_bytes < 1e15:
        return "parallel file system"
    return "nowhere: sample the tokens"


def main():
    measured = read_json(experiment_dir("at_scale") / "measured.json", MEASURED)
    print("time to save one layer + time of one pass of SAE training; the GPU columns are estimates")
    speeds = {"1 GPU": (1, 1), f"1 node of {NODE_GPUS}": (NODE_GPUS * EFFICIENCY_NODE, 1),
              f"{MANY_NODES} nodes": (NODE_GPUS * MANY_NODES * EFFICIENCY_NODES, MANY_NODES)}
    rows = []
    for tokens in TOKENS:
        for width in MODELS:
            size = tokens * width * BYTES_PER_NUMBER
            row = {"tokens": f"{tokens:,}", "d": width, "store": in_words(size),
                   "this machine": " + ".join(duration(tokens * s) for s in own_seconds(width, measured))}
            for name, (speed, nodes) in speeds.items():
                disk = size / DISK_BYTES_PER_S / nodes
                row[name] = " + ".join(duration(max(tokens * s / speed, disk)) for s in gpu_seconds(width))
            rows.append(row | {"where the store lies": place(size)})
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(map(str, row.values())) + " |")


if __name__ == "__main__":
    run(main)
