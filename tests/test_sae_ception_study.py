"""The study: its grid, resume, what it refuses, curves over lambda compared by hand-made numbers, and the verdict."""
import json
import math
import os
import runpy
import signal
import subprocess
import sys
import time

import numpy as np
import pandas
import pytest
import torch
from forked import PROJECT
from test_sae_ception_cycles import SCRIPTS, defaults, digits, script  # noqa: F401

from cycles import schemas, study
from cycles.arms import ARMS
from cycles.colours import colour, look, title
from cycles.comparison_figures import n_seeds
from cycles.frontier import (
    Endpoints,
    against_lambda0,
    at_best_lambda,
    at_equal_pull,
    best_lambda,
    choosers,
    mean_distance,
    read_scores,
    read_study,
    waiting,
    whole,
    write_scores,
)
from cycles.hypotheses import answer, hypotheses, judge, sentences, succeeds
from lib.environment import InputError
from lib.files import read_json
from lib.statistics import interval
from studies import ENDPOINTS

U, ACCURACY = "base_u_weighted_attribute_given_label", "task_accuracy"
WITHIN = "base_probe_within_accuracy"
ENDS = Endpoints({U: 0.01, WITHIN: 0.01}, {ACCURACY: 0.005})


def test_the_grid_gives_each_arm_its_lambdas(digits):  # noqa: F811
    c = study.with_grid(digits | {"ARMS": ("lambda0", "per_class@25", "weight_decay"), "ARM_CONSTANTS": {
        "per_class@25": {"KEEP_PCT": 10.0}, "weight_decay": {"AUX_WEIGHT": 0.01}}}, (0.1, 0.3, 1.0))
    assert c["ARMS"] == ("lambda0", "per_class@25_l0.3", "weight_decay@l0.3", "per_class@25_l0.1", "weight_decay@l0.1",
                         "per_class@25_l1", "weight_decay@l1")
    assert c["ARM_CONSTANTS"]["weight_decay@l0.3"] == {"AUX_WEIGHT": 0.003}
    assert c["ARM_CONSTANTS"]["per_class@25_l1"] == {"KEEP_PCT": 10.0, "AUX_WEIGHT": 1.0}
    assert [study.variant(arm) for arm in ("lambda0", "per_class@25_l0.3", "to_zero@l1e-05")] == [
        ("lambda0", 0.0), ("per_class@25", 0.3), ("to_zero", 1e-5)]
    with pytest.raises(InputError, match="give one number"):
        study.with_grid(digits | {"ARMS": ("per_class",), "ARM_CONSTANTS": {"per_class": {"AUX_WEIGHT": (0.1, 0.2)}}},
                        (1.0,))


@pytest.fixture
def small(digits):  # noqa: F811
    c = digits | {"ARMS": ("lambda0", "per_class", "l1_activation", "weight_decay"), "SEEDS": (7,), "ARM_CONSTANTS": {},
                  "SETTING": "small", "LABEL_GROUPS": (0, 1) * 5, "METRICS": ("beyond",)}
    return study.with_grid(c, (0.5, 2.0))


def test_a_study_resumes_and_refuses_other_constants(small, monkeypatch, own_store):
    study.run_seed(small, 7)
    assert study.done(small) == (7, 7)
    path = study.result_path(small, 7, "per_class@l2")
    first = path.read_bytes()
    path.unlink()
    study.run_seed(small, 7)
    assert path.read_bytes() == first
    found = json.loads(first)
    assert found["aux"]["pull"] > 0 and found["aux"]["shift"] > 0
    half = read_json(study.result_path(small, 7, "per_class@l0.5"))
    assert half["aux"]["pull"] == pytest.approx(found["aux"]["pull"] / 4, rel=1e-4)  # linear in lambda
    unpulled = read_json(study.result_path(small, 7, "lambda0"))["aux"]
    assert unpulled == {"shift": 0.0}
    assert "pull" not in read_json(study.result_path(small, 7, "weight_decay@l2"))["aux"]
    left = {path.parent.name for path in study.setting_root(small).glob("*/seed_7")}
    assert left == {"baseline", "lambda0", "study"}
    path.unlink()
    with pytest.raises(InputError, match="other constants"):
        study.run_seed(small | {"PROBE_LIMIT": 150}, 7)
    failed = study.run_seed(small | {"ARM_CONSTANTS": small["ARM_CONSTANTS"] | {
        "per_class@l2": {"AUX_WEIGHT": 2.0, "KEEP_PCT": 100.0}}}, 7)
    assert len(failed) == 1 and "seed 7, per_class@l2: keeping 256 latents" in failed[0] and not path.exists()
    scores = read_study(study.setting_root(small))
    assert len(scores) == 6 and set(scores.arm) == {"lambda0", "per_class", "l1_activation", "weight_decay"}


