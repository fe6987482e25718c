"""What 02, 03 and 04 share: activations with known features, trainers as processes that take turns, and scores."""
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import torch
from safetensors.torch import load_file
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_matrix, vstack
from torch import Tensor
from torch.nn.functional import embedding_bag, normalize

from lib.environment import PROJECT, InputError
from lib.statistics import interval

PEERS_PYTHON = PROJECT / ".venv-peers" / "bin" / "python"
SHOWN = {"fvu": "FVU", "dead_pct": "dead %", "l0": "L0", "cosine": "max cosine", "found_pct": "found %", "mcc": "MCC",
         "f1": "F1", "cpu_seconds": "processor s"}


@dataclass
class Draw:
    """Activations and the truth behind them."""

    x: Tensor
    """[n_rows, width], centred, with mean squared norm 1."""
    held_out: Tensor
    """[n_held_out, width], centred and scaled by the same numbers."""
    features: Tensor
    """[n_features, width]."""
    fires: csr_matrix
    """bool [n_held_out, n_features]: which features made each held-out row."""


def _normalised(x: Tensor, n_rows: int, features: Tensor, fires: csr_matrix) -> Draw:
    x -= x[:n_rows].mean(0)
    x /= x[:n_rows].square().sum(1).mean().sqrt()
    return Draw(x[:n_rows].contiguous(), x[n_rows:], features, fires)


def sparse_features(*, n_rows: int, n_held_out: int, width: int, n_features: int, l0: float, seed: int) -> Draw:
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


def synth_sae_bench(folder: Path, *, n_rows: int, n_held_out: int, width: int, n_features: int, seed: int) -> Draw:
    """The benchmark that SAELens ships, made by synth_sae_bench.py; `folder` holds its rows for a moment."""
    path = folder / "synth_sae_bench.safetensors"
    ask_peers("synth_sae_bench.py", {"path": str(path), "n_rows": n_rows, "n_held_out": n_held_out, "width": width,
                                     "n_features": n_features, "seed": seed})
    found = load_file(path)
    path.unlink()
    row, feature = found["fires"].long().T.numpy()
    fires = csr_matrix((np.ones(len(row), bool), (row, feature)), shape=(n_held_out, n_features))
    return _normalised(found["x"], n_rows, found["features"], fires)


def peers_python() -> Path:
    """The interpreter of the peers' environment; InputError if it is missing."""
    if not PEERS_PYTHON.exists():
        raise InputError(f"{PEERS_PYTHON} does not exist; `make peers` installs the peers")
    return PEERS_PYTHON


def ask_peers(script: str, order: dict[str, Any]) -> dict[str, Any]:
    """The answer of a script of this folder, the last line it prints, to an order; it runs with the peers' Python."""
    command = [str(peers_python()), str(Path(__file__).with_name(script)), json.dumps(order)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"{script} ended with code {done.returncode}: {last_line(done.stderr)}")
    return json.loads(last_line(done.stdout))


def last_line(output: str) -> str:
    return (output.strip().splitlines() or ["no output"])[-1]


class Trainer:
    """A process of trainers.py, or of another script with its interface: `ours` with this Python, the peers with
    theirs. name: the trainer, and its kind if that is not topk: "ours jumprelu".
    """

    def __init__(self, name: str, rows: Path, settings: dict[str, Any], script: str = "trainers.py"):
        trainer, _, kind = name.partition(" ")
        python = Path(sys.executable) if trainer == "ours" else peers_python()
        order = json.dumps({"kind": kind or "topk", **settings})
        command = [str(python), str(Path(__file__).with_name(script)), trainer, str(rows), order]
        self.name = name
        self.log = open(rows.with_suffix(f".{name.replace(' ', '.')}.log"), "w+")
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
                                        text=True)

    def ask(self, **order: Any) -> dict[str, Any]:
        """The answer to one order; InputError with the exit code and the last line of output if the process died."""
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            self.process.kill()
            self.log.seek(0)
            said = last_line(self.log.read())
            raise InputError(f"{self.name} ended with code {self.process.wait()}: {said}") from None

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


def chosen_rate(runs: list[dict], trainer: str, constants: dict[str, Any]) -> float | None:
    """The learning rate with the lowest FVU on the draw CHOOSE_SEED; None for ours, which takes it from its rule."""
    tried = [run for run in runs if (run["trainer"], run["seed"]) == (trainer, constants["CHOOSE_SEED"])
             and run["lr"] in constants["LEARNING_RATES"]]
    return min(tried, key=lambda run: run["fvu"])["lr"] if tried else None


def reported(runs: list[dict], constants: dict[str, Any]) -> dict[str, list[dict]]:
    """trainer -> its runs on REPORT_SEEDS at its chosen learning rate; a trainer without any is left out."""
    found = {}
    for trainer in constants["TRAINERS"]:
        lr = chosen_rate(runs, trainer, constants)
        found[trainer] = [run for run in runs if (run["trainer"], run["lr"]) == (trainer, lr)
                          and run["seed"] in constants["REPORT_SEEDS"]]
    return {trainer: of_trainer for trainer, of_trainer in found.items() if of_trainer}


def quality_table(found: dict[str, list[dict]]) -> pandas.DataFrame:
    """One row per trainer of `reported`: mean ± half its 95 % t interval over the draws."""
    rows = []
    for trainer, runs in found.items():
        rows.append({"trainer": trainer, "draws": len(runs), "lr": runs[0]["lr"] or "rule"})
        for key, title in SHOWN.items():
            of_draws = interval([run[key] for run in runs])
            rows[-1][title] = f"{of_draws.mean:.4g} ± {of_draws.half:.2g}"
    return pandas.DataFrame(rows)
