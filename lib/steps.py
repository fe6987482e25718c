"""An experiment's scripts and notebooks, one after the other, each with the constants that it has.

    for step in plan(Path(__file__), STEPS, sys.argv[1:]):      # all constants are checked before the first one starts
        run_script(step) if step.path.suffix == ".py" else render(step.path, pages / f"{step.path.stem}.html", ...)
"""
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .constants import constants_of, refuse
from .environment import IN_A_ROW
from .ranges import nearest


class Step(NamedTuple):
    """A script or notebook, and the NAME=value arguments for its constants."""

    path: Path
    arguments: list[str]


def plan(folder: Path, steps: Sequence[str], argv: Sequence[str], about: str) -> list[Step]:
    """The steps to run: those that `argv` names, or else all of `steps`, with the constants that it gives them.

    folder: where scripts and notebooks are. about: what --help prints first. A constant that no step has, a value out
    of range and an unknown step end the program with one line and exit code 2.
    """
    if "--help" in argv or "-h" in argv:
        print(about.strip())
    words = [word for word in argv if "=" not in word and not word.startswith("-")]
    given = {word.partition("=")[0]: word for word in argv if "=" in word and not word.startswith("-")}
    there = sorted(path.name for path in folder.iterdir() if path.suffix in (".py", ".ipynb"))
    if unknown := [word for word in words if Path(word).name not in there]:
        refuse(f"there is no step {unknown[0]}{nearest(Path(unknown[0]).name, there)}")
    paths = [folder / name for name in ([Path(word).name for word in words] or steps)]
    if wrong := [word for word in argv if word.startswith("-") and word not in ("-h", "--help")]:
        refuse(f"{wrong[0]!r} is neither a step nor NAME=value; --help lists the constants")
    names = {path: list(constants_of(path)["CONSTANTS"]) for path in paths}
    if "--help" in argv or "-h" in argv:
        for path in paths:
            print(f"\n{path.name}\n")
            _help(path)
        sys.exit(0)
    known = sorted({name for own in names.values() for name in own})
    for name in given:
        if name not in known:
            refuse(f"there is no constant {name}{nearest(name.upper(), known)}; --help lists them")
    planned = [Step(path, [given[name] for name in given if name in names[path]]) for path in paths]
    for path, arguments in planned:
        constants_of(path, arguments)  # refuses what is out of range
    return planned


def _help(path: Path) -> None:
    try:
        constants_of(path, ["--help"])
    except SystemExit:  # so ends every --help
        pass


def run_script(step: Step) -> None:
    """Run a script as a process of its own; one that fails has said why, and its exit code becomes ours.

    Ctrl-C reaches both processes: the script saves what it has and ends, and this one waits for that.
    """
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        code = subprocess.Popen([sys.executable, str(step.path), *step.arguments],
                                env=os.environ | {IN_A_ROW: "1"}).wait()
    finally:
        signal.signal(signal.SIGINT, before)
    if code:
        sys.exit(code if code > 0 else 128 - code)
