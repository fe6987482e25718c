"""Write the trained SAE in other tools' files; centring and scale are folded in, so that they take raw activations.

    python export_sae.py                                            # all formats
    python export_sae.py FORMAT=sae_lens PUSH_TO=user/repository    # one of them, and to the hub

Reads  store/verify_sae_training/: the run and the SAE of steps 1 and 2
Writes store/verify_sae_training/exports/<format>/<hook point>/, with a model card beside it
"""
from pathlib import Path

from lib.constants import override
from lib.environment import InputError, run
from lib.exchange import FORMATS, fold
from lib.hub import facts_of, push, write_card
from lib.sae import load_sae, require_trained_on
from lib.store import experiment_dir, open_run

FORMAT = "all"                     # sae_lens, dictionary_learning (which SAEBench reads too), sparsify; all
OUT: str | None = None             # folder to write to; None: exports/ beside the SAE
PUSH_TO: str | None = None         # "user/name" of a hub repository for this one FORMAT; None: nothing leaves this machine
PRIVATE = True                     # a repository that PUSH_TO makes is private
CONSTANTS = override(globals())
FOLDER = experiment_dir("verify_sae_training")


def sae_folder(kind, facts):
    """Name of the SAE's folder, as each tool's own files have it: sparsify wants the path inside the base model."""
    if kind == "sparsify":
        return facts["hf_module_path"].removeprefix("model.").removeprefix("transformer.").removeprefix("gpt_neox.")
    return facts["hook_name"].replace(":", "_")


def main():
    kinds = list(FORMATS) if FORMAT == "all" else [FORMAT]
    if FORMAT != "all" and FORMAT not in FORMATS:
        raise InputError(f"FORMAT={FORMAT} is none of {', '.join(FORMATS)}, all")
    if PUSH_TO and len(kinds) > 1:
        raise InputError(f"PUSH_TO takes one format; set FORMAT to one of {', '.join(FORMATS)}")
    sae = load_sae(FOLDER / "sae_model" / "topk_sae.pt")
    saved = open_run("verify_sae_training", sae.config["run_id"])
    require_trained_on(sae, saved, sae.config["hook"])
    facts = facts_of(sae, saved)
    for kind in kinds:
        root = Path(OUT or FOLDER / "exports") / kind
        folder = sae_folder(kind, facts)
        FORMATS[kind].write(root / folder, fold(sae), facts)
        write_card(root, kind, folder, facts, PUSH_TO or "user/repository")
        print(f"{kind:<20} {root / folder}")
        if PUSH_TO:
            print(f"{'':<20} {push(root, PUSH_TO, PRIVATE)}")


if __name__ == "__main__":
    run(main)
