"""How a script starts and ends, whatever it meets: other packages, Ctrl-C, a full disk, a closed pipe, the wrong
lib.
"""
import ast
import errno
import os
import shutil
import signal
import subprocess
import sys

import nbformat
import pytest
from conftest import PROJECT
from forked import TRAIN, VERIFY

from lib.environment import InputError, in_one_line, run

MODELS = """
import sys
import lib.sae
assert not {"torchvision", "transformers"} & set(sys.modules)  # nothing of the user's is touched or loaded
from transformers import LlamaForCausalLM
from overcomplete.sae import TopKSAE, train_sae
from transformers.utils import is_torchvision_available
print(is_torchvision_available(), "timm" in sys.modules)
import torchvision
print(torchvision.__version__)
"""

# What transformers' model classes take from a torchvision that is there.
MODES = """
import enum
InterpolationMode = enum.Enum("InterpolationMode", "NEAREST NEAREST_EXACT BOX BILINEAR HAMMING BICUBIC LANCZOS")
"""

BROKEN = "raise RuntimeError('operator torchvision::nms does not exist')"


def python(code, *folders, **environment):
    path = os.pathsep.join(map(str, [*folders, PROJECT]))
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": path} | environment)


@pytest.mark.parametrize("works", [True, False])
def test_torchvision_is_left_to_the_user_and_breaks_no_model_class(tmp_path, works):
    """One that works stays usable; one that does not match torch costs its own import alone, with its own error."""
    package = tmp_path / "torchvision"
    (package / "transforms" / "v2").mkdir(parents=True)
    for name, code in {"io": "", "transforms/__init__": MODES, "transforms/v2/__init__": "",
                       "transforms/v2/functional": "",
                       "transforms/functional": "def pil_to_tensor(image): ...",
                       "__init__": "__version__ = '9.9'" if works else BROKEN}.items():
        (package / f"{name}.py").write_text(code)
    done = python(MODELS, tmp_path)
    assert done.stdout.splitlines()[0] == f"{works} False", done.stderr
    assert done.stdout.splitlines()[1:] == (["9.9"] if works else [])
    assert (done.returncode == (0 if works else 1)
            and (works or "operator torchvision::nms does not exist" in done.stderr))


def test_lib_can_come_after_transformers(tmp_path):
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(BROKEN)
    done = python("import transformers, transformers.utils as u; u.is_torchvision_available(); import lib; "
                  "print(u.is_torchvision_available())", tmp_path)
    assert done.stdout == "False\n", done.stderr


def test_importing_lib_is_cheap_and_sets_how_threads_wait():
    code = ("import lib, lib.constants, lib.ranges, lib.environment, sys, os; "
            "print(os.environ['OMP_WAIT_POLICY'], {'torch', 'numpy', 'pandas'} & set(sys.modules))")
    assert python(code, OMP_WAIT_POLICY="").stdout == " set()\n"  # what the user has set stays
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment,
                          cwd=PROJECT).stdout == "PASSIVE set()\n"


