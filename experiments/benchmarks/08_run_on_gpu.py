"""Everything that needs a GPU, in one command and under ten minutes: the tests marked gpu, then the timings.

    make gpu                                        # or python 08_run_on_gpu.py; says so and ends where there is none
    python 08_run_on_gpu.py TESTS=False KINDS=lista SHAPES="((768, 24576, 32),)"
    python 08_run_on_gpu.py DEVICE=cpu SHAPES="((16, 32, 2),)" BATCHES=64 SAVE_MODELS=tiny LIVE_TOKENS="()" TESTS=False

What does not fit into the time is left out, and the table says so. The peers run where `make peers` installed them.
Writes store/benchmarks/gpu.json and gpu.md, after each timing. Exit code 1 if a test or a timing failed.
"""
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, NamedTuple

import checkout  # noqa: F401  (first: finds lib)
from lib.constants import override
from lib.ranges import Device, Positive, Size

DEVICE: Device = "cuda"                   # cpu: to see that everything runs
BUDGET_SECONDS: Positive = 540.0          # of everything together
TESTS: bool = True                        # the tests marked gpu come first, and may take half of the time
SHAPES: tuple[tuple[Size, Size, Size], ...] | tuple[()] = (  # width, latents, k of an SAE
    (768, 24576, 32), (2304, 65536, 64), (4096, 131072, 64))
BATCHES: tuple[Size, ...] = (16384, 4096)  # rows of a step; the first is timed at every shape, the others after it
KINDS: tuple[Literal["topk", "batchtopk", "jumprelu", "matryoshka", "lista"], ...] = (  # after the first at the first
    "topk", "batchtopk", "jumprelu", "matryoshka", "lista")                             # shape only
PEERS: tuple[Literal["sparsify", "dictionary_learning", "sae_lens"], ...] | tuple[()] = (
    "sparsify", "dictionary_learning", "sae_lens")
PEER_BATCH: Size = 4096                   # rows of a step of the peers, and of ours beside them
SAVE_MODELS: tuple[Literal["gpt2", "llama_1b", "tiny"], ...] | tuple[()] = ("gpt2", "llama_1b")  # random weights
SAVE_TEXTS: Size = 4000                   # stories of at most 128 tokens
SAVE_BATCH_TOKENS: Size = 16384           # tokens of one forward pass
LIVE_TOKENS: tuple[Size, Size] | tuple[()] = (300_000, 1_000_000)  # of two live trainings, whose difference counts
SECONDS: Positive = 4.0                   # of the steps of one timing, after those that are not counted
CONSTANTS = override(globals())

import torch
from gpu.jobs import time_peer, time_sae, time_saving
from gpu.live import time_live
from gpu.report import page
from gpu.roofline import known_peaks, measured_peaks
from side_by_side import PEERS_PYTHON

from lib.environment import PROJECT, choose_device, first_line, is_out_of_memory, run
from lib.files import atomic_write, write_json
from lib.store import experiment_dir, provenance

SET_UP = {"topk": 10.0, "saving": 25.0, "peer": 35.0, "live": 90.0}  # guesses: seconds of a timing besides SECONDS


