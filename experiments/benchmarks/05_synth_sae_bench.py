"""SynthSAEBench-16k (arXiv 2602.14687) with this project's training step: fresh samples, the published scores.

    make peers                                                # once: the world is drawn with SAELens' own classes
    python 05_synth_sae_bench.py                              # 2 million samples
    python 05_synth_sae_bench.py N_SAMPLES=20_000_000 SEED=1  # every run has a file of its own
    python 05_synth_sae_bench.py N_SAMPLES=200_000_000        # the protocol: hours; rerun the same command to resume

Scores at 1, 2, 5, 10, 20, 50, 100, 200 million samples, by SAELens' formulas, on samples that no training sees:
F1     for each latent, "its code is not 0" against "the feature of the largest |cosine| fires", mean over latents
MCC    mean |cosine| of the best one-to-one matching of latents and features
EV     explained variance; dead: latents that never fire on the samples that score
The same at thresholds that give a mean L0 of THRESHOLD_L0, chosen on further samples without labels.

Reads and writes store/benchmarks/synth_world.safetensors, synth_sae_bench/<hash of the constants>.json, .safetensors
"""
from typing import Annotated

import checkout  # noqa: F401  (first: finds lib)
from lib.constants import override
from lib.ranges import Count, Part, Rate, Seed, Share, Size, at_least, at_most

MeanL0 = Annotated[float, at_least(0.01), at_most(1000)]
N_SAMPLES: Count = 2_000_000              # of training; each is drawn once
N_LATENTS: Size = 4096
TOP_K: Size = 25                          # latents of a sample at the end
START_K: Size = 60                        # at the start; the same as TOP_K: k does not fall
FALL: Share = 0.9                         # share of the training over which k falls, linearly
BATCH_SIZE: Size = 1024
LR: Rate | None = None                    # peak learning rate; None: the rule of step 2
WHITEN: Part = 1 / 8                      # power of the partial whitening; 0: off
SCALED = True                             # children scaled by their parents' values: True in the published source,
                                          # False, it is said, in the published file
THRESHOLD_L0: tuple[MeanL0, ...] = (15.0, 20.0, 25.0)  # mean L0 of the thresholds that score too
N_SCORED: Annotated[int, at_least(1024), at_most(10**7)] = 1_000_000  # samples that score
SEED: Seed = 0                            # of the weights and of the training samples
CONSTANTS = override(globals())

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from sampler import Sampler, World, load_world
from scipy.optimize import linear_sum_assignment
from side_by_side import peers_python
from torch import Tensor
from torch.nn.functional import embedding_bag, normalize
from tqdm.auto import tqdm

from lib.environment import run
from lib.files import fingerprint, read_json, write_json, write_tensors
from lib.schemas import POSITIVE, Schema
from lib.store import experiment_dir, provenance
from lib.training.fast_step import fast_step
from lib.training.settings import aux_after, learning_rate, schedule
from lib.training.step import folded_weights, init_state, whitening
from lib.training.workspace import Workspace

POINTS = Schema({"points": [{"samples": POSITIVE, "seconds": float, "mcc": float, "unique": float, "scores": dict}]})
MILESTONES = [m * 1_000_000 for m in (1, 2, 5, 10, 20, 50, 100, 200)]
FIRST = 200_000  # samples of the covariance
SCORING, CHOOSING, COVARIANCE = 1 << 61, 1 << 60, 1 << 59  # seeds of other samples: no training has one as large
CHUNK = 1 << 14  # samples drawn or scored at one time


