"""The driver of SynthSAEBench on a small world: stopped at any moment it ends with the same weights and scores."""
import importlib.util
import json
import os
import signal
import sys
from functools import partial

import pytest
import torch
from conftest import PROJECT
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize

FOLDER = PROJECT / "experiments" / "benchmarks"
SMALL = ["N_SAMPLES=6400", "N_LATENTS=24", "TOP_K=3", "START_K=6", "BATCH_SIZE=64", "N_SCORED=2048", "N_CURVE=1024",
         "AT_L0=2,4"]


def small_world(path):
    """60 features in 12 dimensions: 4 roots with 3 children each, 44 others."""
    g = torch.Generator().manual_seed(0)
    n, width, parent = 60, 12, torch.full((60,), -1)
    parent[4:16] = torch.arange(4).repeat_interleave(3)
    factor = 0.2 * torch.randn(n, 3, generator=g)
    p = torch.cat([torch.full((4,), 0.3), torch.full((12,), 0.5), torch.logspace(-1, -2.5, 44)])
    world = {"features": normalize(torch.randn(n, width, generator=g), dim=1), "bias": torch.randn(width, generator=g),
             "factor": factor, "spread": (1 - factor.square().sum(1)).sqrt(), "threshold": -torch.special.ndtri(p),
             "mean": 3 + torch.rand(n, generator=g), "std": torch.rand(n, generator=g), "parent": parent}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(world, path)


@pytest.fixture
def bench(monkeypatch, own_store):
    """bench(*arguments): the script as a module, with its constants; a small world is in the store."""
    monkeypatch.syspath_prepend(str(FOLDER))
    small_world(own_store / "benchmarks" / "synth_world.safetensors")

    def load(*arguments, script="05_synth_sae_bench.py", common=SMALL):
        spec = importlib.util.spec_from_file_location("synth_bench", FOLDER / script)
        module = importlib.util.module_from_spec(spec)
        module.__dict__["__arguments__"] = [*common, *arguments]
        spec.loader.exec_module(module)
        return module

    return load


def left_in(store):
    (folder,) = (store / "benchmarks" / "synth_sae_bench").iterdir()
    report = json.loads((folder / "report.json").read_text()) if (folder / "report.json").exists() else None
    return load_file(folder / "state.safetensors"), report


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def without_times(report):
    return [{name: value for name, value in point.items() if "seconds" not in name} for point in report["points"]]


@pytest.fixture
def whole(bench, own_store, tmp_path):
    """What an undisturbed run leaves."""
    bench().main()
    found = left_in(own_store)
    (own_store / "benchmarks" / "synth_sae_bench").rename(tmp_path / "whole")
    return found


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, "between"])
def test_a_stopped_run_ends_with_the_same_weights_and_scores(bench, own_store, whole, monkeypatch, how):
    for stop_at in (3, 40, 41):
        script = bench()
        monkeypatch.setattr(script, "SAVE_SECONDS", 0.0)

        def stopping(state, *values, original=script.fast_step, stop_at=stop_at, **settings):
            if how == "between" and int(state["step"]) == stop_at:
                raise ZeroDivisionError  # as if killed: nothing is saved any more
            original(state, *values, **settings)
            if how != "between" and int(state["step"]) == stop_at:
                os.kill(os.getpid(), how)

        monkeypatch.setattr(script, "fast_step", stopping)
        with pytest.raises((KeyboardInterrupt, ZeroDivisionError)):
            script.main()
        assert int(left_in(own_store)[0]["step"]) == stop_at
    bench().main()
    state, report = left_in(own_store)
    assert same(state, whole[0]) and without_times(report) == without_times(whole[1])
    assert [point["samples"] for point in report["points"]] == [6400]


