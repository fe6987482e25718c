"""The pages that are served: concepts.html with the live panel, or the panel alone where there is none yet."""
from pathlib import Path

from concepts.page_files import live_page

BARE = Path(__file__).with_name("bare.html")
OPENING = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>opening …</title>
<link rel="icon" href="data:,">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:">
<meta http-equiv="refresh" content="0; url=concepts.html"></head><body><a href="concepts.html">open the page</a></body>
</html>"""


def served_page(folder: Path) -> str:
    """The page to serve from the folder of an SAE's products. Raises InputError if older code has written it."""
    path = folder / "concepts.html"
    if not path.exists():
        return BARE.read_text(encoding="utf-8")
    return live_page(path, scripts=["live.js"], styles=["live.css"])
