"""An exported SAE on the hub: its model card and push; lib/exchange/hub.py has pull.

Nothing here runs unless the user names a repository; huggingface_hub finds the token.
"""
import html
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import huggingface_hub

from concepts.dictionary import free_name
from exchange.facts import Facts
from exchange.formats import FORMATS
from exchange.workbench import LIBRARY, LOADING, UNITS
from lib.environment import log
from lib.exchange.hub import one_line
from lib.files import fingerprint, write_text

FOLDED = ("It takes raw activations: centring and scale\nof the training are folded into the weights.\n"
          "Codes are in raw activation units.")
LEFT_OUT = " Special tokens were left out of training."


def write_card(folder: Path, kind: str, sae_folder: str, facts: Facts, repo: str = "user/repository") -> Path:
    """Write README.md, the model card, and return its path. A card that a person edited is kept as README_edited.md.

    kind: a key of FORMATS, or "workbench"; sae_folder: the SAE's folder inside the repository.
    """
    library, loading, units = LIBRARY, LOADING, UNITS
    if kind in FORMATS:
        library, loading, units = FORMATS[kind].library, FORMATS[kind].loading, FOLDED
    units += LEFT_OUT if facts["special_tokens_left_out"] else ""
    told = {key.replace("_", " "): _plain(value) for key, value in facts.items() if value is not None}
    table = "\n".join(f"| {key} | {value} |" for key, value in told.items())
    text = f"""---
library_name: {library}
tags: [sparse-autoencoder, interpretability]
---
# Sparse autoencoder on {_plain(facts["model_name"])}, {_plain(facts["hook_name"])}

{facts["n_latents"]} latents, at most {facts["k"]} on one token. {units}

```python
{loading.format(repo=repo, folder=sae_folder)}
```

| | |
|---|---|
{table}
"""
    path = folder / "README.md"
    if path.exists():
        there = path.read_text(encoding="utf-8", errors="replace")
        at = max(0, there.rfind("<!-- "))
        if there[at:] != _stamp(there[:at]):
            path.replace(kept := free_name(folder / "README_edited.md"))
            log.warning("%s was edited; it is kept beside the new one as %s", path, kept.name)
    write_text(path, text + _stamp(text))
    return path


def _stamp(text: str) -> str:
    """The last line of a card, which tells whether it was edited."""
    return f"<!-- {fingerprint(text)} -->\n"


def _plain(value: Any) -> str:
    """A fact as text in Markdown: no markup, no table cell, no line break."""
    text = html.escape(" ".join(str(value).split()), quote=False)
    return re.sub(r"([\\`*\[\]|])", r"\\\1", text)


def push(root: Path, files: Iterable[Path], repo: str, private: bool = True) -> str:
    """Upload just these files to the model repository "user/name", made if need be; returns the commit's address.

    Their paths in the repository are those below `root`. Raises InputError if it fails.
    """
    api = huggingface_hub.HfApi()
    with one_line(f"PUSH_TO={repo}", "check name and network, and set a token that may write (hf auth login)"):
        parts = [huggingface_hub.CommitOperationAdd(file.relative_to(root).as_posix(), file) for file in files]
        api.create_repo(repo, private=private, exist_ok=True)
        return str(api.create_commit(repo, parts, commit_message="Upload a sparse autoencoder").commit_url)
