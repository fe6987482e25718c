"""Where a training's progress is shown while it runs; the results themselves are always local JSON.

    with open_tracker("tensorboard", folder / "tracker", constants) as track:
        track({"epoch": 1, "loss": 0.3})
"""
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lib.environment import InputError, log

TRACKERS = ("local", "tensorboard", "wandb")


@contextmanager
def open_tracker(kind: str, path: Path, constants: dict[str, Any]) -> Iterator[Callable[[dict[str, float]], None]]:
    """A function that shows one record of numbers by its "epoch"; "local" shows nothing beyond the log.

    A tracker that fails while training runs is reported once and then left alone: it can't stop the training.
    Raises InputError if `kind` is unknown or its package is not installed.
    """
    show, close = _adapter(kind, path, constants)
    broken = False

    def track(record: dict[str, float]) -> None:
        nonlocal broken
        if broken:
            return
        try:
            show(record)
        except Exception as error:  # whatever a tracker raises, the training goes on
            broken = True
            log.warning("tracker %s stopped: %s", kind, error)

    try:
        yield track
    finally:
        try:
            close()
        except Exception as error:  # see above
            log.warning("tracker %s did not close: %s", kind, error)


def _adapter(kind: str, path: Path, constants: dict[str, Any]) -> tuple[Callable, Callable]:
    if kind == "local":
        return (lambda record: None), (lambda: None)
    try:
        if kind == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(path)

            def show(record):
                for name, value in record.items():
                    writer.add_scalar(name, value, record["epoch"])

            return show, writer.close
        if kind == "wandb":
            import wandb

            run = wandb.init(project="sae_ception", name="_".join(path.parts[-3:]), config=constants)
            return (lambda record: run.log(record, step=int(record["epoch"]))), run.finish
    except ImportError:
        raise InputError(f"TRACKER={kind} needs the package {kind}: pip install {kind}, or set TRACKER=local") from None
    raise InputError(f"TRACKER={kind!r} is none of {', '.join(TRACKERS)}")
