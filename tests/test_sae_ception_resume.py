"""A classifier's training that is stopped within an epoch, by a kill or by Ctrl-C, ends with the same bytes."""
import signal
from contextlib import suppress

import pytest
import torch
from test_sae_ception_gates import image_task, text_model, text_task
from torch import nn

import cycles.fine_tuning
import cycles.unfinished
from cycles.auxiliary import Targets
from cycles.fine_tuning import Checkpoint, TuneSettings, fine_tune
from cycles.modules import OwnModule, trained_state
from lib.environment import InputError
from lib.files import read_torch, write_torch
from lib.training import checkpoints

SETTINGS = TuneSettings(epochs=3, batch_size=6, lr=0.01, optimizer="adamw", weight_decay=0.1, warmup_steps=3,
                        decay=True, clip_norm=1.0, accumulate=2, aux_weight=1.0, select="best")
TARGETS = Targets(torch.arange(120), torch.randn(120, 16, generator=torch.Generator().manual_seed(0)))


def start(kind):
    """A model that draws while it trains (dropout; a batch norm's means change too), and its task."""
    if kind == "gpt2":
        return text_model("gpt2"), text_task()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.ReLU(), nn.Linear(16, 3)]
        return OwnModule(nn.Sequential(*layers), "3"), image_task()


def train(kind, path=None, settings=SETTINGS):
    """History and weights of a training, from its checkpoint if there is one."""
    model, task = start(kind)
    history = fine_tune(model, task, settings, TARGETS, checkpoint=path and Checkpoint(path))
    return history, trained_state(model)


def assert_same(one, two):
    assert one[0] == two[0]
    assert one[1].keys() == two[1].keys() and all(torch.equal(one[1][name], two[1][name]) for name in one[1])


@pytest.fixture
def every_step(monkeypatch):
    monkeypatch.setattr(checkpoints, "CHECKPOINT_SECONDS", -1.0)
    monkeypatch.setattr(checkpoints, "CHECKPOINT_SHARE", float("inf"))


