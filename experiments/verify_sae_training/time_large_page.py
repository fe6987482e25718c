"""How long do the facts and the page of a large SAE take, and how much memory? Numbers, and a page to try.

    python time_large_page.py LATENTS=65536

The SAE is not trained: its latents point at activations of the run that step 1 saved, so that they fire as those of a
trained one would. Everything else is the code of notebooks 04 and 05, without names and measured effects.

Reads  store/verify_sae_training/runs/<run_id>/, the language model
Writes OUT: latent_facts.safetensors, top_texts.json, concepts.html and its folder
"""
import checkout  # noqa: F401  (first: finds lib)
from lib.constants import override
from lib.ranges import FileName, Location, NotNegative, Size

RUN_ID: FileName | None = None  # None: the run that 01_save_activations.py finished last
LATENTS: Size = 24576           # of the SAE
TOP_K: Size = 8                 # latents that fire on one token
TOKENS: Size = 100_000          # the first of the run
TOP_TEXTS: Size = 10            # examples of each latent
SEED: NotNegative = 0           # draws the activations that the latents point at
OUT: Location | None = None     # folder to write to; None: large_page/ in the store
CONSTANTS = override(globals())

import resource
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from saved_model import model_of_run
from torch.nn import functional

from concepts.codes import Codes
from concepts.directions import closest_directions, direct_view, logit_effects, token_text
from concepts.examples import near_misses
from concepts.facts import Corpus, collect_facts, read_facts, write_facts
from concepts.firings import collect_firings
from concepts.page_data import Known, page_latents
from concepts.page_files import write_page
from concepts.page_map import map_positions
from concepts.top_texts import write_top_texts
from lib.batches import batches_in_order, read_rows
from lib.environment import run
from lib.sae import make_sae, sae_hash
from lib.store import experiment_dir, open_run


@contextmanager
def timed(what):
    """Print how long the block took, and the most memory that the process has held so far."""
    wall, own = time.perf_counter(), time.process_time()
    yield
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{what:<34} {time.perf_counter() - wall:8.1f} s {time.process_time() - own:8.1f} CPU s {peak:6.2f} GB")


def untrained_sae(shards, n_rows):
    """Latents that point at activations drawn from the first n_rows, about their mean, with some noise."""
    generator = torch.Generator().manual_seed(SEED)
    x = read_rows(shards, torch.randint(0, n_rows, (LATENTS,), generator=generator).sort().values)
    mean = x.mean(0)
    scale = float((x - mean).square().sum(1).mean().sqrt())
    rows = functional.normalize(x - mean, dim=1)
    rows += 0.3 * torch.randn(rows.shape, generator=generator) / rows.shape[1] ** 0.5
    rows = functional.normalize(rows, dim=1)
    return make_sae(rows, torch.zeros(LATENTS), rows, mean=mean, scale=scale, top_k=TOP_K)


def first_rows(shards, n_rows):
    """The first rows of a run's shards."""
    cut = []
    for shard in shards:
        cut.append(shard[:n_rows])
        n_rows -= len(cut[-1])
    return [shard for shard in cut if len(shard)]


def encoded(saved, sae, shards, n_rows):
    """The codes of the shards, in memory."""
    batches = []
    for ids, x in batches_in_order(shards, size=max(64, 2**24 // LATENTS)):
        values, indices = sae.encode(x)
        batches.append((int(ids[0]), values, indices.int()))
    rows = {name: column[:n_rows] for name, column in saved.rows.items()}
    return Codes([text["text"] for text in saved.texts], rows, LATENTS, lambda: iter(batches))


def show(folder, saved, sae, codes, firings):
    """The part of notebook 05: everything on the page."""
    with timed("facts read"):
        facts = read_facts(folder / "latent_facts.safetensors", LATENTS, sae_hash(sae))
        corpus = Corpus(codes.texts, codes.rows)
    model, tokenizer, _ = model_of_run(saved, saved.hook(), torch.device("cpu"))
    with timed("tokens raised and lowered"):
        view = direct_view(model, len(sae.mean))
        logits = logit_effects(sae, view, 8) if view is not None else None
    living = firings.fires.nonzero()[:, 0]
    with timed("closest directions"):
        near = dict(zip(living.tolist(), closest_directions(sae.W_dec, living, n=5, least=0.3)))
    with timed("map"):
        positions, made_by = map_positions(sae.W_dec)
    known = Known(firings.stats(), corpus, {}, facts=facts, token=lambda i: token_text(tokenizer, i), logits=logits,
                  near=near, positions=positions)
    about = {"title": f"{LATENTS:,} latents that no one trained", "n_latents": LATENTS, "n_tokens": len(codes),
             "map": made_by}
    with timed("page written"):
        write_page(folder / "concepts.html", about, page_latents(known))


def main():
    saved = open_run("verify_sae_training", RUN_ID)
    n_rows, folder = min(TOKENS, saved.n_rows), Path(OUT or experiment_dir("verify_sae_training") / "large_page")
    shards = first_rows(saved.shards(saved.hook()), n_rows)
    sae = untrained_sae(shards, n_rows)
    with timed(f"codes of {n_rows:,} tokens"):
        codes = encoded(saved, sae, shards, n_rows)
    with timed("firings"):
        firings = collect_firings(codes, TOP_TEXTS)
    with timed("near misses"):
        misses = near_misses(sae, shards, codes.rows["text_id"])
    with timed("all other facts"):
        facts = collect_facts(codes, firings, misses)
    with timed("facts and top texts written"):
        write_facts(folder / "latent_facts.safetensors", facts, sae_hash=sae_hash(sae), run_id=saved.run_id)
        write_top_texts(folder / "top_texts.json", facts, Corpus(codes.texts, codes.rows), {})
    show(folder, saved, sae, codes=codes, firings=firings)
    print(f"{int((firings.fires > 0).sum()):,} of {LATENTS:,} latents fire; {folder}:")
    for path in sorted(folder.iterdir()):
        size = sum(file.stat().st_size for file in [path, *path.glob("*")] if file.is_file())
        print(f"{size / 1e6:8.1f} MB  {path.name}")


if __name__ == "__main__":
    run(main)
