"""Trackers: each adapter against a stand-in for its package, or the package itself; failures at any moment."""
import sys
import types

import pytest
import torch

from lib.batches import rows_of_tensor
from lib.environment import InputError
from lib.trackers import ADAPTERS, open_tracker
from lib.training.loop import TrainSettings, train_sae


class Recorder:
    """Stands for a tracker's run, client or writer: every call is kept as (name, arguments); `fails` names those that
    raise.
    """

    def __init__(self, calls, fails=()):
        self.calls, self.fails = calls, fails
        self.info = types.SimpleNamespace(run_id="a run")

    def __getattr__(self, name):
        def call(*arguments, **options):
            self.calls.append((name, arguments, options))
            if name in self.fails:
                raise RuntimeError(f"{name}: no network\nat all")
            return self

        return call


def install(monkeypatch, kind, fails=()):
    """Put a stand-in for the package of `kind` in place; returns the list of the calls that it gets."""
    calls: list = []
    recorder = Recorder(calls, fails)
    if kind == "tensorboard":
        module = types.ModuleType("torch.utils.tensorboard")
        module.SummaryWriter = recorder.SummaryWriter
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    elif kind == "mlflow":
        module = types.ModuleType("mlflow")
        module.MlflowClient = recorder.MlflowClient
        monkeypatch.setitem(sys.modules, "mlflow", module)
    else:
        module = types.ModuleType(kind)
        module.init = recorder.init
        monkeypatch.setitem(sys.modules, kind, module)
    return calls


START = {"tensorboard": "SummaryWriter", "mlflow": "MlflowClient", "wandb": "init", "trackio": "init"}
SHOW = {"tensorboard": "add_scalar", "mlflow": "log_metric", "wandb": "log", "trackio": "log"}
CLOSE = {"tensorboard": "close", "mlflow": "set_terminated", "wandb": "finish", "trackio": "finish"}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_tracker_gets_every_number_with_its_step(kind, monkeypatch, tmp_path):
    calls = install(monkeypatch, kind)
    with open_tracker(kind, tmp_path / "tracker", {"TOP_K": 4}) as track:
        track({"epoch": 1, "loss": 0.5})
        track({"step": 7, "epoch": 2, "loss": 0.25})
    names = [name for name, *_ in calls]
    assert names[0] == START[kind] and names[-1] == CLOSE[kind]
    shown = [(arguments, options) for name, arguments, options in calls if name == SHOW[kind]]
    if kind in ("wandb", "trackio"):
        assert [(a[0]["loss"], o["step"]) for a, o in shown] == [(0.5, 1), (0.25, 7)]
        assert calls[0][2]["config"] == {"TOP_K": 4}
    elif kind == "mlflow":
        assert [(*a[1:], o["step"]) for a, o in shown if a[1] == "loss"] == [("loss", 0.5, 1), ("loss", 0.25, 7)]
        assert ("log_param", ("a run", "TOP_K", "4"), {}) in calls
    else:
        assert [a for a, _ in shown if a[0] == "loss"] == [("loss", 0.5, 1), ("loss", 0.25, 7)]


@pytest.mark.parametrize("moment", [START, SHOW, CLOSE])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_tracker_that_fails_is_one_line_and_the_training_goes_on(kind, moment, monkeypatch, tmp_path, caplog):
    calls = install(monkeypatch, kind, fails=(moment[kind],))
    with open_tracker(kind, tmp_path / "tracker", {}) as track:
        track({"epoch": 1, "loss": 0.5})
        track({"epoch": 2, "loss": 0.5})
    assert len(caplog.records) == 1 and f"TRACKER={kind}" in caplog.text and ": no network" in caplog.text
    assert [name for name, *_ in calls].count(moment[kind]) == 1


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_package_that_is_missing_is_told_before_the_training(kind, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if kind == "tensorboard" else kind, None)
    with pytest.raises(InputError, match=f"TRACKER={kind} needs the package {kind}: pip install {kind}"):
        with open_tracker(kind, tmp_path, {}):
            pass


def test_an_unknown_tracker_and_an_error_of_the_training(monkeypatch, tmp_path):
    with pytest.raises(InputError, match="is unknown; choose one of local, tensorboard, wandb, trackio, mlflow"):
        with open_tracker("paper", tmp_path, {}):
            pass
    calls = install(monkeypatch, "wandb")
    with pytest.raises(KeyboardInterrupt):
        with open_tracker("wandb", tmp_path, {}):
            raise KeyboardInterrupt
    assert calls[-1][0] == "finish"


def test_the_training_of_an_sae_is_tracked_and_not_changed_by_it():
    x = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
    rows, settings = rows_of_tensor(x, torch.arange(400) % 10 == 0), TrainSettings(16, 2, epochs=2, batch_size=32,
                                                                                   precision="float32", log_every=5)
    records: list = []
    _, history = train_sae(rows, settings, progress=False, track=records.append)
    _, alone = train_sae(rows, settings, progress=False)
    assert history == alone
    assert [r["loss"] for r in records if "loss" in r] == history["train"]["loss"]
    assert [(r["step"], r["val_ev"]) for r in records
            if "val_ev" in r] == list(zip(history["val"]["step"], history["val"]["ev"]))


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_real_package_where_it_is_installed(kind, monkeypatch, tmp_path, caplog):
    for name, value in {"WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "trackio"),
                        "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    pytest.importorskip(kind)  # reads the environment when it is imported
    with open_tracker(kind, tmp_path / "tracker", {"TOP_K": 4, "LR": None}) as track:
        for epoch in range(3):
            track({"epoch": epoch, "loss": 1 / (1 + epoch)})
    assert not caplog.records
    assert any(path.stat().st_size > 100 for path in tmp_path.rglob("*") if path.is_file())
