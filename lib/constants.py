"""One block of UPPERCASE constants at the top of a script, replaceable on the command line.

    TOP_K: Count = 8            # latents that may fire on one token
    LR: Rate | None = None      # None: chosen from the length of the run
    PRESETS = {"tiny": {}, "bielik": {"TOP_K": 16}}
    CONSTANTS = override(globals(), PRESETS)

`python script.py TOP_K=16 LR=1e-3` then replaces them by name. Heavy imports and whatever is derived from constants
come after the call, so that a wrong value is refused at once. Ranges: lib/ranges.py.

In a notebook the block is a cell that ends with the same call. There it checks the values that the cell assigns;
lib/reports.py runs a notebook with others.
"""
import ast
import io
import json
import sys
import tokenize
from itertools import accumulate, product
from pathlib import Path
from typing import Any, NoReturn

from .environment import InputError, guard_imports
from .ranges import Unfit, fit, is_tuple, nearest, range_of, shown

Presets = dict[str, dict[str, Any]]


def override(
    namespace: dict[str, Any], presets: Presets | None = None, argv: list[str] | None = None, also: Path | None = None
) -> dict[str, Any]:
    """Replace the constants in `namespace` by the chosen preset, then by NAME=value arguments, and check them all.

    namespace: the globals() of the script, or of the notebook. Its constants are the UPPERCASE names that its own
    source assigns, not imported ones. presets: preset name -> {constant: value}, chosen by the constant PRESET. argv:
    the arguments; None means sys.argv[1:] if the script is run, those of constants_of() if it is only read. also:
    another script whose constants this one accepts and returns too.

    Returns all constants as they now are. `--help` prints the docstring and the constants with their comments and
    ranges, and exits with 0; a wrong argument or value prints one line and exits with 2. In a running notebook a wrong
    value raises InputError.
    """
    is_notebook = "__file__" not in namespace
    is_run = namespace.get("__name__") == "__main__" and argv is None and not is_notebook
    if argv is None:
        argv = sys.argv[1:] if is_run else namespace.get("__arguments__", [])
    if is_run:
        guard_imports()
    # IPython keeps the sources of the cells in In; that of the running one is the last.
    source = namespace["In"][-1] if is_notebook else Path(namespace["__file__"]).read_text(encoding="utf-8")
    kinds = kinds_of(source, namespace, [name for name in _assigned(source)
                                         if name in namespace and (presets is None or namespace[name] is not presets)])
    if "-h" in argv or "--help" in argv:
        print(_help(namespace, kinds, presets, source), flush=True)
        if also:
            print(f"\nand those of {also.name}:\n")
            constants_of(also, ["--help"])
        sys.exit(0)
    theirs: dict[str, Any] = {}
    if also:
        is_own = [argument.partition("=")[0] in kinds for argument in argv]
        theirs = constants_of(also, [argument for argument, own in zip(argv, is_own) if not own])["CONSTANTS"]
        argv = [argument for argument, own in zip(argv, is_own) if own]
    try:
        _replace(namespace, kinds, presets, argv)
    except ValueError as error:
        if is_notebook and "__arguments__" not in namespace:
            raise InputError(str(error)) from None
        refuse(str(error))
    return theirs | {name: namespace[name] for name in kinds}


def _replace(namespace: dict[str, Any], kinds: dict[str, Any], presets: Presets | None, argv: list[str]) -> None:
    given = dict(_parse(argument, kinds) for argument in argv)
    if presets is not None:
        preset = given.get("PRESET", namespace.get("PRESET"))
        if preset not in presets:
            raise ValueError(f"PRESET={shown(preset)} must be one of {', '.join(presets)}"
                             f"{nearest(str(preset), list(presets))}")
        namespace.update({name: _fit(name, value, kinds[name]) for name, value in presets[preset].items()})
    namespace.update(given)
    namespace.update({name: _fit(name, namespace[name], kind) for name, kind in kinds.items()})


def read_grid(grid: str, namespace: dict[str, Any], names: tuple[str, ...]) -> list[dict[str, Any]]:
    """The sets of values in the constant `grid`: "TOP_K=4,8 SEED=0,1; KIND=lista" names four, and a fifth.

    namespace: as for override(), which has been called. names: constants that may be named. None gives one empty set. A
    wrong name or value ends the script as in override().
    """
    kinds = kinds_of(Path(namespace["__file__"]).read_text(encoding="utf-8"), namespace, list(names))
    found: list[dict[str, Any]] = []
    for part in (namespace[grid] or "").split(";"):
        chosen = {}
        for name, _, values in (word.partition("=") for word in part.split()):
            if name not in kinds:
                refuse(f"{grid} can't name {shown(name)}{nearest(name.upper(), list(names))}; it can name "
                       f"{', '.join(names)}")
            if name in chosen:
                refuse(f"{grid} names {name} twice; put all of its values into one list, or part the grids by ';'")
            try:
                chosen[name] = [read_value(name, value, kinds[name]) for value in values.split(",")]
            except ValueError as error:
                refuse(f"{grid}: {error}")
        found += [dict(zip(chosen, values)) for values in product(*chosen.values()) if chosen]
    return [each for i, each in enumerate(found) if each not in found[:i]] or [{}]


