"""Maps of activations in two dimensions: pictures, not measurements."""
import importlib.util

import numpy as np
from sklearn.manifold import TSNE
from torch import Tensor

METHODS = ("t-SNE", "UMAP")


def has(method: str) -> bool:
    """Whether a method's package is installed; UMAP's is an extra."""
    return method != "UMAP" or importlib.util.find_spec("umap") is not None


def flat(h: Tensor, method: str, seed: int = 0) -> np.ndarray:
    """Positions [N, 2] of activations h [N, D], by t-SNE (perplexity 30, or N/4) or UMAP (15 neighbours, or N - 1)."""
    if method == "UMAP":
        import umap

        return umap.UMAP(n_neighbors=min(15, len(h) - 1), random_state=seed).fit_transform(h.numpy())
    return TSNE(random_state=seed, perplexity=min(30, len(h) // 4), init="pca").fit_transform(h.numpy())
