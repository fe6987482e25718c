"""An exported SAE on the hub: what it says about itself, its model card, push and pull.

Nothing here is called without the user naming a repository; the token is the one that huggingface_hub finds.
"""
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub

from lib.environment import InputError
from lib.exchange import transformer_lens_name
from lib.files import write_text
from lib.models import hook_of_run
from lib.sae import SAE, sae_hash
from lib.store import Run

EV_FORMULA = "1 - sum of squared errors / sum of squared distances from the per-dimension mean, over all held-out tokens"


def facts_of(sae: SAE, run: Run) -> dict[str, Any]:
    """What another tool should know of the SAE, in SAELens's words where it has them."""
    point = hook_of_run(run, sae.config["hook"])
    constants, final = sae.config.get("constants", {}), sae.config.get("final", {})
    n_batch = constants.get("BATCH_SIZE_TRAIN")
    return {
        "model_name": run.meta["model"]["name"], "hook_name": transformer_lens_name(point.path, point.point),
        "hf_module_path": point.path, "hook_point": point.point, "context_size": run.meta["settings"]["max_length"],
        "dataset_path": run.meta["dataset"]["name"], "prepend_bos": int(run.rows["pos"].min()) > run.meta["settings"]["skip_first"],
        "tokens_trained": sae.config.get("tokens_trained"), "steps": sae.config["tokens_trained"] // n_batch if n_batch else None,
        "lr": constants.get("LR"), "seed": constants.get("SEED"), "n_latents": sae.n_latents, "k": sae.top_k,
        "explained_variance": final.get("ev"), "explained_variance_formula": EV_FORMULA, "dead_pct": final.get("dead_pct"),
        "run_id": run.run_id, "data_digest": sae.config["data_digest"], "sae_hash": sae_hash(sae),
        "code_revision": sae.config.get("provenance", {}).get("git"),
    }  # fmt: skip


LOADING = {
    "sae_lens": 'from sae_lens import SAE\nsae = SAE.from_pretrained("{repo}", "{folder}")',
    "dictionary_learning": 'from dictionary_learning.utils import load_dictionary\nsae, config = load_dictionary("{folder}", "cpu")  # of a local copy',
    "sparsify": 'from sparsify import Sae\nsae = Sae.load_from_hub("{repo}", hookpoint="{folder}")  # input flattened to [N, D]',
}


def write_card(folder: Path, kind: str, sae_folder: str, facts: dict[str, Any], repo: str = "user/repository") -> None:
    """Write README.md, the model card. kind: a key of LOADING; sae_folder: the SAE's folder inside the repository."""
    library = {"sae_lens": "saelens"}.get(kind, kind.replace("_", "-"))
    table = "\n".join(f"| {key.replace('_', ' ')} | {value} |" for key, value in facts.items() if value is not None)
    write_text(folder / "README.md", f"""---
library_name: {library}
tags: [sparse-autoencoder, interpretability]
---
# TopK sparse autoencoder on {facts["model_name"]}, {facts["hook_name"]}

{facts["n_latents"]} latents, at most {facts["k"]} on one token. It takes raw activations: centring and scale of the training are folded into the weights.
Codes are in raw activation units. Special tokens were left out of training.

```python
{LOADING[kind].format(repo=repo, folder=sae_folder)}
```

| | |
|---|---|
{table}
""")


def push(folder: Path, repo: str, private: bool = True) -> str:
    """Upload a folder to the model repository "user/name", made if need be; returns its address. Raises InputError if it fails."""
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload a sparse autoencoder").commit_url)
    except (OSError, ValueError, httpx.HTTPError) as error:
        raise InputError(f"PUSH_TO={repo}: {_first_line(error)}; check name and network, and set a token that may write (hf auth login)") from None


def pull(repo: str, subfolder: str = "") -> Path:
    """Local folder with the files of a model repository, or of one folder of it. Raises InputError if it can't be reached."""
    try:
        patterns = [f"{subfolder.strip('/')}/*"] if subfolder else None
        return Path(huggingface_hub.snapshot_download(repo, allow_patterns=patterns)) / subfolder
    except (OSError, ValueError, httpx.HTTPError) as error:
        raise InputError(f"SOURCE={repo}: {_first_line(error)}; set a local folder, or a repository that this machine can reach") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]
