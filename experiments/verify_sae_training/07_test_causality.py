"""Step 7: do the concepts that the SAE found matter to the model?

    python 07_test_causality.py                  # needs the concept recovery of notebook 03, so the embedded stories
    python 07_test_causality.py MIN_F1=0.9 SAMPLES=100

Takes each ground-truth concept that one latent finds with an F1 over MIN_F1, and held-out tokens that carry it. In the
running model the latent's code is set to 0. For comparison, on the same tokens, a vector of the same length is taken
away along the row of a random latent, and the latents that notebook 03's controls (untrained, decoder or encoder frozen
at random) have for the concept are ablated, with their own codes and at the length of the SAE's. What is compared,
concept by concept, is the KL divergence of the next-token distribution from the unedited one. The concepts are those
that the SAE finds, which favours it.

Reads  store/verify_sae_training/: the run; saes/<name>/: the SAE, verification.json and the controls of notebook 03
Writes store/verify_sae_training/saes/<name>/causality.json
"""
import checkout  # noqa: F401  (first: finds lib)
from lib.constants import override
from lib.ranges import Device, Location, Part, Seed, Size

SAE: Location | None = None               # name or folder of an SAE; None: the one trained or imported last
MIN_F1: Part = 0.8                        # of the best latent on held-out tokens, over its best threshold
SAMPLES: Size = 40                        # held-out tokens for each concept
TRUST_REMOTE_CODE = False                 # run code that comes with a hub model; only for authors you trust
DEVICE: Device = "auto"
SEED: Seed = 0                            # draws the tokens and the random latents
CONSTANTS = override(globals())

import pandas
import torch
from corpora import corpus_of
from saved_model import model_of_sae
from scipy.stats import wilcoxon

from checks.controls import control_saes
from checks.verification import VERIFICATION
from concepts.effects import ablation, divergence, next_logits, of_length, prefixes
from lib.batches import read_rows
from lib.environment import InputError, choose_device, run, say_next
from lib.files import read_json, write_json
from lib.ground_truth import ground_truth
from lib.sae import load_sae, sae_hash
from lib.saes import HISTORY_FILE, MODEL_FILE, find_sae
from lib.training.checkpoints import HISTORY
from lib.training.loop import TrainSettings

FOLDER = find_sae(SAE)


def found_concepts(run_id, sae):
    """The rows of notebook 03's concept recovery in which the SAE's latent is good enough."""
    verification = read_json(FOLDER / "verification.json", VERIFICATION)
    ours = (verification["run_id"], verification["sae_hash"]) == (run_id, sae_hash(sae))
    rows = [row for row in verification["concept_recovery"] if ours and row["latent"]["f1"] > MIN_F1]
    if not rows:
        raise InputError(f"verification.json holds no concept of this SAE with an F1 over {MIN_F1}; run notebook 03 on "
                         "the embedded stories, or lower MIN_F1")
    return rows


def draw_tokens(saved, rows):
    """(row of the run, number of the concept) of up to SAMPLES held-out tokens of each concept, int64 [M] each."""
    truth, generator = ground_truth(saved), torch.Generator().manual_seed(SEED)
    if truth is None:
        raise InputError(f"run {saved.run_id} has lost its ground truth: concepts.json beside its data set is missing")
    column = {concept.name: i for i, concept in enumerate(truth.concepts)}
    if foreign := [row["concept"] for row in rows if row["concept"] not in column]:
        raise InputError(f"verification.json has a concept, {foreign[0]!r}, that the stories lack; rerun notebook 03")
    tokens = [(truth.labels[:, column[row["concept"]]] & saved.is_val).nonzero()[:, 0] for row in rows]
    drawn = [found[torch.randperm(len(found), generator=generator)[:SAMPLES]].sort().values for found in tokens]
    counts = torch.tensor([len(found) for found in drawn])
    return torch.cat(drawn), torch.repeat_interleave(torch.arange(len(rows)), counts)


