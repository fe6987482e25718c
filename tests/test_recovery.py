"""Which unit tells a concept's tokens, what tables of tokens give away, and what the stories say of their tokens."""
import json
import re

import matplotlib.pyplot as plt
import pytest
import torch
from conftest import PROJECT, TEXTS, row_text, tiny_model, word_tokenizer

from checks import figures
from checks.comparison import One, word_f1
from checks.controls import control_saes, control_settings, relative_change
from checks.evaluation import untrained_sae
from checks.recovery import KINDS, compositions, gains, recover_concepts
from concepts.codes import Codes
from lib.activations import SaveSettings, save_activations
from lib.batches import rows_of_run, steps_per_epoch
from lib.environment import InputError
from lib.ground_truth import Concept, Truth, ground_truth, label_rows
from lib.hooks import resolve
from lib.metrics.units import THRESHOLDS, recovery, table_scores
from lib.sae import make_sae, sae_hash
from lib.texts import split_texts
from lib.training.loop import TrainSettings


@pytest.fixture
def run(tmp_path):
    model, texts = tiny_model("llama"), TEXTS * 24
    settings = SaveSettings(shard_rows=100)
    return save_activations(tmp_path / "run", model, word_tokenizer(), [resolve(model, "resid_post:1")], texts=texts,
                            splits=split_texts(len(texts), 0.2, 0), settings=settings)


def one_token(n):
    """Token ids that say nothing."""
    return dict.fromkeys(("ids", "before"), torch.zeros(n, dtype=torch.long))


def test_labels_mark_the_tokens_that_overlap_a_span(run):
    text = run.texts[1]["text"]
    dog, bird = text.index("dog"), text.index("red bird")
    spans = torch.tensor([[1, dog, dog + 3, 0], [1, bird, bird + 8, 1], [2, 0, 0, 1], [5, 900, 950, 0]])
    labels = label_rows(run.rows, spans, 2)
    assert [row_text(run, int(row)) for row in labels[:, 0].nonzero()] == ["dog"]
    assert [row_text(run, int(row)) for row in labels[:, 1].nonzero()] == ["red", "bird"]


def test_a_special_token_at_the_end_of_a_text_belongs_to_no_concept():
    """It has the characters (0, 0), out of the order of its text: [CLS] the dog [SEP], twice."""
    starts, ends = [0, 0, 4, 0], [0, 3, 7, 0]
    rows = {"text_id": [0] * 4 + [1] * 4, "char_start": starts * 2, "char_end": ends * 2}
    rows = {name: torch.tensor(column, dtype=torch.int32) for name, column in rows.items()}
    found = label_rows(rows, torch.tensor([[0, 4, 7, 0], [1, 0, 3, 1]]), 2)
    assert found.nonzero().tolist() == [[2, 0], [5, 1]]


def test_concept_recovery_finds_the_unit_that_is_the_concept():
    """Dimension 0 is on for concept 0 alone; concept 1 is the sign of dimension 3; the latents are the dimensions."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.rand(4000, 2, generator=generator) < 0.2
    x = 0.01 * torch.randn(4000, 6, generator=generator)
    x[labels[:, 0], 0] += 1
    x[labels[:, 1], 3] -= 1
    eye = torch.eye(6)
    sae = make_sae(torch.cat([eye, -eye]), torch.full((12,), -0.5), torch.cat([eye, -eye]), torch.zeros(6), 1.0, 4)
    first, second = recovery({"latent": sae}, x, labels, torch.arange(4000) % 4 == 0, principal=eye, **one_token(4000))
    assert first["firing"] == {"unit": 0, "precision": 1.0, "recall": 1.0, "f1": 1.0, "f1_train": 1.0}
    assert second["firing"]["unit"] == 6 + 3 and second["firing"]["f1"] == 1.0
    assert first["neuron"]["unit"] == 0 and first["neuron"]["f1"] > 0.95
    assert second["neuron"]["unit"] == 3 and second["pca"]["unit"] == 3
    assert THRESHOLDS == 14


def test_a_threshold_finds_a_concept_that_weak_firing_hides():
    """The latent fires strongly on the concept and weakly on half of everything else."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.rand(2000, 1, generator=generator) < 0.2
    x = torch.zeros(2000, 2)
    x[:, 0] = torch.where(labels[:, 0], 1.0, 0.15 * (torch.rand(2000, generator=generator) < 0.5))
    sae = make_sae(torch.eye(2), torch.zeros(2), torch.eye(2), torch.zeros(2), 1.0, 1)
    is_val = torch.arange(2000) % 4 == 0
    (found,) = recovery({"latent": sae}, x, labels, is_val, principal=torch.eye(2), **one_token(2000))
    assert found["latent"] == {"unit": 0, "precision": 1.0, "recall": 1.0, "f1": 1.0, "f1_train": 1.0}
    fires, hits = (x[is_val, 0] > 0).sum(), labels[is_val].sum()
    assert found["firing"]["f1"] == pytest.approx(float(2 * hits / (fires + hits)))


