"""Which TOP_K? Two short trainings for each of a few values, from one read of the run that step 1 saved.

    python choose_k.py
    python choose_k.py KS=4,8,16,32 N_LATENTS_MULTIPLIER=4

A larger k always rebuilds more, so the question is whether the directions come from the data: it recommends the k for
which two seeds find the same ones. Two seeds and few epochs make this a hint, not a result.

Reads  store/verify_sae_training/run_id.txt, runs/<run_id>/, the language model
Writes store/verify_sae_training/choose_k.json
"""
import checkout  # noqa: F401  (first: finds lib)
from lib.constants import override
from lib.ranges import Device, FileName, Name, NotNegative, Seed, Size

RUN_ID: FileName | None = None            # None: the run that 01_save_activations.py finished last
LAYER: Name | None = None                 # which of the run's hook points, by its folder's name; None: the first
KS: tuple[Size, ...] = (2, 4, 8, 16)      # values of TOP_K to try
N_LATENTS_MULTIPLIER: Size = 8            # latents per activation dimension, as in step 2
EPOCHS: Size = 3                          # passes over the training tokens in each training; step 2 makes more
BATCH_SIZE_TRAIN: Size = 1024             # tokens per step
N_TEXTS: NotNegative = 200                # held-out texts for the language-model loss; 0: don't measure it
TRUST_REMOTE_CODE = False                 # run code that comes with a hub model; only for authors you trust
DEVICE: Device = "auto"                   # auto, cpu, cuda, mps
SEED: Seed = 0                            # of the first training; the second takes the next number
CONSTANTS = override(globals())

import pandas
from next_step import kept_for
from saved_model import model_of_run

from checks.evaluation import held_out_tokens, loss_recovered
from checks.sparsity import recommend_k, sweep_k
from lib.batches import rows_of_run
from lib.environment import InputError, choose_device, run, say_next
from lib.files import write_json
from lib.store import experiment_dir, open_run
from lib.training.loop import TrainSettings

SAME_NEXT = ("RUN_ID", "LAYER", "BATCH_SIZE_TRAIN", "DEVICE", "SEED")  # mean the same in step 2; EPOCHS is larger there


def recovered_by(saved, hook, mean, device):
    """A function from an SAE to the share of the language-model loss that it recovers; None with N_TEXTS=0."""
    if not N_TEXTS:
        return None
    model, tokenizer, point = model_of_run(saved, hook, device, TRUST_REMOTE_CODE)
    tokens = held_out_tokens(saved, tokenizer, N_TEXTS)
    return lambda sae: loss_recovered(model, tokenizer, point, sae, tokens=tokens, mean=mean)["loss_recovered"]


def main():
    folder, device = experiment_dir("verify_sae_training"), choose_device(DEVICE)
    saved = open_run("verify_sae_training", RUN_ID)
    hook = saved.hook(LAYER)
    rows = rows_of_run(saved, hook)
    n_latents = N_LATENTS_MULTIPLIER * len(rows.mean)
    if max(KS) > n_latents:
        raise InputError(f"KS={KS} must be at most the number of latents, {n_latents}")
    settings = TrainSettings(n_latents, KS[0], epochs=EPOCHS, batch_size=BATCH_SIZE_TRAIN, seed=SEED)
    table = sweep_k(rows, settings, KS, recovered_by(saved, hook, rows.mean, device), device=device)
    k, reason = recommend_k(table)
    print(pandas.DataFrame(table).to_string(index=False, float_format="{:.4f}".format))
    print(f"recommended: TOP_K={k}\n  {reason}")
    write_json(folder / "choose_k.json", {"constants": CONSTANTS, "run_id": saved.run_id, "hook": hook, "ks": table,
                                          "recommended": k, "reason": reason})
    say_next("02_train_sae.py", TOP_K=k, N_LATENTS_MULTIPLIER=N_LATENTS_MULTIPLIER,
             **kept_for("02_train_sae.py", CONSTANTS, SAME_NEXT))


if __name__ == "__main__":
    run(main)
