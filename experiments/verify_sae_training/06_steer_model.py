"""Step 6: let the model write while a latent is edited, and see what each strength gains and costs.

    python 06_steer_model.py                                 # the most interesting concept
    python 06_steer_model.py SEARCH=dog STRENGTHS=0,1,2      # the most interesting with this word in its name
    python 06_steer_model.py LATENT=17 MODE=scale STRENGTHS=0,1,3 "PROMPTS=('One day',)"

Strength is in units of the latent's own highest code; at 0 (add) or 1 (scale) nothing changes, bit for bit.

Reads  store/verify_sae_training/saes/<name>/: the SAE, and step 4's concepts.json; needs no activations
Writes store/verify_sae_training/saes/<name>/steering.json
"""
from typing import Annotated, Literal

import checkout  # noqa: F401  (first: finds lib)
from lib.constants import override
from lib.ranges import Device, Location, Name, NotNegative, Seed, Size, at_least, at_most

Strength = Annotated[float, at_least(-1000), at_most(1000)]
SAE: Location | None = None               # name or folder of an SAE; None: the one trained or imported last
LATENT: NotNegative | None = None         # the latent to edit; None: chosen by SEARCH
SEARCH: Name | None = None                # a word in the concept's name; None: any
MODE: Literal["add", "scale", "clamp"] = "add"  # add, scale, clamp; lib/steering.py says what a strength means there
STRENGTHS: tuple[Strength, ...] = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
PROMPTS: tuple[Name, ...] = ("One day", "Once upon a time", "The little girl", "In the park")
FAVOURED: Size = 20                       # tokens that the latent's direction raises most, to count in the texts
SAMPLES: Size = 4                         # continuations of each prompt
N_TOKENS: Size = 40                       # tokens to write
TEMPERATURE: Annotated[float, at_least(0), at_most(100)] = 0.7  # 0: greedy, then one sample is enough
TRUST_REMOTE_CODE = False                 # run code that comes with a hub model; only for authors you trust
DEVICE: Device = "auto"
SEED: Seed = 0
CONSTANTS = override(globals())

import pandas as pd
from saved_model import model_of_sae

from concepts.coherence import interest
from concepts.continuations import Writing, sweep
from concepts.dictionary import read_concepts
from concepts.directions import promoted_ids
from concepts.firings import read_latent_stats
from lib.environment import InputError, choose_device, run, say_next
from lib.files import write_json
from lib.origin import about_sae
from lib.sae import load_sae, sae_hash
from lib.saes import MODEL_FILE, find_sae
from lib.steering import Edit, skipped_ids

FOLDER = find_sae(SAE)


def choose_latent(concepts, n_latents):
    """LATENT, or the concept that SEARCH means."""
    if LATENT is not None:
        if LATENT >= n_latents:
            raise InputError(f"LATENT={LATENT} must be at most {n_latents - 1}: the SAE has {n_latents} latents")
        return LATENT
    fitting = [i for i, entry in concepts.items() if SEARCH is None or SEARCH.lower() in entry["name"].lower()]
    if not fitting:
        raise InputError(f"no concept has {SEARCH!r} in its name; look in {FOLDER / 'concepts.csv'}")
    return max(fitting, key=lambda i: (interest(concepts[i]), -i))


def main():
    sae = load_sae(FOLDER / MODEL_FILE, choose_device(DEVICE))
    concepts = read_concepts(FOLDER / "concepts.json", sae_hash(sae))["concepts"]
    maxima = sae.maxima
    if maxima is None:  # in an older file
        maxima = read_latent_stats(FOLDER / "latent_stats.safetensors", sae.n_latents)["max"]
    latent = choose_latent(concepts, sae.n_latents)
    model, tokenizer, point = model_of_sae(sae, sae.mean.device, TRUST_REMOTE_CODE)
    favoured = promoted_ids(sae, model, [latent], FAVOURED)[0]
    prompts = [prompt for prompt in PROMPTS for _ in range(SAMPLES)]
    writing = Writing(prompts, n_tokens=N_TOKENS, skip_ids=skipped_ids(tokenizer, about_sae(sae.config)["settings"]),
                      favoured=favoured, temperature=TEMPERATURE, seed=SEED)
    table = sweep(model, tokenizer, point, sae, edits=[Edit(latent, MODE)], maxima=maxima, strengths=STRENGTHS,
                  writing=writing)
    name = concepts[latent]["name"] if latent in concepts else "(no name)"
    print(f"latent {latent}: {name}; {MODE}, {len(prompts)} continuations of {N_TOKENS} tokens at {point.path}")
    report(table, len(favoured))
    about = {"schema_version": 1, "sae_hash": sae_hash(sae), "latent": latent, "name": name, "constants": CONSTANTS}
    write_json(FOLDER / "steering.json", about | {"sweep": table})
    say_next("07_test_causality.py")


def report(table, n_favoured):
    """Print each strength with its numbers and its first text."""
    shown = pd.DataFrame(table)[["strength", "favoured", "fires", "perplexity", "repeated"]]
    formats = dict.fromkeys(("favoured", "fires", "repeated"), "{:.1%}".format) | {"perplexity": "{:.1f}".format}
    head, *lines = shown.to_string(index=False, formatters=formats).splitlines()
    print(f"{head}  first text")
    for line, row in zip(lines, table):
        print(f"{line}  {row['texts'][0]}")
    print(f"favoured: written tokens among the {n_favoured} that the latent's direction raises most in the unembedding")
    print("fires: written tokens on which the unsteered model shows the latent; perplexity: under the unsteered model")


if __name__ == "__main__":
    run(main)
