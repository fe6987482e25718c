"""What a user can get wrong in any script: one line that says what to do, exit code 2, nothing written. And what may
not leak.
"""
import logging
import shutil

import pytest
import torch
from conftest import tiny_model, word_tokenizer
from forked import BASELINE, CYCLE, MODEL, SAE, SAVE, STORIES, TRAIN, VERIFY, contents

import lib.activations as activations
from lib.activations import SaveSettings, block_rows, forward
from lib.environment import InputError, is_out_of_memory, run
from lib.hooks import resolve
from lib.texts import tokenise

FIRST, SECOND = [f"{VERIFY}/01_save_activations.py", *SAVE], [f"{VERIFY}/02_train_sae.py", *TRAIN]
AUXILIARY = ["experiments/sae_ception/03_train_auxiliary.py"]
CHOOSE = ["experiments/sae_ception/choose_constants.py", "PRESET=mlp_digits"]
BENCH = ["experiments/benchmarks/02_time_sae_training.py"]
# whose earlier steps
NEEDS = {SECOND[0]: "verify 02", SAE[0]: "sae_ception 02", AUXILIARY[0]: "sae_ception 03", MODEL[0]: "embedded 02"}
WRONG = [
    (FIRST, "BATCH_SIZE_SAVE=0", "BATCH_SIZE_SAVE=0 must be at least 1"),
    (FIRST, "MODEL=/nowhere", "there is no file or directory /nowhere"),
    (FIRST, "TRUST_REMOTE_CODE=yes", "TRUST_REMOTE_CODE=yes must be True or False"),
    (FIRST, "MODEL_DTYPE=float8", "must be one of auto, float32, bfloat16, float16"),
    (FIRST, "SEED=one", "SEED=one must be a whole number"),
    (SECOND, "RUN_ID=..", "must be a file name"),
    (SECOND, "RUN_ID=/etc/passwd", "must be a file name"),
    (SECOND, "TOP_K=1.5", "TOP_K=1.5 must be a whole number"),
    (SECOND, "LOG_EVERY=0", "LOG_EVERY=0 must be at least 1"),
    (SECOND, "PRECISION=float8", "PRECISION"),
    (SECOND, "DEVICE=abacus", "DEVICE=abacus must be one of"),
    (BASELINE, "MODLE=gpt2", "did you mean MODEL?"),
    (BASELINE, "PRESET=gpt5", "PRESET=gpt5 must be one of"),
    (BASELINE, "DATASET=/nowhere.jsonl", "there is no file or directory /nowhere.jsonl"),
    (BASELINE, "TEXT_FIELD=body", "has no field 'body'"),
    (BASELINE, "LABEL_FIELD=smell", "has no field 'smell'"),
    (BASELINE, "OPTIMIZER=sgd", "OPTIMIZER=sgd must be one of adamw, adam"),
    (BASELINE, "TARGET_LAYER=resid_post:99", "has blocks 0 to 2"),
    (BASELINE, "TRACKER=pigeon", "TRACKER=pigeon must be one of"),
    (BASELINE, "DEVICE=cuda:9", "is not available here"),
    (BASELINE, "LOAD_BITS=3", "LOAD_BITS=3 must be one of 4, 8 or None"),
    (BASELINE, "LABEL_GROUPS=(0,1,2)", "LABEL_GROUPS=(0, 1, 2) must give a group"),
    (BASELINE, "LR=fast", "LR=fast must be a number"),
    (BASELINE, "EPOCHS_PER_CYCLE=0", "EPOCHS_PER_CYCLE=0 must be at least 1"),
    (BASELINE, "BATCH_SIZE=0", "BATCH_SIZE=0 must be at least 1"),
    (BASELINE, "SETTING=../../up", "must be a file name"),
    (SAE, "TOP_K=0", "TOP_K=0 must be at least 1"),
    (SAE, "SAE_EPOCHS=0", "SAE_EPOCHS=0 must be at least 1"),
    (SAE, "CYCLE=7", "model_cycle_7_best.pt is missing; run 03_train_auxiliary.py first"),
    (SAE, "SEED=7", "holds no baseline; run 01_train_baseline.py"),
    (SAE, "ARM=../up", "must be one of"),
    (AUXILIARY, "ARM=nonsense", "ARM=nonsense must be one of"),
    (AUXILIARY, "INIT=anew", "INIT=anew must be one of continue, scratch"),
    (AUXILIARY, "CYCLE=3", "is missing; run"),
    (CYCLE, "ARMS=('nonsense',)", "holds nonsense, which must be one of"),
    (CYCLE, "SEEDS=()", "SEEDS=() must hold at least one value"),
    (CYCLE, "CYCLES=0", "CYCLES=0 must be at least 1"),
    (CHOOSE, "GRID_ARM=x", "there is no constant GRID_ARM"),
    (STORIES, "N_STORIES=many", "N_STORIES=many must be a whole number"),
    (STORIES, "N_STORIES=4", "raise N_STORIES"),
    (STORIES, "MIN_WORDS=91", "MIN_WORDS=91 must be at most MAX_WORDS=90"),
    (STORIES, "MAX_WORDS=39", "MIN_WORDS=40 must be at most MAX_WORDS=39"),
    (STORIES, "TEST_FRAC=0.95", "leave no story to train on"),
    (MODEL, "BATCH_SIZE=5000", "don't fill a batch of 5000; lower BATCH_SIZE"),
    (MODEL, "HEADS=3", "HIDDEN=16 must be a multiple of HEADS=3"),
    (BENCH, "N_STEP=3", "there is no constant"),
]


