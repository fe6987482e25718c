"""Scripts run in forked children of a process that has imported everything, so that one can be killed every second.

    with Forks() as forks:
        forks.run(["experiments/verify_sae_training/02_train_sae.py", "EPOCHS=2"], store, kill_after=0.7)

Run as a program it is that process: a job is one JSON line in, what became of it one JSON line out.
"""
import importlib
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

PROJECT = Path(__file__).resolve().parents[1]
IMPORTS = ("lib.environment", "lib.activations", "lib.training.loop", "cycles.steps", "cycles.evaluation", "lib.models",
           "lib.training.kernels", "pandas",
           "sklearn.linear_model", "sklearn.feature_extraction.text", "sklearn.cluster",
           "transformers.models.llama.modeling_llama",
           "transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto", "overcomplete.sae")

# Where the packages of the experiments lie.
ROOMS = os.pathsep.join(str(PROJECT / folder)
                        for folder in (".", "experiments/verify_sae_training", "experiments/sae_ception"))
# Set before a script starts, so that a run of a second writes as many files as a long one.
# A checkpoint after every step: how many files a run writes must not depend on how busy the machine is.
OFTEN = {"lib.training.checkpoints.CHECKPOINT_SECONDS": -1.0,
         "lib.training.checkpoints.CHECKPOINT_SHARE": float("inf"), "lib.activations.BLOCK_TEXTS": 16}
VERIFY, CEPTION, EMBEDDED = (f"experiments/{name}"
                             for name in ("verify_sae_training", "sae_ception", "embedded_default"))
SAVE = ["MODEL={data}/llama", "DATASET={data}/train.jsonl", "LAYER_SIGNATURE=resid_post:1,resid_post:0",
        "SHARD_ROWS=60", "PREFLIGHT=False"]
TRAIN = ["N_LATENTS_MULTIPLIER=4", "EPOCHS=12", "BATCH_SIZE_TRAIN=64", "TOP_K=3", "PRECISION=float32"]
DATA = ["MODEL={data}/llama", "DATASET={data}/train.jsonl", "VAL_DATASET={data}/val.jsonl",
        "TEST_DATASET={data}/test.jsonl", "DATA_LIMIT=None", "SETTING=tiny"]
BASELINE = [f"{CEPTION}/01_train_baseline.py", *DATA, "EPOCHS_PER_CYCLE=6", "BATCH_SIZE=16"]
SAE = [f"{CEPTION}/02_train_sae.py", "SAE_EPOCHS=4", "SAE_BATCH_SIZE=64", "TOP_K=4"]
CYCLE = [f"{CEPTION}/04_train_cycle.py", *BASELINE[1:], *SAE[1:], "SEEDS=0,", "ARMS=('lambda0','per_class')",
         "KEEP_PCT=5.0", "ABSORPTION_TOKENS=200"]
STORIES = [f"{EMBEDDED}/01_write_stories.py", "N_STORIES=240"]
MODEL = [f"{EMBEDDED}/02_train_story_model.py", "HIDDEN=16", "LAYERS=1", "HEADS=2", "MLP_WIDTH=16", "N_MERGES=50",
         "EPOCHS=2", "BATCH_SIZE=8",
         "WARMUP=2", "SAVE_EVERY=3"]
# Each script after those that it needs.
SCRIPTS = {
    "verify 01": [[f"{VERIFY}/01_save_activations.py", *SAVE]],
    "verify 02": [[f"{VERIFY}/01_save_activations.py", *SAVE], [f"{VERIFY}/02_train_sae.py", *TRAIN]],
    "verify 02 live": [[f"{VERIFY}/01_save_activations.py", *SAVE, "DATA_LIMIT=60"],
                       [f"{VERIFY}/02_train_sae.py", *TRAIN, "LIVE=True", "N_TOKENS=2000", "BUFFER_TOKENS=200",
                        "SAES=LAYER=resid_post:1,resid_post:0"]],
    "sae_ception 01": [BASELINE],
    "sae_ception 02": [BASELINE, SAE],
    "sae_ception 03": [BASELINE, SAE, [f"{CEPTION}/03_train_auxiliary.py", "KEEP_PCT=5.0"]],
    "sae_ception 04": [CYCLE],
    "embedded 01": [STORIES],
    "embedded 02": [STORIES, MODEL],
}


