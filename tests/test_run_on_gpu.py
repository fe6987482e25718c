"""`make gpu` on a machine without a GPU: its arithmetic, its clock, its table, and that it says what it leaves out."""
import importlib.util
import json
import sys

import pytest
import torch
from conftest import PROJECT

FOLDER = PROJECT / "experiments" / "benchmarks"
sys.path.insert(0, str(FOLDER))

from gpu import clock, jobs, live, report, roofline  # noqa: E402

from lib.environment import InputError  # noqa: E402

H100 = roofline.known_peaks("NVIDIA H100 80GB HBM3, 79 GiB")
CPU = torch.device("cpu")
TINY = {"DEVICE": "cpu", "SHAPES": ((16, 32, 2),), "BATCHES": (64, 32), "KINDS": ("topk", "lista"), "SAVE_MODELS": (),
        "SECONDS": 0.001, "TESTS": False, "PEERS": ()}


def script(**constants):
    """08_run_on_gpu.py as a module, with these constants."""
    about = importlib.util.spec_from_file_location("run_on_gpu", FOLDER / "08_run_on_gpu.py")
    module = importlib.util.module_from_spec(about)
    about.loader.exec_module(module)
    vars(module).update(constants)
    return module


@pytest.mark.parametrize("shape, batch, millions", [
    ((2304, 65_536, 64), 1 << 14, 0.99), ((4096, 65_536, 64), 1 << 14, 0.56), ((4096, 131_072, 64), 1 << 14, 0.35),
    ((4096, 131_072, 64), 1 << 16, 0.41), ((768, 24_576, 32), 1 << 14, 7.0)])
def test_the_roofline_is_what_operations_and_bytes_come_to(shape, batch, millions):
    """Written out once more: 2 B F D operations at 690 TFLOP/s; 8 B k D and 52 F D bytes at 2.9 TB/s."""
    width, n_latents, k = shape
    seconds = 2 * batch * n_latents * width / 690e12 + (8 * batch * k * width + 52 * n_latents * width) / 2.9e12
    assert roofline.step_floor(width, n_latents, k, batch, peaks=H100) == pytest.approx(seconds)
    assert batch / seconds / 1e6 == pytest.approx(millions, rel=0.02)


def test_peaks_by_name_or_measured():
    assert H100 == roofline.Peaks(690e12, 2.9e12) and roofline.known_peaks("NVIDIA H200") == (690e12, 4.15e12)
    assert roofline.known_peaks("NVIDIA H100 PCIe") is None is roofline.known_peaks("cpu")
    measured = roofline.measured_peaks(CPU, seconds=0.01)
    assert 1e8 < measured.flops < 1e15 and 1e7 < measured.bytes_per_s < 1e13


def test_the_clock_counts_the_steps_after_those_that_warm_up(monkeypatch):
    now, seen = [0.0], []
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])

    def step(i):
        seen.append(i)
        now[0] += 9.0 if i < clock.WARM_UP - 1 else 5.0 if i == clock.WARM_UP + 1 else 0.5

    timed = clock.time_steps(step, CPU, seconds=4)
    assert seen == list(range(clock.WARM_UP + 8)) and timed.n_steps == 8
    assert (timed.seconds, timed.fastest, timed.slowest, timed.host_seconds) == (0.5, 0.5, 5.0, 0.5)
    assert timed.peak_bytes is None
    assert clock.time_steps(step, CPU, seconds=0).n_steps == clock.FEWEST
    assert clock.time_steps(step, CPU, seconds=1e9).n_steps == clock.MOST


def test_a_trainer_in_a_process_is_timed_or_ended():
    options = {"device": CPU, "seconds": 0.01, "peaks": H100}
    found = jobs.time_peer("ours", (16, 32, 2), 64, limit=120, **options)
    assert found["tokens_per_s"] == pytest.approx(64 / found["seconds"]) and 0 < found["of_roofline"] < 1
    with pytest.raises(InputError, match="ours ended with code -9"):
        jobs.time_peer("ours", (16, 32, 2), 64, limit=0.01, **options)


