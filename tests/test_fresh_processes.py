"""Every script and notebook as a user starts it: an interpreter or a kernel of its own, imports in its own order,
smallest settings.

The chains run side by side, once; a test looks at what became of each step.
"""
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import PROJECT
from forked import BASELINE, SAE, SAVE, STORIES, TRAIN
from forked import MODEL as STORY_MODEL

VERIFY, CEPTION, BENCHMARKS, SCALE = (f"experiments/{name}"
                                      for name in ("verify_sae_training", "sae_ception", "benchmarks", "at_scale"))
DIGITS = ["PRESET=mlp_digits", "CYCLES=1", "EPOCHS_PER_CYCLE=1", "SAE_EPOCHS=1", "PROBE_LIMIT=100", "EVAL_LIMIT=100",
          "ROBUST_LIMIT=4", "N_SAE_SEEDS=1",
          "METRICS=()"]


class Step(NamedTuple):
    """A script with its arguments, or a notebook with the constants of its first cell."""

    path: str
    given: list[str] = []
    says: str = ""
    """What it must print."""
    code: int = 0


CHAINS = {
    "verify": [
        Step(f"{VERIFY}/00_probe_layers.py",
             ["MODEL={data}/llama", "DATASET={data}/train.jsonl", "LABEL_FIELD=mood", "N_TEXTS=20"], "next: python "),
        Step(f"{VERIFY}/01_save_activations.py", SAVE, "02_train_sae.py"),
        Step(f"{VERIFY}/choose_k.py",
             ["KS=2,3", "EPOCHS=1", "N_LATENTS_MULTIPLIER=2", "N_TEXTS=4", "BATCH_SIZE_TRAIN=64"], "TOP_K="),
        Step(f"{VERIFY}/02_train_sae.py", TRAIN, "run_steps.py 03_analyze_training.ipynb 04_"),
        Step(f"{VERIFY}/compare_with_overcomplete.py", ["EPOCHS=1"], "overcomplete   EV"),
        Step(f"{VERIFY}/03_analyze_training.ipynb", ["LOSS_TEXTS=4", "RECOVERY_TOKENS=500"]),
        Step(f"{VERIFY}/04_name_sae_concepts.ipynb", ["CONTROL_NAMES=5"]),
        Step(f"{VERIFY}/05_show_concepts.ipynb", ["EFFECT_CONCEPTS=2", "EFFECT_TOKENS=1", "STEER_STRENGTHS=(0, 1)"]),
        Step(f"{VERIFY}/06_steer_model.py", ["SEARCH=a", "SAMPLES=2", "N_TOKENS=4", "PROMPTS=the cat"],
             "perplexity"),
        Step(f"{VERIFY}/07_test_causality.py", [], "run notebook 03 on the embedded stories", code=2),
        Step(f"{VERIFY}/show_verification.py", [], "-- evidence: "),
        Step(f"{VERIFY}/list_saes.py", [], "recovered"),
        Step(f"{VERIFY}/concept_dictionary.py", ["SEARCH=a"], "latents have a name"),
        Step(f"{VERIFY}/export_sae.py", ["FORMAT=sae_lens", "OUT={store}/out"], "sae_lens"),
        Step(f"{VERIFY}/import_sae.py", ["SOURCE={store}/nowhere"], "there is no file or directory", code=2),
        Step(f"{VERIFY}/08_compare_kinds.py", ["ARMS=batchtopk", "SEEDS=0,1", "N_LATENTS_MULTIPLIER=2", "EPOCHS=1",
                                               "BATCH_SIZE_TRAIN=64", "LOSS_TEXTS=2", "N_NAMES=4"], "minus topk"),
        Step(f"{VERIFY}/09_compare_saes.ipynb", ["LOSS_TEXTS=2", "MATCH_TOKENS=500"]),
    ],
    "sae_ception": [
        Step(BASELINE[0], [*BASELINE[1:], "EPOCHS_PER_CYCLE=1"], "next: python "),
        Step(SAE[0], [*SAE[1:], "SAE_EPOCHS=1"], "03_train_auxiliary.py"),
        Step(f"{CEPTION}/03_train_auxiliary.py", ["KEEP_PCT=5.0"], "CYCLE=1"),
        Step(f"{CEPTION}/save_model.py", [], "text-classification"),
        Step(f"{CEPTION}/predict.py", ["TEXT=the cat was happy"], "prediction"),
        Step(f"{CEPTION}/choose_constants.py", [*DIGITS, "GRID_KEEP_PCT=2", "GRID_AUX_WEIGHT=1", "SELECT_SEEDS=100",
                                                "GRID_ARMS=per_class"], "ARM_CONSTANTS="),
        Step(f"{CEPTION}/04_train_cycle.py",
             [*DIGITS, "SEEDS=0,1,2", "ARMS=lambda0,per_class,class_mean", "SETTING=tiny2"], "05_compare_cycles.ipynb"),
        Step(f"{CEPTION}/05_compare_cycles.ipynb", ["TSNE_EXAMPLES=40"]),
        Step(f"{CEPTION}/06_interpret_features.ipynb", ["SHOW_LATENTS=1", "SHOW_EXAMPLES=1"]),
        Step(f"{CEPTION}/07_run_study.py", ["STUDY=digits", "SEEDS=1", "LAMBDAS=1", "ARMS=lambda0,per_class",
                                            "ARM_CONSTANTS={{}}", "EPOCHS_PER_CYCLE=1", "SAE_EPOCHS=1", "N_SAE_SEEDS=1",
                                            "PROBE_LIMIT=100", "EVAL_LIMIT=100"], "08_judge_study.py"),
        Step(f"{CEPTION}/08_judge_study.py", ["STUDY=digits"], "complete, 2 of 2 results"),
    ],
    "others": [
        Step(STORIES[0], ["N_STORIES=60"], "02_train_story_model.py"),
        Step(STORY_MODEL[0], STORY_MODEL[1:], "test_perplexity"),
        Step(f"{SCALE}/01_large_shapes.py", ["MODELS=()", "SAES=((16, 32, 2),)", "SAE_BATCH=8", "SAE_STEPS=1"],
             "SAE 16 -> 32"),
        Step(f"{SCALE}/02_plan.py", [], "bielik_1.5b", code=2),
        Step(f"{BENCHMARKS}/01_time_activations.py", ["N_TEXTS=4", "ROUNDS=1", "WIDTH=12", "MLP=12"], "make peers",
             code=2),
        Step(f"{BENCHMARKS}/02_time_sae_training.py",
             ["SHAPES=((16, 32, 2, 64),)", "TRAINERS=ours", "ROUNDS=2", "SECONDS=0.001"], "04_show_benchmarks.ipynb"),
        Step(f"{BENCHMARKS}/03_recover_known_features.py",
             ["TRAINERS=ours", "WIDTH=16", "N_FEATURES=32", "L0=2", "N_LATENTS=32", "TOP_K=2", "N_ROWS=2048",
                                                            "N_HELD_OUT=256", "BATCH_SIZE=256", "REPORT_SEEDS=0"],
                                                            "ours"),
        Step(f"{BENCHMARKS}/09_time_saving.py", ["WIDTH=8", "N_TEXTS=20", "ROUNDS=1"], "rows/s on two cores"),
        Step(f"{BENCHMARKS}/04_show_benchmarks.ipynb"),
        Step(f"{BENCHMARKS}/05_synth_sae_bench.py", ["N_SAMPLES=2048", "N_SCORED=1024"], "make peers", code=2),
        Step(f"{BENCHMARKS}/06_saelens_on_synth.py", ["N_SAMPLES=2048", "N_SCORED=1024"], "make peers", code=2),
        Step(f"{BENCHMARKS}/07_show_leaderboard.py", [], "| conditional 25 |"),
        Step(f"{BENCHMARKS}/08_run_on_gpu.py",
             ["DEVICE=cpu", "SHAPES=((16, 32, 2),)", "BATCHES=64", "KINDS=topk", "SAVE_MODELS=tiny", "SAVE_TEXTS=4",
              "LIVE_TOKENS=()", "SECONDS=0.001", "TESTS=False", "PEERS=()"], "| ours, topk |"),
        Step(f"{BENCHMARKS}/world_figures.py", [], "make peers", code=2),
    ],
}