ERRORS = [
    (OSError(errno.ENOSPC, "No space left on device"), "error: the disk is full"),
    (OSError(errno.EDQUOT, "Disk quota exceeded", "/x"), "error: the disk is full"),
    (PermissionError(errno.EACCES, "Permission denied", "/x/y"), "error: /x/y: no permission"),
    (OSError(errno.EROFS, "Read-only file system", "/x"), "error: /x: the file system is read-only"),
    (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/x"), "error: /x: a file stands where a folder is needed"),
    (IsADirectoryError(errno.EISDIR, "Is a directory", "/x"), "error: /x: a folder stands where a file is needed"),
    (FileNotFoundError(errno.ENOENT, "No such file or directory", "/x"), "error: /x: no such file or folder"),
    (OSError(errno.ENAMETOOLONG, "File name too long", "/x"), "error: /x: the path is too long"),
    (OSError(errno.EFBIG, "File too large"), "error: the file is larger"),
    (OSError(errno.EXDEV, "Invalid cross-device link", "/a", None, "/b"), "error: /a -> /b: Invalid cross-device link"),
    (OSError(errno.ENODEV, "No such device", "/x"), "error: /x: No such device"),
    (OSError(errno.EIO, "Input/output error", "/x"), "error: /x: the disk can't be read"),
    (OSError("in words only"), "error: in words only"),
    (OSError(), "error: OSError"),
    (MemoryError(), "error: out of memory"),
    (BrokenPipeError(errno.EPIPE, "Broken pipe"), "error: Broken pipe"),  # some other pipe than the output
    (InputError("two\nlines"), "error: two lines"),
    (OSError(errno.ENAMETOOLONG, "File name too long", "a/" * 3000), "error: a/a/a/"),
]


@pytest.mark.parametrize(("error", "line"), ERRORS, ids=[repr(error)[:40] for error, _ in ERRORS])
def test_what_a_user_can_put_right_is_one_line(error, line, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        run(main)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith(line) and said.count("\n") == 1 and len(said) < 1100


def test_a_fault_of_the_program_stays_a_traceback():
    def main():
        raise KeyError("x")

    with pytest.raises(KeyError):
        run(main)
    assert in_one_line(ValueError("x")) is None


@pytest.mark.parametrize("place", ["file", "file/deeper", "/proc/nowhere/store", "/dev/null", "/dev/null/x", "{long}",
                                   "~unknown_user_1/store", "\udcff"])
def test_a_store_that_can_not_be_there_is_one_line(forks, tmp_path, place):
    (tmp_path / "file").write_text("precious")
    store = (place.format(long="/".join([str(tmp_path), *["a" * 200] * 30]))
             if place.startswith(("/", "~", "{", "\udcff")) else str(tmp_path / place))
    if place == "\udcff":
        (tmp_path / "cwd" / "\udcff").parent.mkdir()
        (tmp_path / "cwd" / "\udcff").write_text("")
    ended = forks.run([f"{VERIFY}/02_train_sae.py", *TRAIN], tmp_path / "cwd", environment={"STORE_DIR": store})
    assert ended.code == 2 and "Traceback" not in ended.said and ended.said.count("\n") == 1, ended.said
    assert ended.said.startswith("error: ") and (tmp_path / "file").read_text() == "precious"


def test_a_store_in_the_home_folder_is_found(monkeypatch, tmp_path):
    from lib.store import store_root

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("STORE_DIR", "~/my store")
    assert store_root() == tmp_path / "my store"


@pytest.mark.parametrize("environment", [{}, {"RANK": "0"}, {"RANK": "x", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost",
                                                             "MASTER_PORT": "1"},
                                         {"RANK": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost",
                                          "MASTER_PORT": "1"}])
def test_half_of_torchruns_variables_is_one_line(monkeypatch, capsys, environment):
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"WORLD_SIZE": "2"} | environment).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        run(lambda: pytest.fail("it must not start"), parallel=True)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1 and "torchrun" in said


def start(tmp_path, stub, *arguments, **options):
    """Step 2 in a fresh process whose torch is the Python code `stub`."""
    (tmp_path / "torch.py").write_text(stub)
    environment = (os.environ | {"PYTHONPATH": str(tmp_path), "STORE_DIR": str(tmp_path / "store")}
                   | options.pop("env", {}))
    return subprocess.run([sys.executable, str(PROJECT / VERIFY / "02_train_sae.py"), *arguments], text=True,
                          env=environment, **options)


@pytest.mark.parametrize(
    ("stub", "code", "line"),
    [
        ("import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(9)", 130,
         "stopped; rerun the same command to resume"),
        ("try:\n    raise KeyboardInterrupt\nexcept BaseException:\n    raise ImportError('half imported')", 130,
         "stopped; rerun"),
        ("raise OSError(28, 'No space left on device')", 2, "error: the disk is full"),
        ("raise OSError(24, 'Too many open files', '/x/torch.so')", 2, "error: /x/torch.so: too many open files"),
        ("raise MemoryError", 2, "error: out of memory"),
    ],
)
def test_what_happens_while_a_script_imports_is_one_line(tmp_path, stub, code, line):
    done = start(tmp_path, stub, capture_output=True)
    assert done.returncode == code and done.stderr.strip().startswith(line) and len(
        done.stderr.strip().splitlines()
    ) == 1, done.stderr


