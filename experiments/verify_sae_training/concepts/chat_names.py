"""Names of latents by a chat model, and what those names are worth.

    chat = open_chat("openai")                                # concepts/chat_models.py
    contexts = Contexts(codes, is_val)
    print(cost_estimate(chat, contexts, latents, cache))
    named = name_with(chat, contexts, latents, cache)         # latent -> an entry of concepts.json

The model sees contexts from training texts, in which the latent fires strongly, weakly or not at all, and answers with
a name and a description. Then it judges: shown the name and held-out contexts, half of them silent, it says in which
the latent fires (the detection score of Bills et al. 2023 and Paulo et al. 2024, one token per context). The contexts
are drawn evenly from all held-out tokens, so this score estimates what an offline name's rule scores on all of them.
The two can be compared, though one latent's estimate from 20 contexts is off by about 0.1.
"""
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from tqdm.auto import tqdm

from concepts.chat_models import Chat, ask_json, question_key
from concepts.chat_servers import ANSWER_TOKENS, CHARS_PER_TOKEN, NoAnswer
from concepts.codes import Codes
from concepts.formats import EDITABLE, STALE, Concepts
from concepts.names import codes_matrix, score_rule, used_rows
from lib.environment import log

N_FIRING, N_SILENT = 10, 6  # contexts that a name is made from
N_JUDGED = 10  # held-out contexts that fire, and as many silent ones, that it is scored on
WINDOW = (16, 6)  # tokens before and after the marked one
GIVE_UP = 3  # latents in a row without an answer, after which the server is not asked again
MAX_NAME, MAX_DESCRIPTION = 80, 400  # characters
NAME = """A unit inside a language model fires on some tokens of a text and is silent on the others.
In each line one token is marked <<like this>>. The unit has read the text up to that token only.

It fires on these marked tokens (strength from 1 to 10 in brackets):
{firing}

It is silent on these:
{silent}

What do the marked tokens of the first list have in common that those of the second lack? It may be the token, a kind
of word, or what came before it. Answer with one JSON object and nothing else:
{{"name": "at most six words", "description": "one sentence", "confidence": 0.0 to 1.0}}"""
JUDGE = """A unit inside a language model fires on some tokens of a text and is silent on the others.
It is said to fire on: {name}. {description}

In each line one token is marked <<like this>>. On which of these marked tokens does it fire?
{contexts}

Answer with one JSON object and nothing else, the numbers of those lines: {{"fires": [...]}}"""


