"""All numbers of one classifier and one SAE on one split, as a flat dict of metrics.

    scores = evaluate(session, sae, "test", ("probes", "clustering"))

COMPUTE has a function for each group of cycles/metrics.py. Keys are those of README.md, definitions are in lib/metrics.
Nothing is trained on the evaluated split: thresholds, scales and probes come from training examples.
"""
from collections.abc import Callable

import torch
from torch import Tensor

from cycles.attacks import robustness
from cycles.concepts import concepts
from cycles.language import language
from cycles.metrics import GROUPS
from cycles.scored import Scored, Scores, dense_codes, named, token_rows
from cycles.session import Session
from lib.metrics.clustering import clustering as class_separation
from lib.metrics.clustering import unit_rows
from lib.metrics.interpretability import base_threshold, selectivity_given
from lib.metrics.interpretability import selectivity as unit_selectivity
from lib.metrics.performance import classification, k_sparse_probe, logistic_probe, probe_within, worst_group
from lib.metrics.reconstruction import Reconstruction, explained_variance
from lib.sae import SAE


def evaluate(session: Session, sae: SAE, split: str, groups: tuple[str, ...]) -> Scores:
    """Metrics of session.model and `sae` on EVAL_LIMIT examples of a split, drawn with each class's share.

    The groups that are always computed suffice for all choices; `groups` names those wanted beside them.
    """
    task, c, seed = session.task, session.c, session.seed
    ids = task.sample(task.splits[split], c["EVAL_LIMIT"], seed, f"EVAL_LIMIT, {split} examples")
    train_ids = task.sample(task.splits["train"], c["PROBE_LIMIT"], seed, "PROBE_LIMIT, training examples")
    h_train, _ = session.outputs(train_ids)
    h, logits = session.outputs(ids)
    x = Scored(session=session, sae=sae, split=split, ids=ids, y=task.y[ids], h=h, logits=logits,
               codes=dense_codes(sae, h), train_ids=train_ids, h_train=h_train)
    scores: Scores = {}
    for name, group in GROUPS.items():
        if group.always or name in groups:
            scores |= COMPUTE[name](x)
    return scores


def task(x: Scored) -> Scores:
    """Accuracy and the like of the model's logits, and of its worst group where the task has a shortcut."""
    scores = classification(x.logits, x.y)
    if (shortcut := x.session.task.shortcut) is not None:
        scores["worst_group_accuracy"] = worst_group(x.logits, x.y, shortcut[x.ids])
    return named("task", scores)


def reconstruction(x: Scored) -> Scores:
    """SAE quality over the positions it was trained on (all kept tokens, or pooled), and the pooled EV beside it."""
    c, sae, device = x.session.c, x.sae, x.sae.mean.device
    values, indices = sae.encode(x.h.to(device))
    pooled_ev = explained_variance(x.h, sae.decode(values, indices).cpu())
    sums = Reconstruction(sae.n_latents)
    if x.session.task.tokens and c["SAE_POSITIONS"] == "tokens":
        for part in x.ids.split(c["BATCH_SIZE"]):
            states = torch.cat([rows for _, rows in token_rows(x.session, part)])
            token_values, token_indices = sae.encode(states.to(device))
            sums.add(states, sae.decode(token_values, token_indices), token_values, token_indices)
    else:
        for start in range(0, len(x.h), 4096):
            part = slice(start, start + 4096)
            sums.add(x.h[part], sae.decode(values[part], indices[part]), values[part], indices[part])
    r, l0 = sums.result(), (values > 0).sum(1).cpu().double()
    return {
        "sae_reconstruction_loss": r["mse"],
        "sae_explained_variance": r["ev"],
        "sae_explained_variance_pooled": pooled_ev,
        "sae_mean_l0": r["l0_mean"],
        "sae_dead_features_pct": r["dead_pct"],
        "sae_feature_usage_entropy": r["usage_entropy"],
        "sparsity_l0_mean": float(l0.mean()),
        "sparsity_l0_std": float(l0.std(correction=0)),
        "sparsity_l1_mean": float(values.sum(1).cpu().double().mean()),
    }


def selectivity(x: Scored) -> Scores:
    """CSI and U of the base units and of the latents, for the label and for an attribute that was not trained on."""
    task = x.session.task
    fired = {"base": x.h > base_threshold(x.h_train), "sae_features": x.codes > 0}
    scores = _label_selectivity(x, fired, x.y, task.n_classes)
    if task.attribute is not None:
        attribute, n_values = task.attribute[x.ids], int(task.attribute.max()) + 1
        found = _label_selectivity(x, fired, attribute, n_values)
        scores |= {f"{name}_attribute": value for name, value in found.items()}
        for part, fires in fired.items():
            given = selectivity_given(fires, attribute, n_values, y=x.y, n_classes=task.n_classes)
            scores |= {f"{part}_{name}_attribute_given_label": value for name, value in given.items()}
    return scores


def _label_selectivity(x: Scored, fired: dict[str, Tensor], labels: Tensor, n_labels: int) -> Scores:
    scores: Scores = {}
    for part, values in (("base", x.h), ("sae_features", x.codes)):
        found = unit_selectivity(values, fired[part], labels, n_labels)
        found["u_n_supported"] = found.pop("n_supported")
        scores |= named(part, found)
    return scores


def probes(x: Scored) -> Scores:
    """What linear probes fitted on training codes, on all of them and on the k best for each class, reach on these."""
    train, y_train = dense_codes(x.sae, x.h_train), x.session.task.y[x.train_ids]
    sparse = k_sparse_probe(train, y_train, x.codes, x.y)
    return named("probe", logistic_probe(train, y_train, x.codes, x.y)) | named("k_sparse_probe", {
        f"k{k}": score for k, score in sparse.items()})


def beyond(x: Scored) -> Scores:
    """What activations and codes tell linearly of the attribute where the label is known."""
    task = x.session.task
    if task.attribute is None:
        return {}
    scores: Scores = {}
    for part, train, test in (("base", x.h_train, x.h), ("sae_features", dense_codes(x.sae, x.h_train), x.codes)):
        found = probe_within(train, test, attribute=(task.attribute[x.train_ids], task.attribute[x.ids]),
                             y=(task.y[x.train_ids], x.y))
        scores |= named(f"{part}_probe_within", found)
    return scores


def clustering(x: Scored) -> Scores:
    """How well classes are parted in the codes, in codes of unit norm (_unit) and in the activations (_base)."""
    scores: Scores = {}
    for suffix, rows in (("", x.codes), ("_unit", unit_rows(x.codes)), ("_base", x.h)):
        found = class_separation(rows, x.y, x.session.task.n_classes, seed=x.session.seed,
                                 silhouette_rows=x.session.c["SILHOUETTE_ROWS"])
        scores |= {f"clustering_{name}{suffix}": value for name, value in found.items()}
    return scores


COMPUTE: dict[str, Callable[[Scored], Scores]] = {
    "task": task, "reconstruction": reconstruction, "selectivity": selectivity, "probes": probes,
    "beyond": beyond, "clustering": clustering, "robustness": robustness, "language": language, "concepts": concepts,
}
