"""What every script needs: a device, a log, and an end in one line where a user can put the cause right."""
import errno
import logging
import os
import select
import shlex
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported where it is needed: constants are checked before anything heavy is loaded
    import torch

_BESIDE = Path(__file__).resolve().parents[1]
INSTALLED = not (_BESIDE / "experiments" / "verify_sae_training").is_dir()
# The checkout's root; installed there is none, and the working directory takes its place.
PROJECT = Path.cwd() if INSTALLED else _BESIDE
IN_A_ROW = "STEPS_IN_A_ROW"  # environment variable of a script that run_steps.py runs
LONGEST = 1000  # characters of an error's line
log = logging.getLogger("workbench")


class InputError(ValueError):
    """Something the user can put right; its message is one line that says what to do."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, cut at 160 characters; its type's name if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that the disk is full, or the user's quota on it."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device or the machine is out of memory."""
    torch = sys.modules.get("torch")  # whoever raised an error of torch has imported it
    kinds = (MemoryError, getattr(torch, "OutOfMemoryError", MemoryError))
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and "allocate memory" in str(error))


# What an error of the operating system means; any other is reported in its own words.
MEANING = {
    errno.EACCES: "no permission",
    errno.EPERM: "no permission",
    errno.EROFS: "the file system is read-only",
    errno.ENOTDIR: "a file stands where a folder is needed",
    errno.EEXIST: "a file stands where a folder is needed",
    errno.EISDIR: "a folder stands where a file is needed",
    errno.ENOENT: "no such file or folder",
    errno.ENAMETOOLONG: "the path is too long",
    errno.EFBIG: "the file is larger than the file system or `ulimit -f` allows; raise that, then rerun the same "
                 "command to resume",
    errno.EMFILE: "too many open files; raise `ulimit -n`, then rerun the same command to resume",
    errno.EIO: "the disk can't be read or written; check it, then rerun the same command to resume",
}


def in_one_line(error: BaseException) -> str | None:
    """What to tell the user about an error that is no bug of the program; None for any other error."""
    if isinstance(error, InputError):
        return str(error)
    if is_disk_full(error):
        return f"the disk is full ({error}); make room, then rerun the same command to resume"
    if is_out_of_memory(error):
        return (f"out of memory ({first_line(error)}); lower the constants that set batch or buffer sizes, "
                "or use a smaller model")
    if isinstance(error, OSError):
        place = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        line = MEANING.get(error.errno or 0) or error.strerror or str(error) or type(error).__name__
        store = os.path.expanduser(os.environ.get("STORE_DIR", ""))
        advice = "; set STORE_DIR to a folder that you can write" if store and place.startswith(store) else ""
        return f"{place}: {line}{advice}" if place else line
    return None


def end(error: BaseException) -> None:
    """End the process with one line for what a user can put right, and for Ctrl-C; return for anything else."""
    cause: BaseException | None = error
    while cause is not None:  # what an import raises may hide a Ctrl-C
        if isinstance(cause, KeyboardInterrupt):
            print("\nstopped; rerun the same command to resume", file=sys.stderr)
            sys.exit(130)
        cause = cause.__cause__ or cause.__context__
    line, quiet = in_one_line(error), isinstance(error, BrokenPipeError) and _reader_left()
    if line is None:
        return
    try:
        sys.stdout.flush()
    except (OSError, AttributeError):  # what is still unwritten can go nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if quiet:
        sys.exit(141)
    line = " ".join(line.split("\n"))
    if len(line) > LONGEST:  # it holds a path or a name of thousands of characters
        line = f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"
    print(f"error: {line}", file=sys.stderr)
    sys.exit(2)


