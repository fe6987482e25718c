"""Step 8: is another kind, or another setting of step 2, better than plain TopK? Arms at equal L0, paired by seed.

    python 08_compare_kinds.py                              # all arms of checks/arms.py, five seeds
    python 08_compare_kinds.py ARMS=batchtopk,jumprelu SEEDS=0,1,2

For each SAE: EV, loss recovered, known concepts (where the data set carries them; beside the baselines of notebook 03),
names' scores on held-out texts and their coherence, dead latents, and how alike the seeds' dictionaries are. Each arm
minus plain TopK, paired by seed, with 95 % t intervals and Holm's correction over all tests of the table. Where
thresholds decide, all are multiplied by one factor so that TOP_K codes fire on an average training row. All SAEs are
trained from one read of the run, as SAES of step 2. Rerun after an interruption, it keeps what is finished. The SAE of
step 2 stays as it is. What an arm with a random decoder wins (frozen_decoder) is no sign of a better dictionary.

Reads  store/verify_sae_training/run_id.txt, runs/<run_id>/, the language model
Writes store/verify_sae_training/kinds/<run_id>/<arm>_seed<seed>_<hash>/, kinds.json
"""
import math
from statistics import fmean
from typing import Annotated

import checkout  # noqa: F401  (first: finds lib)
from lib.constants import override
from lib.ranges import Count, Device, FileName, Name, NotNegative, Seed, Size, like

RUN_ID: FileName | None = None            # None: the run that 01_save_activations.py finished last
LAYER: Name | None = None                 # which of the run's hook points, by its folder's name; None: the first
ARMS: tuple[Annotated[str, like("[a-z0-9_]+", "an arm's name")], ...] | None = None  # in checks/arms.py; None: all
SEEDS: tuple[Seed, ...] = (0, 1, 2, 3, 4)  # starts and orders of the tokens; every arm has each
N_LATENTS_MULTIPLIER: Size = 8            # latents per activation dimension, as in step 2
TOP_K: Size = 4                           # latents that fire on one token; on average, where thresholds decide
EPOCHS: Size = 4                          # passes over the training tokens; step 2 makes more
BATCH_SIZE_TRAIN: Size = 1024             # tokens per step
LOSS_TEXTS: NotNegative = 100             # held-out texts for the language-model loss; 0: don't measure it
RECOVERY_TOKENS: Count = 60_000           # tokens to search for ground-truth concepts
N_NAMES: NotNegative = 200                # living latents of each SAE to name and score; 0: none
TRUST_REMOTE_CODE = False                 # run code that comes with a hub model; only for authors you trust
DEVICE: Device = "auto"                   # auto, cpu, cuda, mps
CONSTANTS = override(globals())

import pandas
from saved_model import model_of_run

from checks.arm_scores import MEASURES, Judge, baselines, compare, stabilities
from checks.arms import ARMS as ALL_ARMS
from checks.arms import REFERENCE, arm_place, arm_sae, arm_settings, train_arms
from checks.controls import control_saes
from checks.evaluation import held_out_tokens, loss_recovered
from checks.recovery import KINDS, searched_parts
from concepts.codes import Codes
from concepts.names import patterns_of
from lib.batches import rows_of_run
from lib.environment import choose_device, log, log_to, run
from lib.files import fingerprint, read_json, write_json
from lib.ground_truth import ground_truth
from lib.sae import sae_hash
from lib.schemas import SHORT_HASH, Number, Schema, Text
from lib.store import experiment_dir, open_run
from lib.training.loop import TrainSettings

FOLDER = experiment_dir("verify_sae_training")
SHARE = Number(float, 0, 1)
BASELINES = Schema({"key": SHORT_HASH, "context": [str],
                    "f1": {Text("[a-z_]+"): {"all": (SHARE, None), "context": (SHARE, None)}}})
SCORES = Schema({"key": SHORT_HASH, "scores": {Text("[a-z0-9_]+"): float}})


def kept(path, schema, key, make):
    """What `path` holds if it was made with this key, or else what make() returns, which is written there."""
    if path.exists() and (found := read_json(path, schema))["key"] == key:
        return found
    made = {"key": key, **make()}
    write_json(path, made)
    return made


def baselines_of(saved, hook, settings, place):
    """checks.arm_scores.baselines beside plain TopK's first seed, kept beside its folder `place`; none without truth.
    """
    if not (truth := ground_truth(saved)):
        return {"f1": {}, "context": []}

    def make():
        with arm_sae(place) as sae:
            controls = control_saes(saved, hook, settings, place.parent / "controls")
            return baselines({"latent": sae, **controls}, saved, hook, truth, n_rows=RECOVERY_TOKENS)

    key = fingerprint([place.name, RECOVERY_TOKENS])
    return kept(place.parent / f"baselines_{place.name}.json", BASELINES, key, make)


