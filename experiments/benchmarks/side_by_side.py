"""What 02 and 03 share: synthetic activations with known features, and trainers as processes that take turns."""
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import embedding_bag, normalize

from lib.environment import PROJECT, InputError

PEERS_PYTHON = PROJECT / ".venv-peers" / "bin" / "python"


def sparse_features(n_rows: int, width: int, n_features: int, l0: float, seed: int) -> tuple[Tensor, Tensor]:
    """(x [n_rows, width] centred with mean squared norm 1, unit features [n_features, width]).

    Feature i fires with probability proportional to 1 / (i + 10), l0 of them on average and none on more than half
    of the rows, with log-normal amplitude. Added: anisotropic noise of a tenth of the signal's variance.
    """
    generator = torch.Generator().manual_seed(seed)
    features = normalize(torch.randn(n_features, width, generator=generator), dim=1)
    p = 1 / (torch.arange(n_features) + 10.0)
    for _ in range(100):
        p = (p * l0 / p.clamp(max=0.5).sum()).clamp(max=0.5)
    shape = torch.randn(width, width, generator=generator) * torch.logspace(0, -1, width)
    x = torch.empty(n_rows, width)
    for part in x.split(50_000):
        on = torch.rand(len(part), n_features, generator=generator) < p
        amplitude = torch.exp(0.5 * torch.randn(len(part), n_features, generator=generator))
        torch.mm(on * amplitude, features, out=part)
    signal = float(x.var(0).sum())
    for part in x.split(50_000):
        part += torch.randn(len(part), width, generator=generator) @ (shape * (0.1 * signal) ** 0.5 / shape.norm())
    x -= x.mean(0)
    return x / x.square().sum(1).mean().sqrt(), features


class Trainer:
    """A process of trainers.py; `ours` runs in this environment, the peers in theirs (make peers)."""

    def __init__(self, name: str, rows: Path, settings: dict[str, Any]):
        python = Path(sys.executable) if name == "ours" else PEERS_PYTHON
        if not python.exists():
            raise InputError(f"{python} does not exist; `make peers` installs the peers")
        script = Path(__file__).with_name("trainers.py")
        command = [str(python), str(script), name, str(rows), json.dumps(settings)]
        self.name = name
        self.log = open(rows.with_suffix(f".{name}.log"), "w+")
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True)

    def ask(self, **order: Any) -> dict[str, Any]:
        """Send one order and wait for the answer; InputError with the exit code and the last line of output if it failed."""
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


def quality(weights: Path, x: Tensor, features: Tensor, k: int) -> dict[str, float]:
    """FVU, dead latents and L0 on held-out rows x, and how well the dictionary holds the features.

    fvu: SSE / SST about the per-dimension mean. dead_pct: latents that fire on no row. cosine: mean over features of
    the largest cosine with a dictionary row; found_pct: features where that is above 0.9.
    """
    w = load_file(weights)
    sse, codes, fired = 0.0, 0, torch.zeros(len(w["W_enc"]), dtype=torch.bool)
    for part in x.split(8192):
        value, index = torch.relu((part - w["b_dec"]) @ w["W_enc"].T + w["b_enc"]).topk(k, dim=1)
        x_hat = embedding_bag(index, w["W_dec"], per_sample_weights=value, mode="sum") + w["b_dec"]
        sse += float((part - x_hat).double().square().sum())
        codes += int((value > 0).sum())
        fired[index[value > 0]] = True
    cosine = (features @ normalize(w["W_dec"], dim=1).T).amax(1)
    total = float((x - x.mean(0)).double().square().sum())
    return {
        "fvu": sse / total, "dead_pct": 100 * float((~fired).float().mean()), "l0": codes / len(x),
        "cosine": float(cosine.mean()), "found_pct": 100 * float((cosine > 0.9).float().mean()),
    }
