"""The block of constants: types, presets, suggestions, help."""
import pytest

from lib.constants import override

SOURCE = '''"""What the script does.

    python script.py
"""
from pathlib import Path
PRESET = "tiny"  # tiny or big
TOP_K = 8        # latents that may fire
LR: float | None = None  # None: a rule
                 # over two lines
RATE = 0.5       # a share
NAME = "a"
FLAG = False     # yes or no
ANY = None
PRESETS = {"tiny": {}, "big": {"TOP_K": 64, "NAME": "b"}}
derived = TOP_K * 2
'''


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SOURCE)
    namespace = {"__name__": "__main__", "__file__": str(path)}
    exec(compile(SOURCE, str(path), "exec"), namespace)
    namespace["IMPORTED"] = 3  # an imported name is not the script's constant
    return namespace


def call(script, *argv):
    return override(script, script["PRESETS"], list(argv))


def test_returns_the_constants_and_nothing_else(script):
    assert call(script) == {"PRESET": "tiny", "TOP_K": 8, "LR": None, "RATE": 0.5, "NAME": "a", "FLAG": False,
                            "ANY": None}


def test_values_replace_constants_with_their_type(script):
    got = call(script, "TOP_K=16", "LR=1e-3", "RATE=1", "NAME=x=y", "FLAG=True", "ANY=[1, 2]")
    assert got == {"PRESET": "tiny", "TOP_K": 16, "LR": 1e-3, "RATE": 1.0, "NAME": "x=y", "FLAG": True, "ANY": [1, 2]}
    assert type(got["RATE"]) is float
    assert script["TOP_K"] == 16


def test_a_number_given_for_a_string_stays_a_string(script):
    assert call(script, "NAME=007")["NAME"] == "007"


def test_none_is_taken_only_where_it_means_something(script):
    assert call(script, "LR=None")["LR"] is None
    with pytest.raises(SystemExit):
        call(script, "TOP_K=None")


def test_the_command_line_beats_the_preset(script):
    got = call(script, "PRESET=big", "NAME=mine")
    assert (got["TOP_K"], got["NAME"]) == (64, "mine")


@pytest.mark.parametrize(
    "argument, message",
    [
        ("TOPK=3", "there is no constant TOPK; did you mean TOP_K?"),
        ("top_k=3", "there is no constant top_k; did you mean TOP_K?"),
        ("IMPORTED=1", "there is no constant IMPORTED"),
        ("TOP_K=many", "TOP_K=many must be a whole number"),
        ("TOP_K=1.5", "TOP_K=1.5 must be a whole number"),
        ("TOP_K=True", "TOP_K=True must be a whole number"),
        ("LR=fast", "LR=fast must be a number or None"),
        ("FLAG=1", "FLAG=1 must be True or False"),
        ("TOP_K", "'TOP_K' is not NAME=value"),
        ("PRESET=bg", "PRESET=bg must be one of tiny, big; did you mean big?"),
    ],
)
def test_wrong_arguments_end_with_2_and_one_line(script, capsys, argument, message):
    with pytest.raises(SystemExit) as ended:
        call(script, argument)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and message in said and said.count("\n") == 1


def test_help_prints_docstring_constants_and_comments(script, capsys):
    with pytest.raises(SystemExit) as ended:
        call(script, "--help")
    said = capsys.readouterr().out
    assert ended.value.code == 0
    assert "What the script does." in said and "IMPORTED" not in said
    assert "latents that may fire" in said and "None: a rule over two lines" in said
    assert "PRESET=big: TOP_K=64, NAME='b'" in said


def test_help_of_a_value_over_several_lines(tmp_path, capsys):
    """A comment within it is its own, not of the constant above."""
    source = "TOP_K: int = 8  # above\nRULES: tuple[str, ...] = (  # one row each,\n    'a', 'b')  # in this order\n"
    (tmp_path / "script.py").write_text(source)
    namespace = {"__name__": "__main__", "__file__": str(tmp_path / "script.py")}
    exec(source, namespace)
    with pytest.raises(SystemExit):
        override(namespace, argv=["--help"])
    said = capsys.readouterr().out.splitlines()
    assert said[-2].endswith(" above") and said[-1].endswith(" one row each, in this order")


def test_an_imported_script_ignores_the_command_line(script, monkeypatch):
    monkeypatch.setattr("sys.argv", ["pytest", "TOP_K=99"])
    script["__name__"] = "elsewhere"
    assert override(script, script["PRESETS"])["TOP_K"] == 8
