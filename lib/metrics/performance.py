"""What a model, or its codes, can do: accuracy and F1, linear and k-sparse probes, perplexity."""
import math
import warnings

import numpy as np
import torch
from scipy.sparse import csr_matrix
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, f1_score
from torch import Tensor
from torch.nn.functional import cross_entropy

K_SPARSE = (1, 2, 5, 10, 25, 50)  # sizes of the k-sparse probe; those above the number of latents are skipped


def classification(logits: Tensor, y: Tensor) -> dict[str, float]:
    """accuracy, loss (mean cross-entropy in nats), f1_macro and f1_weighted of logits [N, C] for y [N].

    Range: 0 to 1; loss from 0, ln C for a guess. Source: textbook.
    """
    guess = logits.argmax(1)
    return {
        "accuracy": float((guess == y).double().mean()),
        "loss": float(cross_entropy(logits.double(), y)),
    } | _f1(y.numpy(), guess.numpy())


def _f1(y: np.ndarray, guess: np.ndarray) -> dict[str, float]:
    return {f"f1_{kind}": float(f1_score(y, guess, average=kind, zero_division=0)) for kind in ("macro", "weighted")}


def _logistic(x, y: np.ndarray, balanced: bool = False) -> LogisticRegression:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # max_iter is part of the definition
        return LogisticRegression(C=1.0, max_iter=1000, class_weight="balanced" if balanced else None).fit(x, y)


def _scaled(train: Tensor, test: Tensor):
    """Both divided by each column's largest absolute value in training, as sparse matrices where that pays."""
    top = train.abs().max(0).values.clamp(min=1e-12)
    pair = (train / top).numpy(), (test / top).numpy()
    return tuple(csr_matrix(part) for part in pair) if np.mean(pair[0] != 0) < 0.1 else pair


def logistic_probe(train: Tensor, y_train: Tensor, test: Tensor, y_test: Tensor) -> dict[str, float]:
    """Logistic regression (L2, C = 1, max_iter 1000) from features [N, F], scaled by the training maximum.

    Returns train_accuracy, test_accuracy, test_f1_macro, test_f1_weighted.
    Range: 0 to 1. Source: Alain and Bengio (2016).
    """
    x, x_test = _scaled(train, test)
    probe = _logistic(x, y_train.numpy())
    guess = probe.predict(x_test)
    f1 = {f"test_{name}": score for name, score in _f1(y_test.numpy(), guess).items()}
    train_accuracy, test_accuracy = float(probe.score(x, y_train.numpy())), float((guess == y_test.numpy()).mean())
    return {"train_accuracy": train_accuracy, "test_accuracy": test_accuracy} | f1


def probe_within(
    train: Tensor, test: Tensor, *, attribute: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor]
) -> dict[str, float]:
    """What features [N, F] tell linearly of an attribute where the label y is known: logistic_probe's regression in
    each class, on training and test rows of that class alone.

    attribute, y: int64, for training rows and for test rows. Returns accuracy, the mean over classes of the test
    accuracy, and majority, that of always guessing the class's commonest training value. Classes with one value or
    without test rows are left out; without any other, the result is empty.
    Range: 0 to 1. Source: this project.
    """
    scores = []
    for c in y[0].unique():
        inside, outside = y[0] == c, y[1] == c
        values, counts = attribute[0][inside].unique(return_counts=True)
        if len(values) > 1 and outside.any():
            expected = attribute[1][outside]
            found = logistic_probe(train[inside], attribute[0][inside], test[outside], expected)
            guess = values[counts.argmax()]
            scores.append((found["test_accuracy"], float((expected == guess).double().mean())))
    return dict(zip(("accuracy", "majority"), np.mean(scores, 0).tolist())) if scores else {}


def worst_group(logits: Tensor, y: Tensor, group: Tensor) -> float:
    """The lowest accuracy of logits [N, C] among the groups of examples with one label and one value of `group` [N].

    Range: 0 to 1. Source: Sagawa et al. (2020).
    """
    right = (logits.argmax(1) == y).double()
    return min(float(right[(y == c) & (group == g)].mean()) for c, g in torch.stack([y, group], 1).unique(dim=0))


def k_sparse_probe(
    train: Tensor, y_train: Tensor, test: Tensor, y_test: Tensor, sizes: tuple[int, ...] = K_SPARSE
) -> dict[int, float]:
    """k -> test balanced accuracy of one-versus-rest probes on k columns, mean over classes.

    Each class has the k columns with the largest absolute difference of class means over the training rows; features
    [N, F] are scaled by the training maximum.
    Range: 0 to 1; a guess has .5. Source: Gurnee et al. (2023).
    """
    top = train.abs().max(0).values.clamp(min=1e-12)
    train, test = train / top, test / top
    scores: dict[int, list[float]] = {k: [] for k in sizes if k <= train.shape[1]}
    for c in y_train.unique():
        inside = y_train == c
        if inside.all() or not (y_test == c).any():
            continue
        difference = (train[inside].double().mean(0) - train[~inside].double().mean(0)).abs()
        order = difference.argsort(descending=True, stable=True)
        for k in scores:
            probe = _logistic(train[:, order[:k]].numpy(), inside.numpy(), balanced=True)
            guess = probe.predict(test[:, order[:k]].numpy())
            scores[k].append(balanced_accuracy_score((y_test == c).numpy(), guess))
    return {k: float(np.mean(values)) for k, values in scores.items() if values}


def next_token_loss(logits: Tensor, ids: Tensor, mask: Tensor) -> tuple[float, int]:
    """(summed cross-entropy in nats, number of pairs) of logits [B, T, V] at t against ids [B, T] at t + 1.

    A pair counts only if both positions are real tokens by mask [B, T].
    """
    real = (mask[:, :-1] * mask[:, 1:]).bool()
    losses = cross_entropy(logits[:, :-1][real], ids[:, 1:][real], reduction="none")
    return float(losses.cpu().double().sum()), int(real.sum())


def perplexity(losses: list[tuple[float, int]]) -> float:
    """exp(mean cross-entropy of all pairs), from next_token_loss of the corpus's batches; nan without pairs.

    Range: from 1; as many as the vocabulary has tokens for a guess. Source: textbook.
    """
    total, pairs = sum(loss for loss, _ in losses), sum(n for _, n in losses)
    return math.exp(min(total / pairs, 700)) if pairs else float("nan")
