"""A transformers classifier keeps its own head: its logits are transformers' own, its classes are matched by name."""
import json

import pytest
import torch
import transformers
from conftest import TEXTS, WORDS, word_tokenizer
from test_sae_ception_cycles import cycle, defaults  # noqa: F401  (a fixture)
from test_sae_ception_gates import text_task

from cycles.classifier import TextClassifier
from cycles.fitting import drawn_start
from cycles.heads import columns_of, padding_id
from cycles.session import Session
from cycles.tasks import Task
from lib.environment import InputError

SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
        "vocab_size": len(WORDS) + 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
NAMES = ["negative", "neutral", "positive"]
CONFIGS = {
    "llama": lambda **c: transformers.LlamaConfig(**SIZE, **c),
    "bert": lambda **c: transformers.BertConfig(**SIZE, **c),
    "roberta": lambda **c: transformers.RobertaConfig(**SIZE, max_position_embeddings=80, **c),
    "distilbert": lambda **c: transformers.DistilBertConfig(dim=16, n_layers=2, n_heads=2, hidden_dim=32,
                                                            vocab_size=len(WORDS) + 4, pad_token_id=0, **c),
    "gpt2": lambda **c: transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=len(WORDS) + 4,
                                                pad_token_id=0, **c),
}


def classifier(kind, names=NAMES, **extra):
    """A random transformers classifier with these classes."""
    torch.manual_seed(0)
    numbered = dict(enumerate(names or ()))
    labels = {"id2label": numbered, "label2id": {name: i for i, name in numbered.items()}} if names else {}
    return transformers.AutoModelForSequenceClassification.from_config(
        CONFIGS[kind](**(labels or {"num_labels": 3}), **extra)).eval()


def task_of(names, numbers=()):
    return Task(torch.arange(len(names)), len(names), {}, class_names=list(names), numbers=list(numbers))