def _reader_left() -> bool:
    """Whether nobody reads this process's output any more, as when `| head` has seen enough."""
    if not hasattr(select, "poll"):
        return True
    poll = select.poll()
    poll.register(1, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def guard_imports() -> None:
    """Until run() takes over, end the script with one line for errors and Ctrl-C during its imports.

    Also lets a console without UTF-8 show escapes for the characters it lacks, where it would fail otherwise.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        end(error)
        sys.__excepthook__(kind, error, trace)

    sys.excepthook = hook
    if (threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler):
        signal.signal(signal.SIGINT, _stop_at_once)


def _stop_at_once(*_: Any) -> None:
    """No cleaning up: nothing is written yet, and what is being imported could swallow an exception."""
    os.write(2, b"\nstopped; rerun the same command to resume\n")
    os._exit(130)


def run(main: Callable[[], None], parallel: bool = False) -> None:
    """Run a script's main(). What a user can put right ends it with one line and exit code 2, Ctrl-C with 130.

    parallel: whether torchrun may start the script as several processes that share the work.
    """
    sys.excepthook = sys.__excepthook__
    if signal.getsignal(signal.SIGINT) is _stop_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        from .distributed import ranks

        _check_torchrun(parallel)
        with ranks():
            main()
        print(end="", flush=True)
    except (Exception, KeyboardInterrupt) as error:
        end(error)
        raise


def _check_torchrun(parallel: bool) -> None:
    """Raise InputError if torchrun started what runs in one process, or if only part of its variables is set."""
    if (os.environ.get("WORLD_SIZE") or "1") == "1":
        return
    if not parallel:
        raise InputError(f"{Path(sys.argv[0]).name} runs in one process; start it without torchrun")
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT"):
        if not os.environ.get(name, "").isdecimal():
            raise InputError(f"{name}={os.environ.get(name, '')} must be a number where WORLD_SIZE is set; start the "
                             "script with torchrun, or unset WORLD_SIZE")
    if not os.environ.get("MASTER_ADDR") or int(os.environ["RANK"]) >= int(os.environ["WORLD_SIZE"]):
        raise InputError("MASTER_ADDR is missing, or RANK is not below WORLD_SIZE; start the script with torchrun, or "
                         "unset WORLD_SIZE")


def say_next(*steps: str, **constants: Any) -> None:
    """Print the command of the next step, a script or notebooks beside this one, as it can be typed here.

    Nothing where run_steps.py runs this script: it goes on by itself.
    """
    from .distributed import rank

    if rank() or os.environ.get(IN_A_ROW):
        return
    given = [f"{name}={shlex.quote(str(value))}" for name, value in constants.items() if value is not None]
    first, *others = ("run_steps.py", *steps) if steps[0].endswith(".ipynb") else steps
    print("next: python", shlex.quote(str(Path(sys.argv[0]).with_name(first))), *others, *given)


def log_to(path: Path) -> None:
    """Send the log to the console and append it to a file. With several ranks only rank 0 logs; the others warn."""
    from .distributed import rank

    if rank():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    logging.raiseExceptions = False  # a full disk loses lines of the log, but does not end the run
    log.setLevel(logging.INFO)
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    console, file = logging.StreamHandler(sys.stdout), logging.FileHandler(path)
    file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(console)
    log.addHandler(file)


def as_device(wanted: "str | torch.device") -> "torch.device":
    """A device or its name as torch's; "auto" as in choose_device(). What is not here fails when it is first used."""
    import torch

    return choose_device() if wanted == "auto" else torch.device(wanted)


def choose_device(wanted: "str | torch.device" = "auto") -> "torch.device":
    """The device named `wanted`; for "auto" the first of CUDA, MPS and CPU that is available, and the log says which.

    Raises InputError if `wanted` is not available here.
    """
    import torch

    wanted = str(wanted)
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available = ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count())), *available]
    if wanted == "auto":
        log.info("device: %s (auto; available: %s)", available[0], ", ".join(available))
        return torch.device(available[0])  # "cuda" is the GPU that lib.distributed gave to this rank
    if wanted not in available:
        raise InputError(f"DEVICE={wanted!r} is not available here; use one of auto, {', '.join(available)}")
    return torch.device(wanted)
