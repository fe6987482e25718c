"""The leaderboard: runs grouped over seeds, intervals, who passed what was published, and a figure of it."""
import sys

import pytest
from conftest import PROJECT

from lib.environment import InputError
from lib.files import write_json

FOLDER = PROJECT / "experiments" / "benchmarks"
POINT = {"seconds": 60.0, "cpu_seconds": 100.0, "unique": 0.9, "how": {"n": 1024}, "chosen": {}}


@pytest.fixture
def board(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import leaderboard

    return leaderboard


def scores(f1, mcc, samples, l0=25.0):
    found = {"f1": f1, "precision": f1, "recall": f1, "l0": l0, "ev": 0.8, "dead_pct": 0.0}
    return POINT | {"samples": samples, "mcc": mcc, "seconds": samples / 1e4,
                    "scores": {"own": found, "threshold 25": found}}


def report(seed, points, script="05_synth_sae_bench.py", **constants):
    from lib.constants import constants_of

    known = constants_of(FOLDER / script)["CONSTANTS"] | {"SEED": seed, **constants}
    known = {name: list(value) if isinstance(value, tuple) else value for name, value in known.items()}
    return {"script": script, "constants": known, "machine": "a | b", "commits": ["abc"], "date": "2026-01-01",
            "points": points}


@pytest.fixture
def reports():
    long = {"N_SAMPLES": 2_000_384}
    return [report(0, [scores(0.7, 0.7, 1_000_448), scores(0.9, 0.8, 2_000_896)], **long),
            report(1, [scores(0.72, 0.72, 1_000_448), scores(0.92, 0.84, 2_000_896)], **long),
            report(0, [scores(0.5, 0.5, 1_000_448)], LR=3e-4, N_SAMPLES=200_000_000, SCALED=False),
            report(0, [scores(0.74, 0.76, 2_000_896)], script="06_saelens_on_synth.py", KIND="matryoshka")]


def test_rows_are_groups_over_seeds_with_intervals(board, reports):
    found = board.table(board.groups_of(reports), ["own", "batch 25"])
    ours = found[found["what"] == "topk, k 60 to 25, children scaled, 2M samples"].iloc[0]
    assert ours["F1"] == ".910 ± .127" and ours["MCC"] == ".820 ± .254" and ours["seeds"] == 2  # t(1) = 12.7, sd .0141
    assert ours["samples"] == "2M" and ours["command"] == "`05_synth_sae_bench.py N_SAMPLES=2000384 SEED=0 ... 1`"
    other = found[found["what"].str.contains("rate")].iloc[0]
    assert other["what"] == "topk, k 60 to 25, rate 0.0003, children not scaled, 200M samples" and other["F1"] == ".500"
    assert other["samples"] == "1M of 200M"
    assert other["command"] == "`05_synth_sae_bench.py N_SAMPLES=200000000 LR=0.0003 SCALED=False SEED=0`"
    assert list(found["F1"]) == sorted(found["F1"], key=lambda text: -float(text.split()[0]))
    assert len(found) == 3 + len(board.PUBLISHED) and "SAELens' matryoshka, children scaled" in set(found["what"])
    text = board.markdown(found)
    assert "a \\| b" in text and len(text.splitlines()) == 2 + len(found)


def test_a_kind_that_changed_between_two_seeds_is_another_row(board, reports):
    old, new = reports[0], reports[1] | {"kind_numbers": {"ridge": 0.05, "revive": 0.5}}
    assert [len(group.reports) for group in board.groups_of([old, new])] == [1, 1]
    again = new | {"kind_numbers": {"ridge": 0.1, "revive": 0.5}}
    assert len(board.groups_of([new, again])) == 2 and len(board.groups_of([new, new])) == 1


def test_codes_outside_the_protocols_l0_have_no_row(board):
    for l0, n in ((14.0, 0), (14.6, 1), (45.4, 1), (1400.0, 0)):
        (group,) = board.groups_of([report(0, [scores(0.2, 0.1, 1_000_448, l0)])])
        assert len(board.rows_of(group, ["own"])) == n


def test_who_passed_a_published_row_and_after_how_many_samples(board, reports):
    found = board.reached(board.groups_of(reports), "threshold 25", 25)
    rows = {(row["published"].split(":")[0], row["passed by"]): row["after"] for _, row in found.iterrows()}
    ours = "topk, k 60 to 25, children scaled, 2M samples"
    assert rows["Matryoshka", ours] == rows["BatchTopK", ours] == "2M samples"
    assert rows["standard (L1)", ours] == "1M samples" and ("LISTA-Matryoshka", ours) not in rows
    assert rows["BatchTopK", "SAELens' matryoshka, children scaled"] == "2M samples"
    assert not any("not scaled" in by for _, by in rows)


def test_seeds_that_stand_elsewhere_are_compared_where_all_have_a_point(board, reports):
    for each in reports[:2]:
        each["constants"]["N_SAMPLES"] = 5_000_000
    reports[1]["points"].pop()
    (group,) = (group for group in board.groups_of(reports) if len(group.reports) == 2)
    assert list(group.curve) == [1_000_448] and board.rows_of(group, ["own"])[0]["samples"] == "1M of 5M"
    reports[1]["points"] = [scores(0.1, 0.1, 5)]
    (group,) = (group for group in board.groups_of(reports) if len(group.reports) == 2)
    assert board.rows_of(group, ["own"]) == []


def test_a_run_that_has_just_begun_hides_no_finished_one(board, reports):
    reports[1]["points"].pop()
    (group,) = (group for group in board.groups_of(reports) if "2M samples" in group.what)
    row = board.rows_of(group, ["own"])[0]
    assert (row["samples"], row["seeds"], row["F1"]) == ("2M", 1, ".900") and row["command"].endswith("SEED=0`")


def test_the_script_prints_tables_and_draws(forks, reports, own_store, tmp_path):
    script = [str(FOLDER.relative_to(PROJECT) / "07_show_leaderboard.py")]
    ended = forks.run(script, own_store)
    assert ended.code == 0 and "| conditional 25 |" in ended.said, ended.said  # the published runs
    for number, each in enumerate(reports):
        write_json(own_store / "benchmarks" / "synth_sae_bench" / str(number) / "report.json", each)
    ended = forks.run(script, own_store)
    assert ended.code == 0 and "| .910 ± .127 |" in ended.said, ended.said
    assert (own_store / "benchmarks" / "learning_curves.png").stat().st_size > 10_000


def test_a_run_of_ones_own_takes_the_place_of_the_published_one(monkeypatch, tmp_path, reports):
    monkeypatch.syspath_prepend(str(FOLDER))
    sys.modules.pop("synth_reports", None)
    from synth_reports import read_reports

    for folder, name, each in (("a", "x", 0), ("b", "x", 1), ("a", "y", 2)):
        write_json(tmp_path / folder / name / "report.json", reports[each])
    found = read_reports(tmp_path / "a", tmp_path / "b")
    assert [each["constants"]["SEED"] for each in found] == [1, 0] and found[1]["constants"]["LR"] == 3e-4


def test_a_damaged_report_is_named(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(FOLDER))
    sys.modules.pop("synth_reports", None)
    from synth_reports import read_reports

    write_json(tmp_path / "run" / "report.json", {"script": "05_synth_sae_bench.py", "points": []})
    with pytest.raises(InputError, match=r"report.json is damaged: .*; delete it"):
        read_reports(tmp_path)