def test_the_chains_hold_every_script_and_notebook():
    alone = ("10_explore.py", "time_large_page.py")  # one serves until it is stopped, the other has the largest sizes
    scripts = {str(path.relative_to(PROJECT)) for path in (PROJECT / "experiments").glob("*/*.py")
               if "override(globals()" in path.read_text() and path.name not in alone}
    notebooks = {str(path.relative_to(PROJECT)) for path in (PROJECT / "experiments").glob("*/*.ipynb")}
    assert scripts | notebooks == {step.path for chain in CHAINS.values() for step in chain}


@pytest.fixture(scope="session")
def became(labelled_texts, tmp_path_factory):
    """Path -> (exit code, what it said), of every step."""

    def run_chain(name):
        store = tmp_path_factory.getbasetemp() / f"fresh {name}"  # with a space
        store.mkdir()
        environment = (os.environ
                       | {"STORE_DIR": str(store), "OMP_NUM_THREADS": "1", "SETTING": "tiny2", "HF_HUB_OFFLINE": "1",
                          "MPLBACKEND": "agg"})
        found = {}
        for step in CHAINS[name]:
            given = [part.format(data=labelled_texts, store=store) for part in step.given]
            command = [sys.executable, str(PROJECT / step.path), *given]
            if step.path.endswith(".ipynb"):
                command[1:2] = [str((PROJECT / step.path).with_name("run_steps.py")), Path(step.path).name]
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment,
                                  cwd=store)
            found[step.path] = done.returncode, done.stdout + done.stderr
        return found

    with ThreadPoolExecutor(2) as pool:
        return {path: what for chain in pool.map(run_chain, CHAINS) for path, what in chain.items()}


@pytest.mark.parametrize("step", [step for chain in CHAINS.values() for step in chain],
                         ids=lambda step: step.path.removeprefix("experiments/"))
def test_it_runs_in_a_process_of_its_own(became, step):
    code, said = became[step.path]
    assert code == step.code and "Traceback" not in said and step.says in said, said[-3000:]
