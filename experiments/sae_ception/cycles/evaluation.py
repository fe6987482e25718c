"""All numbers of one classifier and one SAE on one split, as a flat dict of metrics.

Keys are those of the experiment's README; the definitions are in lib/metrics. Nothing here is trained on the
evaluated split: thresholds, scales and probes come from training examples.
"""
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cycles.classifier import Entries, make_batch, outputs
from cycles.labels import draw
from cycles.tasks import Task
from lib.hooks import edit, resolve
from lib.metrics.clustering import clustering, unit_rows
from lib.metrics.interpretability import absorption, base_threshold, selectivity, selectivity_given
from lib.metrics.performance import classification, k_sparse_probe, linear_probe, next_token_loss, perplexity
from lib.metrics.reconstruction import Reconstruction, explained_variance
from lib.metrics.robustness import active_jaccard, fgsm, pgd
from lib.sae import SAE

Model = Any  # MLP or TextClassifier of cycles/classifier.py
Scores = dict[str, float]
GROUPS = ("probes", "clustering", "robustness", "language")
HEADLINE = {"u_weighted": "u_weighted", "csi": "csi", "csi_std": "csi_std", "csi_all": "csi_all", "u": "u",
            "u_std": "u_std", "u_label": "u_label",
            "u_adj": "u_adj", "u_all": "u_all", "u_label_all": "u_label_all", "n_supported": "u_n_supported"}


def dense_codes(sae: SAE, h: Tensor) -> Tensor:
    """Codes of h [N, D] as a dense float32 [N, F]."""
    values, indices = sae.encode(h.to(sae.mean.device))
    return torch.zeros(len(h), sae.n_latents).scatter_(1, indices.cpu(), values.cpu())


def evaluate(model: Model, sae: SAE, task: Task, split: str, c: dict[str, Any], seed: int,
             entries: Entries | None = None, groups: tuple[str, ...] = GROUPS) -> Scores:
    """Metrics of `model` and `sae` on c["EVAL_LIMIT"] examples of a split, drawn by `seed` with each class's share.

    The task, the SAE's reconstruction and the selectivities always, which is what choices need; of the rest the
    `groups` asked for: probes, clustering, robustness, language (texts only).
    """
    ids = task.sample(task.splits[split], c["EVAL_LIMIT"], seed, f"EVAL_LIMIT, {split} examples")
    train_ids = task.sample(task.splits["train"], c["PROBE_LIMIT"], seed, "PROBE_LIMIT, training examples")
    h_train, _ = outputs(model, task, train_ids, c["BATCH_SIZE"], entries)
    h, logits = outputs(model, task, ids, c["BATCH_SIZE"], entries)
    y = task.y[ids]
    codes = dense_codes(sae, h)
    scores = _named("task", classification(logits, y))
    scores |= reconstruction(model, sae, task, ids, h, c, entries)
    fired = {"base": h > base_threshold(h_train), "sae_features": codes > 0}
    scores |= label_selectivity(h, codes, fired, y, task.n_classes, "")
    if task.attribute is not None:
        attribute, n_values = task.attribute[ids], int(task.attribute.max()) + 1
        scores |= label_selectivity(h, codes, fired, attribute, n_values, "_attribute")
        for part, fires in fired.items():
            given = selectivity_given(fires, attribute, n_values, y, task.n_classes)
            scores |= {f"{part}_{name}_attribute_given_label": value for name, value in given.items()}
    if "probes" in groups:
        codes_train, y_train = dense_codes(sae, h_train), task.y[train_ids]
        scores |= _named("probe", linear_probe(codes_train, y_train, codes, y))
        scores |= {f"k_sparse_probe_k{k}": v for k, v in k_sparse_probe(codes_train, y_train, codes, y).items()}
    if "clustering" in groups:
        for suffix, x in (("", codes), ("_unit", unit_rows(codes)), ("_base", h)):
            found = clustering(x, y, task.n_classes, seed, c["SILHOUETTE_ROWS"])
            scores |= {f"clustering_{name}{suffix}": value for name, value in found.items()}
    if "robustness" in groups:
        attacked = task.sample(ids, c["ROBUST_LIMIT"], seed, f"ROBUST_LIMIT, {split} examples")
        scores |= robustness(model, sae, task, attacked, c, seed)
    if "language" in groups and task.tokens:
        scores |= language_scores(model, sae, task, ids, c, seed, entries)
    return scores


