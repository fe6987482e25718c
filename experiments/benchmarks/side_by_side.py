"""What 02 and 03 share: synthetic activations with known features, and trainers as processes that take turns."""
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_matrix, vstack
from torch import Tensor
from torch.nn.functional import embedding_bag, normalize

from lib.environment import PROJECT, InputError

PEERS_PYTHON = PROJECT / ".venv-peers" / "bin" / "python"


@dataclass
class Draw:
    """Activations and the truth behind them."""

    x: Tensor
    """[n_rows, width], centred, with mean squared norm 1."""
    held_out: Tensor
    """[n_held_out, width], alike."""
    features: Tensor
    """[n_features, width]."""
    fires: csr_matrix
    """bool [n_held_out, n_features]: which features made each held-out row."""


def _normalised(x: Tensor, n_rows: int, features: Tensor, fires: csr_matrix) -> Draw:
    x -= x[:n_rows].mean(0)
    x /= x[:n_rows].square().sum(1).mean().sqrt()
    return Draw(x[:n_rows].contiguous(), x[n_rows:], features, fires)


def sparse_features(n_rows: int, n_held_out: int, width: int, n_features: int, l0: float, seed: int) -> Draw:
    """Sparse sums of random unit features that fire independently.

    Feature i fires with probability proportional to 1 / (i + 10), l0 of them on average and none on more than half
    of the rows, with log-normal amplitude. Added: anisotropic noise of a tenth of the signal's variance.
    """
    generator = torch.Generator().manual_seed(seed)
    features = normalize(torch.randn(n_features, width, generator=generator), dim=1)
    p = 1 / (torch.arange(n_features) + 10.0)
    for _ in range(100):
        p = (p * l0 / p.clamp(max=0.5).sum()).clamp(max=0.5)
    shape = torch.randn(width, width, generator=generator) * torch.logspace(0, -1, width)
    x = torch.empty(n_rows + n_held_out, width)
    fires = []
    for start in range(0, len(x), 10_000):
        part = x[start : start + 10_000]
        on = torch.rand(len(part), n_features, generator=generator) < p
        fires.append(csr_matrix(on[max(0, n_rows - start) :].numpy()))
        amplitude = torch.exp(0.5 * torch.randn(len(part), n_features, generator=generator))
        torch.mm(on * amplitude, features, out=part)
    signal = float(x.var(0).sum())
    for part in x.split(10_000):
        part += torch.randn(len(part), width, generator=generator) @ (shape * (0.1 * signal) ** 0.5 / shape.norm())
    return _normalised(x, n_rows, features, vstack(fires, "csr"))


def synth_sae_bench(n_rows: int, n_held_out: int, width: int, n_features: int, l0: float, seed: int) -> Draw:
    """The benchmark that SAELens ships, see synth_sae_bench.py; its L0 follows from its probabilities, l0 is not
    used.
    """
    order = {"n_rows": n_rows, "n_held_out": n_held_out, "width": width, "n_features": n_features, "seed": seed}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.safetensors"
        script = Path(__file__).with_name("synth_sae_bench.py")
        subprocess.run([str(peers_python()), str(script), str(path), json.dumps(order)], check=True)
        found = load_file(path)
    row, feature = found["fires"].long().T.numpy()
    fires = csr_matrix((np.ones(len(row), bool), (row, feature)), shape=(n_held_out, n_features))
    return _normalised(found["x"], n_rows, found["features"], fires)


def peers_python() -> Path:
    """The interpreter of the peers' environment; InputError if it is missing."""
    if not PEERS_PYTHON.exists():
        raise InputError(f"{PEERS_PYTHON} does not exist; `make peers` installs the peers")
    return PEERS_PYTHON


class Trainer:
    """A process of trainers.py; `ours` runs in this environment, the peers in theirs (make peers)."""

    def __init__(self, name: str, rows: Path, settings: dict[str, Any]):
        python = Path(sys.executable) if name == "ours" else peers_python()
        script = Path(__file__).with_name("trainers.py")
        command = [str(python), str(script), name, str(rows), json.dumps(settings)]
        self.name = name
        self.log = open(rows.with_suffix(f".{name}.log"), "w+")
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
                                        text=True)

    def ask(self, **order: Any) -> dict[str, Any]:
        """Send one order and wait for the answer; InputError with the exit code and the last line of output if it
        failed.
        """
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            self.process.kill()
            self.log.seek(0)
            lines = self.log.read().strip().splitlines() or ["no output"]
            raise InputError(f"{self.name} ended with code {self.process.wait()}: {lines[-1]}") from None

    def close(self) -> None:
        self.process.communicate()
        self.log.close()


def quality(weights: Path, drawn: Draw, k: int) -> dict[str, float]:
    """What a TopK SAE reaches on the held-out rows, and how well its dictionary holds the features.

    fvu: SSE / SST about the per-dimension mean. dead_pct: latents that fire on no row. cosine: mean over features of
    the largest cosine with a dictionary row; found_pct: features where that is above 0.9. mcc: mean cosine of the best
    one-to-one matching (arXiv 2505.20254). f1: mean over latents of F1 of "fires" against "the feature of the largest
    cosine fires" (arXiv 2602.14687), 0 for a latent that never fires.
    """
    w = load_file(weights)
    x, n_latents = drawn.held_out, len(w["W_enc"])
    sse, fired = 0.0, []
    for part in x.split(2048):
        value, index = torch.relu((part - w["b_dec"]) @ w["W_enc"].T + w["b_enc"]).topk(k, dim=1)
        x_hat = embedding_bag(index, w["W_dec"], per_sample_weights=value, mode="sum") + w["b_dec"]
        sse += float((part - x_hat).double().square().sum())
        row, place = (value > 0).nonzero().T
        fired.append(csr_matrix((np.ones(len(row)), (row, index[row, place])), shape=(len(part), n_latents)))
    codes = vstack(fired, "csr")
    similar = drawn.features @ normalize(w["W_dec"], dim=1).T
    similar /= drawn.features.norm(dim=1, keepdim=True)
    cosine = similar.amax(1)
    matched = linear_sum_assignment(similar.numpy(), maximize=True)
    truth = drawn.fires[:, similar.argmax(0).numpy()]
    both, either = codes.multiply(truth).sum(0), codes.sum(0) + truth.sum(0)
    return {
        "fvu": sse / float((x - x.mean(0)).double().square().sum()),
        "dead_pct": 100 * float((codes.sum(0) == 0).mean()), "l0": codes.nnz / len(x),
        "cosine": float(cosine.mean()), "found_pct": 100 * float((cosine > 0.9).float().mean()),
        "mcc": float(similar.numpy()[matched].mean()), "f1": float((2 * both / np.maximum(either, 1)).mean()),
    }