@pytest.mark.parametrize("kind", ["gpt2", "own"])
def test_a_kill_at_every_checkpoint_leaves_the_same_bytes(kind, tmp_path, monkeypatch, every_step):
    """Twice each: before the file is in place, and just after."""
    class Killed(BaseException):
        pass

    def killed(path, content):
        writes.append(content["progress"].get("partial", {}).get("step"))
        if len(writes) % 2 == 0:
            write_torch(path, content)
        raise Killed

    settings = TuneSettings(**vars(SETTINGS) | {"epochs": 2})
    whole, writes, again = train(kind, settings=settings), [], None
    monkeypatch.setattr(cycles.unfinished, "write_torch", killed)
    while again is None:
        with suppress(Killed):
            again = train(kind, tmp_path / "left.pt", settings)
    assert_same(again, whole)
    steps = list(range(1, 1 + -(-len(start(kind)[1].splits["train"].split(6)) // 2)))
    assert writes[::2] == writes[1::2] == [*steps, None, *steps]


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at", [1, 5, 6])  # within an epoch, and in the last step of the last one
def test_ctrl_c_saves_the_step_it_came_in(kind, at, tmp_path, monkeypatch):
    real, taken, handlers = cycles.fine_tuning.scheduled_lr, [], [signal.getsignal(n) for n in (2, 15)]

    def interrupted(step, *rest):
        taken.append(step)
        if len(taken) == at:
            signal.raise_signal(kind)
        return real(step, *rest)

    settings = TuneSettings(**vars(SETTINGS) | {"epochs": 2, "accumulate": 1})  # of three steps each
    whole = train("gpt2", settings=settings)
    monkeypatch.setattr(cycles.fine_tuning, "scheduled_lr", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train("gpt2", tmp_path / "left.pt", settings)
    assert [signal.getsignal(n) for n in (2, 15)] == handlers and len(taken) == at
    progress = read_torch(tmp_path / "left.pt", "train again")["progress"]
    assert (len(progress["epochs"]), progress["partial"]["step"]) == ((at - 1) // 3, (at - 1) % 3 + 1)
    assert_same(train("gpt2", tmp_path / "left.pt", settings), whole)
    assert taken == [*range(6)]


def test_ctrl_c_while_an_epoch_is_scored_keeps_the_score(tmp_path, monkeypatch):
    real, scored = cycles.fine_tuning._validated, []

    def interrupted(training):
        scored.append(1)
        if len(scored) == SETTINGS.epochs:
            signal.raise_signal(signal.SIGINT)
        return real(training)

    whole = train("own")
    monkeypatch.setattr(cycles.fine_tuning, "_validated", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train("own", tmp_path / "left.pt")
    assert_same(train("own", tmp_path / "left.pt"), whole)
    assert len(scored) == SETTINGS.epochs


def test_checkpoints_within_an_epoch_are_written_now_and_then(tmp_path, monkeypatch):
    """By time: the first is due after CHECKPOINT_SECONDS, the next by what the last one cost."""
    monkeypatch.setattr(checkpoints, "CHECKPOINT_SECONDS", 3.5)
    now, writes = [100.0], []
    monkeypatch.setattr(cycles.fine_tuning.time, "monotonic", lambda: now[0])
    real_lr = cycles.fine_tuning.scheduled_lr

    def second(*args):
        now[0] += 1
        return real_lr(*args)

    def slow(path, content):
        writes.append((now[0] - 100, len(content["progress"]["epochs"]), "partial" in content["progress"]))
        now[0] += 0.11  # a fiftieth of the 5.5 seconds until the next one

    monkeypatch.setattr(cycles.fine_tuning, "scheduled_lr", second)
    monkeypatch.setattr(cycles.unfinished, "write_torch", slow)
    train("own", tmp_path / "left.pt", TuneSettings(epochs=1, batch_size=6, lr=0.01, aux_weight=1.0))
    assert writes == [(4, 0, True), (pytest.approx(10.11), 0, True)]


@pytest.mark.parametrize("often", [False, True])
def test_a_training_that_diverged_leaves_no_checkpoint(often, tmp_path, monkeypatch, request):
    """It would only diverge again, and refuse the lower LR that mends it."""
    if often:
        request.getfixturevalue("every_step")
    real = cycles.fine_tuning._accumulated
    seen = []

    def diverging(training, group):
        seen.append(1)
        return [loss * (1 if len(seen) < 5 else float("nan")) for loss in real(training, group)]

    monkeypatch.setattr(cycles.fine_tuning, "_accumulated", diverging)
    with pytest.raises(InputError, match="not finite in epoch 3; lower LR"):
        train("gpt2", tmp_path / "left.pt")
    assert len(seen) == (5 if often else 6) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name,value", [("losses", torch.zeros(2)), ("generator", torch.zeros(8, dtype=torch.uint8)),
                                        ("losses", "none"), ("generator", torch.zeros(5056))])
def test_a_damaged_part_of_an_epoch_is_told_in_one_line(name, value, tmp_path, monkeypatch):
    def stopped(*_):
        signal.raise_signal(signal.SIGINT)
        return 0.01

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cycles.fine_tuning, "scheduled_lr", stopped)
        train("own", tmp_path / "left.pt")
    content = read_torch(tmp_path / "left.pt", "train again")
    content["progress"]["partial"][name] = value
    write_torch(tmp_path / "left.pt", content)
    with pytest.raises(InputError, match="left.pt is damaged .*; delete it and train again$"):
        train("own", tmp_path / "left.pt")


def test_of_several_ranks_the_first_goes_on_with_what_one_process_left(monkeypatch):
    partial = cycles.unfinished.partial_epoch(2, [torch.ones(2), torch.ones(2)], torch.device("cpu"))
    found = []
    for number in (0, 1):
        monkeypatch.setattr(cycles.unfinished, "rank", lambda number=number: number)
        torch.manual_seed(number + 7)
        step, losses = cycles.unfinished.begun_epoch(partial, torch.device("cpu"))
        found.append((step, float(torch.stack(losses).sum()), torch.equal(torch.get_rng_state(), partial["generator"])))
    assert found == [(2, 4.0, True), (2, 0.0, False)]