class Contexts:
    """Tokens of each latent in their surroundings, for prompts; a latent always gets the same ones.

    Drawn from the rows that offline names are made from (concepts.names.used_rows).
    """

    def __init__(self, codes: Codes, is_val: Tensor):
        self.codes = codes
        self.is_val = is_val.numpy()
        self.use = used_rows(codes)
        self.row_of = np.flatnonzero(self.use)
        self.strength = codes_matrix(codes, self.use)
        self.text_id = codes.rows["text_id"].numpy()

    def firing(self, latent: int, held_out: bool) -> tuple[np.ndarray, np.ndarray]:
        """Rows, ascending, and codes where the latent fires on training or on held-out texts."""
        span = slice(*self.strength.indptr[latent : latent + 2])
        rows, values = self.row_of[self.strength.indices[span]], self.strength.data[span]
        order = np.argsort(rows)
        rows, values = rows[order], values[order]
        chosen = self.is_val[rows] == held_out
        return rows[chosen], values[chosen]

    def silent(self, latent: int, held_out: bool, n: int) -> np.ndarray:
        """Up to n rows where the latent does not fire, drawn evenly."""
        open_rows = self.use & (self.is_val == held_out)
        open_rows[self.firing(latent, held_out)[0]] = False
        pool = np.flatnonzero(open_rows)
        return np.random.default_rng([latent, held_out]).choice(pool, min(n, len(pool)), replace=False)

    def for_name(self, latent: int) -> str | None:
        """The question for the latent's name; None if it fires on no training text."""
        rows, values = self.firing(latent, held_out=False)
        if not len(rows):
            return None
        # Squared steps down the codes: most contexts are strong, the last is the weakest.
        ranks = np.unique(np.round((len(rows) - 1) * np.linspace(0, 1, N_FIRING) ** 2).astype(int))
        chosen = np.argsort(-values, kind="stable")[ranks]
        strengths = np.ceil(10 * values[chosen] / values.max()).astype(int)
        firing = [f"[{strength}] {self.context(row)}" for strength, row in zip(strengths, rows[chosen])]
        silent = [self.context(row) for row in self.silent(latent, False, N_SILENT)]
        return NAME.format(firing="\n".join(firing), silent="\n".join(silent))

    def for_judge(self, latent: int) -> tuple[list[int], np.ndarray]:
        """Held-out rows in the order to show them, and which of them fire: bool [n]."""
        rows, _ = self.firing(latent, held_out=True)
        draw = np.random.default_rng([latent, 2])
        fires = draw.permutation(rows)[:N_JUDGED]
        shown = np.concatenate([fires, self.silent(latent, True, len(fires))])
        order = draw.permutation(len(shown))
        return shown[order].tolist(), (order < len(fires))

    def context(self, row: int) -> str:
        """The token of a row, marked, and its neighbours, on one line."""
        columns, text = self.codes.rows, self.codes.texts[self.text_id[row]]
        near = range(max(0, row - WINDOW[0]), min(len(self.codes), row + WINDOW[1] + 1))
        inside = [r for r in near if self.text_id[r] == self.text_id[row]]
        start, end = int(columns["char_start"][row]), int(columns["char_end"][row])
        left = text[int(columns["char_start"][inside[0]]) : start]
        right = text[end : int(columns["char_end"][inside[-1]])]
        return " ".join(f"{left}<<{text[start:end]}>>{right}".split())


def name_with(chat: Chat, contexts: Contexts, latents: Iterable[int], cache: Path) -> Concepts:
    """Ask for the name of each latent and score it; latent -> an entry of concepts.json.

    Leaves out latents without a valid answer, and all that remain after GIVE_UP latents in a row got none at all. When
    it is run again, what was answered before comes from `cache`. Raises NoAnswer if there never was an answer.
    """
    named: Concepts = {}
    failed = 0
    for latent in tqdm(list(latents), desc=f"naming by {chat.model}", unit="latent"):
        question = contexts.for_name(latent)
        if question is None:
            continue
        try:
            answer = ask_json(chat, question, check_name, cache)
            if answer is None:
                continue
            scores = judge(chat, contexts, latent, answer, cache=cache)
            failed = 0
        except NoAnswer as error:
            if not chat.calls + chat.cached:
                raise
            failed += 1
            log.warning("latent %d keeps its offline name: %s", latent, error)
            if failed == GIVE_UP:
                log.warning("no answer for %d latents in a row; the rest keep their offline names", failed)
                break
            continue
        named[latent] = answer | scores | {
            "backend": chat.backend, "model": chat.model, "prompt_hash": question_key(chat, question),
            "n_examples": len(contexts.firing(latent, held_out=False)[0]),
            "source": "llm", "edited_by": None, "notes": "",
        }
    return named


def score_people(concepts: Concepts, score: Callable[[Concepts], Concepts]) -> Concepts:
    """The people's names that have no score yet, scored; everything that a person wrote in them stays as it is.

    score: entries to score -> scores by latent, such as judge_all or names.score_words.
    """
    new = {i: e for i, e in concepts.items() if e["source"] == "human" and e.get("scored_name") != e["name"]}
    scores = score(new) if new else {}
    fresh = {i: {key: value for key, value in new[i].items() if key not in STALE} for i in scores}
    return {i: entry | {"scored_name": entry["name"]} | scores[i] for i, entry in fresh.items()}


def with_scores(concepts: Concepts, scored: Concepts) -> Concepts:
    """The concepts with what score_people returned, maybe hours later: a name changed meanwhile stays unscored."""
    now = dict(concepts)
    for latent, entry in scored.items():
        if now.get(latent, {}).get("name") == entry["scored_name"]:
            now[latent] = entry | {key: now[latent][key] for key in EDITABLE if key in now[latent]}
    return now