@pytest.mark.parametrize("kind", CONFIGS)
def test_its_logits_are_transformers_own(kind):
    """Also through the cache of what enters the first trained block; and the head trains."""
    lm = classifier(kind)
    task = text_task()
    ids = torch.arange(6)
    batch = task.batch(ids)
    with torch.no_grad():
        theirs = lm(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    model = TextClassifier(lm, 2, "last", 0, columns=[2, 0]).eval()
    with torch.no_grad():
        h, logits = model(batch)
        states = model.token_states(batch, model.entry)
        entry = torch.zeros(*batch["input_ids"].shape, 16)
        for row, state in zip(entry, states):
            row[: len(state)] = state
        cached = model(batch | {"entry": entry})
    assert torch.allclose(logits, theirs[:, [2, 0]], atol=1e-6) and h.shape == (6, 16)
    assert torch.allclose(cached[0], h, atol=1e-5) and torch.allclose(cached[1], logits, atol=1e-5)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("score" in name or "classifier" in name for name in trained)
    assert not any("embed" in name or "wte" in name for name in trained)


def test_h_is_what_the_head_reads():
    """A text that ends in the padding token's id: transformers' causal heads read the token before it."""
    model = TextClassifier(classifier("llama"), 3, "last", 0, columns=[0, 1, 2]).eval()
    ids = torch.tensor([[1, 5, 6, 0], [1, 5, 6, 7]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert model.position(batch["attention_mask"], ids).tolist() == [2, 3]
    with torch.no_grad():
        h, logits = model(batch)
        assert torch.allclose(model.lm.score(model.lm.model.norm(h)), logits, atol=1e-5)


def test_a_head_that_reads_all_tokens_is_refused():
    lm = classifier("llama")
    lm.score.register_forward_hook(lambda _module, _args, out: out.cumsum(1))
    with pytest.raises(InputError, match="reads other tokens .* set KEEP_HEAD=False"):
        TextClassifier(lm, 3, "last", 0, columns=[0, 1, 2])


@pytest.mark.parametrize("task,columns,called", [
    (task_of(["Negative", "POSITIVE"]), [0, 2], ["Negative", "POSITIVE"]),
    (task_of(["0", "2"], [0, 2]), [0, 2], ["negative", "positive"]),
    (task_of(["bad", "good"], [0, 2]), [0, 2], ["bad", "good"]),
])
def test_classes_are_matched_by_name_then_by_number(task, columns, called, caplog):
    with caplog.at_level("INFO", "workbench"):
        assert columns_of(classifier("llama"), task) == columns and task.class_names == called
    assert "MODEL keeps its own head" in caplog.text and "1 other classes are not in the data" in caplog.text
    assert "count from 1" not in caplog.text


def test_labels_that_may_count_from_1_are_told(caplog):
    with caplog.at_level("INFO", "workbench"):
        assert columns_of(classifier("llama"), task_of(["1", "2"], [1, 2])) == [1, 2]
    assert "1 = neutral, 2 = positive" in caplog.text and "if the labels count from 1" in caplog.text


@pytest.mark.parametrize("task,names", [(task_of(["bad", "good"]), NAMES), (task_of(["0", "3"], [0, 3]), NAMES),
                                        (task_of(["-1", "1"], [-1, 1]), NAMES), (task_of(["negative", "x"]), None)])
def test_classes_that_the_head_lacks_are_refused(task, names):
    with pytest.raises(InputError, match="set KEEP_HEAD=False") as error:
        columns_of(classifier("llama", names), task)
    assert "\n" not in str(error.value)


def test_two_labels_for_one_output_are_refused():
    with pytest.raises(InputError, match="are not as many classes of MODEL's own head; .* KEEP_HEAD=False"):
        columns_of(classifier("llama"), task_of(["Positive", "negative", "positive"]))


def test_padding_is_what_the_head_skips_and_no_word():
    class Without:
        pad_token_id, eos_token_id = None, 9

    assert padding_id(Without, classifier("llama").config, own_head=True) == 0
    assert padding_id(word_tokenizer(), transformers.GPT2Config(pad_token_id=5), own_head=True) == 5
    assert padding_id(word_tokenizer(), transformers.GPT2Config(pad_token_id=5), own_head=False) == 0
    assert padding_id(Without, transformers.GPT2Config(), own_head=False) == 9


def test_numbers_of_a_head_without_names_stay_numbers():
    task = task_of(["0", "1"], [0, 1])
    assert columns_of(classifier("llama", None), task) == [0, 1] and task.class_names == ["0", "1"]


@pytest.mark.parametrize("keep", [True, False])
def test_a_whole_cycle_with_its_own_head_or_a_new_one(defaults, tmp_path, keep, caplog):  # noqa: F811
    classifier("bert").save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    lines = [{"text": f"{TEXTS[i % 6]} {TEXTS[i % 5]} {i}", "label": ("negative", "positive")[i % 2]}
             for i in range(60)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    c = defaults[0] | {"MODEL": str(tmp_path / "model"), "DATASET": str(tmp_path / "mine.jsonl"), "KEEP_HEAD": keep,
                       "LABEL_FIELD": "label", "EPOCHS_PER_CYCLE": 1, "SAE_EPOCHS": 1, "METRICS": (), "TOP_K": 4,
                       "KEEP_PCT": 5.0, "DEVICE": "cpu", "BATCH_SIZE": 16}
    session = Session(c, 0)
    assert session.c.get("KEEP_HEAD") is keep and session.task.class_names == ["negative", "positive"]
    assert (session.model.columns == [0, 2]) if keep else (session.model.head.out_features == 2)
    drawn = drawn_start(session, 500_001)  # new_seed's
    assert drawn.keys() == session.initial.keys()
    assert {name for name in drawn if not torch.equal(drawn[name], session.initial[name])} == (
        set() if keep else {"head.weight", "head.bias"})
    cycle(session, "baseline", 0)
    test = cycle(session, "per_class", 1)["test"]
    assert 0 <= test["task_accuracy"] <= 1 and "task_perplexity" not in test
    assert "KEEP_HEAD" not in Session(defaults[0] | {"DEVICE": "cpu", "DATA_LIMIT": 20}, 0).c