def edits(saes, rows, x, concept):
    """What each arm adds to the activations x [M, D], by the arm's name."""
    units = {kind: torch.tensor([row[kind]["unit"] for row in rows])[concept] for kind in saes}
    if any(int(units[kind].max()) >= sae.n_latents for kind, sae in saes.items()):
        raise InputError("verification.json names a latent that its SAE doesn't have; rerun notebook 03")
    arms = {kind: ablation(sae, x, units[kind]) for kind, sae in saes.items()}
    length = arms["latent"].norm(dim=1)
    others = torch.randint(saes["latent"].n_latents - 1, concept.shape, generator=torch.Generator().manual_seed(SEED))
    others += others >= units["latent"]  # any latent but the concept's own
    arms["random"] = of_length(-saes["latent"].W_dec[others.to(x.device)], length)
    for kind in saes.keys() - {"latent"}:
        arms[f"{kind}, same length"] = of_length(-saes[kind].W_dec[units[kind].to(x.device)], length)
    return dict(sorted(arms.items(), key=lambda arm: (arm[0] != "latent", arm[0])))


def main():
    device = choose_device(DEVICE)
    sae = load_sae(FOLDER / MODEL_FILE, device)
    saved, hook, _ = corpus_of(sae, FOLDER)
    rows = found_concepts(saved.run_id, sae)
    saes = {"latent": sae}
    if "frozen_decoder" in rows[0]:
        history = read_json(FOLDER / HISTORY_FILE, HISTORY)
        saes |= control_saes(saved, hook, TrainSettings(**history["settings"]), FOLDER / "controls",
                             n_steps=history["n_steps"], device=device)
    tokens, concept = draw_tokens(saved, rows)
    model, tokenizer, point = model_of_sae(sae, device, TRUST_REMOTE_CODE)
    wanted = torch.zeros(saved.n_rows, dtype=torch.bool)
    wanted[tokens] = True
    place = wanted.nonzero()[:, 0]
    x = read_rows(saved.shards(hook), wanted)[torch.searchsorted(place, tokens)].to(device)
    arms = edits(saes, rows, x, concept)
    kl = torch.zeros(len(arms), len(tokens), dtype=torch.double)
    texts = prefixes(saved, tokenizer, tokens)
    for lines, (clean, *edited) in next_logits(model, point, texts, [None, *arms.values()]):
        kl[:, lines] = torch.stack([divergence(clean, logits).cpu() for logits in edited])
    count = torch.bincount(concept, minlength=len(rows))
    means = torch.zeros(len(rows), len(arms), dtype=torch.double).index_add_(0, concept, kl.T) / count[:, None]
    table = [
        {"concept": row["concept"], "part": row["part"], "latent": row["latent"]["unit"], "n_tokens": int(n),
         "kl": dict(zip(arms, line.tolist()))}
        for row, n, line in zip(rows, count, means)
    ]
    summary = report(table, means, {name: float(delta.norm(dim=1).mean()) for name, delta in arms.items()})
    about = {"schema_version": 2, "sae_hash": sae_hash(sae), "constants": CONSTANTS}
    write_json(FOLDER / "causality.json", about | {"arms": summary, "concepts": table})
    say_next("10_explore.py", SAE=SAE or FOLDER.name)


def report(table, means, lengths):
    """Print the SAE's own edits concept by concept, then all arms over the concepts; returns the latter.

    means: KL [concepts, arms]. lengths: mean length of each arm's edits.
    """
    print("KL of the next token in nats: the concept's latent ablated, and as much taken along a random latent's row")
    shown = pandas.DataFrame({"concept": row["concept"], "latent": row["latent"], "tokens": row["n_tokens"],
                              "ablated": row["kl"]["latent"], "random": row["kl"]["random"]} for row in table)
    print(shown.sort_values("concept").to_string(index=False, float_format="{:.4f}".format))
    summary = {}
    for i, name in enumerate(lengths):
        p = float(wilcoxon(means[:, 0], means[:, i], alternative="greater").pvalue) if i else None
        summary[name] = {"mean_kl": float(means[:, i].mean()), "mean_length": lengths[name],
                         "latent_larger": int((means[:, 0] > means[:, i]).sum()), "p_value": p}
    print(f"over {len(table)} concepts; latent_larger: concepts in which the latent moves more")
    print(pandas.DataFrame(summary).T.to_string(na_rep="", formatters={
        "mean_kl": "{:.4f}".format, "mean_length": "{:.3f}".format, "latent_larger": "{:.0f}".format,
        "p_value": "{:.2g}".format}))
    print("p: Wilcoxon signed-rank test over the concepts, one-sided, uncorrected")
    return summary


if __name__ == "__main__":
    run(main)
