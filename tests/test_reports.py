"""Notebooks as reports: their constants from outside, the page they become, and the steps in order."""
import re
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import nbformat
import pytest
from conftest import PROJECT

from lib.constants import constants_of, override, with_values
from lib.environment import IN_A_ROW, InputError, say_next
from lib.plots import described
from lib.reports import render, write_landing
from lib.steps import Step, plan, run_script

CONSTANTS = '''import sys  # what is light comes first
sys.path.insert(0, "PROJECT")
from lib.constants import override
from lib.ranges import Count

N: Count = 3          # how many
WORDS = ("é", 'b',    # which
         "c")
WHERE = "here"
CONSTANTS = override(globals())'''
FIGURE = '''from pathlib import Path
import matplotlib.pyplot as plt
from IPython.display import HTML, display
from lib.plots import show
figure, axis = plt.subplots()
axis.set(title="Costs $5", xlabel="days", ylabel="dollars")
show(figure, Path("figure.png"))
print("<script>alert(1)</script>", N, WORDS)
display(HTML("<table><tr><td>1</td></tr></table>"))'''


@pytest.fixture
def notebook(tmp_path):
    def write(*cells, name="01_try.ipynb"):
        text = [nbformat.v4.new_code_cell(cell) for cell in (CONSTANTS.replace("PROJECT", str(PROJECT)), *cells)]
        book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Try <b>it</b>\n\n*Look for:* more."),
                                               *text])
        nbformat.write(book, tmp_path / name)
        return tmp_path / name

    return write


def test_a_value_replaces_the_assigned_one_and_nothing_else():
    source = CONSTANTS.replace("PROJECT", "/tmp")
    changed = with_values(source, {"WORDS": ("ü",), "N": 7})
    assert changed == source.replace("= 3 ", "= 7 ").replace('''("é", 'b',    # which
         "c")''', "('ü',)")
    assert with_values("a = N = 2\n# N = 1\nx.N = 3", {"N": 5}) == "a = N = 2\n# N = 1\nx.N = 3"


def test_a_notebook_checks_what_its_cell_assigns(notebook):
    source = "from lib.constants import override\nfrom lib.ranges import Count\nN: Count = 0\noverride(globals())"
    with pytest.raises(InputError, match="N=0 must be at least 1"):
        exec(source, {"In": ["", source]})
    namespace = {"In": [source.replace("= 0", "= 2")], "__name__": "__main__"}
    sys_argv, sys.argv = sys.argv, ["kernel", "-f", "connection.json"]  # what a kernel was started with is not ours
    try:
        exec(namespace["In"][0], namespace)
    finally:
        sys.argv = sys_argv
    assert override(namespace) == {"N": 2}
    assert constants_of(notebook(), ["N=5", "WHERE=there"])["CONSTANTS"] == {
        "N": 5, "WORDS": ("é", "b", "c"), "WHERE": "there"}