def _named(prefix: str, scores: Scores) -> Scores:
    return {f"{prefix}_{name}": value for name, value in scores.items()}


def label_selectivity(
    h: Tensor, codes: Tensor, fired: dict[str, Tensor], y: Tensor, n_classes: int, suffix: str
) -> Scores:
    """CSI and U of the base units h [N, D] and of the codes [N, F] for labels y [N], under base_* and
    sae_features_*.
    """
    values = {"base": h, "sae_features": codes}
    parts = {part: selectivity(values[part], fires, y, n_classes) for part, fires in fired.items()}
    return {f"{part}_{HEADLINE[name]}{suffix}": value for part, found in parts.items() for name, value in found.items()}


def token_rows(
    model: Model, task: Task, ids: Tensor, batch_size: int, entries: Entries | None
) -> Iterator[tuple[int, Tensor]]:
    """(example id, activations [T, D] of its kept tokens at the target layer), batch by batch."""
    device = next(model.parameters()).device
    model.eval()
    for part in ids.split(batch_size):
        for i, states in zip(part.tolist(), model.token_states(make_batch(task, part, device, entries), model.target)):
            yield i, states[torch.tensor(task.tokens[i].keep)].float()


def reconstruction(
    model: Model, sae: SAE, task: Task, ids: Tensor, h: Tensor, c: dict[str, Any], entries: Entries | None
) -> Scores:
    """SAE quality over the positions it was trained on (all kept tokens, or pooled), and the pooled EV beside it."""
    device = sae.mean.device
    values, indices = sae.encode(h.to(device))
    pooled_ev = explained_variance(h, sae.decode(values, indices).cpu())
    sums = Reconstruction(sae.n_latents)
    if task.tokens and c["SAE_POSITIONS"] == "tokens":
        for part in ids.split(c["BATCH_SIZE"]):
            x = torch.cat([states for _, states in token_rows(model, task, part, c["BATCH_SIZE"], entries)])
            token_values, token_indices = sae.encode(x.to(device))
            sums.add(x, sae.decode(token_values, token_indices), token_values, token_indices)
    else:
        for start in range(0, len(h), 4096):
            part = slice(start, start + 4096)
            sums.add(h[part], sae.decode(values[part], indices[part]), values[part], indices[part])
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


def robustness(model: Model, sae: SAE, task: Task, ids: Tensor, c: dict[str, Any], seed: int) -> Scores:
    """Clean, FGSM and PGD accuracy and the overlap of active latents, per budget in c["ROBUST_EPS"].

    Images: L-infinity, in units of the pixel range; texts: L2 per token embedding, in units of the median norm of
    the embedding rows, on real tokens that are not special.
    """
    if not len(ids):
        return {}
    model.eval()
    sums: Scores = {}
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    for part in ids.split(max(c["BATCH_SIZE"], 64)):
        batch = make_batch(task, part, device)
        run, x, settings, unit = _attackable(model, task, batch, part)
        y, (h, logits) = batch["y"], run(x)
        clean = dense_codes(sae, h.detach().cpu())
        found = {"clean": (logits.argmax(1) == y).cpu().double()}
        for eps in c["ROBUST_EPS"]:
            for name, attack in (("fgsm", fgsm), ("pgd", partial(pgd, generator=generator))):
                moved = attack(lambda z: run(z)[1], x, y, eps * unit, **settings)
                with torch.no_grad():
                    h, logits = run(moved)
                found[f"{name}_eps{eps:g}"] = (logits.argmax(1) == y).cpu().double()
            found[f"jaccard_eps{eps:g}"] = active_jaccard(clean, dense_codes(sae, h.cpu()))
        for name, values in found.items():
            sums[f"robust_{name}"] = sums.get(f"robust_{name}", 0.0) + float(values.sum())
    return {name: total / len(ids) for name, total in sums.items()}


