"""Step 7: do the concepts that the SAE found matter to the model?

    python 07_test_causality.py                  # needs the concept recovery of notebook 03, so the embedded stories
    python 07_test_causality.py MIN_F1=0.9 SAMPLES=100

For each ground-truth concept that one latent finds with an F1 over MIN_F1: on held-out tokens where the latent fires, its code is set
to 0 in the running model. Beside it, at the same tokens, a vector of the same length along the row of a latent drawn at random
is taken away instead. The KL divergence of the next-token distribution from the untouched one is compared, concept by concept.

Reads  store/verify_sae_training/: the run, the SAE, verification.json of notebook 03
Writes store/verify_sae_training/causality.json
"""
from lib.constants import override
from lib.ranges import Device, Part, Seed, Size

MIN_F1: Part = 0.8                        # of the best latent on held-out tokens, over its best threshold
SAMPLES: Size = 40                        # held-out tokens for each concept
TRUST_REMOTE_CODE = False                 # run code that comes with a hub model; only for authors you trust
DEVICE: Device = "auto"
SEED: Seed = 0                            # draws the tokens and the random latents
CONSTANTS = override(globals())

import torch
from scipy.stats import wilcoxon

from lib import schemas
from lib.concepts import encode_run
from lib.effects import contexts, divergence, draw_firings, next_logits
from lib.environment import InputError, choose_device, run
from lib.files import read_json, write_json
from lib.models import model_of_run
from lib.sae import load_sae, require_trained_on, sae_hash
from lib.store import experiment_dir, open_run

FOLDER = experiment_dir("verify_sae_training")


def found_concepts(run_id, sae):
    """Latent -> the ground-truth concept that it finds best."""
    verification = read_json(FOLDER / "verification.json", schemas.VERIFICATION)
    ours = (verification["run_id"], verification["sae_hash"]) == (run_id, sae_hash(sae))
    rows = [row for row in verification["concept_recovery"] if ours and row["latent"]["f1"] > MIN_F1]
    if not rows:
        raise InputError(f"verification.json holds no concept of this SAE with an F1 over {MIN_F1}; run notebook 03 on the embedded stories, or lower MIN_F1")
    best = sorted(rows, key=lambda row: row["latent"]["f1"])
    return {row["latent"]["unit"]: row["concept"] for row in best}  # a latent that finds several stands for the best


def measure(model, tokenizer, point, sae, saved, firings):
    """KL in nats of ablating the latent and of the random control, float64 [M] each."""
    generator = torch.Generator().manual_seed(SEED)
    others = torch.randint(sae.n_latents - 1, (len(firings.latent),), generator=generator)
    others += others >= firings.latent  # any latent but the concept's own
    texts = contexts(saved, tokenizer, firings.row)
    size = sae.scale * firings.code[:, None].to(sae.mean.device)
    deltas = [None, *(-size * sae.W_dec[which.to(sae.mean.device)] for which in (firings.latent, others))]
    kl = torch.zeros(2, len(texts), dtype=torch.double)
    for lines, (clean, *edited) in next_logits(model, point, texts, deltas):
        kl[:, lines] = torch.stack([divergence(clean, logits).cpu() for logits in edited])
    return kl


def main():
    sae = load_sae(FOLDER / "sae_model" / "topk_sae.pt", choose_device(DEVICE))
    saved, hook = open_run("verify_sae_training", sae.config["run_id"]), sae.config["hook"]
    require_trained_on(sae, saved, hook)
    concepts = found_concepts(saved.run_id, sae)
    model, tokenizer, point = model_of_run(saved, hook, sae.mean.device, TRUST_REMOTE_CODE)
    firings = draw_firings(encode_run(saved, hook, sae), concepts, SAMPLES, saved.is_val, SEED)
    own, other = measure(model, tokenizer, point, sae, saved, firings)
    table = [
        {"latent": i, "concept": name, "n_tokens": int(here.sum()), "kl_ablated": float(own[here].mean()), "kl_random": float(other[here].mean())}
        for i, name in sorted(concepts.items(), key=lambda item: item[1]) if (here := firings.latent == i).any()
    ]  # fmt: skip
    print(f"{'concept':<40} {'latent':>6} {'tokens':>6} {'ablated':>9} {'random':>9}   KL of the next token, nats")
    for row in table:
        print(f"{row['concept']:<40} {row['latent']:>6} {row['n_tokens']:>6} {row['kl_ablated']:>9.4f} {row['kl_random']:>9.4f}")
    ablated, random = ([row[key] for row in table] for key in ("kl_ablated", "kl_random"))
    more = sum(a > b for a, b in zip(ablated, random))
    p = float(wilcoxon(ablated, random, alternative="greater").pvalue)
    print(f"mean KL {sum(ablated) / len(table):.4f} ablated, {sum(random) / len(table):.4f} random; larger for {more} of {len(table)} concepts")
    print(f"Wilcoxon signed-rank test over the concepts, one-sided: p = {p:.2g}")
    write_json(FOLDER / "causality.json", {"schema_version": 1, "sae_hash": sae_hash(sae), "constants": CONSTANTS, "p_value": p, "concepts": table})


if __name__ == "__main__":
    run(main)
