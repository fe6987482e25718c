"""Every constant of every script declares what it may be, and refuses the rest in one line before anything heavy is
imported.
"""
import ast
import json
import math
import os
import resource
import subprocess
import sys
import typing
from typing import Annotated, Any, Literal, TypedDict

import pytest
from conftest import PROJECT

from lib.constants import constants_of, kinds_of, override, read_value
from lib.ranges import Count, Device, Location, Rate, Seed, Share, Size, Unfit, above, at_least, fit, range_of

SCRIPTS = sorted(path for path in (PROJECT / "experiments").glob("*/*.py") if "override(globals()" in path.read_text())
NOTEBOOKS = sorted((PROJECT / "experiments").glob("*/*.ipynb"))
IDS = [f"{path.parent.name}/{path.name}" for path in SCRIPTS]
HOSTILE = ["0", "-1", "1" + "0" * 30, "1e308", "-1e308", "nan", "inf", "-inf", "", "()", "[]", "{}", "{[]:1}", "None",
           "True", "\ud800", "a\ud800",
           "x" * 20_000, "'", "[[[[", "1" * 5000, "../../x", "/" + "a" * 300, "~unknown_user_1/x", "\0", "1e400",
           "(((1,)))", "{'a': 1}",
           "b'x'", "1j", "...", "\n", "(0,)", "('',)", "(nan,)", "(1, 'a')", "-0.01", "99999999999", "__import__('os')"]


class Pair(TypedDict, total=False):
    size: Size
    rate: Rate | None


KINDS = [
    (Count, [1, 10**12], [0, -1, 10**30, 1.0, True, "1", None, [1], math.nan]),
    (Rate, [1e-9, 1, 10], [0, -0.01, 11, 1e308, math.nan, math.inf, 10**400, "fast", True]),
    (Rate | None, [None, 0.1], [0, "None", ()]),
    (Share, [0.5], [0, 1, -1]),
    (Seed, [0, 2**32 - 1], [-1, 2**32, 10**20, 0.5]),
    (Literal["a", "b"], ["a"], ["A", "", 1, None]),
    (Literal[4, 8] | None, [4, None], [3, True, "4", 4.0]),
    (Device, ["auto", "cuda:3"], ["tpu", "cuda:", "cuda:x", "", "cpu "]),
    (Location, ["gpt2", "a/b", "~/x"],
     ["", " ", "a" * 300, "/".join(["aaaaaaaaa"] * 900), "~unknown_user_1/x", "\ud800", "\0"]),
    (tuple[Count, ...], [(1,), (1, 2)], [(), (0,), ((1,),), "x", {}]),
    (tuple[Count, ...] | tuple[()], [(), (3,)], [(0,), "x"]),
    (tuple[Size, Size], [(1, 2)], [(1,), (1, 2, 3), (0, 1)]),
    (dict[Literal["a"], Pair], [{}, {"a": {"size": 1, "rate": None}}],
     [{"b": {}}, {"a": {"sise": 1}}, {"a": {"size": 0}}, {"a": 1}, []]),
    (str, ["", "a b"], [1, None, "\0", "\ud800", "x" * 20_000]),
    (bool, [True], [1, "True", None]),
    (Annotated[float, at_least(0), above(0)], [1e-300], [0]),
]


@pytest.mark.parametrize(("kind", "good", "bad"), KINDS, ids=[str(kind)[:60] for kind, _, _ in KINDS])
def test_a_kind_takes_its_range_and_nothing_else(kind, good, bad):
    for value in good:
        assert fit(value, kind) == value
    for value in bad:
        with pytest.raises(Unfit) as raised:
            fit(value, kind)
        assert "\n" not in str(raised.value) and str(raised.value).startswith(("must ", "holds "))


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("4", tuple[Count, ...], (4,)), ("4,8", tuple[Count, ...], (4, 8)), ("[4, 8]", tuple[Count, ...], (4, 8)),
        ("0", tuple[Seed, ...], (0,)),
        ("1", Rate, 1.0), ("a,b", tuple[Literal["a", "b"], ...], ("a", "b")),
        ("One day, home", tuple[str, ...], ("One day, home",)),
        ("007", str | None, "007"), ("None", str | None, None), ("'dog'", str | None, "dog"), ("'dog'", str, "'dog'"),
    ],
)
def test_what_is_typed_is_read_as_its_kind_wants_it(text, kind, value):
    got = read_value("X", text, kind)
    assert got == value and type(got) is type(value)


def test_a_range_is_told_in_words():
    assert range_of(Size) == "at least 1" and range_of(Rate | None) == "above 0, at most 10"
    assert range_of(tuple[Literal["a", "b"], ...]) == "each one of a, b" and range_of(bool) == ""


@pytest.fixture(scope="module")
def declared():
    """Script -> (namespace, constant -> kind)."""
    found = {}
    for path in SCRIPTS:
        namespace = constants_of(path)
        own = [name for name in _assigned(path) if name in namespace.get("CONSTANTS", {})]
        found[path] = namespace, kinds_of(path.read_text(), namespace, own)
    return found


def _assigned(path):
    return [node.target.id if isinstance(node, ast.AnnAssign) else node.targets[0].id
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.AnnAssign | ast.Assign)
            and isinstance(getattr(node, "target", None) or node.targets[0], ast.Name)]


