"""The rules of the house, kept by reading the sources; `python tests/house.py` shows it."""
import pytest
from house import PROJECT, File, broken_import_rules, circles, floors, imported, long_lines, read_files, sizes, too_long


@pytest.fixture(scope="module")
def house():
    return read_files()


def test_imports_follow_the_rule(house):
    assert broken_import_rules(house, {path: imported(file, house) for path, file in house.items()}) == []


def test_no_line_is_longer_than_120(house):
    assert [line for file in house.values() for line in long_lines(file)] == []


def test_files_signatures_and_calls_are_short(house):
    """The length of a function is only told: some are clearer in one piece."""
    assert [row for row in too_long(house) if row[0] != "function"] == []


def test_no_file_holds_both_sides_of_a_merge():
    marks = ("<" * 7 + " ", ">" * 7 + " ")
    for top in (".", "lib", "experiments", "tests"):
        for path in PROJECT.glob("*") if top == "." else (PROJECT / top).rglob("*"):
            if path.is_file() and path.suffix in ("", ".py", ".md", ".ipynb", ".sh", ".toml", ".txt", ".json", ".cff"):
                lines = path.read_text(encoding="utf-8", errors="ignore").splitlines()
                assert not [line for line in lines if line.startswith(marks)], path


def broken(**sources):
    """What breaks the rules in a project of these files; `__` stands for a slash."""
    paths = {name.replace("__", "/") + ".py": text for name, text in sources.items()}
    files = {path: File(path, [text]) for path, text in paths.items()}
    return broken_import_rules(files, {path: imported(file, files) for path, file in files.items()})


ONE, TWO = "experiments__one__", "experiments__two__"


def test_each_broken_rule_is_seen():
    assert broken(lib__a="", **{f"{ONE}01_x": "from lib import a", f"{TWO}01_x": "import lib.a"}) == []
    assert broken(lib__a="", lib__b="from . import a", **{f"{ONE}x": "import lib.b", f"{TWO}x": "import lib.b"}) == []
    assert broken(lib__a="", **{f"{ONE}x": "from lib.a import y"}) == [
        "lib/a.py belongs beside the scripts that use it: one"]
    assert broken(lib__a="from concepts.names import x", lib__b="from .a import y",
                  **{f"{ONE}concepts__names": "import lib.b", f"{TWO}x": "import lib.b"}) == [
        "circle: experiments/one/concepts/names.py, lib/a.py, lib/b.py",
        "lib/a.py imports experiments/one/concepts/names.py: lib imports nothing from experiments"]
    assert broken(**{f"{ONE}concepts__names": "", f"{TWO}x": "def f():\n    from concepts import names"}) == [
        "experiments/two/x.py imports experiments/one/concepts/names.py: an experiment imports only lib and itself"]
    assert broken(**{f"{ONE}checkout": "", f"{TWO}checkout": "", f"{TWO}x": "import checkout"}) == []  # its own
    assert broken(**{f"{ONE}cycles__a": "import cycles.b", f"{ONE}cycles__b": "def f():\n    from .a import x"}) == [
        "circle: experiments/one/cycles/a.py, experiments/one/cycles/b.py"]
    only_typed = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .a import x"
    assert broken(**{f"{ONE}cycles__a": "import cycles.b", f"{ONE}cycles__b": only_typed}) == []


def test_what_is_too_long_is_counted():
    text = "def f(a, b, c, d, e, f, g, /, h, *, i):\n" + "    x(1, 2, 3, 4, *y)\n    x(1, 2, 3, 4, 5, z=6)\n" * 21
    found = sizes(File("lib/a.py", [text]))
    assert found[:21] == [("by position", "lib/a.py:x", 5)] * 21
    assert found[21:] == [("function", "lib/a.py:f", 43), ("parameters", "lib/a.py:f", 9)]
    assert long_lines(File("x", ["#" * 120 + "\n" + "#" * 121])) == ["x: 121 characters: " + "#" * 60 + " ..."]
    assert sizes(File("a.py", ["\n" * 251])) == [("file", "a.py", 251)]


def test_floors_and_circles():
    uses = {"a": {"b", "c"}, "b": {"c"}, "c": set(), "d": {"e"}, "e": {"d", "c"}}
    assert circles(uses) == ["d, e"]
    height = floors(uses)
    assert [height[name] for name in "abc"] == [2, 1, 0]
