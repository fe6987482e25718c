"""Any torch module with data of its own goes through all of it: a CNN on MNIST, a small network on a table."""
import textwrap

import pytest
import torch
from conftest import ASSETS
from test_sae_ception_cycles import cycle, defaults, script  # noqa: F401  (fixtures)

from cycles.ablation import Ablation
from cycles.own import code_of, file_of, is_own, key_of, make
from cycles.session import Session
from lib.environment import InputError
from presets import setting_name

TABLE = """
    import torch
    from sklearn.datasets import load_wine
    from torch import nn

    def make_classifier():
        data = load_wine()
        x, y = torch.tensor(data.data, dtype=torch.float32), torch.tensor(data.target)
        test = torch.arange(len(y)) % 4 == 0
        x = (x - x[~test].mean(0)) / x[~test].std(0)
        module = nn.Sequential(nn.Linear(13, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(.1), nn.Linear(32, 3))
        return module, "2", {"train": (x[~test], y[~test]), "test": (x[test], y[test]), "classes": data.target_names}
"""
ODD = """
    from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    class Wrap(nn.Module):
        def forward(self, x):
            return x[None]

    class Unwrap(nn.Module):
        def forward(self, x):
            return x[0]

    def drawn(x, y, **how):
        return DataLoader(TensorDataset(x, y), **how)
"""
ROWS = """
    from dataclasses import dataclass

    @dataclass
    class Sizes:
        n: int = 13

    class Rows(torch.utils.data.IterableDataset):
        def __init__(self, x, y):
            self.rows = list(zip(x, y))

        def __iter__(self):
            return iter(self.rows)
"""
CNN = """
    import gzip
    import numpy as np
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    def load(name, n):
        read = lambda kind, skip: np.frombuffer(gzip.open(f"{FOLDER}/{name}-{kind}-ubyte.gz").read(), np.uint8)[skip:]
        x = torch.tensor(read("images-idx3", 16)).view(-1, 1, 28, 28)[:n] / 255
        y = torch.tensor(read("labels-idx1", 8))[:n].long()
        return DataLoader(TensorDataset(x, y), 64, shuffle=name == "train")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.pool = nn.Conv2d(1, 4, 5, stride=2), nn.MaxPool2d(3)
            self.head = nn.Linear(64, 10)

        def forward(self, x):
            return self.head(self.pool(self.conv(x).relu()).flatten(1))

    def make_classifier():
        return Net(), "pool", {"train": load("train", 600), "test": load("t10k", 200)}
"""


@pytest.fixture
def written(tmp_path, defaults):  # noqa: F811
    """written(source): constants for the classifier that this file makes."""

    def write(source, name="mine.py", **constants):
        (tmp_path / name).write_text(textwrap.dedent(source))
        small = {"EPOCHS_PER_CYCLE": 3, "SAE_EPOCHS": 2, "METRICS": (), "DEVICE": "cpu", "TOP_K": 4, "KEEP_PCT": 3.0,
                 "LR": 1e-2, "WARMUP_STEPS": 0}
        return defaults[0] | small | {"MODEL": f"{tmp_path / name}:make_classifier", **constants}

    return write


def test_a_network_on_a_table(written):
    c = written(TABLE, ARMS=("lambda0", "per_class"), METRICS=("probes", "clustering", "robustness"), ROBUST_LIMIT=20)
    session = Session(c, 0)
    assert session.root.name == setting_name(session.c) == "mine"
    assert session.task.class_names == ["class_0", "class_1", "class_2"] and session.model.target.path == "2"
    assert [len(ids) for ids in session.task.splits.values()] == [119, 14, 45]
    baseline = cycle(session, "baseline", 0)["test"]
    test = cycle(session, "per_class", 1)["test"]
    assert baseline["task_accuracy"] > 0.8 and test["robust_clean"] > 0.6 and "clustering_ari" in test
    h, logits = session.outputs(session.task.splits["test"])
    again = Session(c, 0)
    again.load("per_class", 1)
    assert h.shape == (45, 32) and torch.equal(again.outputs(again.task.splits["test"])[1], logits)
    assert again.key("model", "per_class", 1) == session.key("model", "per_class", 1)
    other = Session(c, 1)
    assert torch.equal(other.task.splits["test"], session.task.splits["test"])
    assert not torch.equal(other.initial["module.0.weight"], session.initial["module.0.weight"])


def test_a_batch_norms_running_means_are_kept(written):
    """They are no parameters, but a model loaded without them gives other outputs."""
    session = Session(written(TABLE), 0)
    cycle(session, "baseline", 0)
    ids = session.task.splits["test"]
    trained = session.outputs(ids)[1]
    session.model.module[1].running_mean.add_(5.0)
    assert not torch.allclose(session.outputs(ids)[1], trained)
    session.load("baseline", 0)
    assert torch.equal(session.outputs(ids)[1], trained)