def test_a_run_killed_while_it_scores_scores_when_it_resumes(bench, own_store, whole, monkeypatch):
    script = bench()
    monkeypatch.setattr(script, "MILESTONES", [3200])
    monkeypatch.setattr(script, "score_sae", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        script.main()
    again = bench()
    monkeypatch.setattr(again, "MILESTONES", [3200])
    again.main()
    state, report = left_in(own_store)
    assert [point["samples"] for point in report["points"]] == [3200, 6400] and same(state, whole[0])
    assert [point["how"]["n"] for point in report["points"]] == [1024, 2048]


def test_scores_are_made_again_where_they_are_asked_for_otherwise(bench, own_store, whole, monkeypatch):
    bench().main()
    again = bench("AT_L0=5,")
    monkeypatch.setattr(again, "fast_step", None)  # nothing is trained
    import synth_reports
    monkeypatch.setattr(synth_reports, "machine", lambda: "another machine")
    trained_on = left_in(own_store)[1]["machine"]
    again.main()
    state, report = left_in(own_store)
    assert same(state, whole[0]) and len(report["points"]) == 1
    assert list(report["points"][0]["scores"]) == ["own", "threshold 5", "pruned 5", "odds 5", "conditional 5",
                                                     "even odds", "even conditional"]
    assert report["machine"] == trained_on != "another machine" and report["machines"] == [trained_on]
    note, older = {"commits": [], "machines": []}, own_store / "older.json"  # a run of before machines were noted
    older.write_text(json.dumps({name: value for name, value in report.items() if name != "machines"}))
    synth_reports.note_who_trains(note, older, steps_left=False)
    assert note == {"commits": [], "machines": [trained_on]}
    synth_reports.note_who_trains(note, older, steps_left=True)
    assert note["machines"] == [trained_on, "another machine"]


def test_saelens_scores_are_made_again_where_they_are_asked_for_otherwise(bench):
    made = {"samples": 6400, "seconds": 0.0, "points": []}
    load = partial(bench, script="06_saelens_on_synth.py", common=["N_SAMPLES=6400", "BATCH_SIZE=64", "N_SCORED=2048"])
    how = load().unscored(made)
    made["points"] = [{"samples": 6400, "how": how}]
    assert how["n"] == 2048 and load().unscored(made) is None
    for given in ("AT_L0=5,", "PRUNE_FROM=3", "CONDITION_FROM=4"):
        assert load(given).unscored(made)["n"] == 2048


def test_wrong_constants_are_refused(bench):
    from lib.environment import InputError

    with pytest.raises(InputError, match="must be at most N_LATENTS=24"):
        bench("TOP_K=25").main()


@pytest.mark.parametrize("kind", ["batchtopk", "jumprelu", "matryoshka"])
def test_every_kind_trains_and_is_scored(bench, own_store, kind):
    bench(f"KIND={kind}", "N_SAMPLES=640", "WHITEN=0").main()
    _, report = left_in(own_store)
    scores = report["points"][0]["scores"]
    assert {"own", "threshold 2", "pruned 4"} <= scores.keys() and ("batch 3" in scores) == (kind == "batchtopk")
    assert all(0 <= found["f1"] <= 1 for found in scores.values())
    assert report["kind_numbers"]["rate"] > 0
    assert sys.modules.get("synth_bench") is None


@pytest.mark.skipif(not (PROJECT / ".venv-peers" / "bin" / "python").exists(), reason="needs make peers")
def test_saelens_trains_on_our_samples_and_resumes(bench, own_store, tmp_path):
    """Twelve steps at once, and eight with four more: the same weights."""
    small = ["N_LATENTS=150", "TOP_K=3", *SMALL[4:], "KIND=matryoshka", "LR=0.01"]
    load = partial(bench, script="06_saelens_on_synth.py", common=small)
    runs = own_store / "benchmarks" / "synth_sae_bench"
    load("N_SAMPLES=768").main()
    runs.rename(tmp_path / "whole")
    load("N_SAMPLES=512").main()
    load("N_SAMPLES=768").main()
    weights = [load_file(next(folder.glob("*/checkpoint_768/weights.safetensors")))
               for folder in (runs, tmp_path / "whole")]
    assert same(*weights) and not list(runs.glob("*/checkpoint_512"))
    (folder,) = runs.iterdir()
    report = json.loads((folder / "report.json").read_text())
    assert [point["samples"] for point in report["points"]] == [512, 768]
    assert report["points"][1]["scores"]["batch 3"]["l0"] == pytest.approx(3)
