"""What decides a training: its settings, and the rules that fill in what they leave open.

    settings = TrainSettings(n_latents=512, top_k=8)
    check_settings(settings, rows)
    plan = make_plan(settings, rows.n_train)
    lr = plan.learning_rate * schedule(step, plan.n_steps)
"""
import math
from dataclasses import dataclass
from typing import NamedTuple

from ..batches import Source, steps_per_epoch
from ..distributed import world_size
from ..environment import InputError
from .kinds import KINDS
from .step import FROZEN

PRECISIONS = ("float32", "bfloat16", "int8")  # of the encoder product


@dataclass(frozen=True)
class TrainSettings:
    """All that decides the weights of an SAE, besides its activations."""

    n_latents: int
    """Latents of the dictionary."""
    top_k: int
    """Latents that may fire on one token; on average, where a threshold decides (batchtopk, jumprelu)."""
    kind: str = "topk"
    """topk, batchtopk, jumprelu or matryoshka (lib.training.kinds)."""
    epochs: int = 10
    """Passes over the training rows; the best validation epoch is kept."""
    batch_size: int = 1024
    """Rows of one step."""
    lr: float | None = None
    """Peak learning rate; None: `learning_rate`, a rule over the SAE's shape and the length of the training."""
    dead_after: int | None = None
    """Tokens of silence after which a latent counts as dead and AuxK works on it; None: the rule `aux_after`."""
    aux_weight: float = 1 / 32
    """Weight of AuxK in the loss; 0 turns it off."""
    whiten: float = 1 / 8
    """Power of the partial whitening, folded away at the end; 0: one scalar only."""
    aligned: bool = True
    """Encoder tied to its dictionary row up to a learnt gain and an orthogonal part; False: free encoder."""
    precision: str = "auto"
    """Of the product that proposes candidates (codes are exact): one of PRECISIONS, or auto (by shape and device)."""
    log_every: int = 50
    """Steps between two points of the training curve."""
    seed: int = 0
    """Draws the start and the order of the rows."""
    start_k: int | None = None
    """Latents that may fire on one token at the start, from where they fall to top_k (`falling_k`); None: top_k."""
    fall: float = 0.9
    """Share of the steps over which they fall."""
    frozen: str | None = None
    """decoder or encoder keeps its random start, as a control (arXiv 2602.14111); needs whiten=0 and aligned=False."""


def check_settings(settings: TrainSettings, rows: Source) -> None:
    """Raise InputError for settings that can't work, alone or on these rows."""
    s, kind = settings, KINDS.get(settings.kind)
    faults = [
        (not 1 <= s.top_k <= s.n_latents,
         f"TOP_K={s.top_k} must be between 1 and the number of latents, {s.n_latents}"),
        (s.start_k is not None and not 1 <= s.start_k <= s.n_latents,
         f"START_K={s.start_k} must be between 1 and the number of latents, {s.n_latents}; None starts with TOP_K"),
        (not 0 <= s.fall <= 1, f"FALL={s.fall} must be from 0 to 1"),
        (s.precision not in ("auto", *PRECISIONS),
         f"PRECISION={s.precision} must be one of auto, {', '.join(PRECISIONS)}"),
        *((getattr(s, name) < 1, f"{name}={getattr(s, name)} must be at least 1")
          for name in ("epochs", "batch_size", "log_every")),
        (s.lr is not None and not 0 < s.lr < math.inf,
         f"LR={s.lr} must be a number above 0; None lets a rule choose it"),
        (s.dead_after is not None and s.dead_after < 0,
         f"DEAD_AFTER_TOKENS={s.dead_after} must be at least 0; None lets a rule choose it"),
        (kind is None, f"KIND={s.kind} is unknown; choose one of {', '.join(KINDS)}"),
        (s.frozen not in (None, *FROZEN), f"frozen={s.frozen} is unknown; choose one of {', '.join(FROZEN)}"),
        (s.frozen and (s.whiten or s.aligned),
         "a frozen part must be random; train it with whiten=0 and aligned=False, which would otherwise shape it"),
        (kind and not kind.ranks and world_size() > 1,
         f"KIND={s.kind} trains in one process only; use KIND=topk with several ranks"),
        (rows.n_train == 0 or rows.n_val < 2,  # a single row has no variance to explain
         "the run needs at least one training row and two validation rows; raise DATA_LIMIT in 01_save_activations.py"),
        (min(s.batch_size, rows.n_train) < world_size(),
         f"batch_size={s.batch_size} leaves some of {world_size()} ranks without a row; raise it"),
    ]
    for wrong, message in faults:
        if wrong:
            raise InputError(message)


class Plan(NamedTuple):
    """What settings and rows come to."""

    steps_per_epoch: int
    n_steps: int
    learning_rate: float
    """At its peak."""
    dead_after: int
    rows_per_step: int
    """Over all ranks; batch_size, or all rows where there are fewer."""


def make_plan(settings: TrainSettings, n_train: int) -> Plan:
    """What is left to the rules, and how long the training on n_train rows takes."""
    per_epoch, rows = steps_per_epoch(n_train, settings.batch_size), min(settings.batch_size, n_train)
    rate, dead_after = settings.lr, settings.dead_after
    if rate is None:
        rate = KINDS[settings.kind].rate * learning_rate(settings.n_latents, settings.epochs * n_train)
    if dead_after is None:
        dead_after = aux_after(settings.n_latents, settings.top_k, rows)
    return Plan(per_epoch, settings.epochs * per_epoch, rate, dead_after, rows_per_step=rows)


def learning_rate(n_latents: int, n_tokens: int) -> float:
    """Peak learning rate of dictionary and encoder: 1e-2 (1024 / F)^(2/3) (600,000 / tokens)^0.4, at most 3e-2.

    Fitted to the best rates of runs of 0.1 to 2.4 million tokens with F from 256 to 4096 (width and k did not matter),
    and set a little below them, because too high a rate kills latents. At 100 million tokens it meets the rule for
    long runs, 2e-4 / sqrt(F / 16384) (Gao et al. 2024).
    """
    return min(3e-2, 1e-2 * (1024 / n_latents) ** (2 / 3) * (600_000 / n_tokens) ** 0.4)


def aux_after(n_latents: int, k: int, batch: int) -> int:
    """Tokens of silence after which AuxK works on a latent: 10 F / k, at least 3,000 and at least two batches.

    An average latent fires ten times in 10 F / k tokens. Silence is counted at the end of a batch of `batch` rows, so
    more than two batches means three in a row: the weights have moved twice since, and one odd batch makes nothing
    dead. This is earlier than one would call a latent dead: waiting longer ends with more dead latents and higher FVU.
    """
    return max(3000, 10 * n_latents // k, 2 * batch)


def falling_k(settings: TrainSettings, step: int, n_steps: int) -> int:
    """Latents that may fire on one token at `step` (from 0): in a straight line from start_k to top_k, rounded."""
    start = settings.top_k if settings.start_k is None else settings.start_k
    return round(start + (settings.top_k - start) * min(1.0, step / max(1.0, settings.fall * n_steps)))


def aux_weight_at(settings: TrainSettings, step: int, n_steps: int) -> float:
    """Weight of AuxK at `step` (from 0): the setting's, and 0 after the kind's last revival."""
    return settings.aux_weight if step < KINDS[settings.kind].revive * n_steps else 0.0


def schedule(step: int, n_steps: int) -> float:
    """Share of the peak learning rate at `step` (from 0): rises over 5 % of the steps, falls over the last half."""
    return min(1.0, (step + 1) / max(1.0, 0.05 * n_steps), (n_steps - step) / max(1.0, 0.5 * n_steps))