def refuse(message: str) -> NoReturn:
    """End the script with one line and exit code 2, as for constants that contradict each other."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


def constants_of(script: Path, argv: list[str] | None = None) -> dict[str, Any]:
    """The namespace of a script or notebook after it called override() with these arguments; nothing below that runs.
    """
    source = script.read_text(encoding="utf-8")
    namespace: dict[str, Any] = {"__name__": script.stem, "__arguments__": argv or []}
    if script.suffix == ".ipynb":
        cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(source)["cells"]]
        source = next((text for kind, text in cells if kind == "code" and has_constants(text)), "")
        namespace |= {"In": [source], "__doc__": cells[0][1]}
    else:
        namespace["__file__"] = str(script)
    tree = ast.parse(source)
    calls = [i for i, node in enumerate(tree.body)
             if any(isinstance(part, ast.Name) and part.id == "override" for part in ast.walk(node))]
    tree.body = tree.body[: calls[0] + 1] if calls else []
    sys.path.insert(0, str(script.parent))  # as when it is run
    try:
        exec(compile(tree, str(script), "exec"), namespace)
    finally:
        sys.path.remove(str(script.parent))
    return {"CONSTANTS": {}} | namespace


def has_constants(cell: str) -> bool:
    """Whether this code cell of a notebook is its block of constants."""
    return "override(globals())" in cell


def with_values(source: str, values: dict[str, Any]) -> str:
    """A source in which the top-level assignments to these names assign these values; comments stay."""
    starts = [0, *accumulate(len(line) for line in source.encode().splitlines(keepends=True))]
    found = source.encode()
    for node in reversed(ast.parse(source).body):
        if isinstance(node, ast.Assign | ast.AnnAssign) and (value := node.value) is not None:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Name) and target.id in values:
                begin = starts[value.lineno - 1] + value.col_offset
                end = starts[(value.end_lineno or 0) - 1] + (value.end_col_offset or 0)
                found = found[:begin] + repr(values[target.id]).encode() + found[end:]
    return found.decode()


def read_value(name: str, text: str, kind: Any) -> Any:
    """The value of a constant that was given as text on the command line.

    It may be a Python literal, plain text, or parts between commas: 007 is text where the constant is text, and
    ARMS=lambda0,per_class needs no quotes.
    """
    readings: list[Any] = [text]
    if kind is not str:
        try:
            value = ast.literal_eval(text)
            is_list = isinstance(value, list | tuple) and is_tuple(kind)
            readings = [value] if is_list else [value, text]
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            readings = [text, tuple(part.strip() for part in text.split(","))]
    faults = []
    for reading in readings:
        try:
            return fit(reading, kind)
        except Unfit as error:
            faults.append(f"{name}={shown(text)} {error}")
    raise ValueError(faults[0])


def kinds_of(source: str, namespace: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Constant -> its annotation, else the type of its default; Any for an unannotated None.

    Annotations are read from the source: Python 3.14 keeps none in a script's globals.
    """
    kinds = {name: Any if namespace[name] is None else type(namespace[name]) for name in names}
    for node in ast.parse(source).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id in kinds:
            kinds[node.target.id] = eval(compile(ast.Expression(node.annotation), "annotation", "eval"), namespace)
    return kinds


def _parse(argument: str, kinds: dict[str, Any]) -> tuple[str, Any]:
    name, equals, text = argument.partition("=")
    if not equals:
        raise ValueError(f"{shown(argument)!r} is not NAME=value; --help lists the constants")
    if name not in kinds:
        raise ValueError(f"there is no constant {shown(name)}{nearest(name.upper(), list(kinds))}; --help lists them")
    return name, read_value(name, text, kinds[name])


def _fit(name: str, value: Any, kind: Any) -> Any:
    try:
        return fit(value, kind)
    except Unfit as error:
        raise ValueError(f"{name}={shown(value)} {error}") from None


def _help(namespace: dict[str, Any], kinds: dict[str, Any], presets: Presets | None, source: str) -> str:
    comments = _comments(source)
    values = {name: f"{name}={namespace[name]!r}" for name in kinds}
    width = min(44, max(map(len, values.values())))
    lines = []
    for name, kind in kinds.items():
        text, allowed = comments.get(name, ""), range_of(kind)
        if all(choice in text for choice in allowed.removeprefix("one of ").split(", ")):
            allowed = ""  # the comment names the choices
        lines.append(f"  {values[name]:<{width}}  {text}{f' ({allowed})' if allowed else ''}".rstrip())
    for preset, changed in (presets or {}).items():
        given = ", ".join(f"{name}={value!r}" for name, value in changed.items())
        lines.append(f"  PRESET={preset}: {given or 'the values above'}")
    return "\n".join([(namespace.get("__doc__") or "").strip(), "", "Constants (NAME=value):", *lines])


def _assigned(source: str) -> dict[str, range]:
    """Every UPPERCASE name that the script assigns at its top level -> the lines of its assignment."""
    lines = {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            continue
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            if isinstance(target, ast.Name) and target.id.isupper():
                lines[target.id] = range(node.lineno, (node.end_lineno or node.lineno) + 1)
    return lines


def _comments(source: str) -> dict[str, str]:
    """Constant -> the comments beside its assignment and in the indented lines below it."""
    names = {line: name for name, lines in _assigned(source).items() for line in lines}
    found: dict[str, str] = {}
    name, last_line = "", -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            text, line = token.string.lstrip("# "), token.start[0]
            if line in names:
                name, last_line = names[line], line
                found[name] = f"{found[name]} {text}" if name in found else text
            elif name and line == last_line + 1 and token.start[1] > 0:
                found[name] += " " + text
                last_line = line
    return found
