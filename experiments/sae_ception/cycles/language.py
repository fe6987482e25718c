"""Metrics that only texts have: perplexity of the fine-tuned model, and first-letter absorption of its SAE."""
import torch
from torch import Tensor

from cycles.examples import make_batch
from cycles.labels import draw
from cycles.scored import Scored, Scores, named, token_rows
from cycles.session import Session
from lib.metrics.interpretability import absorption
from lib.metrics.performance import next_token_loss, perplexity


def language(x: Scored) -> Scores:
    """Perplexity of the fine-tuned language model (where it has a head) and first-letter absorption of the SAE."""
    session, model, c = x.session, x.session.model, x.session.c
    scores: Scores = {}
    if not session.task.tokens:
        return scores
    head = model.lm.get_output_embeddings()
    if head is not None and not model.reads_first and c["ROBUST_LIMIT"]:
        with torch.no_grad():
            losses = []
            for part in draw(x.ids, session.task.y, c["ROBUST_LIMIT"], session.seed).split(c["BATCH_SIZE"]):
                batch = make_batch(session.task, part, next(model.parameters()).device, session.entries)
                logits = head(model.states(batch).to(head.weight.dtype))
                losses.append(next_token_loss(logits.float(), batch["input_ids"], batch["attention_mask"]))
        scores["task_perplexity"] = perplexity(losses)
    if c["ABSORPTION_TOKENS"]:
        states, letters, splits = letter_tokens(session, x.ids, c["ABSORPTION_TOKENS"])
        values, indices = x.sae.encode(states.to(x.sae.mean.device))
        found = absorption(states, (x.sae.scale * values).cpu(), indices.cpu(), dictionary=x.sae.W_dec.cpu(),
                           letters=letters, splits=splits, seed=session.seed)
        scores |= named("absorption", found)
    return scores


def letter_tokens(session: Session, ids: Tensor, limit: int) -> tuple[Tensor, Tensor, Tensor]:
    """Up to `limit` tokens of the examples, in random order, that begin with a letter.

    Returns activations [N, D], letters 0..25 [N] and splits 0, 1, 2 [N]. The split (60/20/20) is drawn by token type,
    so that no probe sees a token id twice.
    """
    rows, letters, types = [], [], []
    order = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(session.seed))]
    for i, states in token_rows(session, order):
        item, text = session.task.tokens[i], session.task.texts[i]
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
    lot = torch.rand(len(unique), generator=torch.Generator().manual_seed(session.seed))
    split = (lot > 0.6).long() + (lot > 0.8).long()
    x = torch.stack(rows) if rows else torch.zeros(0, len(session.model.lm.base_model.config.hidden_size))
    return x[:limit], torch.tensor(letters)[:limit], split[number][:limit]