def _attackable(model: Model, task: Task, batch: dict[str, Tensor], ids: Tensor):
    """(moved input -> h, logits; the clean input; norm, mask and bounds of the attack; its unit of length)."""
    if task.images is not None:
        top = float(task.images.max())
        return (lambda x: model({"x": x})), batch["x"], {"norm": "linf", "bounds": (0.0, top)}, top
    embedding = model.lm.get_input_embeddings()
    name = next(path for path, module in model.lm.named_modules() if module is embedding)
    point = resolve(model.lm, name)
    mask = torch.zeros_like(batch["attention_mask"])
    for row, i in enumerate(ids.tolist()):
        mask[row, : len(task.tokens[i].keep)] = torch.tensor(task.tokens[i].keep).to(mask)

    def run(moved: Tensor):
        with edit(model.lm, point, lambda x: moved.to(x)):
            return model(batch)

    clean = embedding(batch["input_ids"]).detach().float()
    return run, clean, {"norm": "l2", "mask": mask}, float(embedding.weight.detach().float().norm(dim=1).median())


def language_scores(
    model: Model, sae: SAE, task: Task, ids: Tensor, c: dict[str, Any], seed: int, entries: Entries | None
) -> Scores:
    """Perplexity of the fine-tuned language model (where it has a head) and first-letter absorption of the SAE."""
    scores: Scores = {}
    device = next(model.parameters()).device
    head = model.lm.get_output_embeddings()
    if head is not None and not model.reads_first and c["ROBUST_LIMIT"]:
        with torch.no_grad():
            losses = []
            for part in draw(ids, task.y, c["ROBUST_LIMIT"], seed).split(c["BATCH_SIZE"]):
                batch = make_batch(task, part, device, entries)
                logits = head(model.states(batch).to(head.weight.dtype))
                losses.append(next_token_loss(logits.float(), batch["input_ids"], batch["attention_mask"]))
        scores["task_perplexity"] = perplexity(losses)
    if c["ABSORPTION_TOKENS"]:
        x, letters, splits = letter_tokens(model, task, ids, c["ABSORPTION_TOKENS"], c["BATCH_SIZE"], seed, entries)
        values, indices = sae.encode(x.to(sae.mean.device))
        found = absorption(x, (sae.scale * values).cpu(), indices.cpu(), sae.W_dec.cpu(), letters, splits, seed)
        scores |= _named("absorption", found)
    return scores


def letter_tokens(
    model: Model, task: Task, ids: Tensor, limit: int, batch_size: int, seed: int, entries: Entries | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Up to `limit` tokens of the examples, in random order, that begin with a letter: x [N, D], letter 0..25 [N],
    split 0, 1, 2 [N].

    The split (60/20/20) is drawn by token type, so that no probe sees a token id twice.
    """
    rows, letters, types = [], [], []
    generator = torch.Generator().manual_seed(seed)
    for i, states in token_rows(model, task, ids[torch.randperm(len(ids), generator=generator)], batch_size, entries):
        item, text = task.tokens[i], task.texts[i]
        kept = [pos for pos, keep in enumerate(item.keep) if keep]
        for row, pos in enumerate(kept):
            first = text[slice(*item.offsets[pos])].strip()[:1].lower()
            if "a" <= first <= "z":
                rows.append(states[row].cpu())
                letters.append(ord(first) - ord("a"))
                types.append(item.ids[pos])
        if len(rows) >= limit:
            break
    unique, number = torch.tensor(types, dtype=torch.long).unique(return_inverse=True)
    lot = torch.rand(len(unique), generator=torch.Generator().manual_seed(seed))
    split = (lot > 0.6).long() + (lot > 0.8).long()
    x = torch.stack(rows) if rows else torch.zeros(0, len(model.lm.base_model.config.hidden_size))
    return x[:limit], torch.tensor(letters)[:limit], split[number][:limit]
