"""Rows of the synthetic benchmark that SAELens ships (SynthSAEBench, arXiv 2602.14687), run by the peers' Python.

    python synth_sae_bench.py '{"path": "OUT.safetensors", "n_rows": 1000, "n_held_out": 100, "width": 768,
                                "n_features": 16384, "seed": 0}'

Writes to `path` x [n_rows + n_held_out, width], features [n_features, width] and, for the held-out rows, the pairs
(row, feature) that fire; prints {}. The paper's own weights lie on a hub, so the model is drawn here with its
structure: Zipfian firing probabilities of exponent 0.5 from 0.4 to 5e-4, 128 trees of branching 4 and depth 3 with
exclusive siblings, correlations of rank 25. The magnitudes are this script's choice. The directions stay random:
20 steps of the paper's orthogonalisation took four minutes and lowered their overlap by 1 %.
"""
import json
import sys

import torch
from sae_lens.synthetic import (
    HierarchyConfig,
    LinearMagnitudeConfig,
    LowRankCorrelationConfig,
    SyntheticModel,
    SyntheticModelConfig,
    ZipfianFiringProbabilityConfig,
)
from safetensors.torch import save_file

BATCH = 1024


def main() -> None:
    order = json.loads(sys.argv[1])
    torch.manual_seed(order["seed"])  # the generator of rows draws from the global stream
    model = SyntheticModel(SyntheticModelConfig(
        num_features=order["n_features"], hidden_dim=order["width"],
        firing_probability=ZipfianFiringProbabilityConfig(exponent=0.5, max_prob=0.4, min_prob=5e-4),
        hierarchy=HierarchyConfig(total_root_nodes=128, branching_factor=4, max_depth=3, mutually_exclusive_portion=1.0,
                                  compensate_probabilities=True),
        orthogonalization=None,
        correlation=LowRankCorrelationConfig(rank=25, correlation_scale=0.1),
        mean_firing_magnitudes=LinearMagnitudeConfig(start=5.0, end=4.0), std_firing_magnitudes=0.5,
        seed=order["seed"]))
    parts, pairs, done = [], [], 0
    total = order["n_rows"] + order["n_held_out"]
    while done < total:
        x, on = model.sample_with_features(min(BATCH, total - done))
        parts.append(x.float())
        found = (on.to_dense() if on.is_sparse else on).nonzero()
        found[:, 0] += done - order["n_rows"]
        pairs.append(found[found[:, 0] >= 0])
        done += len(x)
    features = model.feature_dict.feature_vectors.detach().float()
    fires = torch.cat(pairs).int()
    save_file({"x": torch.cat(parts), "features": features.contiguous(), "fires": fires.contiguous()}, order["path"])
    print("{}")


if __name__ == "__main__":
    main()