def open_world(path: Path) -> World:
    """The published world, drawn by the peers' Python where it is missing."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        script = Path(__file__).with_name("draw_world.py")
        subprocess.run([str(peers_python()), str(script), str(part)], check=True)
        part.replace(path)
    return load_world(path)


def moments(world: World) -> tuple[Tensor, Tensor]:
    """Mean [D] and covariance [D, D] of the first samples."""
    draw = Sampler(world, SCALED, COVARIANCE)
    total, product = torch.zeros(768, dtype=torch.float64), torch.zeros(768, 768, dtype=torch.float64)
    for start in range(0, FIRST, CHUNK):
        x = draw(start, CHUNK)[0].double()
        total, product = total + x.sum(0), product + x.T @ x
    n = len(range(0, FIRST, CHUNK)) * CHUNK
    mean = total / n
    return mean.float(), (product / n - mean.outer(mean)).float()


def k_of(step: int, n_steps: int) -> int:
    """Latents of a sample in this step."""
    done = min(1.0, step / max(1, FALL * n_steps))
    return round(START_K + (TOP_K - START_K) * done)


class Scores:
    """Sums over the samples that score, for TopK and for each threshold."""

    def __init__(self, weights: dict[str, Tensor], mean: Tensor, features: Tensor):
        self.W_enc, self.b_enc, self.W_dec, self.mean = weights["W_enc"], weights["b_enc"], weights["W_dec"], mean
        similar = (normalize(self.W_dec, dim=1) @ features.T).abs()
        self.best = similar.argmax(1)
        self.mcc = float(similar.numpy()[linear_sum_assignment(similar.numpy(), maximize=True)].mean())
        self.unique = len(self.best.unique()) / len(self.best)

    def pre(self, x: Tensor) -> Tensor:
        return torch.relu((x - self.mean) @ self.W_enc.T + self.b_enc)

    def thresholds(self, draw: Sampler) -> list[float]:
        """The code that THRESHOLD_L0 codes of a sample exceed on average, for each."""
        pre = self.pre(draw(0, CHUNK)[0])
        largest = pre.topk(min(4 * int(max(THRESHOLD_L0)), pre.shape[1]), dim=1).values.flatten().sort(descending=True)
        return [float(largest.values[min(int(l0 * CHUNK), len(largest.values) - 1)]) for l0 in THRESHOLD_L0]

    def of(self, draw: Sampler, thresholds: list[float]) -> dict[str, dict[str, float]]:
        """name of the rule -> f1, precision, recall, l0, ev, dead_pct."""
        rules = {"topk": None, **{f"threshold {l0:g}": t for l0, t in zip(THRESHOLD_L0, thresholds)}}
        n_latents = len(self.W_enc)
        counts = {name: torch.zeros(3, n_latents) for name in rules}  # fires, its feature fires, both
        squares, n, spread, total = dict.fromkeys(rules, 0.0), 0, 0.0, torch.zeros(768, dtype=torch.float64)
        for start in tqdm(range(0, N_SCORED, 4096), desc="scoring", leave=False):
            x, index, _, count = draw(start, 4096)
            on = torch.zeros(len(x), 16_384, dtype=torch.bool)
            places = torch.arange(index.shape[1]) < count[:, None]
            row = torch.arange(len(x)).repeat_interleave(count)
            on[row, index[places].long()] = True
            truth = on[:, self.best]
            pre = self.pre(x)
            values, chosen = pre.topk(TOP_K, dim=1)
            for name, threshold in rules.items():
                if threshold is None:
                    codes = torch.zeros_like(pre).scatter_(1, chosen, values)
                    x_hat = embedding_bag(chosen, self.W_dec, per_sample_weights=values, mode="sum") + self.mean
                else:
                    codes = pre * (pre > threshold)
                    x_hat = codes @ self.W_dec + self.mean
                fires = codes > 0
                counts[name] += torch.stack([fires.sum(0), truth.sum(0), (fires & truth).sum(0)])
                squares[name] += float((x - x_hat).double().square().sum())
            n, total = n + len(x), total + x.double().sum(0)
            spread += float(x.double().square().sum())
        spread -= float(total.square().sum()) / n
        found = {}
        for name, (fires, truth, both) in counts.items():
            precision, recall = both / fires.clamp(min=1), both / truth.clamp(min=1)
            f1 = 2 * precision * recall / (precision + recall).clamp(min=1e-12)
            found[name] = {"f1": float(f1.mean()), "precision": float(precision.mean()), "recall": float(recall.mean()),
                           "l0": float(fires.sum()) / n, "ev": 1 - squares[name] / spread,
                           "dead_pct": 100 * float((fires == 0).float().mean())}
        return found


def stream(draw: Sampler, shift: Tensor, first: int, n_steps: int) -> Iterator[tuple[int, Tensor]]:
    """(step, rows [BATCH_SIZE, D]) from step `first` on; several batches are drawn at one time."""
    per_draw = max(1, CHUNK // BATCH_SIZE)
    for step in range(first, n_steps):
        if step == first or step % per_draw == 0:
            start, rows = step, draw(step * BATCH_SIZE, (per_draw - step % per_draw) * BATCH_SIZE)[0] - shift
        yield step, rows[(step - start) * BATCH_SIZE : (step - start + 1) * BATCH_SIZE]


def point(state: dict[str, Tensor], mean: Tensor, world: World, seconds: float) -> dict[str, Any]:
    """The scores of the SAE as it is now."""
    scores = Scores(folded_weights(state, 1.0), mean, world.features)
    thresholds = scores.thresholds(Sampler(world, SCALED, CHOOSING))
    return {"samples": int(state["step"]) * BATCH_SIZE, "seconds": seconds, "mcc": scores.mcc,
            "unique": scores.unique, "scores": scores.of(Sampler(world, SCALED, SCORING), thresholds)}


def show(found: dict[str, Any]) -> None:
    parts = [f"{name}: F1 {p['f1']:.3f} at L0 {p['l0']:.1f}, EV {p['ev']:.3f}" for name, p in found["scores"].items()]
    tqdm.write(f"{found['samples']:,} samples, {found['seconds']:.0f} s: MCC {found['mcc']:.3f}; {'; '.join(parts)}")


def main() -> None:
    folder = experiment_dir("benchmarks")
    world = open_world(folder / "synth_world.safetensors")
    report = folder / "synth_sae_bench" / f"{fingerprint([CONSTANTS])}.json"
    saved, n_steps = report.with_suffix(".safetensors"), N_SAMPLES // BATCH_SIZE
    report.parent.mkdir(parents=True, exist_ok=True)
    mean, covariance = moments(world)
    transform = whitening(covariance, WHITEN)
    state, points = init_state(transform, N_LATENTS, SEED), []
    if saved.exists():
        state, points = load_file(saved), read_json(report, POINTS)["points"]
    draw, work = Sampler(world, scaled=SCALED, seed=SEED, transform=transform), Workspace(state)
    rate, silence = LR or learning_rate(N_LATENTS, N_SAMPLES), aux_after(N_LATENTS, TOP_K, BATCH_SIZE)
    before, first = points[-1]["seconds"] if points else 0.0, int(state["step"])
    with tqdm(total=N_SAMPLES, initial=first * BATCH_SIZE, unit="sample", unit_scale=True) as bar:
        for step, x in stream(draw, mean @ transform, first, n_steps):
            fast_step(state, x, k=k_of(step, n_steps), lr=rate * schedule(step, n_steps), dead_after=silence, work=work)
            bar.update(BATCH_SIZE)
            done = (step + 1) * BATCH_SIZE
            if step + 1 == n_steps or any(done - BATCH_SIZE < milestone <= done for milestone in MILESTONES):
                points.append(point(state, mean, world, before + bar.format_dict["elapsed"]))
                write_tensors(saved, state)
                write_json(report, {"constants": CONSTANTS, "made_with": provenance(), "points": points})
    for found in points:
        show(found)
    print(f"written: {report}")


if __name__ == "__main__":
    run(main)
