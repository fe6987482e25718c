"""Checks that say whether an SAE learnt something: a number, its thresholds, and PASS, WARN or FAIL."""
import math
import operator
from typing import Any, NamedTuple

from lib.schemas import COUNT, NAME, SHORT_HASH, Number, Schema

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
    """What a check asks for; thresholds like ">= 0.5"."""

    meaning: str
    """What the number is."""
    passes: str
    warns: str | None = None
    """None: what does not pass fails."""
    kind: str = "evidence"
    """sanity: it holds by construction, so anything but PASS means that something is broken."""


RULES = {
    "loss_fell": Rule("last loss / first loss", "<= 0.7", "<= 0.95"),
    "weights_moved": Rule("relative change of dictionary and encoder since the start (the smaller)",
                          ">= 0.05", ">= 0.01"),
    "l0_cap": Rule("most codes on one token, minus k", "<= 0", kind="sanity"),
    "l0_mean": Rule("mean codes per token / k", ">= 0.9", ">= 0.5", kind="sanity"),
    "ev": Rule("explained variance, held out", ">= 0.5", "> 0"),
    "ev_pca": Rule("EV minus that of PCA with k components", "> 0"),
    "ev_random": Rule("EV minus that of the untrained SAE", ">= 0.1", "> 0"),
    "ev_frozen": Rule("EV minus that of the better SAE with a part frozen at random", ">= 0.1", "> 0"),
    "ev_shuffled": Rule("EV minus that on activations whose dimensions are shuffled", ">= 0.1", "> 0"),
    "ev_trim": Rule("change of EV without the 1 % largest rows", "<= 0.1", "<= 0.3"),
    "gap": Rule("training EV minus held-out EV", "<= 0.05", "<= 0.15"),
    "dead": Rule("% of latents that never fire on training + held-out tokens", "< 10", "< 50"),
    "dense": Rule("% of latents that fire on more than 10 % of tokens", "< 1", "< 5"),
    "duplicates": Rule("% of latents with a decoder cosine over 0.95 to another", "< 1", "< 10"),
    "units": Rule("largest deviation of x' from mean 0 and mean squared norm 1", "<= 0.05", "<= 0.2", kind="sanity"),
    "reload": Rule("difference of codes after saving and loading / what float32 rounding explains", "<= 1",
                   kind="sanity"),
    "ce_recovered": Rule("share of the language-model loss recovered with the SAE spliced in", ">= 0.9", ">= 0.7"),
    "concept_gain": Rule("word concepts: mean F1 of latents minus that of the best other kind of unit",
                         ">= 0.1", "> 0"),
    "context_gain": Rule("context concepts: mean F1 of latents minus that of the best other kind of unit",
                         ">= 0.1", "> 0"),
    "context_table": Rule("context concepts: mean F1 of latents minus that of the token table", ">= 0.05", "> 0"),
}
COMPARE = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}


def _holds(value: float, threshold: str | None) -> bool:
    if threshold is None:
        return False
    sign, bound = threshold.split()
    return COMPARE[sign](value, float(bound))


def check(name: str, value: float) -> Check:
    """One verdict. A value that is not finite fails."""
    rule = RULES[name]
    finite = math.isfinite(value)
    verdict = ("PASS" if finite and _holds(value, rule.passes) else
               "WARN" if finite and _holds(value, rule.warns) else "FAIL")
    threshold = "; ".join(filter(None, (rule.passes, rule.warns)))
    return {"check": name, "value": value if finite else None, "verdict": verdict, "threshold": threshold,
            "meaning": rule.meaning, "kind": rule.kind}


def verdict_of(checks: list[Check]) -> str:
    """The checks with evidence in one sentence: how many pass, and which do not."""
    evidence = [row for row in checks if row["kind"] == "evidence"]
    if not evidence:
        return "Not verified yet: run 03_analyze_training.ipynb."
    said = [f"{sum(row['verdict'] == 'PASS' for row in evidence)} of {len(evidence)} checks with evidence pass"]
    for verdict, verb in (("WARN", "warns"), ("FAIL", "fails")):
        if names := [row["check"] for row in evidence if row["verdict"] == verdict]:
            said.append(f"{', '.join(names)} {verb if len(names) == 1 else verb[:-1]}")
    if broken := [row["check"] for row in checks if row["kind"] == "sanity" and row["verdict"] != "PASS"]:
        said.append(f"sanity checks do not hold: {', '.join(broken)}")
    return "; ".join(said) + "."


def format_table(checks: list[Check]) -> str:
    """The checks as aligned text, evidence first, with a count of verdicts for each part."""
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
