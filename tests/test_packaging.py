"""What an installation needs: every import declared, a wheel that works without the checkout; and that make passes on
what it is given.
"""
import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from conftest import PROJECT, tiny_model

from lib.models import model_identity
from lib.sae import make_sae, save_sae

# distribution -> module, where they differ
NAMES = {"scikit-learn": "sklearn", "pyyaml": "yaml", "ipython": "IPython", "umap-learn": "umap"}
# Run in an environment of their own (make peers).
PEERS = {"dictionary_learning", "sae_lens", "sae_bench", "sparsify", "transformer_lens"}
WITHOUT_ITS_OWN = {"overcomplete"}  # installed with --no-deps
FOR_THOSE = {"einops"}  # what it needs of them
SETTINGS = tomllib.loads((PROJECT / "pyproject.toml").read_text())
REQUIREMENTS = (PROJECT / "requirements.txt").read_text()


def modules_of(requirements):
    names = [re.split(r"[<>=!~\[; ]", requirement)[0].lower() for requirement in requirements]
    return {NAMES.get(name, name) for name in names}


def test_every_third_party_import_is_declared():
    declared, extras = modules_of(SETTINGS["project"]["dependencies"]), SETTINGS["project"]["optional-dependencies"]
    files = [*(PROJECT / "lib").rglob("*.py"), *(PROJECT / "experiments").rglob("*.py")]
    own = {"lib"} | {path.stem for path in files} | {path.parent.name for path in files}
    imported = set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = ([alias.name for alias in node.names] if isinstance(node, ast.Import)
                     else [node.module] if isinstance(node, ast.ImportFrom) and not node.level else [])
            imported |= {name.partition(".")[0] for name in names if name}
    needed = imported - own - set(sys.stdlib_module_names) - PEERS
    assert needed - declared - modules_of(sum(extras.values(), [])) == WITHOUT_ITS_OWN
    assert declared - needed == FOR_THOSE  # and nothing is declared that nobody imports
    pinned = modules_of(line for line in REQUIREMENTS.splitlines() if line and not line.startswith("#"))
    assert pinned == declared | modules_of(extras["chat"] + extras["notebooks"] + extras["live"] + extras["dev"])


def test_overcomplete_is_installed_alike_everywhere():
    """Its version is said where pip is called, and where a reader or an error tells how."""
    for name in ("requirements.txt", "pyproject.toml", "Makefile", "lib/sae.py"):
        assert "--no-deps overcomplete==0.3.0" in (PROJECT / name).read_text(), name


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel, built offline from a copy of what it is made from."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(PROJECT / "lib", folder / "lib", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(PROJECT / name, folder / name)
    code = "from setuptools.build_meta import build_wheel; print(build_wheel('.'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.splitlines()[-1]


def test_the_wheel_holds_every_file_of_lib_and_nothing_called_lib(wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    there = {path.relative_to(PROJECT / "lib").as_posix() for path in (PROJECT / "lib").rglob("*")
             if path.is_file() and "__pycache__" not in path.parts}
    assert held == {f"sae_workbench/{name}" for name in there}


USE = """
import importlib.util, os, sys
import sae_workbench
assert "torch" not in sys.modules and importlib.util.find_spec("lib") is None
from sae_workbench import load_encoder
from sae_workbench.store import provenance, store_root
print(load_encoder(sys.argv[1]).encode("the cat sat").tokens, os.path.relpath(store_root()), provenance()["git"])
"""


def test_the_wheel_works_without_the_checkout(wheel, saved_model, tmp_path):
    """In an environment that has nothing but it and what it depends on."""
    W = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    config = {"hook": "resid_post:1", "model": model_identity(tiny_model("llama"), str(saved_model[0]))}
    sae = make_sae(W, torch.zeros(40), W, torch.zeros(16), scale=4.0, top_k=3, config=config)
    save_sae(sae, tmp_path / "topk_sae.pt", probe=torch.randn(64, 16))
    venv.create(tmp_path / "venv", symlinks=True)
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    zipfile.ZipFile(wheel).extractall(packages)
    (packages / "others.pth").write_text("\n".join(place for place in sys.path if place.endswith("site-packages")))
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "STORE_DIR")}
    done = subprocess.run([tmp_path / "venv" / "bin" / "python", "-c", USE, tmp_path / "topk_sae.pt"],
                          capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.stdout.splitlines()[-1:] == ["['the', 'cat', 'sat'] store None"], done.stderr


def test_the_metadata_says_what_it_is():
    project, citation = SETTINGS["project"], yaml.safe_load((PROJECT / "CITATION.cff").read_text())
    assert (project["description"] and (PROJECT / project["readme"]).exists() and project["license"] == "MIT"
            and (PROJECT / "LICENSE").exists())
    assert (citation["title"], citation["version"]) == (project["name"], project["version"])
    assert citation["authors"] == project["authors"]


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


def test_make_passes_constants_as_they_were_given(make):
    done, calls, _ = make("run", "MODEL=gpt2", "DATASET=my d'ata $x.jsonl".replace("$", "$$"), "MY_TEXT=a; \"b\" `c`")
    assert done.returncode == 0, done.stderr
    (store, script, *given), = calls
    assert (script == "experiments/verify_sae_training/run_steps.py"
            and sorted(given) == ["DATASET=my d'ata $x.jsonl", "MODEL=gpt2", 'MY_TEXT=a; "b" `c`'])
    assert make("run", "VERIFY=True")[1][0][1:] == ["experiments/verify_sae_training/run_steps.py", "VERIFY=True"]
    assert make("ception", "SEEDS=0,1")[1][0][1:] == ["experiments/sae_ception/run_steps.py", "SEEDS=0,1"]


@pytest.mark.parametrize("by", ["environment", "argument"])
def test_the_store_may_lie_in_a_folder_with_spaces(make, by):
    for given, expected in (("/tmp/a b/c", "/tmp/a b/c"), ("my store", "{folder}/my store"),
                            ("~/x y", f"{os.environ['HOME']}/x y"), ("", "{folder}/store")):
        done, calls, folder = make("run", STORE_DIR=given) if by == "environment" else make("run", f"STORE_DIR={given}")
        assert done.returncode == 0, done.stderr
        expected = expected.format(folder=folder)
        assert {call[0] for call in calls} == {f"STORE={expected}"}
        assert [call[1:] for call in calls] == [["experiments/verify_sae_training/run_steps.py"]]  # not as a constant
