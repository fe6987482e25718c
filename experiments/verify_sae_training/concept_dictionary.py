"""The concept dictionary of step 4: merge another one into it, export it, search it.

    python concept_dictionary.py SEARCH=dog
    python concept_dictionary.py EXPORT=concepts.yaml            # or .csv, .json; people edit these
    python concept_dictionary.py MERGE=concepts.yaml             # an edited one back, or a colleague's

What a person edited in any of them becomes that person's, with or without `source: human`. Of two names for one latent
a person's is kept, else the present one; every difference is reported. An existing file is never overwritten.

Reads and writes store/verify_sae_training/saes/<name>/concepts.json
"""
from pathlib import Path

import checkout  # noqa: F401  (first: finds lib)
from lib.constants import override
from lib.ranges import Count, Location, Name

SAE: Location | None = None               # name or folder of an SAE; None: the one trained or imported last
MERGE: Location | None = None             # file to merge into concepts.json: .json, .yaml or .csv; None: nothing
EXPORT: Location | None = None            # file to write the whole dictionary to, by its ending; None: nothing
SEARCH: Name | None = None                # words to look for in names, descriptions and notes; None: nothing
LIMIT: Count = 20                         # concepts that a search shows
CONSTANTS = override(globals())

from concepts.dictionary import (
    edit_concepts,
    export_concepts,
    merge_concepts,
    read_concepts,
    require_new,
    search_concepts,
)
from concepts.firings import read_latent_stats
from concepts.formats import check, to_write
from concepts.tables import concepts_from_csv
from lib.environment import run, say_next
from lib.saes import find_sae


def merge(path, other, n_latents):
    """Merge the file `other` into the dictionary at `path`, all or nothing; returns what it now holds."""
    stats = path.with_name("latent_stats.safetensors")
    fires = read_latent_stats(stats, n_latents)["fires"] if stats.exists() else None
    dead = [] if fires is None else (fires == 0).nonzero()[:, 0].tolist()
    conflicts: list = []
    changed = 0

    def change(content):
        nonlocal changed
        if other.suffix == ".csv":
            merged = concepts_from_csv(other, content["concepts"], content["sae_hash"], conflicts)
        else:
            merged, differences = merge_concepts(content, read_concepts(other))
            conflicts.extend(differences)
        check(to_write({**content, "concepts": {}}, merged), other, dead=dead)
        changed = sum(content["concepts"].get(latent) != entry for latent, entry in merged.items())
        return merged

    content = edit_concepts(path, change, dead)
    for conflict in conflicts:
        print(f"{conflict.latent}: kept {conflict.kept}, dropped {conflict.dropped} ({conflict.reason})")
    print(f"merged {other} into {path}: {changed} concepts changed or new, {len(conflicts)} differences")
    return content


def main():
    path = find_sae(SAE) / "concepts.json"
    content = read_concepts(path)
    people = sum(entry["source"] == "human" for entry in content["concepts"].values())
    print(f"{len(content['concepts'])} of {content['n_latents']} latents have a name, {people} by a person")
    if EXPORT:
        require_new(Path(EXPORT))  # before MERGE writes
    if MERGE:
        content = merge(path, Path(MERGE), content["n_latents"])
    if EXPORT:
        export_concepts(content, Path(EXPORT))
        print(f"exported to {EXPORT}")
    if SEARCH:
        found = search_concepts(content["concepts"], SEARCH)
        print(f"{len(found)} found")
        for latent in found[:LIMIT]:
            entry = content["concepts"][latent]
            score = "  -" if entry.get("score") is None else f"{entry['score']:.2f}"
            print(f"{latent:>6}  {score}  {entry['name']}")
    if MERGE:
        say_next("05_show_concepts.ipynb", SAE=SAE or path.parent.name)  # which writes the page anew


if __name__ == "__main__":
    run(main)
