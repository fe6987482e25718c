"""The example of a cluster's job fits the scripts, and the plan's arithmetic is what it says."""
import re
import subprocess
from pathlib import Path

import pytest
from conftest import PROJECT

from lib.constants import constants_of

ROOM = PROJECT / "experiments" / "at_scale"
JOB = ROOM / "slurm.sh"
MEASURED = {"models": {"bielik_1.5b": {"tokens_per_s": 200.0}},
            "saes": [{"tokens_per_s": 5000.0, "width": 1536, "n_latents": 6144}],
            "host": {"tokenising": 4e-6, "saving": 40e-6, "reading": 2e-6, "whitening": 90e-6}}


def asked(name: str) -> int:
    """The number that the job asks the scheduler for."""
    return int(re.findall(rf"^#SBATCH --{name}=(\d+)$", JOB.read_text(), flags=re.MULTILINE)[0])


def steps() -> list[tuple[Path, list[str]]]:
    """Each step's script and constants."""
    lines = [line.split()[1:] for line in JOB.read_text().splitlines() if line.startswith("step ")]
    return [(PROJECT / "experiments" / "verify_sae_training" / script, constants) for script, *constants in lines]


def test_the_job_is_bash():
    subprocess.run(["bash", "-n", str(JOB)], check=True)


def test_the_job_names_constants_that_its_scripts_have_with_values_in_their_ranges():
    found = {script.name: constants_of(script, constants)["CONSTANTS"] for script, constants in steps()}
    save, train = found["01_save_activations.py"], found["02_train_sae.py"]
    assert save["STREAM"] and save["MAX_NORM_MULTIPLE"] is None  # one process only
    n_gpus = asked("nodes") * asked("gpus-per-node")
    assert train["BATCH_SIZE_TRAIN"] % n_gpus == 0 and train["BATCH_SIZE_TRAIN"] >= 256 * n_gpus
    assert train["KIND"] == "topk"


@pytest.mark.parametrize("wrong", ["EPOKS=1", "BATCH_SIZE_TRAIN=0", "PRESET=bielick"])
def test_a_wrong_constant_in_the_job_would_be_seen(wrong, capsys):
    with pytest.raises(SystemExit):
        constants_of(steps()[1][0], [wrong])


def test_one_launcher_on_each_node_starts_a_process_for_each_of_its_gpus(tmp_path):
    """The commands that srun gets, from a srun that only prints them."""
    assert asked("ntasks-per-node") == 1 and asked("cpus-per-task") >= asked("gpus-per-node")
    for name, body in {"srun": 'echo "threads=$OMP_NUM_THREADS $*"', "scontrol": "printf 'one\\ntwo\\n'"}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "STORE_DIR": str(tmp_path), "SLURM_SUBMIT_DIR": str(PROJECT),
                   "SLURM_NNODES": str(asked("nodes")), "SLURM_GPUS_ON_NODE": str(asked("gpus-per-node")),
                   "SLURM_CPUS_PER_TASK": str(asked("cpus-per-task")), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n"}
    done = subprocess.run(["bash", str(JOB)], env=environment, capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    for line in first, second:
        assert line.startswith(f"threads={asked('cpus-per-task') // asked('gpus-per-node')} torchrun --nnodes "
                               f"{asked('nodes')} --nproc-per-node {asked('gpus-per-node')} ")
        assert "--rdzv-endpoint one:29500 0" in line
    del environment["STORE_DIR"]
    assert subprocess.run(["bash", str(JOB)], env=environment, capture_output=True).returncode


@pytest.fixture(scope="module")
def plan():
    return planned()


def planned(*arguments):
    """The functions of 02_plan.py with these constants."""
    source = ROOM / "02_plan.py"
    namespace = constants_of(source, list(arguments)) | {"__name__": "plan"}
    exec(compile(source.read_text().partition("CONSTANTS = override(globals())")[2], str(source), "exec"), namespace)
    return namespace


def test_one_gpu_costs_operations_over_peak_or_bytes_over_bandwidth(plan):
    gpu = plan["on_gpus"](MEASURED, 1)
    assert gpu["model pass"] == pytest.approx(1.6e9 / 9.89e14 / 0.4)
    sweep = 32 * 2 * 4 * 1536**2 / 3.35e12 / 4096  # the weights' way through memory is longer than the products
    assert gpu["SAE step"] == pytest.approx(sweep / 0.3) and sweep > 2 * 4 * 1536**2 / 9.89e14
    assert gpu["saving"] == pytest.approx(40e-6) and gpu["tokenising"] == pytest.approx(4e-6)


def test_what_is_shared_out_falls_with_the_gpus_and_a_step_over_all_weights_does_not(plan):
    one, node, many = (plan["on_gpus"](MEASURED, n) for n in (1, 8, 800))
    for stage in ("tokenising", "model pass", "whitening"):
        assert one[stage] / node[stage] == pytest.approx(8) and one[stage] / many[stage] == pytest.approx(800)
    assert node["saving"] == pytest.approx(40e-6 / 8) and many["saving"] == pytest.approx(40e-6 / 800)
    assert many["SAE step"] > node["SAE step"]  # the batch does not grow, and the network is slower


def test_this_machine_is_what_was_measured_and_wider_models_are_scaled(plan):
    here = plan["here"](MEASURED)
    assert here == pytest.approx(MEASURED["host"] | {"model pass": 1 / 200, "SAE step": 1 / 5000})
    wide = plan["here"](MEASURED, 4096)
    assert wide["model pass"] == pytest.approx(8 / 1.6 / 200) and wide["reading"] == pytest.approx(2e-6 * 8 / 3)
    assert wide["SAE step"] == pytest.approx((8 / 3) ** 2 / 5000)
    assert planned("N_LATENTS_MULTIPLIER=32")["here"](MEASURED)["SAE step"] == pytest.approx(8 / 5000)


@pytest.mark.parametrize("seconds, words", [(0.5, "0.5 s"), (119, "119 s"), (600, "10.0 min"), (86400 * 400, "400 d"),
                                            (86400 * 365 * 30, "30 years")])
def test_durations_in_words(plan, seconds, words):
    assert plan["duration"](seconds) == words


def test_what_a_token_costs_beside_the_model_is_told_without_what_is_no_time(monkeypatch):
    """A peak below 1 GB once stood among the microseconds, times a million."""
    monkeypatch.syspath_prepend(str(ROOM))
    from host_stages import in_microseconds

    found = MEASURED["host"] | {"rows": 0.5, "peak_gb": 0.7}
    assert in_microseconds(found) == "tokenising 4, saving 40, reading 2, whitening 90"
