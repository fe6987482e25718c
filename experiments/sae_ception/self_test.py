"""A self-test: every kind of metric on examples whose value is known in closed form, with PASS or FAIL. Seconds.

    python self_test.py

tests/test_metrics_*.py hold many more; METRICS_REFERENCE.md defines the metrics.
"""
import sys
from math import exp, log

import checkout  # noqa: F401  (first: finds lib)
from lib.environment import guard_imports, run

if __name__ == "__main__":
    guard_imports()

import torch
from torch import Tensor

from lib.metrics.clustering import clustering
from lib.metrics.interpretability import csi, uncertainty, uncertainty_given
from lib.metrics.performance import (
    classification,
    k_sparse_probe,
    logistic_probe,
    next_token_loss,
    perplexity,
    worst_group,
)
from lib.metrics.reconstruction import Reconstruction, explained_variance
from lib.metrics.robustness import active_jaccard, fgsm
from lib.metrics.units import best_latents

TOLERANCE = 1e-6
Row = tuple[str, float, float]


def selectivity() -> list[Row]:
    """U and CSI of units on two balanced classes."""
    y = torch.tensor([0, 0, 1, 1])
    fired = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 1, 0]]).T.bool()
    u = uncertainty(fired, y, 2)["u"]
    information = 0.5 * log(0.5 / (0.75 * 0.5)) + 0.25 * log(0.25 / (0.75 * 0.5)) + 0.25 * log(0.25 / (0.25 * 0.5))
    entropy = -0.75 * log(0.75) - 0.25 * log(0.25)
    values = torch.tensor([[3.0, 3.0, 1.0, 1.0]]).T
    digit, parity = torch.tensor([0, 1, 2, 3] * 2), torch.tensor([0, 1, 0, 1] * 2)
    beyond = uncertainty_given((digit == 0)[:, None], digit, 4, y=parity, n_classes=2)
    given = 0.5 * log(2) / (-0.25 * log(0.25) - 0.75 * log(0.75))
    return [("U of a unit that is the class", float(u[0]), 1.0), ("U of an independent unit", float(u[1]), 0.0),
            ("U of a unit that fires on 3 of 4", float(u[2]), information / entropy),
            ("U(digit given parity) of a unit for one digit", float(beyond["u"]), given),
            ("CSI of class means 3 and 1", float(csi(values, y, 2)), 0.5)]


def performance() -> list[Row]:
    """Accuracy, loss, probes and perplexity."""
    y = torch.tensor([0, 1] * 20)
    wrong = torch.nn.functional.one_hot(torch.tensor([0, 0] * 20), 2).float()
    told = classification(torch.zeros(40, 4), y)
    codes = torch.nn.functional.one_hot(y, 2).float()
    logits, ids = torch.zeros(1, 5, 8), torch.arange(5)[None]
    guess = perplexity([next_token_loss(logits, ids, torch.ones(1, 5))])
    return [("accuracy of always guessing one of two classes", classification(wrong, y)["accuracy"], 0.5),
            ("its macro F1, (2/3 + 0)/2", classification(wrong, y)["f1_macro"], 1 / 3),
            ("loss of equal logits for 4 classes, ln 4", told["loss"], log(4)),
            ("worst group of that guess", worst_group(wrong, y, torch.zeros(40, dtype=torch.long)), 0.0),
            ("linear probe where codes are the class", logistic_probe(codes, y, codes, y)["test_accuracy"], 1.0),
            ("probe on one latent", k_sparse_probe(codes, y, codes, y)[1], 1.0),
            ("perplexity of equal logits for 8 tokens, exp(ln 8)", guess, exp(log(8)))]


def reconstruction() -> list[Row]:
    """Explained variance, L0, dead latents, entropy of usage."""
    x = torch.tensor([[1.0, 2.0], [-1.0, 0.0], [1.0, -2.0], [-1.0, 0.0]])
    sums = Reconstruction(4)
    sums.add(x, x / 2, torch.tensor([[1.0, 2.0], [3.0, 0.0]]).repeat(2, 1),
             torch.tensor([[0, 1], [1, 3]]).repeat(2, 1))
    r = sums.result()
    return [("EV of an exact reconstruction", explained_variance(x, x), 1.0),
            ("EV of the mean", explained_variance(x, x.mean(0).expand(4, 2)), 0.0),
            ("EV of half of centred activations, 1 - 1/4", r["ev"], 0.75),
            ("L0 of rows with 2 and 1 codes", r["l0_mean"], 1.5), ("dead latents, 2 of 4, in %", r["dead_pct"], 50.0),
            ("entropy of usage 1/3 and 2/3, nats", r["usage_entropy"], log(3) - 2 / 3 * log(2))]


def clusters() -> list[Row]:
    """Two points, ten times each."""
    x, y = torch.tensor([[0.0, 0.0], [3.0, 4.0]]).repeat(10, 1), torch.tensor([0, 1] * 10)
    found = clustering(x, y, 2)
    return [("ARI of classes that are clusters", found["ari"], 1.0),
            ("their silhouette", found["silhouette_supervised"], 1.0),
            ("their Davies-Bouldin index", found["davies_bouldin"], 0.0)]


def robustness() -> list[Row]:
    """Overlap of active latents, and a step of FGSM on a linear classifier."""
    a, b = torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([[0.0, 1.0, 1.0]])
    weights = torch.tensor([[1.0, -2.0], [-1.0, 2.0]])

    def logits(x: Tensor) -> Tensor:
        return x @ weights.T

    moved = fgsm(logits, torch.zeros(1, 2), torch.tensor([0]), 0.1)
    return [("overlap of latents {0, 1} and {1, 2}", float(active_jaccard(a, b)), 1 / 3),
            ("margin that FGSM takes, eps times the L1 norm", float(logits(moved)[0].diff()), 0.1 * 6)]


def units() -> list[Row]:
    """A latent that fires on every token, and twice as strongly on the concept's quarter of them."""
    concept = (torch.arange(40) % 4 == 0)[:, None]
    codes, held_out = (1.0 + concept, torch.zeros(40, 1, dtype=torch.long)), torch.arange(40) >= 20
    strong, any_firing = (best_latents(codes, 1, concept, held_out, shares=shares)[0]["f1"]
                          for shares in ((0.0, 0.6), (0.0,)))
    return [("F1 of a latent above the best share of its largest code", strong, 1.0),
            ("its F1 by firing at all, 2 * 5 / (20 + 5)", any_firing, 0.4)]


def main() -> None:
    rows = [row for part in (selectivity, performance, reconstruction, clusters, robustness, units) for row in part()]
    failed = 0
    for name, value, expected in rows:
        right = abs(value - expected) <= TOLERANCE
        failed += not right
        print(f"{'PASS' if right else 'FAIL'}  {name:<52} {value:.6f}  (expected {expected:.6f})")
    print(f"{len(rows) - failed} of {len(rows)} PASS")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    run(main)