def test_thresholds_count_what_lies_beyond_them():
    """The best neuron's scores against a dense search of the same thresholds."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3000, 5, generator=generator)
    labels = (x[:, :3] + 0.5 * torch.randn(3000, 3, generator=generator) > 1.2) | (x[:, 3:4] < -1.5)
    is_val = torch.arange(3000) % 5 == 0
    sae = make_sae(torch.eye(5), torch.zeros(5), torch.eye(5), torch.zeros(5), 1.0, 1)
    found = recovery({"latent": sae}, x, labels, is_val, principal=torch.eye(5), **one_token(3000))
    levels = torch.cat([torch.linspace(0.5, 0.95, THRESHOLDS // 2),
                        1 - torch.logspace(-1.5, -3.5, THRESHOLDS - THRESHOLDS // 2)])
    for c, row in enumerate(found):
        best = (-1.0, 0, 0.0)
        for d in range(5):
            for sign in (1, -1):
                for cut in torch.quantile(sign * x[~is_val, d], levels):
                    on = sign * x[:, d] > cut
                    f1 = [float(2 * (on & labels[:, c])[part].sum() / (on[part].sum() + labels[part, c].sum()))
                          for part in (~is_val, is_val)]
                    best = max(best, (f1[0], d, f1[1]))
        assert (row["neuron"]["f1_train"], row["neuron"]["unit"], row["neuron"]["f1"]) == pytest.approx(best, abs=2e-3)


def test_a_table_takes_the_tokens_whose_share_is_worth_it():
    """Token 0 always carries the concept, token 1 in 6 of 10 rows, token 2 never, token 3 is new in the held-out
    rows.
    """
    which = torch.tensor([0] * 10 + [1] * 10 + [2] * 10 + [0, 0, 1, 1, 1, 2, 3, 3])
    labels = torch.zeros(38, 1, dtype=torch.bool)
    labels[:16] = labels[[30, 31, 32, 33, 36]] = True
    is_val = torch.arange(38) >= 30
    base = labels[~is_val].float().mean(0).expand(4, 1)
    share, (scores,) = table_scores(which, labels, is_val, base)
    assert share[:, 0].tolist() == pytest.approx([(10 + 16 / 30) / 11, (6 + 16 / 30) / 11, 16 / 30 / 11, 16 / 30],
                                                 abs=1e-6)
    assert scores["f1_train"] == pytest.approx(2 * 16 / (20 + 16))  # tokens 0 and 1
    # A new token has the share of all rows, which is under the cut: the share of token 1.
    assert scores == {"unit": None, "precision": 4 / 5, "recall": 4 / 5, "f1": pytest.approx(4 / 5),
                      "f1_train": scores["f1_train"]}


def test_a_table_of_pairs_tells_what_the_token_before_decides():
    generator = torch.Generator().manual_seed(0)
    before, ids = (torch.randint(0, 4, (4000,), generator=generator) for _ in range(2))
    labels = ((ids == 2) & (before == 1))[:, None]
    x, is_val = torch.randn(4000, 3, generator=generator), torch.arange(4000) % 4 == 0
    (found,) = recovery({}, x, labels, is_val, principal=torch.eye(3), ids=ids, before=before)
    assert found["pairs"]["f1"] == 1.0 and found["token"]["unit"] == 2
    share = float(labels[is_val].sum() / (ids[is_val] == 2).sum())
    assert found["table"]["f1"] == found["token"]["f1"] == pytest.approx(2 * share / (1 + share))


def test_concepts_are_parted_by_the_token_table_and_rare_ones_left_out(run):
    """One of a word, one of the place in the text, one of a word's sense, one that hardly occurs."""
    ids, pos = run.rows["token_id"], run.rows["pos"]
    cat = ids == word_tokenizer().convert_tokens_to_ids("cat")
    rare = torch.zeros(run.n_rows, dtype=torch.bool)
    rare[::97] = True
    labels = torch.stack([cat, pos < 4, cat & (pos < 4), rare], 1)
    concepts = [Concept("cat", "leaf"), Concept("early", "state"), Concept("cat: early", "sense", "cat"),
                Concept("rare", "state")]
    rows = rows_of_run(run, run.hooks[0])
    saes = {"latent": untrained_sae(rows, TrainSettings(n_latents=40, top_k=3))}
    found = recover_concepts(saes, run, run.hooks[0], Truth(concepts, labels, {"cat": cat}), torch.eye(16))
    assert {row["concept"]: row["context"] for row in found} == {"cat": False, "early": True, "cat: early": True}
    sense = next(row for row in found if row["part"] == "sense")
    held = cat & run.is_val
    share = float((held & (pos < 4)).sum() / held.sum())
    assert (sense["n_val"] == int((held & (pos < 4)).sum())
            and sense["table"]["f1"] == pytest.approx(2 * share / (1 + share)))
    assert all(row["table"]["f1"] == 1.0 for row in found if row["concept"] == "cat")


