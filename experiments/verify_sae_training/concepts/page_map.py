"""Where latents stand on the page's map: directions that are alike stand close."""
import importlib.util

import torch
from torch import Tensor


def map_positions(dictionary: Tensor, seed: int = 0) -> tuple[Tensor, str]:
    """Positions float32 [F, 2] of the rows of a dictionary [F, D], and in words how they were made.

    UMAP by cosine where umap-learn is installed, else the first two principal components, each with the sign that makes
    its largest loading positive.
    """
    rows = torch.nn.functional.normalize(dictionary.detach().float().cpu(), dim=1)
    if importlib.util.find_spec("umap") and len(rows) > 15:  # its neighbours
        import umap

        found = umap.UMAP(metric="cosine", random_state=seed).fit_transform(rows.numpy())
        return torch.as_tensor(found).float(), "UMAP of the decoder's rows, by cosine"
    centred = rows - rows.mean(0)
    total = float(centred.square().sum())
    if min(centred.shape) < 2 or total == 0:
        return torch.zeros(len(rows), 2), "all rows of the decoder are alike"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _, sizes, axes = torch.svd_lowrank(centred, q=min(8, *centred.shape), niter=10)
    axes = axes[:, :2]
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    share = 100 * float(sizes[:2].square().sum()) / total
    return centred @ axes, f"PCA of the decoder's rows; the two axes hold {share:.0f} % of their variance"
