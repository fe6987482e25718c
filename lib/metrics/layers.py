"""A layer's activations before any SAE: their size, spread, outliers and dimensions, and what a linear probe reads."""
import torch
from torch import Tensor

OUTLIER_ROWS = 10.0  # times the median norm
OUTLIER_DIMENSIONS = 6.0  # times the median dimension's root mean square
RIDGE = 1e-3  # of a linear probe, per row, with dimensions scaled to mean square 1


def layer_statistics(x: Tensor) -> dict[str, float]:
    """Numbers of activations x [N, D].

    width D; median_norm; gamma = norm(mean) / norm(per-dimension sd), which predicts dead latents (arXiv 2605.31518);
    outlier_frac, the share of rows over OUTLIER_ROWS times the median norm; outlier_dims, the dimensions whose root
    mean square is over OUTLIER_DIMENSIONS times the median one's; participation, the effective number of dimensions
    (sum of eigenvalues)^2 / sum of their squares, of the covariance. NaN where all rows are alike.
    """
    x = x.double()
    norms, mean, size = x.norm(dim=1), x.mean(0), x.square().mean(0).sqrt()
    centred = x - mean
    # tr(C)^2 / |C|_F^2 of the covariance C, up to the same factor in both; the smaller of the two products gives both.
    product = centred.T @ centred if x.shape[1] <= len(x) else centred @ centred.T
    return {
        "width": x.shape[1],
        "median_norm": norms.median().item(),
        "gamma": (mean.norm() / x.var(0, correction=0).sum().sqrt()).item(),
        "outlier_frac": (norms > OUTLIER_ROWS * norms.median()).double().mean().item(),
        "outlier_dims": int((size > OUTLIER_DIMENSIONS * size.median()).sum()),
        "participation": (product.trace().square() / product.square().sum()).item(),
    }


def linear_probe(x: Tensor, y: Tensor, is_val: Tensor) -> dict[str, float]:
    """Held-out accuracy of a linear classifier fitted by ridge regression, and of always guessing the majority.

    x: [N, D]; y: int64 [N], classes from 0; is_val: bool [N]. Each class is regressed on as 0 or 1, and the largest
    value wins. Deterministic, and the same for x and any scale * x + shift.
    """
    n_classes = int(y.max()) + 1
    x, targets = x.double(), torch.nn.functional.one_hot(y, n_classes).double()
    train = ~is_val
    x = x - x[train].mean(0)
    x = x / x[train].square().mean(0).sqrt().clamp(min=1e-12)
    prior = targets[train].mean(0)
    gram = x[train].T @ x[train] + RIDGE * int(train.sum()) * torch.eye(x.shape[1], dtype=x.dtype)
    weights = torch.linalg.solve(gram, x[train].T @ (targets[train] - prior))
    guessed = (x[is_val] @ weights + prior).argmax(1)
    truth = y[is_val]
    return {
        "probe_accuracy": (guessed == truth).double().mean().item(),
        "majority": (truth == prior.argmax()).double().mean().item(),
    }
