"""How well codes or activations fall into the classes: ARI, silhouette, Davies-Bouldin, Calinski-Harabasz.

All measure class separation by the labels y, so training on y moves them with or without an SAE.
"""
import numpy as np
from sklearn.cluster import KMeans
from sklearn.metrics import (
    adjusted_rand_score,
    calinski_harabasz_score,
    davies_bouldin_score,
    pairwise_distances,
    silhouette_score,
)
from torch import Tensor

MAX_SILHOUETTE_ROWS = 10_000  # the silhouette needs all pairs


def clustering(
    x: Tensor, y: Tensor, n_classes: int, seed: int = 0, silhouette_rows: int = MAX_SILHOUETTE_ROWS
) -> dict[str, float]:
    """Clustering scores of x [N, F] against the labels y [N].

    ari: adjusted Rand index of y and K-means (n_classes clusters, n_init 10, `seed`); ari_argmax: of y and each row's
    strongest column (rows of zeros form a cluster of their own). silhouette_unsupervised and
    silhouette_unsupervised_argmax use these clusters, silhouette_supervised uses y; Euclidean, on a seeded subsample of
    at most silhouette_rows. davies_bouldin and calinski_harabasz use y. Undefined scores (one cluster, or as many as
    rows) are left out.
    Range: ari up to 1, 0 for a guess; silhouettes -1 to 1; the others from 0, davies_bouldin lower is better. Source:
    Hubert and Arabie (1985), Rousseeuw (1987), Davies and Bouldin (1979), Calinski and Harabasz (1974).
    """
    rows, labels = x.double().numpy(), y.numpy()
    n_distinct = min(n_classes, len(np.unique(rows, axis=0)))
    kmeans = KMeans(n_distinct, n_init=10, random_state=seed).fit_predict(rows)
    strongest = argmax_clusters(x).numpy()
    pick = np.random.default_rng(seed).permutation(len(rows))[: min(silhouette_rows, MAX_SILHOUETTE_ROWS)]
    distances = pairwise_distances(rows[pick].astype(np.float32))
    np.fill_diagonal(distances, 0)
    silhouettes = {
        "silhouette_unsupervised": kmeans[pick],
        "silhouette_unsupervised_argmax": strongest[pick],
        "silhouette_supervised": labels[pick],
    }
    scores = {"ari": adjusted_rand_score(labels, kmeans), "ari_argmax": adjusted_rand_score(labels, strongest)}
    for name, assigned in silhouettes.items():
        if 2 <= len(np.unique(assigned)) < len(pick):
            scores[name] = silhouette_score(distances, assigned, metric="precomputed")
    if 2 <= len(np.unique(labels)) < len(labels):
        scores["davies_bouldin"] = davies_bouldin_score(rows, labels)
        scores["calinski_harabasz"] = calinski_harabasz_score(rows, labels)
    return {name: float(score) for name, score in scores.items()}


def argmax_clusters(x: Tensor) -> Tensor:
    """Each row's strongest column in x [N, F] as its cluster, int64 [N]; F for rows without a positive entry."""
    top = x.max(1)
    return top.indices.masked_fill(top.values <= 0, x.shape[1])


def unit_rows(x: Tensor) -> Tensor:
    """x [N, F] with rows of Euclidean norm 1; rows of zeros stay zero."""
    return x / x.norm(dim=1, keepdim=True).clamp(min=1e-12)
