"""What the study asks, fixed before it runs, and the words that its answers are given in.

    tests = judge(scores, endpoints)                         # one row a hypothesis: mean, interval, Holm's p, answer
    lines = sentences(scores, tests, endpoints, complete)    # five of them: the verdict
"""
from typing import Literal, NamedTuple

import pandas

from cycles.frontier import Endpoints, against_lambda0, at_best_lambda, at_equal_pull, best_lambda, waiting
from cycles.metrics import in_words
from lib.statistics import Interval, holm, interval, paired

METHOD, LABEL_FREE = ("per_class", "per_class@25"), ("per_example", "per_example@2")
AS_HARD = ("random_latents", "full_recon")  # what the label-free form is compared with at equal pull
LEVEL, FEWEST_SEEDS = 0.05, 10


class Hypothesis(NamedTuple):
    """arm minus `against` in a metric: at the arm's best lambda for the first endpoint, or at equal pull."""

    arm: str
    against: str
    how: Literal["best", "pull"]
    metric: str


def hypotheses(endpoints: Endpoints) -> list[Hypothesis]:
    """The family that Holm's correction is taken over."""
    return [test for metric in endpoints.margins for test in (
        *(Hypothesis(arm, "lambda0", "best", metric) for arm in (*METHOD, *LABEL_FREE)),
        *(Hypothesis(arm, other, "pull", metric) for arm in LABEL_FREE for other in AS_HARD),
    )]


def judge(scores: pandas.DataFrame, endpoints: Endpoints) -> pandas.DataFrame:
    """Each hypothesis whose arms were run: mean difference [low, high], p, Holm's p over all, seeds n, and an answer.
    """
    gains, ran, rows = against_lambda0(scores), set(scores.arm), []
    for test in hypotheses(endpoints):
        if not {test.arm, test.against} <= ran:
            continue
        if test.how == "pull":
            values = at_equal_pull(scores, test.arm, test.against, test.metric)
        else:
            values = at_best_lambda(gains, test.arm, endpoints, test.metric)
        rows.append({**test._asdict(), **paired(values, 0 * values)})
    table = pandas.DataFrame(rows)
    table["p_holm"] = holm(table.p.tolist())
    table["answer"] = [answer(row, endpoints.margins[row["metric"]]) for _, row in table.iterrows()]
    return table


def answer(row: pandas.Series, margin: float) -> str:
    """raises, lowers (an effect by Holm's p); no effect (the whole interval within the margin); not decided."""
    if not row["n"] >= FEWEST_SEEDS:
        return "not decided"
    if -margin < row["low"] and row["high"] < margin:
        return "no effect"
    if row["p_holm"] < LEVEL:
        return "raises" if row["low"] > 0 else "lowers"
    return "not decided"


def controls(scores: pandas.DataFrame) -> list[str]:
    """The arms of a study that the method has to beat: all that are neither it nor its variants."""
    return [arm for arm in scores.arm.unique() if arm not in (*METHOD, *LABEL_FREE, "lambda0")]


def against_controls(
    gains: pandas.DataFrame, arm: str, others: list[str], endpoints: Endpoints
) -> dict[str, Interval]:
    """arm minus each control in the first endpoint, every one at its own best lambda, paired by seed; controls without
    one are left out, and those that no scored seed has yet are nan.
    """
    own = at_best_lambda(gains, arm, endpoints, endpoints.first)
    found = {other: at_best_lambda(gains, other, endpoints, endpoints.first) for other in others
             if best_lambda(gains, other, endpoints) is not None}
    return {other: interval((own - theirs).dropna()) for other, theirs in found.items()}


