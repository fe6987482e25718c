"""index.html: what the SAE is, what its verification says, the pages and files about it, and what to do next."""
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from checks.verification import KINDS, VERIFICATION, verdict_of
from concepts.dictionary import read_concepts
from exchange.facts import public_name
from lib.environment import InputError
from lib.files import read_json
from lib.reports import Links, write_landing
from lib.saes import ABOUT_FILE, find_sae, list_saes
from lib.schemas import SAE_SIDECAR
from lib.steps import Step
from lib.store import META, experiment_dir

PAGES = {  # notebook -> name of its page, what it shows, its picture
    "03_analyze_training": ("Did it learn?", "Training, sparsity, reconstruction and known concepts, each beside SAEs "
                            "that learnt nothing or half; ends in a verdict.", "baselines"),
    "04_name_sae_concepts": ("Names", "What each latent fires on, its name, and how well the name does on texts that "
                             "it was not made from.", "name_scores"),
    "05_show_concepts": ("Concepts", "The most active latents, their texts, their effect on the next token, a text of "
                         "your own, steering.", "most_active_latents"),
    "09_compare_saes": ("Side by side", "Several SAEs on the same tokens: EV, L0, shared latents, stable ones.",
                        "compared_matches"),
}
FILES = {
    "topk_sae.pt": "the SAE: weights, and the rows that test its loading",
    "topk_sae.json": "what it was made from",
    "training_history.json": "its training, step by step",
    "verification.json": "every check with its number and threshold; the best unit for each known concept",
    "concepts.json": "the names, with their scores", "concepts.csv": "the same as a table that you can edit",
    "top_texts.json": "the strongest texts of each latent",
    "concept_effects.json": "what latents do to the next token",
    "steering.json": "texts written while a latent was edited",
    "causality.json": "effects of taking concepts away, against random directions",
}
VERDICTS = ("FAIL", "WARN", "PASS")
NEXT = (
    ("python 06_steer_model.py SAE={name} SEARCH=dog", "Let the model write while one latent is edited."),
    ("python 07_test_causality.py SAE={name}",
     "Does taking a concept away do more than a random direction of the same size?"),
    ("python 10_explore.py SAE={name}", "Type a text and see what fires; steer with a slider."),
    ("python 02_train_sae.py SEED=1", "Train another SAE on the same activations: here with another seed."),
    ("python run_steps.py 09_compare_saes.ipynb", "Set the SAEs side by side: which latents come back?"),
    ("python run_steps.py MODEL=... DATASET=... LAYER_SIGNATURE=...", "All steps on a model and texts of your own."),
)


class Place(NamedTuple):
    """An SAE on a corpus."""

    sae: Path
    """The SAE's folder."""
    folder: Path
    """Where what is made on the corpus lies: the SAE's folder; on_<run_id>/ in it for another corpus."""

    @property
    def pages(self) -> Path:
        return self.folder / "pages"


def place_of(sae: str | None, run_id: str | None) -> Place:
    """The place of an SAE, by its name, folder or None for the last, on its own corpus or that of another run."""
    folder = find_sae(sae)
    own = read_json(folder / ABOUT_FILE, SAE_SIDECAR).get("run_id")
    return Place(folder, folder if run_id in (None, own) else folder / f"on_{run_id}")


def links(place: Place, planned: Sequence[Step]) -> Links:
    """The pages that a page links to: those that exist, and those that are about to."""
    coming = {step.path.stem for step in planned}
    there = [name for name in PAGES if name in coming or (place.pages / f"{name}.html").exists()]
    extra = [("All concepts", "../concepts.html")] if "05_show_concepts" in there else []
    return [("Overview", "../index.html"), *((PAGES[name][0], f"{name}.html") for name in there), *extra]