@pytest.fixture
def own_store(monkeypatch, tmp_path):
    monkeypatch.setenv("STORE_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def run_study(monkeypatch, own_store):
    """The functions of step 7, of the study of digits."""
    monkeypatch.setattr(sys, "argv", ["07_run_study.py"])
    step = runpy.run_path(str(SCRIPTS / "07_run_study.py"))
    step["record"].__globals__["STUDY"] = "digits"
    return step


def test_a_study_is_judged_by_the_seeds_of_all_its_commands(run_study, own_store):
    for asked, known in (((3, 4), [3, 4]), ((1, 3), [1, 3, 4]), ((4,), [1, 3, 4])):
        run_study["record"](run_study["study_constants"]() | {"SEEDS": asked})
        assert read_json(own_store / "sae_ception/study_digits/study/study.json", schemas.STUDY)["seeds"] == known


@pytest.mark.parametrize("given", ["AUX_WEIGHT=0.05", "CYCLES=3"])
def test_a_study_refuses_what_it_would_ignore(run_study, monkeypatch, given):
    monkeypatch.setattr(sys, "argv", ["07_run_study.py", given])
    with pytest.raises(InputError, match=f"{given.partition('=')[0]} would be ignored"):
        run_study["study_constants"]()


def test_shift():
    h = torch.tensor([[0.0, 0], [2, 0]])
    assert study.shift(h + 1, h) == pytest.approx(4 / 2)
    assert study.shift(h, h) == 0


def table(rows):
    """Scores from (arm, lambda, seed, accuracy, U, pull); validation and test are alike."""
    names = ("arm", "lam", "seed", f"test_{ACCURACY}", f"test_{U}", "pull")
    frame = pandas.DataFrame([dict(zip(names, row)) for row in rows])
    frame["shift"] = frame["pull"]
    for name in (ACCURACY, U):
        frame[f"val_{name}"] = frame[f"test_{name}"]
    for split in ("val", "test"):
        frame[f"{split}_base_probe_within_accuracy"] = 0.8
    return frame


def test_the_best_lambda_keeps_the_accuracy_on_validation():
    rows = [("lambda0", 0, seed, 0.9, 0.1 * seed, math.nan) for seed in (1, 2)]
    for lam, accuracy, gain in ((0.1, 0.9, 0.01), (1.0, 0.896, 0.02), (10.0, 0.894, 0.5)):
        rows += [("per_class", lam, seed, accuracy, 0.1 * seed + gain * seed, lam) for seed in (1, 2)]
    gains = against_lambda0(table(rows))
    assert best_lambda(gains, "per_class", ENDS) == 1.0
    assert at_best_lambda(gains, "per_class", ENDS, U).to_dict() == pytest.approx({2: 0.04})  # seed 1 has chosen
    assert at_best_lambda(gains, "per_class", ENDS, ACCURACY).to_dict() == pytest.approx({2: -0.004})
    gains.loc[gains.lam < 10, f"val_{ACCURACY}"] = -0.1
    assert best_lambda(gains, "per_class", ENDS) is None
    assert not len(at_best_lambda(gains, "per_class", ENDS, U))
    gains.loc[gains.lam == 10, f"val_{ACCURACY}"] = 0
    gains[f"test_{ACCURACY}"] = -1  # test scores choose nothing
    assert best_lambda(gains, "per_class", ENDS) == 10.0
    gains["val_base_information"] = -gains.lam
    assert best_lambda(gains, "per_class", ENDS._replace(kept={"base_information": 5.0})) == 1.0


def test_a_lambda_at_which_networks_die_is_not_chosen():
    rows = [("lambda0", 0, seed, 0.9, 0.2, math.nan) for seed in range(6)]
    rows += [("per_class", lam, seed, 0.9, 0.2 + lam, lam) for lam in (0.1, 1.0) for seed in range(6)]
    assert best_lambda(against_lambda0(table(rows)), "per_class", ENDS) == 1.0
    rows.remove(("per_class", 1.0, 1, 0.9, 1.2, 1.0))
    assert best_lambda(against_lambda0(table(rows)), "per_class", ENDS) == 0.1


def test_a_score_that_few_seeds_have_is_not_chosen_by():
    rows = [("lambda0", 0, seed, 0.9, 0.2, math.nan) for seed in range(9)]
    rows += [("per_class", lam, seed, 0.9, 0.2 + lam, lam) for lam in (0.1, 1.0) for seed in range(9)]
    gains = against_lambda0(table(rows))
    gains.loc[(gains.lam == 1.0) & gains.seed.isin([1, 2]), f"val_{U}"] = math.nan
    assert best_lambda(gains, "per_class", ENDS) == 0.1  # three choose
    gains[f"test_{U}"] = math.nan
    assert at_best_lambda(gains, "per_class", ENDS, U).empty
    assert math.isnan(interval([1.0, float("nan"), 2.0]).mean) and math.isnan(interval(pandas.Series([1, None])).low)


def test_luck_is_not_chosen_and_scored_at_once():
    rng, found = np.random.default_rng(0), []
    for _ in range(30):  # studies in which no lambda does anything
        rows = [("lambda0", 0, seed, 0.9, 0.2, math.nan) for seed in range(12)]
        rows += [("per_class", lam, seed, 0.9, 0.2 + luck, lam) for lam in (0.1, 0.3, 1.0, 3.0, 10.0)
                 for seed, luck in enumerate(rng.normal(0, 0.02, 12))]
        gains = against_lambda0(table(rows))
        assert choosers(gains, ENDS) == [0, 1, 2, 3]
        gains.loc[gains.seed > 3, f"val_{U}"] += 100 * gains.lam  # those who are scored have no say
        found.append(at_best_lambda(gains, "per_class", ENDS, U))
    assert all(list(scored.index) == list(range(4, 12)) for scored in found)
    assert abs(np.mean(found)) < 2.5 * 0.02 / np.sqrt(8 * 30)  # +.007 where all seeds choose and are scored


def test_who_will_be_scored_does_not_choose_while_a_study_is_unfinished():
    rows = [(arm, lam, seed, 0.9, 0.2 + lam, 1.0) for arm, lam in (("lambda0", 0), ("per_class", 0.1))
            for seed in range(6)]
    gains, study_of_30 = against_lambda0(table(rows)), ENDS._replace(seeds=tuple(range(30)))
    assert choosers(gains, ENDS) == [0, 1] and choosers(gains, study_of_30) == [0, 1, 2, 3, 4, 5]
    assert best_lambda(gains, "per_class", study_of_30) == 0.1
    assert not len(at_best_lambda(gains, "per_class", study_of_30, U))
    assert waiting(gains, "per_class", study_of_30)  # for seeds 6 to 9
    assert not waiting(gains, "per_class", ENDS._replace(seeds=tuple(range(18))))


def test_means_are_over_the_same_seeds():
    rows = [("lambda0", 0, seed, 0.9, 0.2, math.nan) for seed in range(3)]
    rows += [("per_class", lam, seed, 0.9, 0.2, 1.0) for lam in (0.1, 1.0) for seed in range(3)]
    rows += [("class_mean", 0.1, seed, 0.9, 0.2, 1.0) for seed in range(2)]
    found = whole(against_lambda0(table(rows[:-3] + rows[-2:])))  # per_class at 1 lacks a seed, too
    assert set(zip(found.arm, found.lam)) == {("per_class", 0.1)} and n_seeds(found) == 3


def test_curves_are_compared_where_both_run():
    a = np.array([0.0, 2.0]), np.array([0.0, 2.0])  # y = x
    b = np.array([1.0, 2.0, 3.0]), np.array([0.0, 0.0, 9.0])
    assert mean_distance(a, b) == pytest.approx(1.5)  # the mean of x from 1 to 2
    assert mean_distance(b, a) == pytest.approx(-1.5)
    assert math.isnan(mean_distance(a, (np.array([2.0, 3.0]), np.zeros(2))))


def test_equal_pull_is_on_a_logarithmic_scale():
    rows = [("lambda0", 0, 1, 0.9, 0.1, math.nan)]
    rows += [("per_example", lam, 1, 0.9, y, pull) for lam, y, pull in ((1, 0.1, 1.0), (10, 0.3, 10.0))]
    rows += [("random_latents", lam, 1, 0.9, 0.1, pull) for lam, pull in ((1, 10**0.5), (10, 100.0))]
    rows += [("per_example", 1, 2, 0.9, 0.1, 1.0)]  # one point is no curve
    found = at_equal_pull(table(rows), "per_example", "random_latents", U)
    assert found.to_dict() == pytest.approx({1: 0.15})  # mean of .1 and .2 above random_latents


def test_scores_come_back_from_their_table(tmp_path):
    rows = [("lambda0", 0, 1, 0.9, 0.1, math.nan), ("per_class", 0.3, 1, 0.85, 1 / 3, 2.5)]
    scores, path = table(rows), tmp_path / "scores.csv"
    about = {"study": "paper", "registration": None, "seeds": [1], "finished": 2, "total": 3}
    write_scores(path, scores, [ACCURACY, U], about)
    ends = Endpoints({U: 0.01}, {ACCURACY: 0.005})
    found, of = read_scores(path, ends.columns)
    assert of == about
    pandas.testing.assert_frame_equal(found, scores[list(found)], rtol=1e-5)
    whole_file = path.read_text()
    header, _, rows = whole_file.partition("\n")
    for text in ("", rows, f"{{}}\n{rows}", f"{header}\n", f"{header}\narm\nper_class\n",
                 whole_file.replace("0.85", "much"), whole_file.replace("0.3,1,", "0.3,1.5,")):
        assert text != whole_file
        path.write_text(text)
        with pytest.raises(InputError, match="scores.csv is damaged"):
            read_scores(path, ends.columns)


def judged(gain, accuracy=0.9, control=0.0):
    """A study of 15 seeds in which per_class gains `gain` in U on average, and the control `control`."""
    rows = []
    for seed in range(15):
        noise = 0.001 * (-1) ** seed
        rows.append(("lambda0", 0, seed, 0.9, 0.2, math.nan))
        rows.append(("per_class", 1.0, seed, accuracy, 0.2 + gain + noise, 1.0))
        rows.append(("class_mean", 1.0, seed, 0.9, 0.2 + control + 2 * noise, 1.0))
    scores = table(rows)
    tests = judge(scores, ENDS)
    return scores, tests, tests[tests.metric == U].iloc[0].answer


def test_the_answers_follow_from_intervals():
    assert judged(0.05)[2] == "raises" and judged(-0.05)[2] == "lowers" and judged(0.002)[2] == "no effect"
    few = pandas.Series({"n": 3, "low": 0.1, "high": 0.2, "p_holm": 0.001})
    wide = pandas.Series({"n": 30, "low": -0.1, "high": 0.2, "p_holm": 0.5})
    assert answer(few, 0.01) == answer(wide, 0.01) == "not decided"
    assert len(hypotheses(ENDS)) == 16


@pytest.mark.parametrize("gain, control, within, wins", [
    (0.05, 0.01, 0.8, True), (0.05, 0.05, 0.8, False), (0.0, 0.0, 0.8, False), (0.05, 0.01, 0.7, False)])
def test_success_needs_every_control_beaten_and_nothing_lost(gain, control, within, wins):
    scores, _, _ = judged(gain, control=control)
    for split in ("val", "test"):
        scores.loc[scores.arm == "per_class", f"{split}_base_probe_within_accuracy"] = within
    tests = judge(scores, ENDS)
    assert succeeds(scores, tests, ENDS, "per_class") is wins
    lines = sentences(scores, tests, ENDS, "all of it")
    assert len(lines) == 5 and ("helps: per_class." in lines[4]) is wins
    assert "per_class beats class_mean" in lines[2] or gain == control
    unfinished = scores[(scores.arm != "class_mean") | (scores.seed < 5)]  # the control has chosen, and is not scored
    for rest in (unfinished, scores[scores.arm != "class_mean"]):
        assert not succeeds(rest, tests, ENDS._replace(seeds=tuple(range(15))), "per_class")


def test_controls_without_a_lambda_are_named():
    """Where per_class has no lambda that keeps the accuracy, the other form of it is compared, or none."""
    scores, _, _ = judged(0.05, accuracy=0.5)
    second = scores[scores.arm == "class_mean"].assign(arm="per_class@25")
    for arms, said in (([scores, second], "per_class@25 is not told apart from class_mean."),
                       ([scores[scores.arm != "class_mean"]], "there are none.")):
        some = pandas.concat(arms)
        assert said in sentences(some, judge(some, ENDS), ENDS, "all of it")[2]
    some = pandas.concat([scores.assign(test_task_accuracy=0.5, val_task_accuracy=0.5)[scores.arm == "class_mean"],
                          scores[scores.arm == "lambda0"], second.assign(arm="per_class")])
    assert "no lambda keeps what is to be kept in class_mean." in sentences(some, judge(some, ENDS), ENDS, "")[2]


@pytest.mark.parametrize("name, method", [
    ("paper_25", "Probe within a class on base units not decided (+0.0096 [-0.0017, +0.0208], Holm p 0.121)"),
    ("paper", "Probe within a class on base units raises (+0.0114 [+0.0041, +0.0186], Holm p 0.011)"),
    ("few", "raises (+0.0259 [+0.0090, +0.0428], Holm p 0.018)"),
    ("noise", "no effect (+0.0029 [+0.0016, +0.0042], Holm p 0.002)"),
    ("shortcut", "not decided (-0.0225 [-0.0455, +0.0004], Holm p 0.160)"),
])
def test_the_published_scores_give_the_published_verdict(name, method):
    study = name.removesuffix("_25")
    endpoints = Endpoints(*ENDPOINTS[study])
    scores, about = read_scores(PROJECT / f"experiments/sae_ception/results/{name}.csv", endpoints.columns)
    assert about["study"] == study and len(scores) == about["finished"] == about["total"]
    endpoints = endpoints._replace(seeds=tuple(about["seeds"]))
    lines = sentences(scores, judge(scores, endpoints), endpoints, "all of it")
    assert method in lines[1] and lines[4].endswith("no variant of SAE-ception is shown to help.")


@pytest.mark.parametrize("step, own, setting, kind, code", [
    ("07_run_study.py", "STUDY=digits", "study_digits", signal.SIGKILL, -9),
    ("04_train_cycle.py", "PRESET=mlp_digits", "mlp_digits", signal.SIGINT, 130),
])
def test_processes_of_a_run_that_is_stopped_end(own_store, step, own, setting, kind, code):
    command = [sys.executable, str(PROJECT / "experiments/sae_ception" / step), own, "SEEDS=1,2", "WORKERS=2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=lambda:
                               signal.signal(signal.SIGINT, signal.default_int_handler))
    try:
        wait_until(lambda: [*own_store.glob(f"*/{setting}/baseline/seed_1")])  # a worker is at work
        process.send_signal(kind)
        assert process.wait(30) == code
        wait_until(lambda: not alive(process.pid))
        assert kind != signal.SIGINT or "rerun the same command" in process.stderr.read()
    finally:
        if alive(process.pid):
            os.killpg(process.pid, signal.SIGKILL)


def test_a_process_that_is_killed_ends_the_run_in_one_line(own_store):
    command = [sys.executable, str(PROJECT / "experiments/sae_ception/04_train_cycle.py"), "PRESET=mlp_digits",
               "SEEDS=1,2", "WORKERS=2"]
    holder = own_store / "sae_ception/mlp_digits/baseline/seed_1/.lock"
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        wait_until(lambda: holder.exists() and holder.read_text())
        os.kill(int(holder.read_text()), signal.SIGKILL)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 2 and "error: a process of WORKERS was killed" in said and "Traceback" not in said
    wait_until(lambda: not alive(process.pid))


def test_processes_give_the_scores_of_one(script, own_store):  # noqa: F811
    """Each has as many threads as the one, so the scores are the same to the last digit."""
    given = ["PRESET=mlp_digits", "SEEDS=1,2", "ARMS=lambda0,per_class", "EPOCHS_PER_CYCLE=1", "SAE_EPOCHS=1",
             "PROBE_LIMIT=100", "EVAL_LIMIT=100", "METRICS=()", "CYCLES=1"]
    with_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for n in (1, 2):
            printed = script("04_train_cycle.py", *given, f"WORKERS={n}", f"SETTING=with_{n}")[1]
            assert ("2 seeds in 2 processes" in printed) is (n == 2)
            assert "per_class seed 2 cycle 1: SAE validation EV" in printed
    finally:
        torch.set_num_threads(with_threads)
    one, two = ((own_store / f"sae_ception/with_{n}/results.csv").read_text().replace(f"with_{n}", "") for n in (1, 2))
    assert one == two and one.count("per_class") > 20


def alive(group):
    """Whether any process of this group lives."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until(happens, seconds=120):
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_every_arm_has_a_look_of_its_own():
    assert len({tuple(look(arm).values()) for arm in ARMS}) == len(ARMS)
    assert colour("per_class@25") == colour("per_class") and title("per_class@25") == "per class (25)"


def test_the_scripts_on_a_small_study(script, monkeypatch, own_store):  # noqa: F811
    given = ["STUDY=digits", "SETTING=try", "SEEDS=1,2", "LAMBDAS=1", "ARMS=lambda0,per_class", "EPOCHS_PER_CYCLE=1",
             "SAE_EPOCHS=1", "PROBE_LIMIT=100", "EVAL_LIMIT=100", "N_SAE_SEEDS=1", "ARM_CONSTANTS={}"]
    assert "08_judge_study.py" in script("07_run_study.py", *given, "WORKERS=1")[1]
    _, out, _ = script("08_judge_study.py", "STUDY=digits", "SETTING=try")
    assert "complete, 4 of 4 results, exploratory" in out and "no variant of SAE-ception" in out
    root = own_store / "sae_ception" / "try" / "study"
    assert (root / "frontier.png").stat().st_size > 10_000 and (root / "verdict.md").exists()
    code, _, said = script("07_run_study.py", *given, "TOP_K=4", ok=False)
    assert code == 2 and "TOP_K was 8, is 4); set SETTING" in said
    code, _, said = script("07_run_study.py", *given[:1], "SETTING=other", "REGISTRATION=abc1234", ok=False)
    assert code == 2 and "not at REGISTRATION=abc1234" in said
    (root / "seed_2" / "per_class@l1.json").unlink()
    assert "INCOMPLETE, 3 of 4" in script("08_judge_study.py", "STUDY=digits", "SETTING=try")[1]
    (root / "seed_1" / "lambda0.json").unlink()
    (root / "seed_2" / "lambda0.json").unlink()
    code, _, said = script("08_judge_study.py", "STUDY=digits", "SETTING=try", ok=False)
    assert code == 2 and "no result of lambda0 yet" in said
