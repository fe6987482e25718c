"""One block of UPPERCASE constants at the top of a script, replaceable on the command line.

    TOP_K = 8                          # latents that may fire on one token
    LR: float | None = None            # None: chosen from the length of the run
    PRESETS = {"tiny": {}, "bielik": {"TOP_K": 16}}
    CONSTANTS = override(globals(), PRESETS)

`python script.py TOP_K=16 LR=1e-3` then replaces them by name; what is derived from constants comes
after the call. A constant's type is its annotation if it has one, else the type of its default.
"""
import ast
import difflib
import io
import sys
import tokenize
import types
import typing
from pathlib import Path
from typing import Any

Presets = dict[str, dict[str, Any]]


def override(namespace: dict[str, Any], presets: Presets | None = None, argv: list[str] | None = None) -> dict[str, Any]:
    """Replace the constants in `namespace` by the chosen preset and then by NAME=value arguments.

    namespace: the script's globals(); its constants are the UPPERCASE names that its own source assigns, imported
    ones are left alone. presets: preset name -> {constant: value}, chosen by the constant
    PRESET. argv: the arguments; None means sys.argv[1:] when the script is run, nothing when it is imported.

    Returns all constants as they now are. `--help` prints the docstring and the constants with their
    comments and exits with 0; a wrong argument prints one line and exits with 2.
    """
    if argv is None:
        argv = sys.argv[1:] if namespace.get("__name__") == "__main__" else []
    source = Path(namespace["__file__"]).read_text(encoding="utf-8")
    names = [name for name in _assigned(source).values() if name in namespace and (presets is None or namespace[name] is not presets)]
    if "-h" in argv or "--help" in argv:
        print(_help(namespace, names, presets, _comments(source)))
        sys.exit(0)
    try:
        given = dict(_parse(argument, namespace, names) for argument in argv)
        preset = given.get("PRESET", namespace.get("PRESET"))
        if presets is not None:
            if preset not in presets:
                raise ValueError(f"PRESET={preset!r} is none of {', '.join(presets)}{_nearest(str(preset), list(presets))}")
            namespace.update(presets[preset])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    namespace.update(given)
    return {name: namespace[name] for name in names}


def _parse(argument: str, namespace: dict[str, Any], names: list[str]) -> tuple[str, Any]:
    name, equals, text = argument.partition("=")
    if not equals:
        raise ValueError(f"{argument!r} is not NAME=value; --help lists the constants")
    if name not in names:
        raise ValueError(f"there is no constant {name}{_nearest(name.upper(), names)}; --help lists them")
    types_allowed = _types(namespace, name)
    if types_allowed == {str}:
        return name, text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text  # a bare word: right for a string, refused below for anything else
    if float in types_allowed and type(value) is int:
        value = float(value)
    if types_allowed and type(value) not in types_allowed:
        wanted = " or ".join(sorted(t.__name__.replace("NoneType", "None") for t in types_allowed))
        raise ValueError(f"{name}={text} is not of type {wanted}")
    return name, value


def _types(namespace: dict[str, Any], name: str) -> set[type]:
    """The types a constant may have; empty for one that is None and not annotated: anything goes."""
    annotation = namespace.get("__annotations__", {}).get(name)
    if annotation is None:
        return set() if namespace[name] is None else {type(namespace[name])}
    parts = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    return {typing.get_origin(part) or part for part in parts}


def _nearest(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _help(namespace: dict[str, Any], names: list[str], presets: Presets | None, comments: dict[str, str]) -> str:
    width = max(len(f"{name}={namespace[name]!r}") for name in names)
    lines = [f"  {f'{name}={namespace[name]!r}':<{min(width, 44)}}  {comments.get(name, '')}".rstrip() for name in names]
    for preset, values in (presets or {}).items():
        lines.append(f"  PRESET={preset}: " + (", ".join(f"{k}={v!r}" for k, v in values.items()) or "the values above"))
    return "\n".join([(namespace.get("__doc__") or "").strip(), "", "Constants (NAME=value):", *lines])


def _assigned(source: str) -> dict[int, str]:
    """Line where the assignment ends -> name, for every UPPERCASE name that the script assigns at its top level."""
    ends = {}
    for node in ast.parse(source).body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        for target in targets:
            if isinstance(target, ast.Name) and target.id.isupper():
                ends[node.end_lineno or node.lineno] = target.id
    return ends


def _comments(source: str) -> dict[str, str]:
    """Constant -> the comment behind its assignment, with the indented comment lines below it."""
    ends = _assigned(source)
    found: dict[str, str] = {}
    name, last_line = "", -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            text, line = token.string.lstrip("# "), token.start[0]
            if line in ends:
                name, last_line = ends[line], line
                found[name] = text
            elif name and line == last_line + 1 and token.start[1] > 0:
                found[name] += " " + text
                last_line = line
    return found