def has_range(kind: Any) -> bool:
    """Whether every number and text in it is bounded; a bool, a choice and None bound themselves."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Annotated, Literal) or kind in (bool, type(None)) or typing.is_typeddict(kind) or kind == tuple[()]:
        return True
    return bool(parts) and all(has_range(part) for part in parts if part is not ...)


@pytest.mark.parametrize("path", SCRIPTS, ids=IDS)
def test_every_constant_declares_its_range(declared, path):
    _, kinds = declared[path]
    assert (kinds
            and not [name for name, kind in kinds.items()
                     if not has_range(kind) and (name, kind) not in (("PRESET", str), ("SUBFOLDER", str))])


@pytest.mark.parametrize("path", SCRIPTS, ids=IDS)
def test_hostile_values_are_refused_or_within_the_declared_range(declared, path):
    for name, kind in declared[path][1].items():
        for text in HOSTILE:
            try:
                value = read_value(name, text, kind)
            except ValueError as error:
                assert str(error).startswith(f"{name}=") and str(error).isprintable() and len(str(error)) < 900
                continue
            assert fit(value, kind) == value  # what is taken is in range, and stays what it is
            for number in flat(value):
                assert not isinstance(number, float) or math.isfinite(number)
                assert not isinstance(number, int | float) or abs(number) <= 10**30
                assert not isinstance(number, str) or len(number) <= 10_000 and not set(number) & {"\0", "\ud800"}


def flat(value):
    if isinstance(value, tuple | dict):
        return [part for item in (value.items() if isinstance(value, dict) else value) for part in flat(item)]
    return [value]


@pytest.mark.parametrize("path", SCRIPTS, ids=IDS)
def test_presets_and_edited_defaults_are_checked_too(declared, path, capsys):
    """Through the whole of override(): a preset, and a default edited in the file, outside the range end with one line
    and exit code 2.
    """
    namespace, kinds = declared[path]
    name = next(name for name, kind in kinds.items() if name != "PRESET" and kind is not bool)
    for edited, presets in (({name: {1: 2}}, None), ({"PRESET": "p"}, {"p": {name: b"x"}})):
        with pytest.raises(SystemExit) as ended:
            override(namespace | edited, presets, [])
        said = capsys.readouterr().err
        assert ended.value.code == 2 and said.startswith(f"error: {name}=") and said.count("\n") == 1


def test_annotations_are_read_from_the_source(tmp_path):
    """Python 3.14 leaves a script's globals without __annotations__."""
    path = tmp_path / "script.py"
    path.write_text("from __future__ import annotations\nfrom lib.constants import override\nfrom lib.ranges import "
                    "Count\nK: Count = 4\nCONSTANTS = override(globals())\n")
    assert constants_of(path, ["K=5"])["K"] == 5
    namespace = constants_of(path)
    assert kinds_of(path.read_text(), {key: value for key, value in namespace.items() if key != "__annotations__"},
                    ["K"]) == {"K": Count}


def test_choices_are_those_of_the_library(declared):
    """Names that a script lists so that it need not import torch are the ones that lib knows."""
    from exchange.formats import FORMATS
    from lib.activations import STORE_DTYPES
    from lib.hooks import ROLES
    from lib.steering import MODES
    from lib.trackers import TRACKERS
    from lib.training.kinds import KINDS as SAE_KINDS

    kinds = {(path.parent.name, path.name[:2], name): kind for path in SCRIPTS
             for name, kind in declared[path][1].items()}
    verify = "verify_sae_training"
    assert typing.get_args(kinds[verify, "01", "STORE_DTYPE"]) == tuple(STORE_DTYPES)
    assert set(typing.get_args(kinds[verify, "02", "KIND"])) == set(SAE_KINDS)
    assert kinds["benchmarks", "05", "KIND"] == kinds[verify, "02", "KIND"]
    assert set(typing.get_args(kinds[verify, "02", "TRACKER"])) == {"local", *TRACKERS}
    assert set(typing.get_args(kinds[verify, "06", "MODE"])) <= set(MODES)
    own = {"all", "workbench", "delphi", "neuronpedia"}
    assert set(typing.get_args(kinds[verify, "ex", "FORMAT"])) == own | set(FORMATS)
    assert all(fit(f"{role}, {role}", kinds[verify, "00", "POINTS"]) for role in ROLES)


@pytest.mark.parametrize("path", SCRIPTS, ids=IDS)
def test_help_and_a_wrong_argument_answer_at_once_in_a_fresh_process(path, tmp_path):
    environment = ({key: value for key, value in os.environ.items() if not key.startswith("COV")}
                   | {"STORE_DIR": str(tmp_path / "store")})
    for argument, code in (("--help", 0), ("NO_SUCH_CONSTANT=1", 2)):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, str(path), argument], capture_output=True, text=True, env=environment,
                              cwd=tmp_path)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == code, done.stderr
        # seconds of the processor; torch alone takes 2
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5
        assert ("Constants (NAME=value):" in done.stdout if code == 0 else done.stderr.count("\n") == 1
                and done.stderr.startswith("error: "))
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("path", SCRIPTS + NOTEBOOKS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_lib_is_imported_before_what_brings_a_runtime_of_threads(path):
    """lib sets OMP_WAIT_POLICY, which is read when torch, scikit-learn or numba is first imported."""
    if path.suffix == ".ipynb":
        cells = [cell["source"] for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        source = "".join(cells[0])
    else:
        source = path.read_text()
    imports = [node for node in ast.parse(source).body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [(node.names[0].name if isinstance(node, ast.Import) else node.module).partition(".")[0]
             for node in imports]
    assert next(name for name in names if name not in sys.stdlib_module_names) == "checkout"  # which imports lib first
