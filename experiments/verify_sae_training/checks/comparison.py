"""Several SAEs of one language model on the same tokens, for notebook 09.

    run, saes = open_saes(names, run_id, device)
"""
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import scipy.sparse
import torch
from corpora import corpus_of
from saved_model import hook_of_run
from torch import Tensor

from checks.recovery import searched_parts
from concepts.dictionary import read_concepts
from lib.environment import InputError
from lib.files import read_json, write_json
from lib.ground_truth import WORD_F1, Truth
from lib.hooks import HookPoint
from lib.metrics.units import best_latents, token_table
from lib.sae import SAE, load_sae, sae_hash
from lib.saes import ABOUT_FILE, MODEL_FILE, find_sae, list_saes, made_from
from lib.schemas import SAE_SIDECAR
from lib.store import Run

DEFAULT = 6  # SAEs that are compared unasked
Matches = Mapping[tuple[str, str], tuple[Tensor, Tensor]]
"""(SAE, other SAE) -> for each latent the other's best match and its correlation, as best_matches gives them."""


class One(NamedTuple):
    """One of the compared SAEs."""

    folder: Path
    sae: SAE
    hook: str
    """Its hook point in the run."""
    point: HookPoint
    layer: str
    """Its short name."""
    names: dict[int, str]
    """Latent -> its name, of those that have one."""

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def kind(self) -> str:
        imported = self.sae.config.get("imported")
        return imported["format"] if imported else str(self.sae.config.get("constants", {}).get("KIND", "topk"))


def open_saes(which: Sequence[str] | None, run_id: str | None = None, device: torch.device | str = "cpu"
              ) -> tuple[Run, list[One]]:
    """The SAEs of these names or folders, and the run on whose tokens they are compared: run_id, or else that of the
    first. No name: the last SAE, and the newest others that were trained on the same run.

    Raises InputError if the run does not hold the layer of one of them, or is of another language model.
    """
    folders = [find_sae(name) for name in which or ()] or _of_one_run()
    if twice := {folder.name for folder in folders if folders.count(folder) > 1}:
        raise InputError(f"SAES names {', '.join(sorted(twice))} twice")
    run, saes = None, []
    for folder in folders:
        sae = load_sae(folder / MODEL_FILE, device)
        run, hook, _ = corpus_of(sae, folder, run.run_id if run else run_id)
        path, names = folder / "concepts.json", {}
        if path.exists():
            concepts = read_concepts(path, sae_hash(sae))["concepts"]
            names = {latent: entry["name"] for latent, entry in concepts.items()}
        saes.append(One(folder, sae, hook, point=hook_of_run(run, hook), layer=run.short_name(hook), names=names))
    assert run is not None
    return run, saes


def _of_one_run() -> list[Path]:
    """The last SAE, then the newest others of its run, at most DEFAULT in all."""
    last = find_sae()
    run_id = read_json(last / ABOUT_FILE, SAE_SIDECAR).get("run_id")
    others = [folder for folder in reversed(list_saes())
              if folder != last and read_json(folder / ABOUT_FILE, SAE_SIDECAR).get("run_id") == run_id]
    return [last, *others][:DEFAULT]


def word_f1(one: One, run: Run, truth: Truth) -> dict[str, float]:
    """Word concept -> F1 on held-out tokens of the best latent; as recover_concepts has them, on the same rows."""
    found: dict[str, float] = {}
    for part in searched_parts(run, one.hook, truth):
        _, table = token_table(run.rows["token_id"].long()[part.rows], part.labels, part.is_val)
        columns = [i for i, scores in enumerate(table) if scores["f1_train"] >= WORD_F1]
        if columns:
            codes = one.sae.encode(part.x.to(one.sae.mean))
            best = best_latents(codes, one.sae.n_latents, part.labels[:, columns], part.is_val)
            found |= {part.concepts[i].name: scores["f1"] for i, scores in zip(columns, best)}
    return found


def strongest_tokens(
    run: Run, keep: Tensor, codes: scipy.sparse.csr_array, latents: Sequence[int], n: int = 4
) -> dict[int, list[str]]:
    """For each of the latents the texts of the tokens with most of its activation, at most n, the first first.

    keep: bool [n_rows], the rows of the run that `codes` [N, F] are of.
    """
    rows, by_latent = keep.nonzero()[:, 0], codes.tocsc()
    columns = [run.rows[name][rows] for name in ("text_id", "char_start", "char_end")]
    found = {}
    for latent in latents:
        span, total = slice(*by_latent.indptr[latent : latent + 2]), Counter[str]()
        for row, code in zip(by_latent.indices[span].tolist(), by_latent.data[span].tolist()):
            text, start, end = (int(column[row]) for column in columns)
            total[run.texts[text]["text"][start:end].strip()] += code
        found[latent] = [token for token, _ in total.most_common(n)]
    return found


def as_seeds(saes: Mapping[str, One]) -> list[list[str]]:
    """The SAEs whose trainings differ in the seed alone, two or more in each group."""
    groups: dict[str, list[str]] = {}
    for key, one in saes.items():
        parts = made_from(one.sae.config)
        constants = {name: value for name, value in parts["constants"].items() if name != "SEED" and value is not None}
        if "imported" not in one.sae.config:
            groups.setdefault(repr((sorted(constants.items()), parts["activations"], parts["split"])), []).append(key)
    return [group for group in groups.values() if len(group) > 1]


def in_address(name: str) -> str:
    """A folder's name as part of an address: whatever is no letter, digit, dot, hyphen or underscore as %XX."""
    return quote(name, safe="").replace("~", "%7E")


def write_stability(
    saes: Mapping[str, One], groups: list[list[str]], matches: Matches, *, run_id: str, n_tokens: int
) -> list[Path]:
    """Write each SAE's stability.json, for those that have another seed or layer beside them; returns the files.

    Of each latent: its best match in each other seed, their mean correlation ("stability"), and its best match in each
    SAE of another layer.
    """
    written = []
    for key, one in saes.items():
        seeds = [other for group in groups if key in group for other in group if other != key]
        layers = [other for other in saes if saes[other].layer != one.layer]
        latents: dict[str, dict[str, Any]] = {}
        for others, name in ((seeds, "seeds"), (layers, "layers")):
            for other in others:
                for latent, (match, r) in enumerate(zip(*(part.tolist() for part in matches[key, other]))):
                    if match >= 0:
                        about = {"sae": saes[other].name, "latent": match, "correlation": r}
                        if name == "layers":
                            about |= {"layer": saes[other].layer, "name": saes[other].names.get(match)}
                            if (saes[other].folder.parent == one.folder.parent
                                and (saes[other].folder / "concepts.html").exists()):
                                about["href"] = f"../{in_address(saes[other].name)}/concepts.html#{match}"
                        latents.setdefault(str(latent), {}).setdefault(name, []).append(about)
        for entry in latents.values():
            if found := entry.get("seeds"):
                # Where it has no match, or a negative one, it is not found.
                entry["stability"] = sum(max(0.0, match["correlation"]) for match in found) / len(seeds)
        if seeds or layers:
            path = one.folder / "stability.json"
            write_json(path, {"schema_version": 1, "sae_hash": sae_hash(one.sae), "run_id": run_id,
                              "n_tokens": n_tokens, "latents": latents})
            written.append(path)
    return written
