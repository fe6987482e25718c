"""What an installation needs: every import declared, every data file in the wheel; and that make passes on what it is
given.
"""
import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import PROJECT

NAMES = {"scikit-learn": "sklearn", "pyyaml": "yaml"}  # distribution -> module, where they differ
PEERS = {"dictionary_learning", "sae_lens", "sae_bench", "sparsify", "transformer_lens"}  # run in an environment of
                                                                                          # their own (make peers)
FROM_TORCH = {"tensorboard"}  # imported as torch.utils.tensorboard
SETTINGS = tomllib.loads((PROJECT / "pyproject.toml").read_text())


def modules_of(requirements):
    names = [re.split(r"[<>=!~\[; ]", requirement)[0].lower() for requirement in requirements]
    return {NAMES.get(name, name) for name in names}


def test_every_third_party_import_is_declared():
    declared = modules_of(SETTINGS["project"]["dependencies"])
    optional = modules_of(sum(SETTINGS["project"]["optional-dependencies"].values(), []))
    files = [*(PROJECT / "lib").rglob("*.py"), *(PROJECT / "experiments").rglob("*.py")]
    own = {"lib"} | {path.stem for path in files} | {path.parent.name for path in files}
    imported = set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = ([alias.name for alias in node.names] if isinstance(node, ast.Import)
                     else [node.module] if isinstance(node, ast.ImportFrom) and not node.level else [])
            imported |= {name.partition(".")[0] for name in names if name}
    needed = imported - own - set(sys.stdlib_module_names) - PEERS
    assert needed - declared - optional == set()
    assert declared - needed == set()  # and nothing is declared that nobody imports
    pinned = modules_of(line for line in (PROJECT / "requirements.txt").read_text().splitlines()
                        if line and not line.startswith(("#", "-")))
    assert {"torch", "transformers", "datasets", "overcomplete", "numba", "sklearn"} <= pinned & declared


def test_the_wheel_holds_every_file_of_lib():
    """By setuptools' own list, which is what a wheel is made from."""
    code = ("from setuptools.dist import Distribution; d = Distribution({'script_name': 'setup.py'}); "
            "d.parse_config_files(); "
            "c = d.get_command_obj('build_py'); c.build_lib = 'x'; c.ensure_finalized(); "
            "print(*c.get_outputs(include_bytecode=False), sep='\\n')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT)
    listed = {str(Path(line).relative_to("x/sae_workbench")) for line in done.stdout.splitlines()
              if line.startswith("x")}
    there = {str(path.relative_to(PROJECT / "lib")) for path in (PROJECT / "lib").rglob("*")
             if path.is_file() and "__pycache__" not in path.parts}
    assert there == listed, done.stderr


def test_the_metadata_says_what_it_is():
    project = SETTINGS["project"]
    assert (project["description"] and (PROJECT / project["readme"]).exists() and project["license"] == "MIT"
            and (PROJECT / "LICENSE").exists())


@pytest.fixture
def make(tmp_path):
    """Runs make in a copy of its files, in a folder with a space, with a Python that only writes down what it was
    given.
    """
    folder = tmp_path / "a project's folder"
    (folder / ".venv" / "bin").mkdir(parents=True)
    for path in ["Makefile", "requirements.txt", "pyproject.toml",
                 *(str(p.relative_to(PROJECT)) for p in (PROJECT / "experiments").glob("*/*.py"))]:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes((PROJECT / path).read_bytes())
    python = folder / ".venv" / "bin" / "python"
    python.write_text(f"#!/bin/sh\nprintf '%s\\n' \"STORE=$STORE_DIR\" \"$@\" END >> '{tmp_path}/given'\n")
    python.chmod(0o755)
    (folder / ".venv" / "installed").touch()

    def run(*arguments, **environment):
        (tmp_path / "given").unlink(missing_ok=True)
        clean = {key: value for key, value in os.environ.items()
                 if key not in ("STORE_DIR", "MAKEFLAGS", "MAKEOVERRIDES")}
        done = subprocess.run(["make", *arguments], cwd=folder, capture_output=True, text=True, env=clean | environment)
        calls = Path(tmp_path / "given").read_text().split("END\n")[:-1] if (tmp_path / "given").exists() else []
        return done, [call.splitlines() for call in calls], folder

    return run


def test_make_passes_constants_to_the_steps_that_have_them(make):
    done, calls, _ = make("run", "MODEL=gpt2", "DATASET=my d'ata $x.jsonl".replace("$", "$$"),
                          "LAYER_SIGNATURE=resid_post:6", "TOP_K=16")
    assert done.returncode == 0, done.stderr
    probe, save, train = calls[:3]
    assert set(probe[2:]) == {"MODEL=gpt2", "DATASET=my d'ata $x.jsonl"}
    assert (set(save[2:]) == {"MODEL=gpt2", "DATASET=my d'ata $x.jsonl", "LAYER_SIGNATURE=resid_post:6"}
            and train[2:] == ["TOP_K=16"])
    _, calls, _ = make("ception", "SEEDS=0,1")
    assert calls[0][2:] == ["SEEDS=0,1"]
    done, calls, _ = make("run", "MODLE=gpt2")
    assert done.returncode == 2 and not calls and "there is no constant MODLE" in done.stderr


@pytest.mark.parametrize("by", ["environment", "argument"])
def test_the_store_may_lie_in_a_folder_with_spaces(make, by):
    for given, expected in (("/tmp/a b/c", "/tmp/a b/c"), ("my store", "{folder}/my store"),
                            ("~/x y", f"{os.environ['HOME']}/x y"), ("", "{folder}/store")):
        done, calls, folder = make("run", STORE_DIR=given) if by == "environment" else make("run", f"STORE_DIR={given}")
        assert done.returncode == 0, done.stderr
        expected = expected.format(folder=folder)
        assert {call[0] for call in calls} == {f"STORE={expected}"}
        assert f"{expected}/verify_sae_training/pages" in calls[3] and len(calls) == 7
