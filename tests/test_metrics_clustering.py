"""Clustering scores: known answers, and agreement with scikit-learn."""
import pytest
import torch
from sklearn.metrics import calinski_harabasz_score, davies_bouldin_score, silhouette_score

from lib.metrics.clustering import argmax_clusters, clustering, unit_rows


def blobs(n=90, spread=0.05):
    g = torch.Generator().manual_seed(0)
    y = torch.arange(n) % 3
    return torch.eye(3)[y] * 4 + spread * torch.randn(n, 3, generator=g), y


def test_separated_classes_under_any_name_score_one():
    x, y = blobs()
    scores = clustering(x, torch.tensor([2, 0, 1])[y], 3)  # K-means and arg-max know nothing of the names
    assert scores["ari"] == 1 and scores["ari_argmax"] == 1
    assert scores["silhouette_supervised"] == pytest.approx(scores["silhouette_unsupervised"])


def test_equal_to_scikit_learn():
    x, y = blobs(spread=2.0)
    scores = clustering(x, y, 3)
    rows = x.double().numpy()
    assert scores["davies_bouldin"] == pytest.approx(davies_bouldin_score(rows, y))
    assert scores["calinski_harabasz"] == pytest.approx(calinski_harabasz_score(rows, y))
    assert scores["silhouette_supervised"] == pytest.approx(silhouette_score(rows, y), abs=1e-5)


def test_same_seed_same_scores_and_scale_matters_only_without_unit_rows():
    x, y = blobs(spread=1.0)
    x = x.abs() * torch.linspace(1, 9, len(x))[:, None]
    assert clustering(x, y, 3, silhouette_rows=40) == clustering(x, y, 3, silhouette_rows=40)
    unit = clustering(unit_rows(x), y, 3)
    assert unit == clustering(unit_rows(1024 * x), y, 3)
    assert unit["davies_bouldin"] != pytest.approx(clustering(x, y, 3)["davies_bouldin"], abs=1e-3)


def test_rows_of_zeros_are_their_own_cluster():
    assert argmax_clusters(torch.tensor([[0.0, 2], [3, 1], [0, 0], [-1, -2]])).tolist() == [1, 0, 2, 2]


def test_undefined_scores_are_absent():
    scores = clustering(torch.zeros(10, 3), torch.zeros(10, dtype=torch.long), 1)
    assert set(scores) == {"ari", "ari_argmax"}
    assert "davies_bouldin" in clustering(torch.zeros(10, 3), torch.arange(10) % 2, 2)
