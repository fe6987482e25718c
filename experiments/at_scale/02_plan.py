"""What a run of a million, a billion or a trillion tokens needs: bytes, and time on this machine, one GPU, one node,
many nodes.

    python 01_large_shapes.py && python 02_plan.py
    python 02_plan.py PEAK_FLOPS=3.12e14 HBM_BYTES_PER_S=2e12    # an A100

This machine's times come from the rates that step 1 measured on this machine, at d = 1536; wider models are scaled by
their floating-point operations. The GPUs' times are an estimate from arithmetic, not a measurement: operations over
peak times utilisation, for an SAE step also the bytes of weights, gradients and moments over the memory's bandwidth,
and the bytes of the store over the disks' bandwidth; the slowest counts.
Reads store/at_scale/measured.json
"""
from typing import Annotated, Literal

import checkout  # noqa: F401  (first: finds lib)
from lib.constants import override
from lib.ranges import Count, Positive, Size, above, at_least, at_most

Efficiency = Annotated[float, above(0), at_most(1)]
TOKENS: tuple[Annotated[int, at_least(1), at_most(10**18)], ...] = (10**6, 10**9, 10**12)
# width: parameters of a language model of that width; half of them are below the middle layer, where activations are
# saved
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

from lib.checking import Schema
from lib.environment import InputError, run
from lib.files import read_json
from lib.schemas import POSITIVE, POSITIVE_NUMBER
from lib.store import experiment_dir

RATE = {"tokens_per_s": POSITIVE_NUMBER}
MEASURED = Schema({"models": {"bielik_1.5b": RATE}, "saes": [RATE | {"width": POSITIVE}]},
                  remedy="delete it and run 01_large_shapes.py again")


def flops_to_save(width: int) -> float:
    """Of one token: twice the parameters below the middle."""
    return MODELS[width]


def flops_to_train(width: int) -> float:
    """Of one token in one pass: the encoder's product; what the k chosen latents cost is small beside it."""
    return 2 * N_LATENTS_MULTIPLIER * width**2


def gpu_seconds(width: int) -> tuple[float, float]:
    """(saving, one pass of SAE training) of one token on one GPU."""
    # Dictionary and encoder, each with gradient and two moments, float32: 16 bytes read and 16 written for each weight.
    weight_bytes = 32 * 2 * N_LATENTS_MULTIPLIER * width**2
    train = max(flops_to_train(width) / PEAK_FLOPS, weight_bytes / GPU_BATCH / HBM_BYTES_PER_S) / USE_OF_PEAK_SAE
    return flops_to_save(width) / (PEAK_FLOPS * USE_OF_PEAK_SAVING), train


def own_seconds(width: int, measured: dict) -> tuple[float, float]:
    """(saving, one pass of SAE training) of one token on the machine of step 1."""
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
    columns = ("tokens", "d", "store", "this machine", "1 GPU", f"1 node of {NODE_GPUS}", f"{MANY_NODES} nodes",
               "where the store lies")
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    speeds = ((1, 1), (NODE_GPUS * EFFICIENCY_NODE, 1), (NODE_GPUS * MANY_NODES * EFFICIENCY_NODES, MANY_NODES))
    for tokens in TOKENS:
        for width in MODELS:
            size = tokens * width * BYTES_PER_NUMBER
            cells = [" + ".join(duration(tokens * s) for s in own_seconds(width, measured))]
            for speed, nodes in speeds:
                disk = size / DISK_BYTES_PER_S / nodes
                cells.append(" + ".join(duration(max(tokens * s / speed, disk)) for s in gpu_seconds(width)))
            print("| " + " | ".join([f"{tokens:,}", str(width), in_words(size), *cells, place(size)]) + " |")


if __name__ == "__main__":
    run(main)