def test_a_live_training_is_timed_by_the_difference_of_two(tmp_path, monkeypatch):
    run_step, seconds = live._run, iter([9.0, 5.0, 8.0])
    monkeypatch.setattr(live, "_run", lambda *step, **constants: (run_step(*step, **constants), next(seconds))[1])
    found = live.time_live("tiny", (600, 1800), CPU, multiplier=2, k=4, batch=64, buffer_tokens=300)
    assert (found["seconds"], found["tokens_per_s"], found["seconds_of_each"]) == (3.0, 400.0, [5.0, 8.0])
    monkeypatch.setattr(live, "_run", lambda *step, **constants: 5.0)
    with pytest.raises(InputError, match="took no longer"):
        live.time_live("tiny", (600, 1800), CPU)
    monkeypatch.undo()
    with pytest.raises(InputError, match="02_train_sae.py ended with code 2: .*TOP_K"):
        live._run(tmp_path, "02_train_sae.py", TOP_K=0)


def test_without_a_gpu_it_says_so_in_one_line(monkeypatch, capsys, own_store):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    script().main()
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and said.startswith("no GPU that torch can use") and not own_store.exists()


def test_on_a_cpu_everything_is_timed_and_told(capsys, own_store):
    script(**TINY).main()
    found = json.loads((own_store / "benchmarks" / "gpu.json").read_text())
    assert [(each["what"], each["who"]) for each in found["results"]] == [
        ("step (16, 32, 2), batch 64", "ours, topk"), ("step (16, 32, 2), batch 32", "ours, topk"),
        ("step (16, 32, 2), batch 64", "ours, lista")]
    assert all(each["tokens_per_s"] > 0 and each["kernels"] for each in found["results"])
    assert found["peaks"]["source"] == "measured" and found["measured_peaks"]["flops"] > 0
    assert found["machine"]["torch"] == torch.__version__ and {"driver", "commit"} <= found["machine"].keys()
    page = (own_store / "benchmarks" / "gpu.md").read_text()
    assert page == report.page(found) and page in capsys.readouterr().out
    for each in found["results"]:
        assert f"| {each['what']} | {each['who']} | {each['tokens_per_s']:,.0f} |" in page


def test_what_has_no_time_or_fails_is_told_and_the_rest_goes_on(monkeypatch, own_store):
    tried = script(**TINY)
    outcomes = iter([torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("no kernel\nmore"), None])

    def timed(*arguments, **options):
        if error := next(outcomes):
            raise error
        return {"seconds": 0.5, "tokens_per_s": 128.0, "of_roofline": 0.25, "peak_bytes": 2 * 10**9}

    monkeypatch.setattr(tried, "time_sae", timed)
    with pytest.raises(SystemExit):
        tried.main()
    page = (own_store / "benchmarks" / "gpu.md").read_text()
    assert "| ours, topk | out of memory |" in page and "| ours, topk | failed: no kernel |" in page
    assert "| step (16, 32, 2), batch 64 | ours, lista | 128 | 500.00 |  | 25 % | 2.0 |" in page
    script(**TINY, BUDGET_SECONDS=1.0).main()
    assert (own_store / "benchmarks" / "gpu.md").read_text().count("| left out: no time |") == 3


def test_the_tests_are_those_marked_gpu():
    """Each is skipped, or does what it does where there is a GPU."""
    found = script().run_tests(300)
    assert found["code"] == 0 and "deselected" in found["said"]
    assert "skipped" in found["said"] or torch.cuda.is_available()


def test_the_tests_come_first_and_their_failure_is_the_exit_code(monkeypatch, own_store):
    tried = script(**TINY | {"TESTS": True}, BUDGET_SECONDS=1.0)
    monkeypatch.setattr(tried, "run_tests", lambda seconds: {"code": 1, "said": "1 failed, 2 passed"})
    with pytest.raises(SystemExit):
        tried.main()
    assert "- tests: 1 failed, 2 passed" in (own_store / "benchmarks" / "gpu.md").read_text()