def judge_all(chat: Chat, contexts: Contexts, concepts: Concepts, cache: Path) -> Concepts:
    """The detection scores of these entries, as far as the server answers."""
    scores: Concepts = {}
    try:
        for latent, entry in concepts.items():
            scores[latent] = judge(chat, contexts, latent, entry, cache=cache)
    except NoAnswer as error:
        log.warning("%d names by people stay without a score: %s", len(concepts) - len(scores), error)
    return scores


def judge(chat: Chat, contexts: Contexts, latent: int, entry: dict[str, Any], *, cache: Path) -> dict[str, Any]:
    """Detection score of an entry's name and description, and recall; score is None without held-out firings or a valid
    verdict. precision and f1 are None: of all tokens far fewer fire than half, and how often the model is wrong on the
    silent ones, which decides them then, can't be told from ten.
    """
    name, description = entry["name"], entry.get("description") or ""
    rows, fires = contexts.for_judge(latent)
    kind = f"balanced accuracy of the model's verdicts on {len(rows)} held-out tokens, half of them silent"
    scores: dict[str, Any] = {"balanced_accuracy": None, "precision": None, "recall": None, "f1": None}
    if rows:
        question = _judge_question(contexts, rows, name, description)
        verdict = ask_json(chat, question, check_verdict(len(rows)), cache)
        if verdict is not None:
            says = np.isin(np.arange(1, len(rows) + 1), verdict["fires"])
            scores = score_rule(says, fires) | {"precision": None, "f1": None}
    scored = {"scored_name": name, "score": scores.pop("balanced_accuracy"), "score_kind": f"{kind}; 0.5 is chance"}
    return scored | {"judge": chat.model, **scores}


def _judge_question(contexts: Contexts, rows: list[int], name: str, description: str) -> str:
    lines = "\n".join(f"{number}. {contexts.context(row)}" for number, row in enumerate(rows, 1))
    return JUDGE.format(name=name, description=description, contexts=lines)


def check_name(answer: dict[str, Any]) -> dict[str, Any]:
    """The answer's name, description and confidence (None if not given); ValueError says what is wrong."""
    texts = {}
    for key, limit in (("name", MAX_NAME), ("description", MAX_DESCRIPTION)):
        value = answer.get(key)
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f'"{key}" must be a text')
        if len(value) > limit:
            raise ValueError(f'"{key}" has {len(value)} characters, more than {limit}')
        texts[key] = " ".join(value.split())
    confidence = answer.get("confidence")
    number = isinstance(confidence, int | float) and not isinstance(confidence, bool)
    if confidence is not None and not (number and 0 <= confidence <= 1):
        raise ValueError('"confidence" must be a number from 0 to 1')
    return texts | {"confidence": confidence}


def check_verdict(n: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A check that "fires" is a list of line numbers from 1 to n."""

    def check(answer: dict[str, Any]) -> dict[str, Any]:
        fires = answer.get("fires")
        if not isinstance(fires, list) or not all(type(i) is int and 1 <= i <= n for i in fires):
            raise ValueError(f'"fires" must be a list of line numbers from 1 to {n}')
        return {"fires": sorted(set(fires))}

    return check


def cost_estimate(chat: Chat, contexts: Contexts, latents: Iterable[int], cache: Path) -> str:
    """What naming these latents will take, judged by the length of the questions, in one line."""
    latents, calls, characters = list(latents), 0, 0
    for latent in latents:
        question = contexts.for_name(latent)
        if question and not (cache / f"{question_key(chat, question)}.json").exists():
            rows, _ = contexts.for_judge(latent)
            calls += 1 + bool(rows)
            characters += len(question) + (len(_judge_question(contexts, rows, "", "")) if rows else 0)
    tokens = f"about {characters // CHARS_PER_TOKEN:,} tokens to read, at most {calls * ANSWER_TOKENS:,} to write"
    return f"{chat.model}: {len(latents)} names, {calls} questions not in the cache: {tokens} (bad answers cost more)"
