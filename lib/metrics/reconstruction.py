"""How well an SAE rebuilds its activations, and how sparsely.

Everything is a sum over rows, kept in float64 and divided once, so no number depends on the batch size. Sums go over
each row first: one sum of a whole array is cut where threads meet, and its last digit depends on how many there are.
"""
import torch
from torch import Tensor


class Reconstruction:
    """Sums over a stream of rows, from which result() computes every number of this file.

    One fixed evaluation set goes through add() in any number of batches:

        sums = Reconstruction(sae.n_latents)
        for x in batches:
            values, indices = sae.encode(x)
            sums.add(x, sae.decode(values, indices), values, indices)
        sums.result()["ev"]
    """

    def __init__(self, n_latents: int):
        self.n_rows, self.n_elements = 0, 0
        self.fires = torch.zeros(n_latents, dtype=torch.int64)
        self._shift: Tensor | None = None  # near the mean, so that sum of squares - n mean^2 loses no digits
        self._sum = self._square_sum = torch.zeros(0, dtype=torch.float64)
        self._sse = self._l0 = self._l0_square = self._l1 = 0.0

    def add(self, x: Tensor, xhat: Tensor, values: Tensor, indices: Tensor) -> None:
        """Add rows: x and xhat [B, D] in raw activation units, values and indices [B, k] of the codes.

        A zero in `values` is a slot that did not fire; its index is ignored.
        """
        # no float64 but on the CPU: MPS has none
        x, xhat, values = (t.detach().cpu().double() for t in (x, xhat, values))
        if self._shift is None:
            self._shift = x.mean(0)
            self._sum, self._square_sum = torch.zeros_like(self._shift), torch.zeros_like(self._shift)
        centred = x - self._shift
        self._sum += centred.sum(0)
        self._square_sum += centred.square().sum(0)
        self._sse += (x - xhat).square().sum(1).sum().item()
        fired = values != 0
        l0 = fired.sum(1).double()
        self._l0 += l0.sum().item()
        self._l0_square += l0.square().sum().item()
        self._l1 += values.abs().sum(1).sum().item()
        self.fires += torch.bincount(indices.detach().cpu().long()[fired], minlength=len(self.fires))
        self.n_rows += len(x)
        self.n_elements += x.numel()

    def result(self) -> dict[str, float]:
        """All numbers over the rows added so far.

        ev: 1 - SSE/SST with SST about the per-dimension mean over the whole set (the mean predictor gives 0;
        nan where the set has no variance), fvu = 1 - ev, mse: mean squared error over all elements, l0_mean and
        l0_std: codes per row, l1_mean: sum of |code| per row, dead_pct: 0-100, latents that fired on none of
        the n_rows rows, usage_entropy in nats, effective_latents = exp(usage_entropy).
        Range: ev up to 1; dead_pct 0 to 100; usage_entropy 0 to ln F; others from 0. Source: Gao et al. (2024) for ev.
        """
        n = self.n_rows
        if n == 0:
            raise ValueError("no rows were added")
        sst = (self._square_sum - self._sum.square() / n).clamp(min=0).sum().item()
        ev = ev_of_sums(self._sse, sst)
        l0 = self._l0 / n
        entropy = usage_entropy(self.fires)
        return {
            "ev": ev,
            "fvu": 1 - ev,
            "mse": self._sse / self.n_elements,
            "l0_mean": l0,
            "l0_std": max(0.0, self._l0_square / n - l0**2) ** 0.5,
            "l1_mean": self._l1 / n,
            "dead_pct": dead_pct(self.fires),
            "usage_entropy": entropy,
            "effective_latents": float(torch.tensor(entropy, dtype=torch.float64).exp()),
            "n_rows": n,
        }


def ev_of_sums(sse: float, sst: float) -> float:
    """1 - SSE/SST, the one formula of every EV here; nan where there is no variance to explain."""
    return 1 - sse / sst if sst > 0 else float("nan")


def explained_variance(x: Tensor, xhat: Tensor) -> float:
    """1 - SSE/SST of xhat [N, D] for x [N, D], SST about x's per-dimension mean; nan if x has no variance.

    Range: up to 1; 0 for the mean as a guess. Source: textbook.
    """
    x, xhat = x.detach().cpu().double(), xhat.detach().cpu().double()
    return ev_of_sums(float((x - xhat).square().sum()), float((x - x.mean(0)).square().sum()))


def dead_pct(fires: Tensor) -> float:
    """Share, 0-100, of latents that never fired; fires [F] counts firings over one stated set of rows."""
    return 100.0 * (fires == 0).cpu().double().mean().item()


def usage_entropy(fires: Tensor) -> float:
    """-sum p ln p in nats with p_j = firings of latent j / all firings; 0 if nothing fired."""
    p = fires.cpu().double() / max(1, int(fires.sum()))
    return float(-torch.special.xlogy(p, p).sum()) + 0.0
