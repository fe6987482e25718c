"""Scripts run in forked children of a process that has imported everything, so that one can be killed every second.

    with Forks() as forks:
        forks.run("experiments/.../02_train_sae.py", ["EPOCHS=2"], store, kill_after=0.7)

Run as a program it is that process: a job is one JSON line in, what became of it one JSON line out.
"""
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

PROJECT = Path(__file__).resolve().parents[1]
IMPORTS = ("lib.environment", "lib.activations", "lib.training", "lib.cycles", "lib.task_evaluation", "lib.models", "lib.kernels", "pandas",
           "sklearn.linear_model", "sklearn.feature_extraction.text", "sklearn.cluster", "transformers.models.llama.modeling_llama",
           "transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto", "overcomplete.sae")  # fmt: skip


class Ended(NamedTuple):
    """What became of a run."""

    code: int
    """Exit code; -9 if it was killed."""
    seconds: float
    writes: int
    """Files that it put in place."""
    said: str


class Forks:
    """The process that forks; close it, or use it in a with block."""

    def __init__(self):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(PROJECT)}
        self.process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def run(self, script, arguments, store, *, kill_after=None, kill_at_write=None, kind=signal.SIGKILL, patches=None, environment=None) -> Ended:
        """Run one of the project's scripts on a store; `kind` is sent after so many seconds, or when it has written so many files.

        patches: {"module.NAME": value}, set before the script starts.
        """
        store.mkdir(parents=True, exist_ok=True)
        job = {"script": str(PROJECT / script), "arguments": arguments, "store": str(store), "kill_after": kill_after, "kill_at_write": kill_at_write,
               "kind": int(kind), "patches": patches or {}, "environment": environment or {}}  # fmt: skip
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return Ended(**json.loads(self.process.stdout.readline()))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()


def child(job, notes):
    """Run the script as __main__; never returns."""
    for descriptor in (1, 2):
        os.dup2(os.open(notes + ".log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ.update({"STORE_DIR": job["store"]} | job["environment"])
    os.chdir(job["store"])
    sys.argv = [job["script"], *job["arguments"]]
    sys.path.insert(0, str(Path(job["script"]).parent))
    for name, value in job["patches"].items():
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
        import traceback

        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def serve():
    """Fork a child for each job, kill it in time, and say what became of it."""
    for name in IMPORTS:
        importlib.import_module(name)
    for number, line in enumerate(sys.stdin):
        job = json.loads(line)
        notes = f"{job['store']}/../.forked_{os.getpid()}_{number}"
        Path(notes).touch()
        threads = {path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")}
        assert len(threads - {"jemalloc_bg_thd"}) == 1, f"a process with the threads {threads} can't be forked safely"
        start = time.monotonic()
        pid = os.fork()
        if not pid:
            child(job, notes)
        deadline = start + (job["kill_after"] if job["kill_after"] is not None else 120)
        while not (done := os.waitpid(pid, os.WNOHANG))[0]:
            if time.monotonic() > deadline:
                os.kill(pid, job["kind"])
                deadline = float("inf")
            time.sleep(0.002)
        seconds, said = time.monotonic() - start, Path(notes + ".log").read_text()
        answer = {"code": os.waitstatus_to_exitcode(done[1]), "seconds": seconds, "writes": os.path.getsize(notes), "said": said}
        os.remove(notes)
        os.remove(notes + ".log")
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