def contents(folder):
    """The bytes of every file of a store but the logs."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and path.suffix != ".log"}


class Ended(NamedTuple):
    """What became of a run."""

    code: int
    """Exit code; that of a signal is negative: -9 if it was killed, -19 if it was stopped and is still there."""
    process: int
    seconds: float
    writes: int
    """Files that it put in place."""
    said: str


class Whole(NamedTuple):
    """A run that was not disturbed."""

    command: list[str]
    """Script and arguments."""
    before: Path
    """The store that it began with."""
    ended: Ended
    files: dict[str, bytes]
    """What the store held when it had ended."""


class Forks:
    """The process that forks; close it, or use it in a with block."""

    def __init__(self):
        environment = (os.environ
                       | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": ROOMS})
        self.process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True, env=environment)

    def run(
        self, command, store, *, kill_after=None, kill_at_write=None, kind=signal.SIGKILL, environment=None
    ) -> Ended:
        """Run one of the project's scripts on a store; `kind` is sent after so many seconds, or when it has written so
        many files.
        """
        store.mkdir(parents=True, exist_ok=True)
        job = {"script": str(PROJECT / command[0]), "arguments": command[1:], "store": str(store),
               "kill_after": kill_after,
               "kill_at_write": kill_at_write, "kind": int(kind), "environment": environment or {}}
        return Ended(**self._ask(job))

    def end(self, stopped: Ended) -> None:
        """Kill a run that was stopped."""
        self._ask({"end": stopped.process})

    def _ask(self, job):
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()


def child(job, notes):
    """Run the script as __main__; never returns."""
    for descriptor in (1, 2):
        os.dup2(os.open(notes + ".log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what it puts in the background without it
    os.environ.update({"STORE_DIR": job["store"]} | job["environment"])
    os.chdir(job["store"])
    sys.argv = [job["script"], *job["arguments"]]
    sys.path.insert(0, str(Path(job["script"]).parent))
    for name, value in OFTEN.items():
        module, _, constant = name.rpartition(".")
        setattr(importlib.import_module(module), constant, value)
    replace = os.replace

    def counted(*paths):
        number = os.path.getsize(notes) + 1
        if number == job["kill_at_write"] and number % 2:  # before the file is in place, or just after
            os.kill(os.getpid(), job["kind"])
        replace(*paths)
        with open(notes, "ab") as file:
            file.write(b".")
        if number == job["kill_at_write"]:
            os.kill(os.getpid(), job["kind"])

    os.replace = counted
    code = 0
    try:
        runpy.run_path(job["script"], run_name="__main__")
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        code = 1
        try:
            sys.excepthook(*sys.exc_info())  # as the interpreter does
        except SystemExit as ended:
            code = ended.code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def serve():
    """Fork a child for each job, kill it in time, and say what became of it."""
    for name in IMPORTS:
        importlib.import_module(name)
    folder = tempfile.mkdtemp()
    for number, line in enumerate(sys.stdin):
        job = json.loads(line)
        if "end" in job:
            os.kill(job["end"], signal.SIGKILL)
            os.waitpid(job["end"], 0)
            print("{}", flush=True)
            continue
        notes = f"{folder}/{number}"
        for path in (notes, notes + ".log"):
            Path(path).touch()
        threads = {path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")}
        assert len(threads - {"jemalloc_bg_thd"}) == 1, f"a process with the threads {threads} can't be forked safely"
        start = time.monotonic()
        pid = os.fork()
        if not pid:
            child(job, notes)
        deadline = start + (job["kill_after"] if job["kill_after"] is not None else 120)
        while not (done := os.waitpid(pid, os.WNOHANG | os.WUNTRACED))[0]:
            if time.monotonic() > deadline:
                os.kill(pid, job["kind"])
                deadline = float("inf")
            time.sleep(0.002)
        seconds, said = time.monotonic() - start, Path(notes + ".log").read_text()
        code = -os.WSTOPSIG(done[1]) if os.WIFSTOPPED(done[1]) else os.waitstatus_to_exitcode(done[1])
        answer = {"code": code, "process": pid, "seconds": seconds, "writes": os.path.getsize(notes), "said": said}
        print(json.dumps(answer), flush=True)
    shutil.rmtree(folder)


if __name__ == "__main__":
    serve()
