"""Write METRICS_REFERENCE.md: formula, range, source and tests of every metric, from the docstrings of lib/metrics.

    python metrics_reference.py

A docstring that ends with "Range: ... Source: ..." is a metric's. The tests are those of tests/test_metrics_*.py that
call it.
"""
import ast
import importlib
import inspect
import re
from pathlib import Path
from typing import NamedTuple

import checkout  # noqa: F401  (first: finds lib)
from lib.environment import PROJECT, guard_imports, run

PAGE = Path(__file__).with_name("METRICS_REFERENCE.md")
FILES = ("interpretability", "performance", "reconstruction", "clustering", "robustness", "units")


class Metric(NamedTuple):
    """A metric as its docstring defines it."""

    name: str
    file: str
    formula: str
    range: str
    source: str


def metrics() -> list[Metric]:
    """The metrics of lib/metrics, in the order of the files."""
    found = []
    for file in FILES:
        module = importlib.import_module(f"lib.metrics.{file}")
        functions = {name: value for name, value in vars(module).items() if getattr(value, "__module__", "") ==
                     module.__name__ and not name.startswith("_")}
        for name, function in functions.items():
            text = inspect.getdoc(getattr(function, "result", function)) or ""
            if ends := re.search(r"\s*Range: (.*?)\.?\s+Source:\s(.*?)\.?\Z", text, re.DOTALL):
                limits, source = (" ".join(part.split()) for part in ends.groups())
                found.append(Metric(name, file, formula=text[: ends.start()], range=limits, source=source))
    return found


def tests_of(name: str) -> list[str]:
    """The tests that call a function, as "file: test"."""
    found = []
    for path in sorted((PROJECT / "tests").glob("test_metrics_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            used = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and name in used:
                found.append(f"{path.name}: {node.name}")
    return found


def page() -> str:
    """METRICS_REFERENCE.md."""
    rows = [f"| [{m.name}](#{m.name.lower()}) | {m.range} | {m.source} | {len(tests_of(m.name))} |" for m in metrics()]
    parts = [f"## {m.name}\n\n`lib/metrics/{m.file}.py`\n\n```text\n{m.formula}\n```\n\n**Range** {m.range}. "
             f"**Source** {m.source}.\n\n" + "\n".join(f"- `tests/{test}`" for test in tests_of(m.name))
             for m in metrics()]
    head = ("# Metrics\n\nWritten by `python metrics_reference.py` from the docstrings of `lib/metrics`; a test keeps "
            "it current. README.md says\nwhich keys of `results.csv` they are. `python self_test.py` computes examples "
            "of known value.\nN examples, D units, F latents, C classes.\n")
    table = "\n".join(["| metric | range | source | tests |", "|---|---|---|---|", *rows])
    return "\n".join([head, table, "", "\n\n".join(parts), ""])


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    guard_imports()
    run(main)
