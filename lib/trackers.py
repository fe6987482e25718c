"""Shows a training's progress while it runs. The results themselves are always local JSON.

    with open_tracker("tensorboard", folder / "tracker", constants) as track:
        track({"epoch": 1, "loss": 0.3})

local shows nothing beyond the log. tensorboard, mlflow and trackio write to this machine, unless MLFLOW_TRACKING_URI or
TRACKIO_SPACE_ID name another place; wandb needs an account, unless WANDB_MODE=offline.
"""
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from .environment import InputError, first_line, log

Record = dict[str, float]
PROJECT_NAME = "sae-workbench"


class Tracker(NamedTuple):
    """A started tracker."""

    show: Callable[[Record, int], None]
    """Takes numbers by name, and their step or epoch."""
    close: Callable[[], None]


@contextmanager
def open_tracker(kind: str, path: Path, constants: dict[str, Any]) -> Iterator[Callable[[Record], None]]:
    """A function that shows one record of numbers at its "step" or, if it has none, its "epoch".

    path: the tracker's own folder; its last three parts name the run. A tracker that fails to start, run or close is
    reported in one line and dropped: it can't stop the training.
    Raises InputError if `kind` is unknown or its package is not installed.
    """
    tracker = _start(kind, path, constants)

    def track(record: Record) -> None:
        nonlocal tracker
        if tracker is not None:
            try:
                tracker.show(record, int(record["step"] if "step" in record else record["epoch"]))
            except Exception as error:  # whatever a tracker raises must not stop the training
                log.warning("TRACKER=%s stopped; the training continues: %s", kind, first_line(error))
                tracker = None

    try:
        yield track
    finally:
        try:
            if tracker is not None:
                tracker.close()
        except Exception as error:  # see above
            log.warning("TRACKER=%s did not close: %s", kind, first_line(error))


def _start(kind: str, path: Path, constants: dict[str, Any]) -> Tracker | None:
    """The tracker; None for "local", or if it can't start."""
    if kind == "local":
        return None
    if kind not in ADAPTERS:
        raise InputError(f"TRACKER={kind!r} is unknown; choose one of {', '.join(TRACKERS)}")
    try:
        return ADAPTERS[kind](path, "_".join(path.parts[-3:]), constants)
    except ImportError:
        raise InputError(f"TRACKER={kind} needs the package {kind}: pip install {kind}, or set TRACKER=local") from None
    except Exception as error:  # no account, no network, a full disk ...
        log.warning("TRACKER=%s can't start; the training continues: %s", kind, first_line(error))
        return None


def _tensorboard(path: Path, name: str, constants: dict[str, Any]) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(path)

    def show(record: Record, step: int) -> None:
        for key, value in record.items():
            writer.add_scalar(key, value, step)

    return Tracker(show, writer.close)


def _wandb(path: Path, name: str, constants: dict[str, Any]) -> Tracker:
    import wandb

    path.mkdir(parents=True, exist_ok=True)
    run = wandb.init(project=PROJECT_NAME, name=name, config=constants, dir=path)
    return Tracker(lambda record, step: run.log(record, step=step), run.finish)


def _trackio(path: Path, name: str, constants: dict[str, Any]) -> Tracker:
    import trackio

    run = trackio.init(project=PROJECT_NAME, name=name, config=constants, space_id=os.environ.get("TRACKIO_SPACE_ID"))
    return Tracker(lambda record, step: run.log(record, step=step), run.finish)


def _mlflow(path: Path, name: str, constants: dict[str, Any]) -> Tracker:
    from mlflow import MlflowClient

    path.mkdir(parents=True, exist_ok=True)
    client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{path / 'mlflow.db'}")
    found = client.get_experiment_by_name(PROJECT_NAME)
    experiment = found.experiment_id if found else client.create_experiment(PROJECT_NAME)
    run_id = client.create_run(experiment, run_name=name).info.run_id
    for key, value in constants.items():
        client.log_param(run_id, key, str(value)[:500])

    def show(record: Record, step: int) -> None:
        for key, value in record.items():
            client.log_metric(run_id, key, value, step=step)

    return Tracker(show, lambda: client.set_terminated(run_id))


ADAPTERS: dict[str, Callable[[Path, str, dict[str, Any]], Tracker]] = {
    "tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio, "mlflow": _mlflow,
}
TRACKERS = ("local", *ADAPTERS)
