"""Write the trained SAE, or what its latents fire on, in other tools' files.

    python export_sae.py                                            # the SAE in all formats that can hold it
    python export_sae.py FORMAT=sae_lens PUSH_TO=user/repository    # in one of them, and to the hub
    python export_sae.py FORMAT=workbench PUSH_TO=user/repository   # for load_encoder("user/repository")
    python export_sae.py FORMAT=delphi                              # the codes of all texts, for automatic explanations
    python export_sae.py FORMAT=neuronpedia                         # dashboards, after step 4

For other tools an SAE takes raw activations, with centring and scale folded in; its codes are in raw activation units.

Reads  store/verify_sae_training/saes/<name>/: the SAE; for neuronpedia also the files of step 4; for it and delphi the
       activations
Writes store/verify_sae_training/saes/<name>/exports/<format>/, with a model card beside each SAE
"""
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

import checkout  # noqa: F401  (first: finds lib)
from lib.constants import override
from lib.ranges import FileName, Location, like

Format = Literal["all", "workbench", "sae_lens", "dictionary_learning", "sparsify", "delphi", "neuronpedia"]
Repository = Annotated[str, like(r"[\w.\-]{1,96}/[\w.\-]{1,96}", "user/name of a hub repository")]
SAE: Location | None = None               # name or folder of an SAE; None: the one trained or imported last
FORMAT: Format = "all"                    # workbench (with names, for load_encoder), sae_lens, dictionary_learning
                                          # (for SAEBench too), sparsify; all: these four; delphi and neuronpedia: what
                                          # the latents fire on, which takes the activations
OUT: Location | None = None               # folder to write to; None: exports/ beside the SAE
PUSH_TO: Repository | None = None         # "user/name" on the hub, with one FORMAT; None: nothing leaves this machine
PRIVATE = True                            # a repository that PUSH_TO makes is private
NAME: FileName = "sae-workbench"          # of the source set in a Neuronpedia export
TRUST_REMOTE_CODE = False                 # run code that comes with a hub model; only for authors you trust
CONSTANTS = override(globals())

from corpora import corpus_of
from saved_model import model_of_sae

from concepts.codes import encode_run
from concepts.dictionary import read_concepts
from concepts.directions import direct_view
from concepts.facts import Corpus
from concepts.firings import read_latent_stats
from concepts.top_texts import read_examples
from exchange.delphi import write_delphi
from exchange.facts import facts_of, module_folder
from exchange.formats import FORMATS, formats_for, write_foreign
from exchange.hub import push, write_card
from exchange.neuronpedia import Latents, place_of, write_neuronpedia
from exchange.workbench import write_workbench
from lib.environment import InputError, run
from lib.exchange.folded import fold
from lib.sae import load_sae, sae_hash
from lib.saes import MODEL_FILE, find_sae

FOLDER = find_sae(SAE)
SAE_FILE = FOLDER / MODEL_FILE


def export_sae(kind, root, sae, facts):
    """Write the SAE and its model card; with PUSH_TO upload both. Returns the SAE's folder."""
    if kind == "workbench":
        folder, written = "", write_workbench(root, FOLDER, sae)
    else:
        folder = FORMATS[kind].folder(facts)
        written = write_foreign(kind, root / folder, fold(sae), facts)
    written.append(write_card(root, kind, folder, facts, repo=PUSH_TO or "user/repository"))
    if PUSH_TO:
        print(f"{kind:<20} {push(root, written, PUSH_TO, PRIVATE)}")
    return root / folder


def export_delphi(root, sae, saved, facts):
    """Write delphi's cache; returns its folder."""
    _, tokenizer, _ = model_of_sae(sae, "cpu", TRUST_REMOTE_CODE)
    folder = root / module_folder(facts)
    codes = encode_run(saved, sae.config["hook"], sae)
    write_delphi(folder, saved, codes, scale=sae.scale, tokenizer=tokenizer)
    return folder


def export_neuronpedia(root, sae, saved, facts):
    """Write Neuronpedia's dashboards, with the names and texts of step 4; returns their folder."""
    known, top, _ = read_examples(FOLDER, sae.n_latents, sae_hash(sae))
    corpus = Corpus([text["text"] for text in saved.texts], saved.rows)
    model, tokenizer, _ = model_of_sae(sae, "cpu", TRUST_REMOTE_CODE)
    latents = Latents(
        sae, encode_run(saved, sae.config["hook"], sae), tokenizer=tokenizer,
        top=lambda latent: known.top(latent, corpus) if known else top.get(latent, []),
        stats=read_latent_stats(FOLDER / "latent_stats.safetensors", sae.n_latents),
        concepts=read_concepts(FOLDER / "concepts.json", sae_hash(sae))["concepts"],
        view=direct_view(model, len(sae.mean)),
    )
    created = datetime.fromtimestamp(SAE_FILE.stat().st_mtime).isoformat(timespec="seconds")
    return write_neuronpedia(root, place_of(facts, NAME, created), facts, latents)


def main():
    if PUSH_TO and FORMAT not in ("workbench", *FORMATS):
        raise InputError(f"PUSH_TO takes an SAE in one format; set FORMAT to workbench, {', '.join(FORMATS)}")
    sae = load_sae(SAE_FILE)
    facts = facts_of(sae)
    for kind in ["workbench", *formats_for(fold(sae))] if FORMAT == "all" else [FORMAT]:
        root = Path(OUT or FOLDER / "exports") / kind
        if kind == "delphi":
            folder = export_delphi(root, sae, corpus_of(sae, FOLDER)[0], facts)
        elif kind == "neuronpedia":
            folder = export_neuronpedia(root, sae, corpus_of(sae, FOLDER)[0], facts)
        else:
            folder = export_sae(kind, root, sae, facts)
        print(f"{kind:<20} {folder}")


if __name__ == "__main__":
    run(main)
