"""index.html: what the SAE is, what its verification says, the pages and files about it, and what to do next."""
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from checks.verification import KINDS, VERIFICATION, verdict_of
from concepts.dictionary import read_concepts
from exchange.facts import public_name
from lib.environment import InputError
from lib.files import read_json
from lib.reports import Links, write_landing
from lib.saes import ABOUT_FILE
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
    "08_compare_kinds": ("Kinds of SAE", "TopK, BatchTopK, JumpReLU and nested TopK at equal L0.", "kinds_at_equal_l0"),
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
    ("python 02_train_sae.py SEED=1", "Train another SAE on the same activations: here with another seed."),
    ("python run_steps.py 09_compare_saes.ipynb", "Set the SAEs side by side: which latents come back?"),
    ("python run_steps.py MODEL=... DATASET=... LAYER_SIGNATURE=...", "All steps on a model and texts of your own."),
)


def links(folder: Path, planned: Sequence[Step]) -> Links:
    """The pages that a page of this SAE links to: those that exist, and those that are about to."""
    coming = {step.path.stem for step in planned}
    there = [name for name in PAGES if name in coming or (folder / "pages" / f"{name}.html").exists()]
    extra = [("All concepts", "../concepts.html")] if "05_show_concepts" in there else []
    return [("Overview", "../index.html"), *((PAGES[name][0], f"{name}.html") for name in there), *extra]


def write_overview(folder: Path) -> tuple[Path, str]:
    """Write index.html into an SAE's folder; returns its path and the verdict in words."""
    about = read_json(folder / ABOUT_FILE, SAE_SIDECAR)
    verified, checks = folder / "verification.json", []
    if verified.exists() and (found := read_json(verified, VERIFICATION))["sae_hash"] == about["sae_hash"]:
        checks = found["checks"]
    verdict = verdict_of(checks)
    path = folder / "index.html"
    worst_first = sorted(checks, key=lambda row: VERDICTS.index(row["verdict"]))
    write_landing(path, {
        "title": folder.name, "lead": verdict, "facts": _facts(folder, about), "pages": _pages(folder), "verdict": "",
        "checks": [(KINDS[kind], [row for row in worst_first if row["kind"] == kind]) for kind in KINDS if checks],
        "files": [(name, _size(folder / name), what) for name, what in FILES.items() if (folder / name).exists()],
        "steps": [(command.format(name=folder.name), what) for command, what in NEXT],
        "note": "Every page works offline and asks nothing of any host. Keep this folder together: pages link each "
                "other.",
    })
    return path, verdict


def _facts(folder: Path, about: dict[str, Any]) -> list[tuple[str, str]]:
    model, final, constants = about.get("model", {}), about.get("final", {}), about.get("constants", {})
    facts = [("Model", f"{public_name(model.get('name', 'unknown'))} ({model.get('class', 'unknown class')})"),
             ("Layer", str(about.get("layer") or about.get("hook")))]
    meta_path = experiment_dir("verify_sae_training") / "runs" / str(about.get("run_id")) / "meta.json"
    if meta_path.exists():
        meta = read_json(meta_path, META)
        facts.append(("Texts", f"{meta['n_texts']:,} of {public_name(meta['dataset']['name'])}"))
    kind = constants.get("KIND", "imported" if "imported" in about else "topk")
    facts.append(("SAE", f"{kind}, {about['n_inputs']} -> {about['n_latents']:,} latents, k = {about['top_k']}"))
    if "ev" in final:
        facts.append(("Held-out texts", f"explained variance {final['ev']:.3f}, L0 {final['l0_mean']:.2f}, "
                                        f"{final['dead_pct']:.1f} % of the latents dead"))
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
        found.append(("All concepts", "concepts.html", "Every named latent with its texts, statistics and effects; "
                      "search by name or token.", ""))
    return found


def _size(path: Path) -> str:
    n = path.stat().st_size
    return f"{n / 1e6:.1f} MB" if n >= 1e5 else f"{n / 1e3:.1f} kB"
