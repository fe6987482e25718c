"""Step 6: let the model write while a latent is edited: does its concept appear, and do the texts still read well?

    python 06_steer_model.py                                 # the concept that shows most, chosen by the rule below
    python 06_steer_model.py SEARCH=dog                      # the one whose name this word fits best
    python 06_steer_model.py LATENT=17 MODE=scale STRENGTHS=1,3 "PROMPTS=('One day',)"

Strength is in units of the latent's own highest code; at 0 (add) or 1 (scale) nothing changes, bit for bit. Without
STRENGTHS it is sought: the one at which the concept appears most among texts of at most MAX_COST times the perplexity
of unsteered ones. What is reported of it is measured on other seeds than those that chose it; greedy texts have none.

The rule, without LATENT and SEARCH: of the concepts that are one thing (coherence) and whose name has an F1 of at least
MIN_F1 and tells words that the model seldom writes, FINALISTS are picked by what they do to the next token; the
strength of each is sought; the one whose rise has the highest lower end of its 95 % interval is shown.

Reads  store/verify_sae_training/saes/<name>/: the SAE, and step 4's concepts.json and top_texts.json; needs no
       activations
Writes store/verify_sae_training/saes/<name>/steering.json
"""
from typing import Annotated, Literal

import checkout  # noqa: F401  (first: finds lib)
from lib.constants import override
from lib.ranges import Device, Location, Name, NotNegative, Part, Seed, Size, at_least, at_most

Strength = Annotated[float, at_least(-1000), at_most(1000)]
SAE: Location | None = None               # name or folder of an SAE; None: the one trained or imported last
LATENT: NotNegative | None = None         # the latent to edit; None: chosen by SEARCH
SEARCH: Name | None = None                # a word in the concept's name; None: chosen by the rule above
MODE: Literal["add", "scale", "clamp"] = "add"  # add, scale, clamp; lib/steering.py says what a strength means there
STRENGTHS: tuple[Strength, ...] | tuple[()] = ()  # the strengths to try; (): sought
MAX_COST: Annotated[float, at_least(1), at_most(1000)] = 1.5  # perplexity, over that of unsteered texts, to seek below
MIN_F1: Part = 0.5                        # of the names that the rule chooses among
FINALISTS: Size = 8                       # concepts whose strength the rule seeks
PROMPTS: tuple[Name, ...] = ("One day", "Once upon a time", "The little girl", "In the park")
FAVOURED: Size = 20                       # tokens that the latent's direction raises most, to count in the texts
SAMPLES: Size = 8                         # continuations of each prompt
N_TOKENS: Size = 40                       # tokens to write
TEMPERATURE: Annotated[float, at_least(0), at_most(100)] = 0.7  # 0: greedy, one continuation of each prompt
TRUST_REMOTE_CODE = False                 # run code that comes with a hub model; only for authors you trust
DEVICE: Device = "auto"
SEED: Seed = 0                            # chooses with this seed, reports with the next
CONSTANTS = override(globals())

from saved_model import model_of_sae
from tqdm.auto import tqdm

from concepts.appearance import rule_of, words_to_seek
from concepts.coherence import MIXED, called
from concepts.dictionary import read_concepts
from concepts.directions import promoted_ids
from concepts.firings import read_latent_stats
from concepts.screening import screen
from concepts.steered_texts import Writing, measuring
from concepts.steering_report import meanings, strengths_table, telling_pairs, verdict
from concepts.strengths import find_strength
from concepts.top_texts import read_top_texts
from lib.environment import InputError, choose_device, run, say_next
from lib.files import write_json
from lib.ground_truth import tree_beside
from lib.origin import about_sae
from lib.sae import load_sae, sae_hash
from lib.saes import MODEL_FILE, find_sae
from lib.steering import Edit, left_out

FOLDER = find_sae(SAE)
MIN_EXAMPLES = 50  # firings that a name must rest on before the rule considers it


def named_latent(concepts, n_latents):
    """LATENT, or the concept that SEARCH means; None where the rule is to choose."""
    if LATENT is not None:
        if LATENT >= n_latents:
            raise InputError(f"LATENT={LATENT} must be at most {n_latents - 1}: the SAE has {n_latents} latents")
        return LATENT
    if SEARCH is None:
        return None
    latent = called(concepts, SEARCH)
    if latent is None:
        raise InputError(f"no concept has {SEARCH!r} in its name; look in {FOLDER / 'concepts.csv'}")
    return latent


