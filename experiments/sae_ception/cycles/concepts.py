"""Which concepts of the embedded stories single units find: the best latent and the best unit of the layer for each.

Nobody trains on these concepts. Unit and threshold are chosen on the tokens of training examples and scored on those of
the scored split, as 03_analyze_training.ipynb of verify_sae_training does.
"""
from typing import Any

import torch
from torch import Tensor

from cycles.scored import Scored, Scores, token_rows
from cycles.session import Session
from cycles.targets import random_sae
from lib.ground_truth import WORD_F1, Truth, searched, tree_at, truth_of
from lib.metrics.units import recovery
from lib.models import local_path
from lib.texts import load_documents

ONE_BY_ONE = ("latent", "neuron")  # kinds whose F1 is kept for each concept; of the others there are means


def concepts(x: Scored) -> Scores:
    """Mean F1 of the best unit of each kind over word concepts and over context concepts, and some for each concept.

    {} where the data set has no concepts beside it, or the SAE has not learnt from all tokens.
    """
    if not x.session.task.tokens or x.session.c["SAE_POSITIONS"] != "tokens":
        return {}
    h, rows = tokens(x.session, torch.cat([x.train_ids, x.ids]))
    if (truth := _truth(x.session, torch.cat([x.train_ids, x.ids]), rows)) is None:
        return {}
    is_val = rows["text_id"] >= len(x.train_ids)
    principal = torch.linalg.eigh(torch.cov(h[~is_val].double().T)).eigenvectors.float()
    saes = {"latent": x.sae, "untrained": random_sae(x.sae, x.session.seed)}
    found: dict[str, dict[str, Any]] = {}
    for part, columns in searched(truth, is_val, torch.ones_like(is_val)):
        scores = recovery(saes, h[part], truth.labels[part][:, columns], is_val[part], principal=principal,
                          ids=rows["token_id"][part], before=rows["before"][part])
        found |= {truth.concepts[column].name: of for column, of in zip(columns, scores)}
    return summarised(found)


def summarised(found: dict[str, dict[str, Any]]) -> Scores:
    """Flat scores of concept -> kind -> scores, as lib.metrics.units.recovery gives them for each concept."""
    scores: Scores = {}
    for where, in_context in (("word", False), ("context", True)):
        part = [of for of in found.values() if (of["table"]["f1_train"] < WORD_F1) == in_context]
        scores[f"concepts_n_{where}"] = float(len(part))
        for kind in part[0] if part else ():
            scores[f"concepts_f1_{kind}_{where}"] = sum(of[kind]["f1"] for of in part) / len(part)
    return scores | {f"concept_f1_{kind}: {name}": of[kind]["f1"] for name, of in found.items() for kind in ONE_BY_ONE}


def tokens(session: Session, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Activations [N, D] of the examples' kept tokens, and of each token: text_id, its example's place in ids;
    token_id; before, that of the token before it (-1: none); char_start and char_end.
    """
    states, columns = [], []
    for place, (i, rows) in enumerate(token_rows(session, ids)):
        item = session.task.tokens[i]
        kept = [pos for pos, keep in enumerate(item.keep) if keep]
        of_text = [item.ids[pos] for pos in kept]
        states.append(rows.cpu())
        columns += [(place, token, before, *item.offsets[pos])
                    for pos, token, before in zip(kept, of_text, [-1, *of_text[:-1]])]
    names = ("text_id", "token_id", "before", "char_start", "char_end")
    return torch.cat(states), dict(zip(names, torch.tensor(columns).view(-1, len(names)).T))


def _truth(session: Session, ids: Tensor, rows: dict[str, Tensor]) -> Truth | None:
    """The concepts of these tokens; None where no concepts.json lies beside the data set, or not with all its texts."""
    c = session.c
    path = local_path(c["DATASET"])
    if path is None or (tree := tree_at(path.parent / "concepts.json")) is None:
        return None
    files = [path for name in ("DATASET", "VAL_DATASET", "TEST_DATASET") if c[name] and (path := local_path(c[name]))]
    stories = {story["text"]: story for path in files for story in load_documents(str(path))}
    texts = [session.task.texts[i] for i in ids.tolist()]
    return truth_of([stories[text] for text in texts], tree, rows) if all(text in stories for text in texts) else None
