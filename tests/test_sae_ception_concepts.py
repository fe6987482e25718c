"""The stories' own concepts as an endpoint of the cycles: what experiment 1 finds in the same tokens."""
import json

import pytest
import torch
from test_recovery import STORIES, story_run
from test_sae_ception_cycles import defaults, write_texts  # noqa: F401  (fixture)

from checks.recovery import recover_concepts
from cycles.concepts import summarised
from cycles.evaluation import evaluate
from cycles.metrics import in_words
from cycles.session import Session
from cycles.targets import random_sae
from lib.activations import SaveSettings, save_activations
from lib.ground_truth import WORD_F1, ground_truth
from lib.sae import make_sae


def story(i):
    """One of two stories, made a text of its own by words without concepts at its end."""
    base, more = STORIES[i % 2], [("cat", "bird", "tree", "red")[i // 2 // 4**place % 4] for place in range(3)]
    return base | {"text": f"{base['text']} {' '.join(more)}", "concepts": [*base["concepts"], 0, 0, 0]}


@pytest.fixture
def session(defaults, tmp_path):  # noqa: F811
    c = defaults[0] | write_texts(tmp_path, "llama")
    story_run(tmp_path, STORIES)  # for its concepts.json
    cut = {"train": range(60), "val": range(60, 70), "test": range(70, 120)}
    for name, ids in cut.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(story(i)) + "\n" for i in ids))
    return Session(c | {"PROBE_LIMIT": None, "EVAL_LIMIT": None, "TARGET_LAYER": "1", "ABSORPTION_TOKENS": 0,
                        "ATTRIBUTE_FIELD": None}, 0)


@pytest.fixture
def sae():
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(48, 16, generator=generator), dim=1)
    return make_sae(rows, torch.zeros(48), rows, mean=torch.zeros(16), scale=1.0, top_k=4)


def test_the_concepts_score_as_in_experiment_1(session, sae, tmp_path):
    scores = evaluate(session, sae, "test", ("concepts",))
    texts = [session.task.texts[i] for split in ("train", "test") for i in session.task.splits[split].tolist()]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(story(i)) + "\n" for i in range(120)))
    run = save_activations(
        tmp_path / "same_tokens", session.model.lm, session.tokenizer, [session.model.target], texts=texts,
        splits=["train"] * 60 + ["val"] * 50, settings=SaveSettings(max_length=session.c["MAX_LENGTH"]),
        meta={"dataset": {"name": str(tmp_path / "all.jsonl"), "limit": None}})
    hook = run.hooks[0]
    x = torch.cat(list(run.shards(hook)))[~run.is_val]
    saes = {"latent": sae, "untrained": random_sae(sae, 0)}
    principal = torch.linalg.eigh(torch.cov(x.double().T)).eigenvectors.float()
    rows = recover_concepts(saes, run, hook, ground_truth(run), principal=principal)
    assert len(rows) > 8 and {row["part"] for row in rows} == {"leaf", "node", "sense", "state"}
    for kind in ("latent", "neuron"):
        of_each = {row["concept"]: row[kind]["f1"] for row in rows}
        assert {name: scores[f"concept_f1_{kind}: {name}"] for name in of_each} == pytest.approx(of_each, abs=1e-6)
    assert sum(name.startswith("concept_f1_latent") for name in scores) == len(rows)
    for where, in_context in (("word", False), ("context", True)):
        part = [row for row in rows if row["context"] == in_context]
        assert scores[f"concepts_n_{where}"] == len(part) > 0
        for kind in ("latent", "firing", "untrained", "neuron", "pca", "token", "table", "pairs"):
            mean = sum(row[kind]["f1"] for row in part) / len(part)
            assert scores[f"concepts_f1_{kind}_{where}"] == pytest.approx(mean, abs=2e-3), kind  # pca: signs, rounding
            assert "_" not in in_words(f"concepts_f1_{kind}_{where}")


def test_no_concepts_no_scores(session, sae, tmp_path):
    def named():
        return [name for name in evaluate(session, sae, "test", ("concepts",)) if name.startswith("concept")]

    assert named()
    session.c["SAE_POSITIONS"] = "pooled"  # the SAE knows nothing of other tokens
    assert not named()
    session.c["SAE_POSITIONS"] = "tokens"
    (tmp_path / "concepts.json").unlink()
    assert not named()


def test_concepts_are_means_of_words_and_of_contexts():
    def of(table, latent, neuron):
        return {"table": {"f1": table, "f1_train": table}, "latent": {"f1": latent}, "neuron": {"f1": neuron}}

    found = summarised({"dog": of(1.0, 0.9, 0.5), "cat": of(WORD_F1, 0.7, 0.1), "quoted": of(0.3, 0.6, 0.2)})
    assert found == pytest.approx({
        "concepts_n_word": 2, "concepts_n_context": 1, "concepts_f1_latent_word": 0.8, "concepts_f1_neuron_word": 0.3,
        "concepts_f1_table_word": (1 + WORD_F1) / 2, "concepts_f1_latent_context": 0.6,
        "concepts_f1_neuron_context": 0.2, "concepts_f1_table_context": 0.3, "concept_f1_latent: dog": 0.9,
        "concept_f1_neuron: dog": 0.5, "concept_f1_latent: cat": 0.7, "concept_f1_neuron: cat": 0.1,
        "concept_f1_latent: quoted": 0.6, "concept_f1_neuron: quoted": 0.2})
    assert summarised({}) == {"concepts_n_word": 0, "concepts_n_context": 0}