def test_frozen_parts_stay_in_eval_mode(written):
    """A batch norm that is frozen keeps its means, and what drops out there drops nothing; the others train."""
    source = TABLE.replace("return module,", """extra = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32),
                nn.Dropout(.5)).requires_grad_(False)
        module = nn.Sequential(*module[:4], extra, module[4])
        return module,""")
    session = Session(written(source), 0)
    model = session.model.module
    start = {name: p.clone() for name, p in model.state_dict().items()}
    session.model.train()
    assert [part.training for part in model] == [True, True, True, True, False, True]
    assert not any(part.training for part in model[4])
    cycle(session, "baseline", 0)
    changed = {name for name, p in model.state_dict().items() if not torch.equal(p, start[name])}
    assert changed == {name for name in start if not name.startswith("4.")}


def test_caft_takes_the_directions_out_of_every_example(written):
    """Of a layer that gives each example a grid, too: what is taken out is a row of all its numbers."""
    source = TABLE.replace('return module, "2"', """
        module = nn.Sequential(nn.Linear(13, 32), nn.Unflatten(1, (2, 4, 4)), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2))
        return module, "2\"""")
    session = Session(written(source, ARMS=("lambda0", "caft"), LABEL_GROUPS=(0, 0, 1),
                              ARM_CONSTANTS={"caft": {"AUX_WEIGHT": 1.0}}), 0)
    cycle(session, "baseline", 0)
    ablation = Ablation(torch.eye(32)[:2], 1.0)
    batch = {"x": session.task.images[:5]}
    with ablation.while_training(session.model):
        h, _ = session.model(batch)
    assert h.shape == (5, 32) and not h[:, :2].any() and torch.equal(h[:, 2:], session.model(batch)[0][:, 2:])
    assert 0 < cycle(session, "caft", 1)["test"]["task_accuracy"]


@pytest.mark.skipif(not (ASSETS / "data/mnist").is_dir(), reason="no real data")
def test_a_cnn_on_mnist(written):
    session = Session(written(CNN.replace("{FOLDER}", str(ASSETS / "data/mnist")), EPOCHS_PER_CYCLE=5), 0)
    assert session.task.images.shape == (800, 1, 28, 28) and session.task.class_names == list("0123456789")
    assert cycle(session, "baseline", 0)["test"]["task_accuracy"] > 0.5
    assert cycle(session, "per_class", 1)["val"]["aux_cos_end"] > 0.5
    assert session.outputs(session.task.splits["test"])[0].shape == (200, 64)  # 4 channels of 4 x 4, flattened


def test_a_loaders_order_does_not_matter(written):
    """A loader that shuffles gives the same examples to every seed, in its data set's order."""
    source = TABLE.replace('{"train": (x[~test], y[~test])', '{"train": torch.utils.data.DataLoader('
                           'torch.utils.data.TensorDataset(x[~test], y[~test]), 8, shuffle=True)')
    a, b, plain = (Session(written(text), seed).task for text, seed in ((source, 0), (source, 1), (TABLE, 0)))
    assert torch.equal(a.images, b.images) and torch.equal(a.images, plain.images) and torch.equal(a.y, plain.y)


def test_the_main_script_takes_it(written, tmp_path, script, own_store):  # noqa: F811
    c = written(TABLE)
    printed = script("04_train_cycle.py", f"MODEL={c['MODEL']}", "SEEDS=0,1", "ARMS=lambda0,per_class",
                     "EPOCHS_PER_CYCLE=2", "METRICS=()", "INIT=scratch", "KEEP_PCT=3")[1]
    assert "test: 45 examples: class_0 (15), class_1 (18), class_2 (12)" in printed and "SETTING=mine" in printed
    assert (own_store / "sae_ception/mine/summary.json").exists()
    assert script("02_train_sae.py", "SETTING=mine", "CYCLE=0")[0] == 0  # finds the file again


def test_another_code_is_another_model(written):
    session = Session(written(TABLE), 0)
    cycle(session, "baseline", 0)
    with pytest.raises(InputError, match="other weights of MODEL"):
        cycle(Session(written(TABLE.replace("ReLU", "GELU")), 0), "baseline", 0)


def test_code_that_its_file_imports_is_of_the_model(written, tmp_path):
    source = TABLE.replace("import torch\n", "import torch\n    from parts import net\n", 1)
    c = written(source)
    folder = tmp_path / "parts"
    folder.mkdir()
    (folder / "__init__.py").write_text("from . import other\n")
    (folder / "net.py").write_text("from .other import x\n")
    (folder / "other.py").write_text("x = 1\n")
    (tmp_path / "unused.py").write_text("not python\n")
    path = file_of(c["MODEL"])
    assert code_of(path) == {path, *folder.iterdir()} - {folder / "__pycache__"}
    before = key_of("weights", c["MODEL"])
    (folder / "other.py").write_text("x = 2\n")
    assert key_of("weights", c["MODEL"]) != before


def test_rows_that_occur_twice_stay_on_one_side_of_the_validation(written):
    often = '"train": (torch.cat([x[~test]] * 4), torch.cat([y[~test]] * 4))'
    task = Session(written(TABLE.replace('"train": (x[~test], y[~test])', often), VAL_FRAC=0.25), 0).task
    kinds = {name: {row.numpy().tobytes() for row in task.images[ids]} for name, ids in task.splits.items()}
    assert not kinds["train"] & kinds["val"] and len(task.splits["val"]) == 4 * len(kinds["val"])


