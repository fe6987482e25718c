"""Write the trained SAE, or what its latents fire on, in other tools' files.

    python export_sae.py                                            # the SAE in all formats
    python export_sae.py FORMAT=sae_lens PUSH_TO=user/repository    # in one of them, and to the hub
    python export_sae.py FORMAT=delphi                              # the codes of all texts, for automatic explanations
    python export_sae.py FORMAT=neuronpedia                         # dashboards, after step 4

Centring and scale are folded in, so that an exported SAE takes raw activations; codes are in raw activation units
everywhere.

Reads  store/verify_sae_training/: the run and the SAE of steps 1 and 2; for neuronpedia also the files of step 4
Writes store/verify_sae_training/exports/<format>/, with a model card beside each SAE
"""
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

import checkout  # noqa: F401  (first: finds lib)
from lib.constants import override
from lib.ranges import FileName, Location, like

Format = Literal["all", "sae_lens", "dictionary_learning", "sparsify", "delphi", "neuronpedia"]
Repository = Annotated[str, like(r"[\w.\-]{1,96}/[\w.\-]{1,96}", "user/name of a hub repository")]
FORMAT: Format = "all"                    # sae_lens, dictionary_learning (which SAEBench reads too), sparsify; all:
                                          # these; delphi; neuronpedia
OUT: Location | None = None               # folder to write to; None: exports/ beside the SAE
PUSH_TO: Repository | None = None         # "user/name" of a hub repository for an SAE in one FORMAT; None: nothing
                                          # leaves this machine
PRIVATE = True                            # a repository that PUSH_TO makes is private
NAME: FileName = "sae-workbench"          # of the source set in a Neuronpedia export
TRUST_REMOTE_CODE = False                 # delphi, neuronpedia: run code that comes with a hub model; only for authors
                                          # you trust
CONSTANTS = override(globals())

import torch

from concepts.codes import encode_run
from concepts.dictionary import read_concepts
from concepts.directions import direct_view
from concepts.firings import read_latent_stats, read_top_texts
from exchange.dashboards import write_delphi, write_neuronpedia
from exchange.formats import FORMATS, fold
from exchange.hub import facts_of, push, write_card
from lib.environment import InputError, run
from lib.files import safe_name
from lib.models import model_of_run
from lib.sae import load_sae, require_trained_on, sae_hash
from lib.store import experiment_dir, open_run

FOLDER = experiment_dir("verify_sae_training")
SAE_FILE = FOLDER / "sae_model" / "topk_sae.pt"


def sae_folder(kind, facts):
    """Name of the SAE's folder, as each tool's own files have it: EleutherAI's want the path inside the base model."""
    if kind in ("sparsify", "delphi"):
        path = facts["hf_module_path"].removeprefix("model.").removeprefix("transformer.").removeprefix("gpt_neox.")
    else:
        path = facts["hook_name"].replace(":", "_")
    return safe_name(path)


def export_sae(kind, root, sae, facts):
    folder = sae_folder(kind, facts)
    written = FORMATS[kind].write(root / folder, fold(sae), facts)
    written.append(write_card(root, kind, folder, facts, PUSH_TO or "user/repository"))
    print(f"{kind:<20} {root / folder}")
    if PUSH_TO:
        print(f"{'':<20} {push(root, written, PUSH_TO, PRIVATE)}")


def export_firings(kind, root, sae, saved, facts):
    model, tokenizer, _ = model_of_run(saved, sae.config["hook"], torch.device("cpu"), TRUST_REMOTE_CODE)
    codes = encode_run(saved, sae.config["hook"], sae)
    if kind == "delphi":
        folder = root / sae_folder(kind, facts)
        write_delphi(folder, saved, codes, sae.scale, tokenizer)
    else:
        meta, top, _ = read_top_texts(FOLDER / "top_texts.json")
        if meta.get("sae_hash") != sae_hash(sae):
            raise InputError("top_texts.json is about another SAE; run 04_name_sae_concepts.ipynb again")
        concepts = read_concepts(FOLDER / "concepts.json", sae_hash(sae))["concepts"]
        created = datetime.fromtimestamp(SAE_FILE.stat().st_mtime).isoformat(timespec="seconds")
        stats, view = read_latent_stats(FOLDER / "latent_stats.safetensors", sae.n_latents), direct_view(model,
                                                                                                         len(sae.mean))
        folder = write_neuronpedia(root, NAME, created, facts, sae, codes, stats, top, concepts, view, tokenizer)
    print(f"{kind:<20} {folder}")


def main():
    if PUSH_TO and FORMAT not in FORMATS:
        raise InputError(f"PUSH_TO takes an SAE in one format; set FORMAT to one of {', '.join(FORMATS)}")
    sae = load_sae(SAE_FILE)
    saved = open_run("verify_sae_training", sae.config["run_id"])
    require_trained_on(sae, saved, sae.config["hook"])
    facts = facts_of(sae, saved)
    every = ["sae_lens"] if sae.threshold is not None else list(FORMATS)  # the others have no SAE with thresholds
    for kind in every if FORMAT == "all" else [FORMAT]:
        root = Path(OUT or FOLDER / "exports") / kind
        if kind in FORMATS:
            export_sae(kind, root, sae, facts)
        else:
            export_firings(kind, root, sae, saved, facts)


if __name__ == "__main__":
    run(main)
