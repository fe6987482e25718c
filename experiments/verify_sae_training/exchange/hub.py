"""An exported SAE on the hub: what it says about itself, its model card, push and pull.

Nothing here is called without the user naming a repository; the token is the one that huggingface_hub finds.
"""
import html
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import huggingface_hub

from concepts.dictionary import free_name
from exchange.formats import FORMATS, transformer_lens_name
from lib.environment import PROJECT, InputError, first_line, log
from lib.files import fingerprint, write_text
from lib.models import hook_of_run
from lib.sae import SAE, sae_hash
from lib.store import Run

EV_FORMULA = ("1 - sum of squared errors / sum of squared distances from the per-dimension mean, "
              "over all held-out tokens")


def public_name(name: str) -> str:
    """What others may be told of a model or data set: a name on the hub as it is, of a local path its last part.

    What comes with the project is "embedded/model" and "embedded/stories/train.jsonl".
    """
    here = next((path for path in (os.path.expanduser(name), str(PROJECT / name)) if os.path.exists(path)), None)
    on_hub = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name, re.ASCII)
    if here is None and on_hub and not name.endswith((".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet")):
        return name
    path = Path(os.path.realpath(here or name))
    if path.is_relative_to(PROJECT / "store" / "embedded"):
        return path.relative_to(PROJECT / "store").as_posix()
    return re.split(r"[/\\]", str(path).rstrip("/\\"))[-1] or "local"


def facts_of(sae: SAE, run: Run) -> dict[str, Any]:
    """What another tool should know of the SAE, in SAELens's words where it has them."""
    point = hook_of_run(run, sae.config["hook"])
    constants, final = sae.config.get("constants", {}), sae.config.get("final", {})
    n_batch = constants.get("BATCH_SIZE_TRAIN")
    return {
        "model_name": public_name(run.meta["model"]["name"]),
        "hook_name": transformer_lens_name(point.path, point.point),
        "hf_module_path": point.path, "hook_point": point.point, "context_size": run.meta["settings"]["max_length"],
        "dataset_path": public_name(run.meta["dataset"]["name"]),
        "prepend_bos": int(run.rows["pos"].min()) > run.meta["settings"]["skip_first"],
        "tokens_trained": sae.config.get("tokens_trained"),
        "steps": sae.config["tokens_trained"] // n_batch if n_batch else None,
        "lr": constants.get("LR"), "seed": constants.get("SEED"), "n_latents": sae.n_latents, "k": sae.top_k,
        "explained_variance": final.get("ev"), "explained_variance_formula": EV_FORMULA,
        "dead_pct": final.get("dead_pct"),
        "run_id": run.run_id, "data_digest": sae.config["data_digest"], "sae_hash": sae_hash(sae),
        "code_revision": sae.config.get("provenance", {}).get("git"),
    }


LOADING = {
    "sae_lens": 'from sae_lens import SAE\nsae = SAE.from_pretrained("{repo}", "{folder}")',
    "dictionary_learning": 'from dictionary_learning.utils import load_dictionary\nsae, config = '
                           'load_dictionary("{folder}", "cpu")  # of a local copy',
    "sparsify": 'from sparsify import Sae\nsae = Sae.load_from_hub("{repo}", hookpoint="{folder}")  # input flattened '
                'to [N, D]',
}


def write_card(folder: Path, kind: str, sae_folder: str, facts: dict[str, Any], repo: str = "user/repository") -> Path:
    """Write README.md, the model card, and return its path. A card that a person edited is kept as README_edited.md.

    kind: a key of LOADING; sae_folder: the SAE's folder inside the repository.
    """
    library = {"sae_lens": "saelens"}.get(kind, kind.replace("_", "-"))
    told = {key.replace("_", " "): _plain(value) for key, value in facts.items() if value is not None}
    table = "\n".join(f"| {key} | {value} |" for key, value in told.items())
    text = f"""---
library_name: {library}
tags: [sparse-autoencoder, interpretability]
---
# TopK sparse autoencoder on {_plain(facts["model_name"])}, {_plain(facts["hook_name"])}

{facts["n_latents"]} latents, at most {facts["k"]} on one token. It takes raw activations: centring and scale
of the training are folded into the weights.
Codes are in raw activation units. Special tokens were left out of training.

```python
{LOADING[kind].format(repo=repo, folder=sae_folder)}
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
    """Upload these files, and no others, to the model repository "user/name", made if need be; the commit's address.

    Their paths in the repository are those below `root`. Raises InputError if it fails.
    """
    api = huggingface_hub.HfApi()
    with _one_line(f"PUSH_TO={repo}", "check name and network, and set a token that may write (hf auth login)"):
        parts = [huggingface_hub.CommitOperationAdd(file.relative_to(root).as_posix(), file) for file in files]
        api.create_repo(repo, private=private, exist_ok=True)
        return str(api.create_commit(repo, parts, commit_message="Upload a sparse autoencoder").commit_url)


def pull(repo: str, subfolder: str = "") -> Path:
    """Local folder with the files of an SAE in a model repository, or in one folder of it.

    Raises InputError if it can't be reached.
    """
    names = [*(known.file for known in FORMATS.values()), "cfg.json", "config.json"]
    patterns = [str(PurePosixPath(subfolder) / name) for name in names]
    with _one_line(f"SOURCE={repo}", "set a local folder, or a repository that this machine can reach"):
        return Path(huggingface_hub.snapshot_download(repo, allow_patterns=patterns)) / subfolder


@contextmanager
def _one_line(what: str, advice: str) -> Iterator[None]:
    """Whatever is raised inside becomes an InputError: which HTTP library the hub's client uses, it may change."""
    try:
        yield
    except Exception as error:
        raise InputError(f"{what}: {first_line(error)}; {advice}") from None
