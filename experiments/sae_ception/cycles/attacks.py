"""Robustness of a classifier and of its SAE's active latents under FGSM and PGD."""
from functools import partial

import torch
from torch import Tensor

from cycles.examples import make_batch
from cycles.scored import Scored, Scores, dense_codes
from cycles.session import Session
from lib.environment import InputError
from lib.hooks import edit, resolve
from lib.metrics.robustness import active_jaccard, fgsm, pgd


def robustness(x: Scored) -> Scores:
    """Clean, FGSM and PGD accuracy and the overlap of active latents, per budget in ROBUST_EPS.

    Images: L-infinity, in units of the pixel range; texts: L2 per token embedding, in units of the median norm of
    the embedding rows, on real tokens that are not special.
    """
    session, c = x.session, x.session.c
    ids = session.task.sample(x.ids, c["ROBUST_LIMIT"], session.seed, f"ROBUST_LIMIT, {x.split} examples")
    if not len(ids):
        return {}
    session.model.eval()
    sums: Scores = {}
    generator = torch.Generator().manual_seed(session.seed)
    device = next(session.model.parameters()).device
    for part in ids.split(max(c["BATCH_SIZE"], 64)):
        batch = make_batch(session.task, part, device)
        forward, clean_x, settings, unit = _attackable(session, batch, part)
        y, (h, logits) = batch["y"], forward(clean_x)
        clean = dense_codes(x.sae, h.detach().cpu())
        found = {"clean": (logits.argmax(1) == y).cpu().double()}
        for eps in c["ROBUST_EPS"]:
            for name, attack in (("fgsm", fgsm), ("pgd", partial(pgd, generator=generator))):
                moved = attack(lambda z: forward(z)[1], clean_x, y, eps * unit, **settings)
                with torch.no_grad():
                    h, logits = forward(moved)
                found[f"{name}_eps{eps:g}"] = (logits.argmax(1) == y).cpu().double()
            found[f"jaccard_eps{eps:g}"] = active_jaccard(clean, dense_codes(x.sae, h.cpu()))
        for name, values in found.items():
            sums[f"robust_{name}"] = sums.get(f"robust_{name}", 0.0) + float(values.sum())
    return {name: total / len(ids) for name, total in sums.items()}


def _attackable(session: Session, batch: dict[str, Tensor], ids: Tensor):
    """(moved input -> h, logits; the clean input; norm, mask and bounds of the attack; its unit of length)."""
    model, task = session.model, session.task
    if task.images is not None:
        if not task.images.is_floating_point():
            raise InputError("whole numbers can't be moved a little; leave robustness out of METRICS")
        low, top = float(task.images.min()), float(task.images.max())
        return (lambda moved: model({"x": moved})), batch["x"], {"norm": "linf", "bounds": (low, top)}, top - low
    embedding = model.lm.get_input_embeddings()
    name = next(path for path, module in model.lm.named_modules() if module is embedding)
    point = resolve(model.lm, name)
    mask = torch.zeros_like(batch["attention_mask"])
    for row, i in enumerate(ids.tolist()):
        mask[row, : len(task.tokens[i].keep)] = torch.tensor(task.tokens[i].keep).to(mask)

    def forward(moved: Tensor):
        with edit(model.lm, point, lambda x: moved.to(x)):
            return model(batch)

    clean = embedding(batch["input_ids"]).detach().float()
    return forward, clean, {"norm": "l2", "mask": mask}, float(embedding.weight.detach().float().norm(dim=1).median())
