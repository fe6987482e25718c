"""The texts that an SAE is looked at on: those that it was trained on, or others.

    run, hook, out = corpus_of(sae, folder, RUN_ID)           # None: its own; what is made goes to `out`
    run, hook, out, there = texts_of(sae, folder, RUN_ID)     # the same, where texts and tokens are enough
    constants = constants_for(sae, CONSTANTS, given)          # for 01_save_activations.py SAE=... DATASET=...
"""
from collections.abc import Collection
from pathlib import Path
from typing import Any

from concepts.dictionary import Concepts, read_concepts
from concepts.formats import STALE
from lib.environment import InputError, log
from lib.files import read_json
from lib.models import local_path, source_of_run
from lib.origin import about_sae
from lib.outputs import differences, safe_name
from lib.sae import SAE, sae_hash
from lib.saes import link, require_same_split
from lib.store import MANIFEST, META, Run, experiment_dir, open_run

DATA = ("PRESET", "DATASET", "DATA_SPLIT", "TEXT_FIELD", "DATA_LIMIT", "VAL_FRAC", "SEED")
HERE = ("SAE", "STREAM", "TRUST_REMOTE_CODE")  # what an SAE has no say in
MASKS = ("max_length", "skip_special", "skip_first", "max_norm_multiple")


def corpus_of(sae: SAE, folder: Path, run_id: str | None = None) -> tuple[Run, str, Path]:
    """The activations of an SAE's own corpus, or of another run; the hook point; and where to write what is made there.

    folder: the SAE's. On another corpus things go to its folder on_<run_id>. Raises InputError if the activations are
    gone, or those of another model, tokenizer or place.
    """
    own, hook = sae.config["run_id"], sae.config["hook"]
    is_own, told = run_id in (None, own), "this reads the activations that the SAE was trained on, and"
    again = f"; to make them again: python 01_save_activations.py SAE={folder.name}"
    if is_own and not (experiment_dir("verify_sae_training") / "runs" / safe_name(own) / "manifest.json").exists():
        # not with the advice of open_run: another run is not the SAE's, and step 1 by itself makes another one
        raise InputError(f"{told} run {own} is missing or unfinished{again}")
    try:
        run = open_run("verify_sae_training", run_id or own)
    except InputError as error:
        raise InputError(f"{told} {error}{again}" if is_own else str(error)) from None
    if run.run_id == own:
        require_trained_on(sae, run, hook)
        return run, hook, folder
    require_same_split(sae.config, run, run.hook(hook))
    about = about_sae(sae.config)
    for part, facts in (("model", ("weights", "dtype", "name")), ("tokenizer", ("fingerprint",))):
        its, other = ({fact: found.get(part, {}).get(fact) for fact in facts} for found in (about, run.meta))
        if its[facts[0]] != other[facts[0]]:
            raise InputError(f"run {run.run_id} is of another {part} than the SAE ({differences(its, other)}); make "
                             f"one with python 01_save_activations.py SAE={folder.name} DATASET=...")
    if why := differences(*({key: found["settings"][key] for key in MASKS} for found in (about, run.meta))):
        log.warning("run %s cut or masked its texts otherwise than the SAE's own (%s)", run.run_id, why)
    return run, run.hook(hook), folder / f"on_{run.run_id}"


def keep_corpus(run: Run, out: Path) -> None:
    """Keep a run's texts and tokens (not its activations) in out/corpus/<run_id>/, where texts_of() finds them.

    They are hard links, where the file system has them, so that they take no room.
    """
    folder = out / "corpus" / run.run_id
    for file in ("texts.jsonl", *(shard["file"] for shard in run.manifest["rows"]), "meta.json", "manifest.json"):
        if not (folder / file).exists():
            link(run.path / file, folder / file)


def texts_of(sae: SAE, folder: Path, run_id: str | None = None) -> tuple[Run, str, Path, bool]:
    """corpus_of(), and whether the activations are there: without them, what keep_corpus() kept of the run.

    Raises InputError if that is not there either.
    """
    try:
        return *corpus_of(sae, folder, run_id), True
    except InputError:
        own = sae.config["run_id"]
        out = folder if run_id in (None, own) else folder / f"on_{run_id}"
        kept = out / "corpus" / safe_name(run_id or own)
        if not (kept / "manifest.json").exists():
            raise
        run = Run(kept, read_json(kept / "meta.json", META), read_json(kept / "manifest.json", MANIFEST))
        return run, sae.config["hook"], out, False


def names_by_people(sae: SAE, folder: Path, out: Path, dead: Collection[int]) -> Concepts:
    """The names that people gave this SAE's latents, to go along to another corpus; to be scored anew there.

    folder: the SAE's; out: that of the other corpus, where a person's name for the same latent comes first. dead:
    latents that never fire there.
    """
    here, there = ({latent: entry for latent, entry in read_concepts(path, sae_hash(sae))["concepts"].items()
                    if entry["source"] == "human"} if (path := place / "concepts.json").exists() else {}
                   for place in (folder, out))
    return {latent: {key: value for key, value in entry.items() if key not in (*STALE, "scored_name")}
            for latent, entry in here.items() if latent not in {*there, *dead}}


def constants_for(sae: SAE, constants: dict[str, Any], given: Collection[str]) -> dict[str, Any]:
    """The constants of step 1 that save an SAE's own activations again or, given a DATASET, those of other texts.

    Model and layer are the SAE's; how texts are cut and masked too, unless the user says otherwise. given: names of the
    constants that the user gave. Raises InputError if one contradicts the SAE.
    """
    about = about_sae(sae.config)
    saved, point = about.get("constants", {}), about["hooks"][0]
    if "MODEL" not in saved or "path" not in point:
        raise InputError("the SAE does not say how its activations were saved; set MODEL and LAYER_SIGNATURE, not SAE")
    place = f"{point['path']}:{point['point']}"
    model = saved["MODEL"] if _lies(saved["MODEL"]) or not about["model"].get("path") else source_of_run(about["model"])
    layers = {place, point["signature"], f"{point['signature']}:{point['point']}", *point.get("names", [])}
    if "MODEL" in given and (_lies(constants["MODEL"]) or constants["MODEL"]) != (_lies(model) or model):
        raise InputError(f"MODEL={constants['MODEL']} is not the SAE's model, {model}; leave MODEL out")
    if "LAYER_SIGNATURE" in given and constants["LAYER_SIGNATURE"] not in layers:
        raise InputError(f"LAYER_SIGNATURE={constants['LAYER_SIGNATURE']} is not where the SAE reads, "
                         f"{(point.get('names') or [place])[0]}; leave LAYER_SIGNATURE out")
    taken = {name: value for name, value in saved.items() if name in constants and name not in (*HERE, *given)}
    if "DATASET" in given:
        taken = {name: value for name, value in taken.items() if name not in DATA} | {"LAYER_SIGNATURE": place}
    return constants | taken | {"MODEL": model, "LAYER_SIGNATURE": taken.get("LAYER_SIGNATURE", place)}


def _lies(name: str) -> Path | None:
    """Where a local model lies; None for a name on the hub, and for a path that is gone."""
    try:
        return local_path(name)
    except InputError:
        return None


def require_trained_on(sae: SAE, run: Run, hook: str) -> None:
    """Raise InputError unless the SAE was trained on this run's activations at `hook`."""
    if sae.config.get("data_digest") != run.digest(hook):
        raise InputError(f"the SAE was trained on run {sae.config.get('run_id')} at {sae.config.get('hook')}, not on "
                         f"{run.run_id} at {hook}; run 02_train_sae.py again")