def write_overview(place: Place) -> tuple[Path, str]:
    """Write index.html beside the pages' folder; returns its path and the verdict in words."""
    folder, about = place.folder, read_json(place.sae / ABOUT_FILE, SAE_SIDECAR)
    is_elsewhere, name = folder != place.sae, place.sae.name
    verified, checks = folder / "verification.json", []
    if verified.exists() and (found := read_json(verified, VERIFICATION))["sae_hash"] == about["sae_hash"]:
        checks = found["checks"]
    verdict = verdict_of(checks)
    path = folder / "index.html"
    worst_first = sorted(checks, key=lambda row: VERDICTS.index(row["verdict"]))
    write_landing(path, {
        "title": f"{name}, {folder.name}" if is_elsewhere else name,
        "lead": verdict, "facts": _facts(folder, about), "pages": _pages(folder),
        "checks": [(KINDS[kind], [row for row in worst_first if row["kind"] == kind]) for kind in KINDS if checks],
        "files": [(name, _size(folder / name), what) for name, what in FILES.items() if (folder / name).exists()],
        "steps": [(command.format(name=name), what) for command, what in NEXT],
        "up": ("On its own corpus", "../index.html") if is_elsewhere else
              ("All SAEs", "../../index.html") if folder.parent.name == "saes" else None,
        "note": "Every page works offline and asks nothing of any host. Keep this folder together: pages link each "
                "other.",
    })
    _write_list(place.sae.parent)
    return path, verdict


def _write_list(saes: Path) -> None:
    """Write the page that links the pages of all SAEs in the folder saes/, beside it."""
    found = []
    for folder in list_saes():
        if folder.parent.resolve() == saes.resolve() and (folder / "index.html").exists():
            facts = dict(_facts(folder, read_json(folder / ABOUT_FILE, SAE_SIDECAR)))
            what = "; ".join(facts[name] for name in ("SAE", "On held-out texts", "Names") if name in facts)
            drawn = f"saes/{folder.name}/figures/baselines.png"
            found.append((folder.name, f"saes/{folder.name}/index.html", what,
                          drawn if (saes.parent / drawn).exists() else ""))
    if saes.name == "saes":  # an SAE may lie elsewhere
        write_landing(saes.parent / "index.html", {
            "title": "SAEs", "lead": f"{len(found)} with pages, oldest first.", "pages": found,
            "note": "python list_saes.py lists all SAEs of the store, those without pages too."})


def _facts(folder: Path, about: dict[str, Any]) -> list[tuple[str, str]]:
    model, final, constants = about.get("model", {}), about.get("final", {}), about.get("constants", {})
    facts = [("Model", f"{public_name(model.get('name', 'unknown'))} ({model.get('class', 'unknown class')})"),
             ("Layer", str(about.get("layer") or about.get("hook")))]
    run_id = folder.name.removeprefix("on_") if folder.name.startswith("on_") else about.get("run_id")
    meta_path = experiment_dir("verify_sae_training") / "runs" / str(run_id) / "meta.json"
    if meta_path.exists():
        meta = read_json(meta_path, META)
        facts.append(("Texts", f"{meta['n_texts']:,} of {public_name(meta['dataset']['name'])}"))
    kind = constants.get("KIND", "imported" if "imported" in about else "topk")
    facts.append(("SAE", f"{kind}, {about['n_inputs']} -> {about['n_latents']:,} latents, k = {about['top_k']}"))
    if "ev" in final:
        facts.append(("On held-out texts", f"explained variance {final['ev']:.3f}, L0 {final['l0_mean']:.2f}, "
                                           f"{final['dead_pct']:.1f} % of the latents dead (its own corpus)"))
    try:
        names = read_concepts(folder / "concepts.json", about["sae_hash"])
    except InputError:  # not named yet, or named by another version
        return facts
    return [*facts, ("Names", names.get("coverage", f"{len(names['concepts']):,} latents are named"))]


def _pages(folder: Path) -> list[tuple[str, str, str, str]]:
    found = []
    for stem, (name, what, picture) in PAGES.items():
        if (folder / "pages" / f"{stem}.html").exists():
            drawn = f"figures/{picture}.png"
            found.append((name, f"pages/{stem}.html", what, drawn if (folder / drawn).exists() else ""))
    if (folder / "concepts.html").exists():
        found.append(("All concepts", "concepts.html", "Every living latent with its texts, statistics and effects; "
                      "search by name or token.", ""))
    return found


def _size(path: Path) -> str:
    n = path.stat().st_size
    return f"{n / 1e6:.1f} MB" if n >= 1e5 else f"{n / 1e3:.1f} kB"