@pytest.mark.parametrize(("command", "wrong", "said"), WRONG,
                         ids=[f"{c[0].split('/')[1]} {c[0].split('/')[2][:2]} {w}" for c, w, _ in WRONG])
def test_wrong_input_is_one_line_and_writes_nothing(
    forks, undisturbed, labelled_texts, tmp_path, command, wrong, said, record_property
):
    name = wrong.partition("=")[0]
    rest = [part.format(data=labelled_texts) for part in command[1:] if part.partition("=")[0] != name]
    store = tmp_path / "deep" / "store"  # so that a path with .. still ends in tmp_path
    store.mkdir(parents=True)
    if command[0] in NEEDS:
        shutil.copytree(undisturbed(NEEDS[command[0]]).before, store, dirs_exist_ok=True)
    before = contents(tmp_path)
    ended = forks.run([command[0], *rest, wrong], store)
    errors = [line for line in ended.said.splitlines() if line.startswith("error: ")]
    assert ended.code == 2 and len(errors) == 1 and "Traceback" not in ended.said, ended.said
    assert said in errors[0]
    after = contents(tmp_path)
    assert {path: data for path, data in after.items() if path in before} == before
    new = [path for path in after if path not in before]
    assert not [path for path in new
                if path.endswith((".pt", ".jsonl", ".csv")) or "results" in path or "manifest" in path], new
    record_property("fault", "wrong input")
    record_property("tried", 1)


def test_a_batch_too_large_for_the_memory_is_halved_with_a_word(monkeypatch, caplog):
    """The memory holds two texts at a time; the rows are those of larger batches."""
    model, tokenizer = tiny_model("llama"), word_tokenizer()
    points, settings = [resolve(model, "resid_post:1")], SaveSettings(batch_tokens=1000)
    tokens = tokenise(tokenizer, ["the cat sat", "a dog ran", "it was sad", "the blue bird", "a cat"], 0, 128)
    expected = block_rows(model, points, tokens, pad_id=0, settings=settings)

    def small_memory(model, points, batch, *rest):
        if len(batch) > 2:
            torch.empty(1 << 62, dtype=torch.uint8)  # more than any machine has
        return forward(model, points, batch, *rest)

    monkeypatch.setattr(activations, "forward", small_memory)
    with caplog.at_level(logging.WARNING, "workbench"):
        rows, states = block_rows(model, points, tokens, pad_id=0, settings=settings)
    assert torch.equal(rows, expected[0])
    torch.testing.assert_close(states, expected[1])
    assert "5 texts are too many for the memory, trying 2" in caplog.text


def test_a_text_too_large_for_the_memory_is_named(monkeypatch):
    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = tiny_model("llama")
    monkeypatch.setattr(activations, "forward", no_memory)
    with pytest.raises(InputError, match="a text of 4 tokens is too large for the memory; lower MAX_LENGTH"):
        block_rows(model, [resolve(model, "resid_post:1")], tokenise(word_tokenizer(), ["the cat sat"], 0, 128),
                   pad_id=0, settings=SaveSettings())


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"),
                                   OSError(28, "No space left on device")])
def test_full_memory_and_full_disk_end_any_script_with_one_line(error, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        run(main)
    said = capsys.readouterr().err
    assert (ended.value.code == 2 and said.count("\n") == 1
            and said.startswith(("error: the disk is full (", "error: out of memory (")))


def test_other_errors_are_not_taken_for_full_memory():
    assert not is_out_of_memory(RuntimeError("shapes differ")) and not is_out_of_memory(ValueError("allocate memory"))


SECRETS = {"HF_TOKEN": "hf_veryhidden123", "OPENAI_API_KEY": "sk-veryhidden123", "ANTHROPIC_API_KEY": "veryhidden123",
           "WANDB_API_KEY": "veryhidden123"}


def test_keys_in_the_environment_reach_no_file_and_no_line(forks, labelled_texts, tmp_path):
    for command in (FIRST, SECOND, BASELINE, SAE):
        ended = forks.run([part.format(data=labelled_texts) for part in command], tmp_path / "store",
                          environment=SECRETS)
        assert ended.code == 0 and "veryhidden" not in ended.said
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 20 and not [path for path in files if b"veryhidden" in path.read_bytes()]