class Job(NamedTuple):
    """One thing to time, and about how long it takes."""

    what: str
    who: str
    seconds: float
    work: Callable[[], dict[str, Any]]


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on, besides the code."""
    found = {"device": device.type, "driver": None, "torch": torch.__version__, "cuda": torch.version.cuda}
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        found |= {"device": f"{about.name}, {about.total_memory / 2**30:.0f} GiB", "driver": driver()}
    return found


def driver() -> str | None:
    """Its version; None where nvidia-smi does not tell."""
    try:
        done = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
                              capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().partition("\n")[0] or None


def run_tests(seconds: float) -> dict[str, Any]:
    """The tests marked gpu, in a process of their own: its exit code and its last line."""
    # tests/conftest.py has the mark under that name; reading all other tests would take a part of the time
    files = sorted(str(path) for path in (PROJECT / "tests").glob("test_*.py") if "CUDA" in path.read_text())
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--no-header", "-p", "no:cacheprovider", *files]
    try:
        done = subprocess.run(command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"code": 1, "said": f"stopped after {seconds:.0f} seconds"}
    print(done.stdout, flush=True)
    return {"code": done.returncode, "said": (done.stdout.strip().splitlines() or ["nothing"])[-1]}


def jobs(device: torch.device, peaks: Any) -> Iterator[Job]:
    """What is worth most comes first."""
    def ours(shape: tuple, batch: int, kind: str) -> Job:
        work = partial(time_sae, shape, batch, kind, device=device, seconds=SECONDS, peaks=peaks)
        return Job(f"step {shape}, batch {batch}", f"ours, {kind}", SECONDS + SET_UP["topk"], work)

    def peer(name: str, shape: tuple) -> Job:
        work = partial(time_peer, name, shape, PEER_BATCH, device=device, seconds=SECONDS, limit=4 * SET_UP["peer"],
                       peaks=peaks)
        return Job(f"step {shape}, batch {PEER_BATCH}", name, SECONDS + SET_UP["peer"], work)

    yield from (ours(shape, BATCHES[0], KINDS[0]) for shape in SHAPES)
    for model in SAVE_MODELS:
        yield Job(f"saving from a random {model}", "ours", SET_UP["saving"],
                  partial(time_saving, model, SAVE_TEXTS, SAVE_BATCH_TOKENS, device=device))
    yield from (ours(shape, batch, KINDS[0]) for batch in BATCHES[1:] for shape in SHAPES)
    yield from (ours(shape, BATCHES[0], kind) for shape in SHAPES[:1] for kind in KINDS[1:])
    for i, shape in enumerate(SHAPES):
        yield from (peer(name, shape) for name in PEERS if PEERS_PYTHON.exists())
        if i == 0 and LIVE_TOKENS and SAVE_MODELS:
            yield Job(f"live training from a random {SAVE_MODELS[0]}, 32 latents per dimension, k 32, batch 4096",
                      "ours", SET_UP["live"], partial(time_live, SAVE_MODELS[0], LIVE_TOKENS, device=device))


def outcome(job: Job, left: float) -> dict[str, Any]:
    """What the timing gave, or why it gave nothing."""
    about = {"what": job.what, "who": job.who}
    if job.seconds > left:
        return about | {"why": "left out: no time"}
    try:
        return about | job.work()
    except Exception as error:  # the others are still worth timing
        memory = is_out_of_memory(error) or "out of memory" in str(error)
        return about | {"why": "out of memory" if memory else f"failed: {first_line(error)}", "failed": not memory}
    finally:
        if DEVICE != "cpu":
            torch.cuda.empty_cache()


def main() -> None:
    start = time.monotonic()
    if DEVICE != "cpu" and not torch.cuda.is_available():
        print("no GPU that torch can use through CUDA is here, so nothing was run")
        return
    device, root = choose_device(DEVICE), experiment_dir("benchmarks")
    tests = run_tests(BUDGET_SECONDS / 2) if TESTS else None
    here = machine(device)
    measured, known = measured_peaks(device), known_peaks(here["device"])
    peaks = known or measured
    found: dict[str, Any] = {
        "constants": CONSTANTS, "made_with": provenance(), "machine": here | {"commit": provenance()["git"]},
        "tests": tests, "results": [], "measured_peaks": measured._asdict(),
        "peaks": peaks._asdict() | {"source": "by the device's name" if known else "measured"}}
    for job in jobs(device, peaks):
        found["results"].append(outcome(job, BUDGET_SECONDS - (time.monotonic() - start)))
        print({name: value for name, value in found["results"][-1].items() if name != "kernels"}, flush=True)
        write_json(root / "gpu.json", found)
        atomic_write(root / "gpu.md", lambda path: path.write_text(page(found), encoding="utf-8"))
    print(page(found))
    if not PEERS_PYTHON.exists() and PEERS:
        print("the peers were not timed: `make peers` installs them")
    if (tests and tests["code"]) or any(each.get("failed") for each in found["results"]):
        raise SystemExit(1)


if __name__ == "__main__":
    run(main)
