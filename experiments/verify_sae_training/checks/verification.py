"""Checks that say whether an SAE learnt something: a number, its thresholds, and PASS, WARN or FAIL."""
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from lib.checking import Number, Schema
from lib.schemas import COUNT, NAME, SHORT_HASH

Check = dict[str, Any]
KINDS = {"evidence": "evidence", "sanity": "sanity, true by construction unless something is broken"}
UNIT = {"unit": COUNT, "f1": Number(float, 0, 1)}
VERIFICATION = Schema({
    "run_id": NAME, "sae_hash": SHORT_HASH,
    "checks": [{"check": str, "value": (float, None), "verdict": ("PASS", "WARN", "FAIL"), "threshold": str,
                "meaning": str, "kind": tuple(KINDS)}],
    "concept_recovery": [{"concept": str, "part": ("leaf", "node", "sense", "state"), "context": bool, "latent": UNIT,
                          "untrained?": UNIT, "frozen_decoder?": UNIT, "frozen_encoder?": UNIT}],
}, remedy="delete it and run notebook 03 again")


class Rule(NamedTuple):
    """What a check asks for."""

    meaning: str
    """What the number is."""
    passes: Callable[[float], bool]
    warns: Callable[[float], bool]
    text: str
    """The thresholds in words: for PASS; for WARN."""
    kind: str = "evidence"
    """evidence, or sanity: what holds by construction, so that anything but PASS means that something is broken."""


def _at_least(good: float, fair: float) -> tuple[Callable[[float], bool], Callable[[float], bool], str]:
    return lambda v: v >= good, lambda v: v >= fair, f">= {good:g}; >= {fair:g}"


def _at_most(good: float, fair: float) -> tuple[Callable[[float], bool], Callable[[float], bool], str]:
    return lambda v: v <= good, lambda v: v <= fair, f"<= {good:g}; <= {fair:g}"


def _below(good: float, fair: float) -> tuple[Callable[[float], bool], Callable[[float], bool], str]:
    return lambda v: v < good, lambda v: v < fair, f"< {good:g}; < {fair:g}"


def _above_zero(good: float) -> tuple[Callable[[float], bool], Callable[[float], bool], str]:
    return lambda v: v >= good, lambda v: v > 0, f">= {good:g}; > 0"


RULES = {
    "loss_fell": Rule("last loss / first loss", *_at_most(0.7, 0.95)),
    "weights_moved": Rule("relative change of dictionary and encoder since the start (the smaller)",
                          *_at_least(0.05, 0.01)),
    "l0_cap": Rule("most codes on one token, minus k", *_at_most(0, 0), "sanity"),
    "l0_mean": Rule("mean codes per token / k", *_at_least(0.9, 0.5), "sanity"),
    "ev": Rule("explained variance, held out", *_above_zero(0.5)),
    "ev_pca": Rule("EV minus that of PCA with k components", lambda v: v > 0, lambda v: False, "> 0"),
    "ev_random": Rule("EV minus that of the untrained SAE", *_above_zero(0.1)),
    "ev_frozen": Rule("EV minus that of the better SAE with a part frozen at random", *_above_zero(0.1)),
    "ev_shuffled": Rule("EV minus that on activations whose dimensions are shuffled", *_above_zero(0.1)),
    "ev_trim": Rule("change of EV without the 1 % largest rows", *_at_most(0.1, 0.3)),
    "gap": Rule("training EV minus held-out EV", *_at_most(0.05, 0.15)),
    "dead": Rule("% of latents that never fire on training + held-out tokens", *_below(10, 50)),
    "dense": Rule("% of latents that fire on more than 10 % of tokens", *_below(1, 5)),
    "duplicates": Rule("% of latents with a decoder cosine over 0.95 to another", *_below(1, 10)),
    "units": Rule("largest deviation of x' from mean 0 and mean squared norm 1", *_at_most(0.05, 0.2), "sanity"),
    "reload": Rule("difference of codes after saving and loading / what float32 rounding explains", *_at_most(1, 1),
                   "sanity"),
    "ce_recovered": Rule("share of the language-model loss recovered with the SAE spliced in", *_at_least(0.9, 0.7)),
    "concept_gain": Rule("word concepts: mean F1 of latents minus that of the best other kind of unit",
                         *_above_zero(0.1)),
    "context_gain": Rule("context concepts: mean F1 of latents minus that of the best other kind of unit",
                         *_above_zero(0.1)),
    "context_table": Rule("context concepts: mean F1 of latents minus that of the token table", *_above_zero(0.05)),
}


def check(name: str, value: float) -> Check:
    """One verdict. A value that is not finite fails."""
    rule = RULES[name]
    finite = math.isfinite(value)
    verdict = "PASS" if finite and rule.passes(value) else "WARN" if finite and rule.warns(value) else "FAIL"
    return {"check": name, "value": value if finite else None, "verdict": verdict, "threshold": rule.text,
            "meaning": rule.meaning, "kind": rule.kind}


def format_table(checks: list[Check]) -> str:
    """The checks as aligned text, thresholds as "PASS; WARN", what is evidence first, with a count of verdicts for each
    part.
    """
    lines = [f"{'check':<14} {'value':>9}  {'verdict':<7}  {'PASS; WARN':<18}  meaning"]
    for kind, title in KINDS.items():
        part = [row for row in checks if row["kind"] == kind]
        counts = ", ".join(f"{n} {verdict}" for verdict in ("PASS", "WARN", "FAIL")
                           if (n := sum(row["verdict"] == verdict for row in part)))
        lines.append(f"-- {title}: {counts or 'none'}")
        for row in part:
            value = "-" if row["value"] is None else f"{row['value']:.4g}"
            lines.append(f"{row['check']:<14} {value:>9}  {row['verdict']:<7}  {row['threshold']:<18}  "
                         f"{row['meaning']}")
    return "\n".join(lines)