def recovered_by(saved, hook, device):
    """A function from an SAE to the share of the language-model loss that it recovers; None where there is none."""
    name = saved.meta["model"]["class"]
    if not LOSS_TEXTS or not ("CausalLM" in name or "LMHead" in name):
        return None
    model, tokenizer, point = model_of_run(saved, hook, device, TRUST_REMOTE_CODE)
    tokens, mean = held_out_tokens(saved, tokenizer, LOSS_TEXTS), rows_of_run(saved, hook).mean
    return lambda sae: loss_recovered(model, tokenizer, point, sae, tokens=tokens, mean=mean)["loss_recovered"]


def print_table(rows):
    """Each arm's mean and its difference to plain TopK, measure by measure; * marks p below .05 after Holm."""
    for measure, title in MEASURES.items():
        lines = []
        for row in (row for row in rows if row["measure"] == measure):
            minus = row.get("minus_topk", dict.fromkeys(("mean", "low", "high", "p_holm"), math.nan))
            lines.append({title: row["arm"], "mean": row["mean"], "±": row["high"] - row["mean"],
                          "minus topk": minus["mean"], "from": minus["low"], "to": minus["high"],
                          "p, Holm": minus["p_holm"], "": "*" if minus["p_holm"] < 0.05 else ""})
        if lines:
            print("\n" + pandas.DataFrame(lines).to_string(index=False, float_format="{:.4f}".format, na_rep="-"))


def judge_of(saved, hook, context, device):
    """What scores each SAE; context: the concepts that the token table does not find."""
    truth, texts = ground_truth(saved), [text["text"] for text in saved.texts]
    patterns = patterns_of(Codes(texts, saved.rows, 0, lambda: iter(()))) if N_NAMES else None
    parts = list(searched_parts(saved, hook, truth, RECOVERY_TOKENS)) if truth else []
    return Judge(saved, hook, recovered_by(saved, hook, device), parts=parts, context=set(context), patterns=patterns,
                 n_names=N_NAMES)


def results_of(saved, hook, planned, found, device):
    """The scores of every planned SAE. found: of baselines_of."""
    judge = judge_of(saved, hook, found["context"], device)
    results = []
    saes: dict[str, list] = {arm: [] for arm, *_ in planned}
    for arm, settings, place in planned:
        log.info("%s, seed %s: %s", arm, settings.seed, place.name)
        with arm_sae(place, device) as sae:
            key = fingerprint([sae_hash(sae), LOSS_TEXTS, RECOVERY_TOKENS, N_NAMES, list(MEASURES)])
            scores = kept(place / "scores.json", SCORES, key, lambda: {"scores": judge.scores(sae)})["scores"]
        results.append({"arm": arm, "seed": settings.seed, **scores})
        saes[arm].append(sae)
    for arm, of_arm in saes.items():
        mine = [result for result in results if result["arm"] == arm]
        for result, stability in zip(mine, stabilities(of_arm)):
            result["stability"] = stability
    return results


def without_nan(value):
    """The value with None for nan, which JSON lacks."""
    if isinstance(value, dict):
        return {name: without_nan(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def main():
    log_to(FOLDER / "08_compare_kinds.log")
    saved, device = open_run("verify_sae_training", RUN_ID), choose_device(DEVICE)
    hook, folder = saved.hook(LAYER), FOLDER / "kinds" / saved.run_id
    base = TrainSettings(N_LATENTS_MULTIPLIER * len(rows_of_run(saved, hook).mean), TOP_K, epochs=EPOCHS,
                         batch_size=BATCH_SIZE_TRAIN)
    arms = dict.fromkeys((REFERENCE, *(ALL_ARMS if ARMS is None else ARMS)))
    planned = [(arm, settings, arm_place(saved, hook, settings, folder=folder, arm=arm))
               for seed in dict.fromkeys(SEEDS) for arm in arms if (settings := arm_settings(arm, base, seed))]
    train_arms(saved, hook, {place: settings for _, settings, place in planned}, device)
    found = baselines_of(saved, hook, *planned[0][1:])
    results = results_of(saved, hook, planned, found=found, device=device)
    table = compare(results)
    write_json(FOLDER / "kinds.json", without_nan({
        "constants": CONSTANTS, "run_id": saved.run_id, "hook": hook, "baselines": found["f1"], "results": results,
        "table": table}))
    print_table(table)
    print("\nL0 on held-out tokens, mean over seeds: " + ", ".join(
        f"{arm} {fmean(result['l0'] for result in results if result['arm'] == arm):.3f}" for arm in arms))
    if found["f1"]:
        print("\nmean F1 over the concepts, plain TopK's first seed: " + ", ".join(
            f"{KINDS[kind]} {value['all']:.3f}" for kind, value in found["f1"].items()))


if __name__ == "__main__":
    run(main)