def test_ctrl_c_while_it_imports_is_ignored_where_the_shell_says_so(tmp_path):
    ignore = lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)  # noqa: E731  (as nohup and `&` do)
    done = start(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGINT); raise MemoryError",
                 capture_output=True, preexec_fn=ignore)
    assert done.returncode == 2


@pytest.mark.parametrize("arguments", [["--help"], []])
def test_a_closed_pipe_is_quiet(tmp_path, arguments):
    """What `| head` leaves: in the constants' help, and in main()."""
    script = tmp_path / "script.py"
    script.write_text('"""Help."""\nfrom lib.constants import override\nX = True\nCONSTANTS = override(globals())\n'
                      'from lib.environment import run\n\n\ndef main():\n    print("x" * 100)\n\n\nrun(main)\n')
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, str(script), *arguments], stdout=writing, stderr=subprocess.PIPE, text=True,
                          cwd=PROJECT,
                          env=os.environ | {"PYTHONPATH": str(PROJECT)})
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_full_disk_behind_the_output_is_one_line(tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, str(PROJECT / VERIFY / "02_train_sae.py"), "--help"], stdout=full,
                              stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: the disk is full") and done.stderr.count("\n") == 1


def test_a_console_without_unicode_shows_escapes(tmp_path):
    script = tmp_path / "script.py"
    script.write_text('"""Żółw 😀"""\nfrom lib.constants import override\nX = True\nCONSTANTS = override(globals())\n',
                      encoding="utf-8")
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(PROJECT)}
    done = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "\\u017b\\xf3\\u0142w" in done.stdout


@pytest.fixture
def other_clone(tmp_path):
    """A copy of the project, used with this one's environment, and this one's lib on the path."""
    other = tmp_path / "other"
    for folder in ("lib", VERIFY):
        shutil.copytree(PROJECT / folder, other / folder, ignore=shutil.ignore_patterns("__pycache__"))

    def run(*command):
        return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, cwd=tmp_path,
                              env=os.environ | {"PYTHONPATH": str(PROJECT)})

    return other, run


def test_a_script_of_another_clone_uses_its_own_lib(other_clone):
    other, run = other_clone
    ranges = other / "lib" / "ranges.py"
    ranges.write_text(ranges.read_text().replace('"a whole number"', '"a number of the copy"'))
    done = run(other / VERIFY / "02_train_sae.py", "TOP_K=x")
    assert done.returncode == 2 and done.stderr == "error: TOP_K=x must be a number of the copy\n"


def test_a_notebook_of_another_clone_uses_its_own_lib(other_clone):
    """Up to `import checkout`, as each notebook has it, then a look at where lib is."""
    other, run = other_clone
    path = other / VERIFY / "05_show_concepts.ipynb"
    notebook = nbformat.read(path, as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    first.source = first.source.partition("import checkout")[0] + "import checkout, lib; print('lib:', lib.__file__)"
    notebook.cells = [first]
    nbformat.write(notebook, path)
    done = run("-m", "nbconvert", "--log-level=ERROR", "--to", "markdown", "--execute", "--stdout", path)
    assert f"lib: {other / 'lib' / '__init__.py'}" in done.stdout, done.stderr


@pytest.mark.parametrize("path", sorted((PROJECT / "experiments").glob("*/*.ipynb")), ids=lambda path: path.name)
def test_a_notebook_finds_its_checkout_before_it_imports_the_project(path):
    """And before torch, whose idle threads wait as lib says."""
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    names = [node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
             for node in ast.walk(ast.parse("\n".join(cells))) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert next(name for name in names if name.partition(".")[0] not in sys.stdlib_module_names) == "checkout"
