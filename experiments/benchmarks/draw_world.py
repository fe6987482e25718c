"""The world of SynthSAEBench-16k (arXiv 2602.14687), drawn with SAELens' own classes from the published configuration.

    ../../.venv-peers/bin/python draw_world.py OUT.safetensors      # about two minutes of two cores

Seed 42. Drawn on a CPU, so the weights are not the published ones, which were drawn on a GPU; the distribution is the
same. One step is not SAELens' code: its orthogonalisation takes a hundred minutes here, because autograd goes through
all pairs of features. Its loss has a gradient in closed form (`gradient`), which gives the same steps of Adam.

Whether children are scaled by their parents' values (the source says so, the published file is said not to) is a
matter of sampling, so one file serves both; see sampler.py, which also says what each tensor is.
"""
import json
import sys

import torch
from sae_lens.synthetic import (
    FoldedNormalMagnitudeConfig,
    HierarchyConfig,
    LinearMagnitudeConfig,
    LowRankCorrelationConfig,
    SyntheticModel,
    SyntheticModelConfig,
    ZipfianFiringProbabilityConfig,
)
from safetensors.torch import save_file

STEPS, RATE = 100, 3e-4  # of the orthogonalisation


def configuration(n_features: int = 16_384, width: int = 768, scaled: bool = True) -> SyntheticModelConfig:
    """The published one, but for the orthogonalisation."""
    return SyntheticModelConfig(
        num_features=n_features, hidden_dim=width, bias=0.5, seed=42, orthogonalization=None,
        firing_probability=ZipfianFiringProbabilityConfig(exponent=0.5, max_prob=0.4, min_prob=5e-4),
        hierarchy=HierarchyConfig(total_root_nodes=128, branching_factor=4, max_depth=3, mutually_exclusive_portion=1.0,
                                  compensate_probabilities=True, scale_children_by_parent=scaled),
        correlation=LowRankCorrelationConfig(rank=25, correlation_scale=0.1),
        mean_firing_magnitudes=LinearMagnitudeConfig(start=5.0, end=4.0),
        std_firing_magnitudes=FoldedNormalMagnitudeConfig(mean=0.5, std=0.5))


def gradient(rows: torch.Tensor) -> torch.Tensor:
    """Of sum over i != j of (e_i . e_j)^2 + n sum over i of (|e_i|^2 - 1)^2, with respect to the rows e [n, D]."""
    square = rows.square().sum(1, keepdim=True)
    return 4 * (rows @ (rows.T @ rows) - square * rows) + 4 * len(rows) * (square - 1) * rows


def orthogonalised(rows: torch.Tensor, steps: int = STEPS, rate: float = RATE) -> torch.Tensor:
    """Unit rows after as many steps of Adam on that loss."""
    rows = torch.nn.Parameter(torch.nn.functional.normalize(rows, dim=1))
    adam = torch.optim.Adam([rows], lr=rate)
    for _ in range(steps):
        rows.grad = gradient(rows.detach())
        adam.step()
    return torch.nn.functional.normalize(rows.detach(), dim=1)


def parents(model: SyntheticModel) -> torch.Tensor:
    """[N]: each feature's parent, -1: none. Children of one parent must be consecutive and exclude each other."""
    found = torch.full((model.cfg.num_features,), -1)
    nodes = list(model.hierarchy.roots)
    while nodes:
        node = nodes.pop()
        numbers = sorted(child.feature_index for child in node.children)
        assert not numbers or (node.mutually_exclusive_children and numbers[-1] - numbers[0] + 1 == len(numbers))
        found[numbers] = node.feature_index
        nodes += node.children
    return found


def tensors(model: SyntheticModel, features: torch.Tensor) -> dict[str, torch.Tensor]:
    """The world's tensors by the names under which sampler.py reads them; F features of width D: features [F, D]."""
    draws = model.activation_generator
    factor, spread = draws.low_rank_correlation
    found = {"features": features, "bias": model.feature_dict.bias, "factor": factor, "spread": spread,
             "threshold": draws.correlation_thresholds, "mean": draws.mean_firing_magnitudes,
             "std": draws.std_firing_magnitudes, "parent": parents(model)}
    return {name: value.detach().contiguous() for name, value in found.items()}


def main() -> None:
    model = SyntheticModel(configuration())
    features = orthogonalised(model.feature_dict.feature_vectors.detach())
    save_file(tensors(model, features), sys.argv[1])
    sample = torch.nn.functional.normalize(features[torch.randperm(len(features))[:2048]], dim=1)
    cosine = (sample @ features.T).abs()
    print(json.dumps({"mean_largest_cosine": float(cosine.topk(2, dim=1).values[:, 1].mean())}))


if __name__ == "__main__":
    main()