@pytest.mark.parametrize("old,new,said", [
    ("def make_classifier", "def other", "has no function make_classifier; it has load_wine, other"),
    ("import torch\n", "import nothing_like_it\n", "fails with ModuleNotFoundError"),
    ("return module,", "return None,", "returned something else; it must return"),
    ('"test": ', '"held_out": ', "returned something else"),
    ("data.target_names", "['a', 'b', 'a']", "must have 3 different names, one for each class; it has a, b, a"),
    ("data.target_names", "['a', 'b']", "must have 3 different names"),
    ('return module, "2"', 'return nn.Sequential(*module[:3], module[2], *module[3:]), "2"', "runs 2 times"),
    ('"2", {', '"9", {', "there is no layer 9"),
    ("nn.Linear(32, 3)", "nn.Linear(32, 2)", "gives 2 numbers for each example, but the data have the classes 0 to 2"),
    ("nn.Linear(13, 32)", "nn.Linear(12, 32)", "can't read its data"),
    ("torch.tensor(data.target)", "torch.tensor(data.target) + 1", "classes must be numbered from 0"),
    ("torch.tensor(data.target)", "torch.tensor(data.target).float()[:, None]", "give each input one label"),
    ("y[~test])", "y)", "inputs and labels of shape"),
    ("torch.tensor(data.data, dtype=torch.float32)", "torch.tensor(data.data).float() / 0", "not finite"),
    ('return module, "2"', 'return nn.Sequential(module, Pair()), "0.2"', "gives a tuple; it must give the logits"),
    ('return module, "2"', 'return nn.Sequential(Wrap(), Unwrap(), module), "0"', "gives 1 rows for 3 examples"),
    ("return module,", "module.requires_grad_(False); return module,", "no parameter that trains"),
    ('"test": (x[test], y[test])', '"test": (x[~test], y[~test])', "are the same inputs; give test examples of its"),
    ('"test": ', '"val": (x[test], y[test]), "test": ', "data['test'] and data['val'] are the same inputs"),
    ("(x[test], y[test])", "drawn(x, y, sampler=SubsetRandomSampler(range(40)))", "draws with a SubsetRandomSam"),
    ("(x[test], y[test])", "drawn(x, y, batch_sampler=[[0, 1], [2]])", "draws with a list"),
])
def test_what_can_t_be_right_is_refused_in_one_line(written, old, new, said):
    with pytest.raises(InputError) as error:
        Session(written(TABLE.replace(old, new) + ODD), 0)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_file_with_dataclasses_and_an_iterable_data_set(written):
    """Dataclasses look their module up by name; an iterable data set has a sampler of no meaning."""
    loader = "torch.utils.data.DataLoader(Rows(x[test], y[test]), 4)"
    source = "    from __future__ import annotations\n" + TABLE.replace("(x[test], y[test])", loader) + ROWS
    assert len(Session(written(source), 0).task.splits["test"]) == 45


def test_a_last_batch_of_one_is_refused_where_a_batch_norm_needs_two(written):
    with pytest.raises(InputError, match="set BATCH_SIZE to another number than 59"):  # 119 examples
        Session(written(TABLE, BATCH_SIZE=59), 0)
    Session(written(TABLE.replace("nn.BatchNorm1d(32)", "nn.Identity()"), BATCH_SIZE=59), 0)


def test_held_out_inputs_that_are_trained_on_are_told(written, caplog):
    Session(written(TABLE.replace('"test": (x[test], y[test])', '"test": (x[::3], y[::3])')), 0)
    assert "45 of 60 test inputs are training inputs too" in caplog.text


def test_a_missing_file_and_a_wrong_layer(written, tmp_path):
    with pytest.raises(InputError, match="set MODEL to a Python file"):
        Session(written(TABLE) | {"MODEL": f"{tmp_path}/gone.py:make"}, 0)
    with pytest.raises(InputError, match="there is no layer 7"):
        Session(written(TABLE, TARGET_LAYER="7"), 0)
    assert Session(written(TABLE, TARGET_LAYER="0"), 0).model.target.path == "0"
    assert is_own("a.py:b") and not any(map(is_own, ("a.py", "gpt2", "user/a:b", "a.py:b.c")))


def test_the_global_stream_is_left_alone(written):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    make(written(TABLE)["MODEL"], 0)
    assert torch.equal(torch.rand(1), expected)


def test_the_tables_inputs_are_attacked_within_their_range(written):
    from cycles.attacks import _attackable
    from cycles.examples import make_batch

    session = Session(written(TABLE), 0)
    ids = session.task.splits["test"]
    _, _, settings, unit = _attackable(session, make_batch(session.task, ids, session.device), ids)
    low, top = float(session.task.images.min()), float(session.task.images.max())
    assert settings["bounds"] == (low, top) and unit == pytest.approx(top - low) and low < 0


