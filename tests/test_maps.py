"""Maps: t-SNE always, UMAP where it is installed, which need not be."""
import sys
import types

import numpy as np
import torch

from cycles import maps


def test_tsne_is_a_function_of_its_seed_and_takes_few_rows():
    h = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    a = maps.flat(h, "t-SNE")
    assert a.shape == (12, 2) and np.array_equal(a, maps.flat(h, "t-SNE"))


def test_umap_is_asked_only_where_it_is_installed(monkeypatch):
    asked = {}

    class Umap:
        def __init__(self, **settings):
            asked.update(settings)

        def fit_transform(self, rows):
            return rows[:, :2]

    monkeypatch.setattr(maps.importlib.util, "find_spec", lambda name: None)
    assert maps.has("t-SNE") and not maps.has("UMAP")
    monkeypatch.setitem(sys.modules, "umap", types.SimpleNamespace(UMAP=Umap))
    h = torch.arange(30.0).view(10, 3)
    assert np.array_equal(maps.flat(h, "UMAP", seed=3), h[:, :2].numpy())
    assert asked == {"n_neighbors": 9, "random_state": 3}