def test_compared_saes_are_scored_on_the_word_concepts_of_notebook_03(run):
    """Leaves, nodes above them and senses that the token table finds, not leaves alone; the same F1."""
    ids, pos = run.rows["token_id"], run.rows["pos"]
    cat, dog = (ids == word_tokenizer().convert_tokens_to_ids(word) for word in ("cat", "dog"))
    labels = torch.stack([cat, cat | dog, pos < 4, cat & (pos < 9)], 1)
    concepts = [Concept("animal/cat", "leaf"), Concept("animal", "node"), Concept("early", "state"),
                Concept("cat: not late", "sense", "cat")]
    labels[(cat & (pos < 9)).nonzero()[::4, 0], 3] = False  # a sense needs tokens of its word without it
    truth, hook = Truth(concepts, labels, {"cat": cat}), run.hooks[0]
    sae = untrained_sae(rows_of_run(run, hook), TrainSettings(n_latents=40, top_k=3))
    found = recover_concepts({"latent": sae}, run, hook, truth, torch.eye(16))
    one = One(run.path, sae, hook, point=None, layer="", names={})
    words = {row["concept"]: row["latent"]["f1"] for row in found if not row["context"]}
    assert word_f1(one, run, truth) == words and len(words) == 3


def story_run(tmp_path, stories):
    """A run of the tiny model whose data set stands beside a concepts.json."""
    tree = {"leaves": [{"number": 1, "path": "animal/pet/dog", "words": ["dog"]},
                       {"number": 2, "path": "feeling/bad/sad", "words": ["sad"]}]}
    tree |= {"leaves": [*tree["leaves"], {"number": 3, "path": "sense/see", "words": ["saw"]},
                        {"number": 4, "path": "negation", "words": ["not"]}]}
    (tmp_path / "concepts.json").write_text(json.dumps(tree | {"topics": ["walks"], "moods": ["bad end", "good end"]}))
    (tmp_path / "stories.jsonl").write_text("".join(json.dumps(story) + "\n"
                                                    for story in [*stories, stories[0] | {"text": "a cat"}]))
    model, texts = tiny_model("llama"), [story["text"] for story in stories]
    meta = {"dataset": {"name": str(tmp_path / "stories.jsonl"), "limit": None}}
    point = resolve(model, "resid_post:1")
    return save_activations(tmp_path / "run", model, word_tokenizer(), [point], texts=texts,
                            splits=split_texts(len(texts), 0.5, 0), meta=meta)


STORIES = [
    {"text": 'the dog saw a red saw . "then it sat" , sad', "mood": 0, "topic": 0,
     "concepts": [0, 1, 3, 0, 0, 0, 0, 0, 0, 2]},
    {"text": "it was not sad and happy . a dog", "mood": 1, "topic": 0, "concepts": [0, 0, 4, 2, 0, 0, 0, 1]},
]


