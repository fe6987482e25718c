"""A notebook as a report: run with constants of one's own, and written as one page that asks nothing of any host.

    render(Path("03_analyze_training.ipynb"), Path("pages/03_analyze_training.html"), ["LOSS_TEXTS=0"])

In the page the code is behind a button, each figure has its description as alt text, and wide tables scroll in boxes of
their own. lib/report/ holds the templates, lib/constants.py says how a notebook's constants are read and checked.
"""
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from .constants import constants_of, has_constants, with_values
from .environment import InputError
from .files import write_text
from .store import store_root

TEMPLATES = Path(__file__).parent
Links = Sequence[tuple[str, str]]


def render(notebook: Path, page: Path, arguments: Sequence[str] = (), pages: Links = ()) -> None:
    """Run a notebook with NAME=value arguments for its constants and write it as an HTML page.

    pages: name and address of the pages that its head links to, relative to its own folder. Raises InputError, in the
    notebook's own words, where one of its cells does.
    """
    import nbformat

    book = nbformat.read(notebook, as_version=4)
    if arguments:
        constants = constants_of(notebook, list(arguments))["CONSTANTS"]
        given = {name: constants[name] for name in (argument.partition("=")[0] for argument in arguments)}
        cell = next(cell for cell in book.cells if cell.cell_type == "code" and has_constants(cell.source))
        cell.source = with_values(cell.source, given)
    _execute(book, notebook)
    write_text(page, _as_html(book, page.name, pages))


def _execute(book: Any, notebook: Path) -> None:
    """Run the cells in a kernel of their own, in the notebook's folder, with a bar over the cells."""
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    codes = [i for i, cell in enumerate(book.cells) if cell.cell_type == "code"]
    with tqdm(total=len(codes), desc=notebook.stem, unit="cell") as bar:
        client = NotebookClient(
            book, timeout=None, kernel_name="python3", resources={"metadata": {"path": str(notebook.parent)}},
            on_cell_executed=lambda **_: bar.update(), extra_arguments=["--log-level=ERROR"])
        try:
            # A relative STORE_DIR would be another folder there; in a page bars would be noise.
            client.execute(env=os.environ | {"STORE_DIR": str(store_root().absolute()), "TQDM_DISABLE": "1"})
        except CellExecutionError as error:
            if error.ename == "InputError":
                raise InputError(f"{notebook.name}: {error.evalue}") from None
            raise


def _as_html(book: Any, here: str, pages: Links) -> str:
    from nbconvert import HTMLExporter

    first = next(cell.source for cell in book.cells if cell.cell_type == "markdown")
    exporter = HTMLExporter(template_name="report", extra_template_basedirs=[str(TEMPLATES)],
                            exclude_anchor_links=True)
    about = {"title": first.splitlines()[0].lstrip("# "), "here": here, "pages": list(pages), "styles": styles()}
    return exporter.from_notebook_node(book, about)[0]


def styles() -> str:
    """The style sheet of all pages, code in the colours of either scheme included."""
    from pygments.formatters import HtmlFormatter

    light, dark = (HtmlFormatter(style=name, nobackground=True).get_style_defs(".highlight")
                   for name in ("default", "github-dark"))
    layout = (TEMPLATES / "report" / "style.css").read_text(encoding="utf-8")
    return f"{layout}\n{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}"


def write_landing(path: Path, about: dict[str, Any]) -> None:
    """Write the page that links all others; lib/report/landing.html.j2 says what `about` holds."""
    from jinja2 import Environment, FileSystemLoader

    templates = Environment(loader=FileSystemLoader(TEMPLATES / "report"), autoescape=True, trim_blocks=True)
    write_text(path, templates.get_template("landing.html.j2").render(styles=styles(), **about))
