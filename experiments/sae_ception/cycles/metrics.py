"""The metrics: which are computed together, and those that tables, figures and the verdict name.

To add a metric:
1. Let the function of its group, listed at the end of cycles/evaluation.py, return one more key: results.csv has it.
2. If it fits no group, add one: a row in GROUPS, and its function in that list.
3. If a table, a figure or the verdict is to name it, add its row to REPORTED.
4. Define it in README.md.

Nothing here needs torch, so that scripts refuse a wrong METRICS at once.
"""
from typing import NamedTuple


class Group(NamedTuple):
    """Metrics that one function computes."""

    what: str
    always: bool = False
    """Computed for every split; else on test, where METRICS asks for it."""


class Metric(NamedTuple):
    """A metric that is reported by name."""

    title: str
    """In figures."""
    column: str = ""
    """Its heading in the table of 04_train_cycle.py; empty: not shown there."""
    primary: bool = False
    """Whether the question is decided by it; all others are secondary."""
    margin: float | None = None
    """How far it may be from lambda0's for two arms to count as alike in it."""


GROUPS = {
    "task": Group("accuracy, loss and F1 of the classifier", always=True),
    "reconstruction": Group("how well and how sparsely the SAE explains the target layer", always=True),
    "selectivity": Group("U and CSI of base units and latents, for the label and the attribute", always=True),
    "probes": Group("linear and k-sparse probes on the codes"),
    "beyond": Group("linear probes for the attribute within each class, on activations and codes"),
    "clustering": Group("how well codes and activations fall into the classes"),
    "robustness": Group("accuracy and active latents under FGSM and PGD; costs most"),
    "language": Group("perplexity and first-letter absorption; texts only"),
    "concepts": Group("F1 of the best latent and the best unit for each concept; the embedded stories only"),
}
OPTIONAL = tuple(name for name, group in GROUPS.items() if not group.always)

REPORTED = {
    "task_accuracy": Metric("Task accuracy (constraint)", "accuracy", margin=0.005),
    "base_u": Metric("U of base units (primary)", "base U", primary=True),
    "sae_features_u_weighted": Metric("U of latents (primary)", "SAE U", primary=True),
    "sae_features_u_label": Metric("U of latents as a share of the label", "SAE U_y"),
    "sae_features_csi": Metric("CSI of latents", "SAE CSI"),
    "sae_features_u_n_supported": Metric("Latents that fire often enough", "supp"),
    "clustering_ari": Metric("ARI, K-means on codes", "ARI"),
    "probe_test_accuracy": Metric("Linear probe on codes", "probe"),
    "sparsity_l0_mean": Metric("Codes of an example (L0)", "L0", margin=0.5),
    "sae_explained_variance": Metric("Explained variance of the SAE", "EV", margin=0.02),
    "sae_dead_features_pct": Metric("Dead latents (%)", "dead %"),
    "clustering_silhouette_supervised": Metric("Silhouette of the classes, codes"),
    "clustering_davies_bouldin": Metric("Davies-Bouldin, codes (lower = tighter)"),
    "clustering_calinski_harabasz": Metric("Calinski-Harabasz, codes"),
    "base_csi": Metric("CSI of base units"),
    "sae_features_u": Metric("U, mean over latents that fire often enough"),
    "sae_features_u_adj": Metric("U of latents, chance-adjusted"),
}
PLACES = {"base_": "base units", "sae_features_": "latents"}
MEASURES = {
    "csi": "CSI of {}", "u": "U of {}", "u_label": "U of {} as a share of the label",
    "u_adj": "U of {}, chance-adjusted", "u_weighted": "U of {}, by how often they fire",
    "u_adj_weighted": "U of {}, chance-adjusted, by how often they fire",
    "u_n_supported": "Number of {} that fire often enough",
    "information": "Information of {} (nats)", "probe_within_accuracy": "Probe within a class on {}",
    "probe_within_majority": "Commonest value within a class, beside {}",
}
OF_UNITS = {"": "", "_all": ", all of them", "_std": ", spread"}
LABELS = {"": "", "_attribute": "; attribute", "_attribute_given_label": "; attribute beyond the label"}
CLUSTERS = {
    "ari": "ARI, K-means", "ari_argmax": "ARI, strongest unit", "silhouette_supervised": "Silhouette, classes",
    "silhouette_unsupervised": "Silhouette, K-means", "silhouette_unsupervised_argmax": "Silhouette, strongest unit",
    "davies_bouldin": "Davies-Bouldin (lower = tighter)", "calinski_harabasz": "Calinski-Harabasz",
}
ROWS = {"": "codes", "_unit": "codes of length 1", "_base": "activations"}
FINDERS = {
    "latent": "latent", "firing": "latent, firing at all", "untrained": "latent of an untrained SAE",
    "neuron": "base unit", "pca": "principal direction", "token": "token", "table": "table of tokens",
    "pairs": "table of token pairs",
}
WORDS = (
    {f"{place}{key}{of}{label}": text.format(who) + more + what for place, who in PLACES.items()
     for key, text in MEASURES.items() for of, more in OF_UNITS.items() for label, what in LABELS.items()}
    | {f"clustering_{key}{rows}": f"{text}; {what}" for key, text in CLUSTERS.items() for rows, what in ROWS.items()}
    | {f"k_sparse_probe_k{k}": f"Probe on the {k} best latents" for k in (2, 5, 10, 25, 50)}
    | {"k_sparse_probe_k1": "Probe on the best latent", "sparsity_l0_std": "Codes of an example, spread",
       "sparsity_l1_mean": "Sum of an example's codes"}
    | {"task_loss": "Task loss (nats)", "task_f1_macro": "Task F1, mean over classes",
       "task_f1_weighted": "Task F1, mean over examples", "task_perplexity": "Perplexity of the texts",
       "task_worst_group_accuracy": "Accuracy of the worst group"}
    | {f"concepts_f1_{kind}_{where}": f"F1 of the best {who}, {where} concepts" for kind, who in FINDERS.items()
       for where in ("word", "context")}
)
PRIMARY = tuple(name for name, metric in REPORTED.items() if metric.primary)
MAX_ACCURACY_LOSS = REPORTED["task_accuracy"].margin or 0.0
MATCHED = {name: REPORTED[name].margin or 0.0 for name in ("sae_explained_variance", "sparsity_l0_mean")}


def in_words(metric: str) -> str:
    """What tables and figures call a metric of results.csv."""
    return REPORTED[metric].title if metric in REPORTED else WORDS.get(metric, metric.replace("_", " "))
