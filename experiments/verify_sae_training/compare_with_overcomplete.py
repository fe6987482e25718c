"""Train overcomplete's TopKSAE with its own loop and defaults on the tokens of step 2, and print both results.

    python compare_with_overcomplete.py          # after 02_train_sae.py, whose sizes, epochs and batches it takes

Raw activations, overcomplete's default encoder, its train_sae with plain MSE and Adam: nothing is centred, tied or
revived. So that both learn from the same, the SAE must be of KIND=topk and trained on the activations of its run from
the start: without LIVE and START_FROM.

Reads  store/verify_sae_training/runs/<run_id>/, saes/<name>/
"""
import time

import checkout  # noqa: F401  (first: finds lib)
from lib.constants import override
from lib.ranges import Location, Rate, Seed, Size

SAE: Location | None = None               # name or folder of an SAE; None: the one trained or imported last
LR: Rate = 1e-3                           # of the reference experiment
EPOCHS: Size | None = None                # None: as many as in step 2
SEED: Seed = 0                            # start of the weights and order of the tokens
CONSTANTS = override(globals())

import torch
from corpora import corpus_of
from overcomplete.sae import TopKSAE, train_sae
from torch.utils.data import DataLoader, TensorDataset

from lib.batches import read_rows, rows_of_run, sample_rows
from lib.environment import InputError, run
from lib.files import read_json
from lib.metrics.reconstruction import Reconstruction
from lib.sae import load_sae
from lib.saes import HISTORY_FILE, MODEL_FILE, find_sae
from lib.training.checkpoints import HISTORY
from lib.training.loop import score

FOLDER = find_sae(SAE)


def require_comparable(sae):
    """Raise InputError for an SAE that had other tokens, another start or another rule than theirs would have."""
    made = sae.config.get("constants", {})
    odd = {name: made[name] for name in ("LIVE", "START_FROM") if made.get(name)}
    if made.get("KIND", "topk") != "topk":
        odd["KIND"] = made["KIND"]
    if odd or "imported" in sae.config:
        how = "with " + " and ".join(f"{name}={value}" for name, value in odd.items()) if odd else "elsewhere"
        raise InputError(f"{FOLDER.name} was trained {how}, and overcomplete's loop can't be: set SAE to one that "
                         "02_train_sae.py trained with KIND=topk, without LIVE and START_FROM")


def train_theirs(x, settings):
    """overcomplete's model after its own training loop on rows x [N, D]."""
    torch.manual_seed(SEED)  # overcomplete draws from the global stream
    model = TopKSAE(x.shape[1], nb_concepts=settings["n_latents"], top_k=settings["top_k"])
    loader = DataLoader(TensorDataset(x), batch_size=settings["batch_size"], shuffle=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    train_sae(model, loader, lambda x, xhat, *_: (x - xhat).square().mean(), optimizer,
              nb_epochs=EPOCHS or settings["epochs"])
    return model.eval()


def score_theirs(model, x, k):
    """The same numbers as for ours, by the same code."""
    sums = Reconstruction(model.nb_concepts)
    with torch.no_grad():
        for rows in x.split(4096):
            _, codes, xhat = model(rows)
            values, indices = codes.topk(k, dim=1)
            sums.add(rows, xhat, values, indices)
    return sums.result()


def main():
    sae = load_sae(FOLDER / MODEL_FILE)
    require_comparable(sae)
    history = read_json(FOLDER / HISTORY_FILE, HISTORY)
    saved, hook, _ = corpus_of(sae, FOLDER)
    rows, settings = rows_of_run(saved, hook), history["settings"]
    train, val = (read_rows(rows.shards, wanted) for wanted in (~rows.is_val, rows.is_val))
    start = time.perf_counter()
    theirs = train_theirs(train, settings)
    print(f"overcomplete's loop took {time.perf_counter() - start:.0f} s")
    table = {"this project": score(sae, sample_rows(rows, validation=True, limit=None)),
             "overcomplete": score_theirs(theirs, val, sae.top_k)}
    print(f"{saved.meta['model']['name']}, {hook}: {sae.n_latents} latents, "
          f"k={sae.top_k}, {len(train):,} tokens x {EPOCHS or settings['epochs']}")
    for name, result in table.items():
        print(f"{name:<14} EV {result['ev']:.4f}  dead {result['dead_pct']:5.1f} %  L0 {result['l0_mean']:.2f}  on "
              f"{result['n_rows']:,} held-out tokens")


if __name__ == "__main__":
    run(main)