def test_what_the_stories_say_of_their_tokens(tmp_path):
    run = story_run(tmp_path, STORIES)
    truth = ground_truth(run)
    where = {concept.name: truth.labels[:, i] for i, concept in enumerate(truth.concepts)}

    def tokens(name):
        return [row_text(run, int(row)) for row in where[name].nonzero()]

    assert tokens("animal/pet/dog") == tokens("animal") == ["dog", "dog"]
    assert tokens("in a quotation") == ["then", "it", "sat"]
    assert tokens("after a negation") == ["sad", "and", "happy"]
    assert tokens("last named: feeling/bad/sad") == ["and", "happy", ".", "a", "dog"]
    assert tokens("last named: animal/pet/dog")[:3] == ["saw", "a", "red"]
    assert tokens("how it ends: good end") == re.findall(r"\w+|\.", STORIES[1]["text"])
    assert where["topic: walks"].all() and not where["last named: name/girl"].any()
    assert [concept.word for concept in truth.concepts if concept.part == "sense"] == ["saw"]
    assert [row_text(run, int(row)) for row in truth.words["saw"].nonzero()] == ["saw", "saw"]
    (sense,) = (concept.name for concept in truth.concepts if concept.part == "sense")
    assert tokens(sense) == ["saw"]


def test_the_truth_goes_by_the_text_not_by_its_place(tmp_path):
    """A run of a sample of the stories, in another order, has the same labels."""
    run = story_run(tmp_path, STORIES)
    lines = (tmp_path / "stories.jsonl").read_text().splitlines()
    before = ground_truth(run)
    (tmp_path / "stories.jsonl").write_text("\n".join(reversed(lines)) + "\n")
    after = ground_truth(run)
    assert before.concepts == after.concepts and torch.equal(before.labels, after.labels)
    (tmp_path / "stories.jsonl").write_text(lines[0] + "\n")
    with pytest.raises(InputError, match="1 texts of run"):
        ground_truth(run)


def test_a_data_set_that_has_moved_leaves_the_run_without_truth(tmp_path, caplog):
    run = story_run(tmp_path, STORIES)
    run.meta["dataset"]["path"] = str(tmp_path / "stories.jsonl")
    assert ground_truth(run)
    (tmp_path / "stories.jsonl").rename(tmp_path / "elsewhere.jsonl")
    assert ground_truth(run) is None and "is gone; put it back" in caplog.text


@pytest.mark.parametrize("change", [
    {"concepts": [0, 0, 4, 2, 0, 0, 0]}, {"concepts": [0, 0, 4, 2, 0, 0, 0, 1, 0]}, {"topic": -1}, {"mood": 2},
    {"concepts": [0, 0, 4, 2, 0, 0, 0, 9]},
])
def test_numbers_that_are_not_those_of_the_words_and_the_tree_give_no_truth(tmp_path, caplog, change):
    """One word's number missing shifted or dropped the labels of the rest; a leaf of another tree became no concept."""
    run = story_run(tmp_path, [STORIES[0], STORIES[1] | change])
    assert ground_truth(run) is None and "don't give their words the numbers" in caplog.text


def test_every_word_with_two_senses_in_the_shipped_stories_is_asked_for():
    """What test_embedded.py finds in the stories, ground_truth finds too."""
    from lib.ground_truth import _senses

    with open(PROJECT / "store/embedded/stories/train.jsonl", encoding="utf-8") as file:
        stories = [json.loads(line) for line in file]
    tree = json.loads((PROJECT / "store/embedded/stories/concepts.json").read_text())
    senses = _senses(stories, {leaf["number"]: leaf["path"] for leaf in tree["leaves"]})
    assert senses.keys() >= {"bat", "bark", "orange", "saw", "fly", "fall", "watch", "chicken", "her", "hand", "rose",
                             "fish", "cold", "duck"}
    assert senses["saw"] == "object/tool" and senses["watch"] == "sense/see" and senses["rose"] == ""