class Page(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def of(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def test_a_page_is_a_report(notebook, tmp_path):
    path = tmp_path / "a page's folder" / "01_try.html"
    render(notebook(FIGURE), path, ["N=41"], [("Overview", "../index.html"), ("Try", "01_try.html")])
    text = path.read_text()
    page = Page(text)
    assert "41 ('é', 'b', 'c')" in page.text and "N: Count = 41" in page.text
    (image,) = page.of("img")
    assert image["alt"] == "Costs $5: dollars over days" and image["src"].startswith("data:image/png")
    assert [link["href"] for link in page.of("a")] == ["../index.html", "01_try.html"]
    assert [link.get("aria-current") for link in page.of("a")] == [None, "page"]
    code = [div["class"] for div in page.of("div") if "code" in div.get("class", "").split()]
    assert code == ["code", "code hidden"] and len(page.of("button")) == 1  # the constants fold by themselves
    assert "<script>alert" not in text and "<title>Try &lt;b&gt;it&lt;/b&gt;</title>" in text
    assert 'class="look"' in text and "default-src 'none'" in text
    assert not re.search(r"(?:src|href)\s*=\s*[\"']?(?:https?:)?//", text) and "@import" not in text


def test_what_a_notebook_refuses_is_one_line(notebook, tmp_path):
    refusing = notebook("from lib.environment import InputError\nraise InputError('run step 4 first')")
    with pytest.raises(InputError, match=r"^01_try.ipynb: run step 4 first$"):
        render(refusing, tmp_path / "page.html")
    with pytest.raises(Exception, match="ZeroDivisionError"):
        render(notebook("1 / 0"), tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_a_relative_store_is_the_same_one_for_a_notebook_elsewhere(notebook, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STORE_DIR", "out")
    (tmp_path / "there").mkdir()
    path = notebook(f"import sys; sys.path.insert(0, {str(PROJECT)!r})",
                    "from lib.store import experiment_dir\nprint('at', experiment_dir('x').absolute())")
    moved = path.rename(tmp_path / "there" / path.name)
    render(moved, tmp_path / "page.html")
    assert f"at {tmp_path / 'out' / 'x'}" in Page((tmp_path / "page.html").read_text()).text


@pytest.fixture
def folder(notebook):
    path = notebook()
    head = ("from lib.constants import override\nfrom lib.ranges import Count\n\nM: Count = 1  # of the script\n"
            "N: Count = 1\nCONSTANTS = override(globals())\n")
    path.with_name("00_first.py").write_text('"""First."""\n' + head)
    return path.parent


STEPS = ("00_first.py", "01_try.ipynb")


def test_each_step_gets_its_own_constants(folder):
    first, second = plan(folder, STEPS, ["N=4", "M=2", "WHERE=there"], "")
    assert (first, second) == (Step(folder / STEPS[0], ["N=4", "M=2"]), Step(folder / STEPS[1], ["N=4", "WHERE=there"]))
    assert plan(folder, STEPS, [STEPS[1], "N=4"], "") == [Step(folder / STEPS[1], ["N=4"])]


@pytest.mark.parametrize(("arguments", "message"), [
    (["MM=3"], "there is no constant MM; did you mean M?"),
    (["WHERE=x", "N=0"], "N=0 must be at least 1"),
    (["00_first.py", "WHERE=x"], "there is no constant WHERE"),
    (["01_tri.ipynb"], "there is no step 01_tri.ipynb; did you mean 01_try.ipynb?"),
    (["--all"], "'--all' is neither a step nor NAME=value"),
])
def test_wrong_arguments_end_before_the_first_step(folder, capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        plan(folder, STEPS, arguments, "")
    said = capsys.readouterr().err
    assert ended.value.code == 2 and message in said and said.count("\n") == 1


def test_help_lists_the_constants_of_all_steps(folder, capsys):
    with pytest.raises(SystemExit) as ended:
        plan(folder, STEPS, ["--help"], "All of it.")
    said = capsys.readouterr().out
    assert ended.value.code == 0 and all(text in said for text in ("All of it.", "of the script", "how many")), said


def test_the_next_command_can_be_typed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["my place/02_train_sae.py"])
    say_next("06_steer_model.py", SAE="a b", LATENT=None)
    say_next("03_a.ipynb", "04_b.ipynb", SAE="a")
    monkeypatch.setenv(IN_A_ROW, "1")  # run_steps.py goes on by itself
    say_next("06_steer_model.py")
    assert capsys.readouterr().out.splitlines() == [
        "next: python 'my place/06_steer_model.py' SAE='a b'",
        "next: python 'my place/run_steps.py' 03_a.ipynb 04_b.ipynb SAE=a"]


def test_a_script_that_fails_gives_its_exit_code(tmp_path):
    (tmp_path / "fails.py").write_text("import sys\nsys.exit(3)")
    with pytest.raises(SystemExit) as ended:
        run_script(Step(tmp_path / "fails.py", []))
    assert ended.value.code == 3


def test_ctrl_c_waits_for_what_the_script_saves(tmp_path):
    """A terminal sends Ctrl-C to both processes, and the script needs more than the quarter of a second that
    subprocess.run would leave it.
    """
    (tmp_path / "slow.py").write_text(
        "import pathlib, sys, time\ntry:\n    pathlib.Path('ready').touch(); time.sleep(60)\n"
        "except KeyboardInterrupt:\n    time.sleep(0.6); pathlib.Path('saved').touch(); sys.exit(130)\n")
    outer = ("import signal, sys; sys.path.insert(0, sys.argv[1])\nfrom pathlib import Path\n"
             "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
             "from lib.steps import Step, run_script\nrun_script(Step(Path('slow.py'), []))")
    process = subprocess.Popen([sys.executable, "-c", outer, str(PROJECT)], cwd=tmp_path, process_group=0)
    end = time.monotonic() + 60
    while not (tmp_path / "ready").exists() and time.monotonic() < end:
        time.sleep(0.01)
    subprocess.run(["kill", "-INT", "--", f"-{process.pid}"], check=True)
    assert process.wait(60) == 130 and (tmp_path / "saved").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_figure_is_described_by_its_titles_and_axes():
    figure, (left, right) = plt.subplots(1, 2)
    left.set(title="Loss", xlabel="tokens", ylabel="nats")
    figure.colorbar(right.imshow([[0, 1]]), label="share")
    assert described(figure).startswith("Loss: nats over tokens")
    plt.close(figure)


def test_the_landing_page_escapes_what_it_shows(tmp_path):
    evil = "</title><script>alert(1)</script>"
    row = {"verdict": "WARN", "value": None, "meaning": evil, "threshold": "> 0"}
    write_landing(tmp_path / "index.html", {
        "title": evil, "lead": evil, "facts": [(evil, evil)], "pages": [("Page", "pages/a.html", evil, "")],
        "checks": [("evidence", [row])], "files": [("a.json", "1 kB", evil)], "steps": [(evil, evil)],
        "note": evil, "up": ("All", "../index.html")})
    page = (tmp_path / "index.html").read_text()
    assert "<script" not in page and page.count("alert(1)") == 11
    assert [link["href"] for link in Page(page).of("a")] == ["../index.html", "pages/a.html", "a.json"]
