"""The concept dictionary of step 4: merge another one into it, export it, search it.

    python concept_dictionary.py SEARCH=dog
    python concept_dictionary.py EXPORT=concepts.yaml            # or .csv, .json; people edit these
    python concept_dictionary.py MERGE=concepts.yaml             # an edited one back, or a colleague's

A merged .csv is a table of edits: what it changes becomes a person's. In .yaml and .json an entry that a person edits
needs `source: human`. Of two names for one latent a person's is kept,
else the one that is there; every difference is told.

Reads and writes store/verify_sae_training/concepts.json
"""
from pathlib import Path

from lib.constants import override
from lib.dictionary import concepts_from_csv, export_concepts, merge_concepts, read_concepts, search_concepts, write_concepts
from lib.environment import run
from lib.store import experiment_dir

MERGE: str | None = None   # file to merge into concepts.json: .json, .yaml or .csv; None: nothing
EXPORT: str | None = None  # file to write the whole dictionary to, by its ending; None: nothing
SEARCH: str | None = None  # words to look for in names, descriptions and notes; None: nothing
LIMIT = 20                 # concepts that a search shows
CONSTANTS = override(globals())


def merge(content, path, other):
    """Merge the file `other` into the dictionary at `path`; returns what it now holds."""
    conflicts: list = []
    if other.suffix == ".csv":
        merged = concepts_from_csv(other, content["concepts"])
    else:
        merged, conflicts = merge_concepts(content, read_concepts(other))
    changed = sum(content["concepts"].get(latent) != entry for latent, entry in merged.items())
    for conflict in conflicts:
        print(f"{conflict.latent}: kept {conflict.kept}, dropped {conflict.dropped} ({conflict.reason})")
    header = {key: value for key, value in content.items() if key != "concepts"}
    write_concepts(path, header, merged)
    print(f"merged {other}: {changed} concepts changed or new, {len(conflicts)} differences; {path}")
    return read_concepts(path)


def main():
    path = experiment_dir("verify_sae_training") / "concepts.json"
    content = read_concepts(path)
    people = sum(entry["source"] == "human" for entry in content["concepts"].values())
    print(f"{len(content['concepts'])} of {content['n_latents']} latents have a name, {people} by a person")
    if MERGE:
        content = merge(content, path, Path(MERGE))
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


if __name__ == "__main__":
    run(main)
