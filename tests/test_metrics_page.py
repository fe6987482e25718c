"""The page of metrics says what the docstrings say, and the self-test passes, and fails where a metric is wrong."""
import ast
import inspect
import re
import runpy

import pytest
from conftest import PROJECT

HERE = PROJECT / "experiments/sae_ception"
HELPERS = {"base_threshold", "unit_rows", "next_token_loss"}


@pytest.fixture(scope="module")
def reference():
    return runpy.run_path(str(HERE / "metrics_reference.py"))


def test_the_page_is_current(reference):
    assert (HERE / "METRICS_REFERENCE.md").read_text() == reference["page"](), "run metrics_reference.py"


def test_every_metric_has_formula_range_source_and_test(reference):
    metrics = reference["metrics"]()
    for m in metrics:
        assert m.formula and m.range and m.source and reference["tests_of"](m.name), m.name
    used = set()
    for name in ("evaluation", "language", "attacks"):
        for node in ast.walk(ast.parse((HERE / f"cycles/{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lib.metrics"):
                used |= {alias.name for alias in node.names}
    assert used - HELPERS <= {m.name for m in metrics}


def test_the_self_test_passes_and_can_fail(capsys):
    names = runpy.run_path(str(HERE / "self_test.py"))
    names["main"]()
    printed = capsys.readouterr().out
    n = len(re.findall("^PASS", printed, re.MULTILINE))
    assert n >= 20 and "FAIL" not in printed and f"{n} of {n} PASS" in printed
    inspect.unwrap(names["main"]).__globals__["explained_variance"] = lambda x, xhat: 0.5
    with pytest.raises(SystemExit):
        names["main"]()
    assert len(re.findall("^FAIL", capsys.readouterr().out, re.MULTILINE)) == 2