def test_controls_are_trained_once_and_only_what_is_free_moves(run, tmp_path):
    hook, settings = run.hooks[0], TrainSettings(n_latents=40, top_k=3, epochs=3, batch_size=32, precision="float32")
    rows = rows_of_run(run, hook)
    first = control_saes(run, hook, settings, tmp_path / "controls")
    assert list(first) == ["untrained", "frozen_decoder", "frozen_encoder"]
    assert sae_hash(first["untrained"]) == sae_hash(untrained_sae(rows, settings))
    for part, still, free in (("decoder", "dictionary", "encoder"), ("encoder", "encoder", "dictionary")):
        chosen = control_settings(settings, part, rows.n_train)
        moved = relative_change(first[f"frozen_{part}"], untrained_sae(rows, chosen))
        assert moved[still] < 1e-5 and moved[free] > 0.05
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "controls").rglob("*.pt")}
    assert len(written) == 2
    again = control_saes(run, hook, settings, tmp_path / "controls")
    assert [sae_hash(sae) for sae in again.values()] == [sae_hash(sae) for sae in first.values()]
    assert written == {path: path.stat().st_mtime_ns for path in (tmp_path / "controls").rglob("*.pt")}
    control_saes(run, hook, TrainSettings(n_latents=40, top_k=2, epochs=1, batch_size=32, precision="float32"),
                 tmp_path / "controls")
    assert len(list((tmp_path / "controls").rglob("*.pt"))) == 4


def test_controls_of_a_live_training_take_as_many_steps(run, tmp_path):
    """Epochs of the run's rows: as many as the steps, and for stored rows those of the SAE itself."""
    hook, settings = run.hooks[0], TrainSettings(n_latents=40, top_k=3, epochs=1, batch_size=32, precision="float32")
    per_epoch = steps_per_epoch(rows_of_run(run, hook).n_train, 32)
    for n_steps, epochs in ((None, 1), (per_epoch, 1), (2 * per_epoch + 1, 2)):
        found = control_saes(run, hook, settings, tmp_path / "controls", n_steps=n_steps)
        assert found["frozen_decoder"].config["settings"]["epochs"] == epochs
    assert len(list((tmp_path / "controls").rglob("*.pt"))) == 4


def test_the_checks_compare_latents_with_the_best_other_unit_and_with_the_table():
    def row(context, **f1):
        return {"context": context} | {kind: {"f1": value} for kind, value in f1.items()}

    words = [row(False, latent=0.9, untrained=0.4, neuron=0.5, table=1.0),
             row(False, latent=0.7, untrained=0.6, neuron=0.1, table=1.0)]
    contexts = [row(True, latent=0.5, untrained=0.1, neuron=0.7, table=0.3)]
    assert gains(words) == {"concept_gain": pytest.approx(0.3)}  # 0.8 against the untrained SAE's 0.5
    assert gains(words + contexts) == {"concept_gain": pytest.approx(0.3), "context_gain": pytest.approx(-0.2),
                                       "context_table": pytest.approx(0.2)}


def test_what_a_latent_is_made_of(run):
    """Latent 0 fires on one token, 1 on the two words of a leaf, 2 on everything."""
    cat, dog = (run.rows["token_id"] == word_tokenizer().convert_tokens_to_ids(word) for word in ("cat", "dog"))
    values = torch.stack([cat.float(), (cat | dog).float(), torch.ones(run.n_rows)], 1)
    codes = Codes([text["text"] for text in run.texts], run.rows, 3,
                  lambda: iter([(0, values, torch.arange(3).expand(run.n_rows, 3))]))
    truth = Truth([Concept("animal/pet", "leaf"), Concept("animal", "node")], torch.stack([cat | dog, cat | dog], 1),
                  {})
    assert compositions(codes, truth, [0, 1, 2]) == {"one token": [0], "one leaf concept": [1], "neither": [2]}
    assert compositions(codes, None, [0, 1]) == {"one token": [0], "one leaf concept": [], "neither": [1]}


@pytest.mark.parametrize("parts", [(False,), (True,), (False, True)])
def test_the_figures_of_recovery_draw_whatever_concepts_there_are(parts):
    found = [
        {"concept": f"c{i}", "context": context, **{kind: {"f1": 0.1 * i} for kind in KINDS}} for context in parts
        for i in range(9)
    ]
    for figure in (figures.recovery_boxes(found, KINDS), figures.recovery_examples(found, KINDS)):
        figure.canvas.draw()
        assert len(figure.axes) == 2
        plt.close(figure)