def succeeds(scores: pandas.DataFrame, tests: pandas.DataFrame, endpoints: Endpoints, arm: str) -> bool:
    """Whether the arm helps: it raises the first endpoint, costs less than the margin of every other one and of what is
    to be kept, by the intervals, and beats every control in the first endpoint: there must be some, with results.
    """
    gains, first = against_lambda0(scores), endpoints.first
    own = tests[(tests.arm == arm) & (tests.how == "best") & (tests.metric == first)]
    beaten = against_controls(gains, arm, controls(scores), endpoints)
    spared = (endpoints.kept | endpoints.margins).items()
    return bool(len(own) and own.answer.iloc[0] == "raises"
                and all(interval(at_best_lambda(gains, arm, endpoints, name)).low > -margin for name, margin in spared)
                and beaten and all(found.low > 0 for found in beaten.values()))  # nan is not above 0


def sentences(scores: pandas.DataFrame, tests: pandas.DataFrame, endpoints: Endpoints, complete: str) -> list[str]:
    """The verdict in five sentences; `complete`: how much of the study is in."""
    gains = against_lambda0(scores)
    ran = [arm for arm in METHOD + LABEL_FREE if (scores.arm == arm).any()]
    helps = [arm for arm in ran if succeeds(scores, tests, endpoints, arm)]
    verdict = (f"By the rule fixed beforehand SAE-ception helps: {', '.join(helps)}." if helps else
               "By the rule fixed beforehand no variant of SAE-ception is shown to help.")
    return [f"{complete}.", _method(gains, tests, endpoints), _specific(gains, scores, endpoints),
            _label_free(tests, endpoints), verdict]


def _told(row: pandas.Series) -> str:
    if row["n"] == 0:
        return f"{in_words(row['metric'])} not measured yet"
    return (f"{in_words(row['metric'])} {row['answer']} ({row['mean']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}], "
            f"Holm p {row['p_holm']:.3f})")


def _method(gains: pandas.DataFrame, tests: pandas.DataFrame, endpoints: Endpoints) -> str:
    parts = []
    for arm in METHOD:
        own = tests[(tests.arm == arm) & (tests.how == "best")]
        if not len(own) or (lam := best_lambda(gains, arm, endpoints)) is None:
            continue
        accuracy = at_best_lambda(gains, arm, endpoints, "task_accuracy")
        if accuracy.empty:
            parts.append(f"{arm}, best lambda {lam:g}: no seed that is scored has run")
            continue
        mean, low, high = (100 * x for x in interval(accuracy))
        told = ", ".join(_told(row) for _, row in own.iterrows())
        parts.append(f"{arm}, best lambda {lam:g}: {told}, accuracy {mean:+.2f} points [{low:+.2f}, {high:+.2f}]")
    return "The method against lambda0: " + ("; ".join(parts) or "no lambda keeps what is to be kept") + "."


def _specific(gains: pandas.DataFrame, scores: pandas.DataFrame, endpoints: Endpoints) -> str:
    lams = {arm: best_lambda(gains, arm, endpoints) for arm in (*METHOD, *controls(scores))}
    arm = next((arm for arm in METHOD if lams[arm] is not None), None)
    late = [other for other in controls(scores) if waiting(gains, other, endpoints)]
    none = [other for other in controls(scores) if lams[other] is None and other not in late]
    parts = []
    if arm is not None:
        found = against_controls(gains, arm, controls(scores), endpoints)
        beats, beaten = [a for a, x in found.items() if x.low > 0], [a for a, x in found.items() if x.high < 0]
        undecided = [a for a in found if a not in beats + beaten]
        told = (("beats", beats), ("is beaten by", beaten), ("is not told apart from", undecided))
        parts += [f"{arm} {words} {', '.join(names)}" for words, names in told if names]
    parts += [f"no lambda keeps what is to be kept in {', '.join(none)}"] if none else []
    parts += [f"not run yet: {', '.join(late)}"] if late else []
    return f"The controls, every arm at its best lambda: {'; '.join(parts) or 'there are none'}."


def _label_free(tests: pandas.DataFrame, endpoints: Endpoints) -> str:
    rows = tests[(tests.how == "pull") & (tests.metric == endpoints.first)]
    parts = [f"{row['arm']} minus {row['against']}: {_told(row)}, {row['n']:.0f} seeds" for _, row in rows.iterrows()]
    return "Without labels, at equal pull: " + ("; ".join(parts) or "not run") + "."