def chosen_by_rule(concepts, measure, spare, **live):
    """The latent that the rule at the top chooses. live: model, tokenizer, point, sae and maxima, as screen() takes."""
    rules = {i: rule_of(entry) for i, entry in concepts.items()
             if (entry.get("f1") or 0) >= MIN_F1 and (entry.get("n_examples") or 0) >= MIN_EXAMPLES
             and entry.get("coherence", 1.0) >= MIXED}
    writing = Writing(PROMPTS, N_TOKENS, spare=spare, temperature=TEMPERATURE, seed=SEED)
    screened = screen(**live, rules=rules, writing=writing, limit=MAX_COST)[:FINALISTS]
    found = {}
    for each in tqdm(screened, desc="seeking strengths", unit="latent"):
        best, _ = find_strength(measure(each.latent, SEED), MODE, MAX_COST)
        if best is not None:
            found[each.latent] = best["concept_rise"]["low"] or 0.0
    if not found:
        raise InputError("no concept with a good name makes the model write it; choose one by LATENT or SEARCH")
    return max(found, key=lambda i: (found[i], -i))


def texts_of_step_4():
    """The texts in top_texts.json, each once, or none."""
    path = FOLDER / "top_texts.json"
    examples = read_top_texts(path)[1].values() if path.exists() else ()
    return sorted({example["text"] for found in examples for example in found})


def main():
    sae = load_sae(FOLDER / MODEL_FILE, choose_device(DEVICE))
    concepts = read_concepts(FOLDER / "concepts.json", sae_hash(sae))["concepts"]
    maxima = sae.maxima
    if maxima is None:  # in an older file
        maxima = read_latent_stats(FOLDER / "latent_stats.safetensors", sae.n_latents)["max"]
    latent = named_latent(concepts, sae.n_latents)
    model, tokenizer, point = model_of_sae(sae, sae.mean.device, TRUST_REMOTE_CODE)
    origin = about_sae(sae.config)
    spare = left_out(tokenizer, origin["settings"])

    n_samples = SAMPLES if TEMPERATURE else 1  # greedy ones are all the same

    def measure(latent, seed, words=None):
        writing = Writing([prompt for prompt in PROMPTS for _ in range(n_samples)], N_TOKENS, spare=spare,
                          favoured=promoted_ids(sae, model, [latent], FAVOURED)[0], words=words or {},
                          rule=rule_of(concepts[latent]) if latent in concepts else (), temperature=TEMPERATURE,
                          seed=seed)
        return measuring(model, tokenizer, point, sae, edits=[Edit(latent, MODE)], maxima=maxima, writing=writing)

    if latent is None:
        latent = chosen_by_rule(concepts, measure, spare, model=model, tokenizer=tokenizer, point=point, sae=sae,
                                maxima=maxima)
    entry = concepts.get(latent, {"name": "(no name)", "rule": []})
    truth, words = words_to_seek(rule_of(entry), tree_beside(origin.get("dataset")), texts_of_step_4())
    print(f"latent {latent}: {entry['name']}; {MODE}, {len(PROMPTS) * n_samples} continuations of {N_TOKENS} tokens at "
          f"{point.path}")
    if not STRENGTHS and not rule_of(entry):
        raise InputError(f"latent {latent} has no name whose words could be sought; set STRENGTHS")
    search = measure(latent, SEED, words)
    if STRENGTHS:
        best, table = None, [search(strength) for strength in (None, *STRENGTHS)]
    else:
        best, table = find_strength(search, MODE, MAX_COST)
    shown = strengths_table(table)
    print(shown.to_string(index=False), *meanings(list(shown), truth), sep="\n")
    about = {"schema_version": 2, "sae_hash": sae_hash(sae), "latent": latent, "name": entry["name"], "truth": truth,
             "constants": CONSTANTS, "sweep": table, "recommended": None}
    if best:
        again = measure(latent, SEED + 1, words)
        pair = {"unsteered": again(None), "steered": again(best["strength"])}
        about["recommended"] = pair
        print("", *verdict(**pair, max_cost=MAX_COST, greedy=not TEMPERATURE), sep="\n")
        for what, (unsteered, steered) in telling_pairs(**pair).items():
            print(f"\n  of the pairs, {what}\n  unsteered  {unsteered}\n  steered    {steered}")
    elif not STRENGTHS:
        print(f"no strength gives texts of at most {MAX_COST:g} times the unsteered ones' perplexity")
    write_json(FOLDER / "steering.json", about)
    say_next("07_test_causality.py", SAE=SAE or FOLDER.name)


if __name__ == "__main__":
    run(main)
