"""The shipped stories and story model: ground truth, splits, moods, tokenizer, perplexity, and how they are made."""
import importlib.util
import json
import random
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lib.environment import InputError
from lib.files import sha256

PROJECT = Path(__file__).resolve().parents[1]
SCRIPTS = PROJECT / "experiments" / "embedded_default"
SHIPPED = PROJECT / "store" / "embedded"
SPLITS = ("train", "val", "test")


@pytest.fixture(autouse=True)
def scripts_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def load(name: str, **constants):
    """A script as a module, with other constants."""
    spec = importlib.util.spec_from_file_location(name[3:-3], SCRIPTS / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for constant, value in constants.items():
        assert constant in module.CONSTANTS
        setattr(module, constant, value)
        module.CONSTANTS[constant] = value
    return module


def read(split: str) -> list[dict]:
    with open(SHIPPED / "stories" / f"{split}.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="module")
def shipped() -> dict[str, list[dict]]:
    return {split: read(split) for split in SPLITS}


@pytest.fixture(scope="module")
def concepts() -> dict:
    return json.loads((SHIPPED / "stories" / "concepts.json").read_text())


@pytest.fixture(scope="module")
def report() -> dict:
    return json.loads((SHIPPED / "model" / "report.json").read_text())


def words(story: dict) -> list[str]:
    return re.findall("[A-Za-z]+", story["text"])


def bytes_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != ".lock"}


def test_the_same_seed_writes_the_same_bytes_and_another_seed_others(tmp_path, monkeypatch):
    files = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        monkeypatch.setenv("STORE_DIR", str(tmp_path / name))
        load("01_write_stories.py", N_STORIES=300, SEED=seed).main()
        files[name] = bytes_below(tmp_path / name)
    assert files["a"] == files["b"]
    assert len(files["a"]) == 5
    assert files["a"]["embedded/stories/train.jsonl"] != files["c"]["embedded/stories/train.jsonl"]


def test_shipped_stories_are_what_the_script_writes(shipped):
    script = load("01_write_stories.py")
    n_val, n_test = int(script.N_STORIES * script.VAL_FRAC), int(script.N_STORIES * script.TEST_FRAC)
    taken: set[str] = set()
    assert [script.write_story(i, script.SEED, taken) for i in range(200)] == shipped["val"][:200]
    assert (len(shipped["val"]), len(shipped["test"])) == (n_val, n_test)
    assert sum(map(len, shipped.values())) == script.N_STORIES
    stated = json.loads((SHIPPED / "stories" / "report.json").read_text())  # else the script would write them again
    assert stated["grammar"] == [sha256(SCRIPTS / name) for name in ("grammar.py", "stories.py")]


def test_every_concept_number_stands_on_a_word_of_its_leaf(shipped, concepts):
    leaf_words = [set()] + [set(leaf["words"]) for leaf in concepts["leaves"]]
    assert [leaf["number"] for leaf in concepts["leaves"]] == list(range(1, len(leaf_words)))
    seen = set()
    for story in shipped["train"] + shipped["val"] + shipped["test"]:
        found = words(story)
        assert len(found) == len(story["concepts"])
        for word, number in zip(found, story["concepts"]):
            if number:
                assert word.lower() in leaf_words[number], (word, number, story["text"])
        seen.update(story["concepts"])
    assert seen == set(range(len(leaf_words)))


def test_a_word_with_one_sense_always_carries_it(shipped, concepts):
    import grammar

    one_sense = {}
    for leaf in concepts["leaves"]:
        for word in leaf["words"]:
            one_sense[word] = None if word in one_sense or word in grammar.PLAIN_SENSES else leaf["number"]
    for story in shipped["train"]:
        for word, number in zip(words(story), story["concepts"]):
            expected = one_sense.get(word.lower())
            assert expected is None or number == expected, (word, story["text"])


def test_words_with_two_senses_occur_in_both(shipped, concepts):
    senses: dict[str, set[int]] = {}
    for story in shipped["train"]:
        for word, number in zip(words(story), story["concepts"]):
            senses.setdefault(word.lower(), set()).add(number)
    twofold = {word for word, leaves in concepts["two_senses"].items()
               if word in senses and len(senses[word] - {0}) > 1}
    assert twofold >= {"bat", "bark", "orange", "saw", "fly", "fall", "watch", "chicken", "her", "hand"}
    for word in ("rose", "fish", "cold", "duck", "light", "ring", "park", "kind", "left"):
        assert 0 in senses[word] and len(senses[word]) == 2, word


def test_the_tree_has_enough_concepts_in_two_and_three_levels(concepts):
    depths = [leaf["path"].count("/") + 1 for leaf in concepts["leaves"]]
    assert len(depths) >= 30
    assert {2, 3} <= set(depths)
    assert "animal/pet/dog" in concepts["nodes"] and "animal/pet" in concepts["nodes"] and "animal" in concepts["nodes"]


def test_stories_are_whole_and_splits_share_none(shipped):
    texts = [story["text"] for split in SPLITS for story in shipped[split]]
    assert len(set(texts)) == len(texts)
    for text in texts:
        assert 40 <= len(re.findall("[A-Za-z]+", text)) <= 90
        assert text[0].isupper() or text[0] == '"'
        assert text.count('"') % 2 == 0
        assert not re.search(r"[\[\]<>{}@]|  | [.,!?]|\ba [aeiou]|\ban [^aeiouh]", text), text
        assert not re.search(r"[.!?] [a-z]", text), text
    for split in SPLITS:
        assert {story["mood"] for story in shipped[split]} == {0, 1}
        assert {story["topic"] for story in shipped[split]} == {0, 1, 2, 3}


def test_mood_needs_order(shipped, report):
    """No word, and no bag of words, tells the mood as well as a probe on a model that reads in order."""
    script = load("01_write_stories.py")
    measured = script.mood_baselines(shipped["train"], shipped["test"])
    stated = json.loads((SHIPPED / "stories" / "report.json").read_text())["mood_accuracy"]
    assert measured == pytest.approx(stated, abs=0.02)
    assert measured["best_single_word"] < 0.62
    assert measured["bag_of_words"] < 0.70
    assert report["mood_probe_accuracy"] > measured["bag_of_words"] + 0.1
    assert measured["majority"] < 0.55


def test_grammar_refuses_a_word_without_its_sense():
    import stories

    with pytest.raises(ValueError, match="needs a sense"):
        stories.literal("bark", None)
    with pytest.raises(ValueError, match="no sense food"):
        stories.literal("bark", "food")
    assert stories.literal("bark", "call") == ("bark", "sound/call")
    assert stories.literal("bark", "none") == ("bark", None)


def test_every_sentence_of_the_grammar_can_be_written():
    import grammar
    import stories

    for rule in grammar.RULES.values():
        for template in rule:
            for seed in range(3):
                story = stories.new_story(random.Random(seed), 0)
                text, numbers = stories.join([stories.expand(template, story, "afraid")])
                assert len(re.findall("[A-Za-z]+", text)) == len(numbers)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(SHIPPED / "model", local_files_only=True).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(SHIPPED / "model", local_files_only=True)


def test_shipped_model_beats_the_bigram(model, tokenizer, shipped, report):
    assert model.dtype == torch.float32
    import story_model as judge

    encoded = judge.encode(tokenizer, shipped["test"][:64])
    perplexity = judge.perplexity(model, encoded, tokenizer.pad_token_id)
    stated = report["test_perplexity"]
    assert perplexity < 0.8 * stated["bigram"] < 0.8 * stated["unigram"]
    assert perplexity == pytest.approx(stated["model"], rel=0.1)


def test_offsets_cut_the_text_where_the_words_are(tokenizer, shipped):
    assert tokenizer.is_fast
    whole = 0
    for story in shipped["test"][:100]:
        encoding = tokenizer(story["text"], return_offsets_mapping=True)
        assert encoding["input_ids"][0] == tokenizer.bos_token_id
        assert tokenizer.decode(encoding["input_ids"], skip_special_tokens=True) == story["text"]
        spans = set(encoding["offset_mapping"])
        assert "".join(story["text"][a:b] for a, b in encoding["offset_mapping"]) == story["text"].replace(" ", "")
        found = list(re.finditer("[A-Za-z]+", story["text"]))
        whole += sum(match.span() in spans for match in found) / len(found)
    assert whole / 100 > 0.97


@pytest.mark.parametrize("text", ["Żółw & 😀\n\ttabs", "", "An elephant wrote 1234 e-mails?!", "日本語"])
def test_any_text_can_be_typed(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:], clean_up_tokenization_spaces=False) == text


def test_ngram_perplexity_in_closed_form():
    import story_model as judge

    ids = torch.tensor([0, 1, 2])
    scores = judge.ngram_perplexity([ids], [ids], [ids], 3)
    assert scores["unigram"] == pytest.approx(2.5)  # add one: (0 + 1, 1 + 1, 1 + 1) / 5
    weight = scores["bigram_weight"]
    assert weight == pytest.approx(0.95)
    assert scores["bigram"] == pytest.approx(1 / (0.95 + 0.05 * 2 / 5))


TINY = {"HIDDEN": 16, "LAYERS": 1, "HEADS": 2, "MLP_WIDTH": 16, "N_MERGES": 50, "EPOCHS": 2, "BATCH_SIZE": 8,
        "WARMUP": 2, "SAVE_EVERY": 3}


def train_tiny(folder: Path, monkeypatch, stop_after: int | None = None) -> dict[str, bytes]:
    monkeypatch.setenv("STORE_DIR", str(folder))
    load("01_write_stories.py", N_STORIES=60).main()
    script = load("02_train_story_model.py", **TINY)
    if stop_after is not None:
        written = []

        def stop(path, write):
            original(path, write)
            written.append(path)
            if len(written) == stop_after:
                raise KeyboardInterrupt

        original, script.write_torch = script.write_torch, stop
        with pytest.raises(KeyboardInterrupt):
            script.main()
        assert (folder / "embedded" / "checkpoints").exists()
        assert not (folder / "embedded" / "model" / "report.json").exists()
        script.write_torch = original
    script.main()
    assert not (folder / "embedded" / "checkpoints").exists()
    return bytes_below(folder / "embedded" / "model")


def test_a_killed_training_ends_with_the_same_bytes(tmp_path, monkeypatch):
    straight = train_tiny(tmp_path / "straight", monkeypatch)
    killed = train_tiny(tmp_path / "killed", monkeypatch, stop_after=2)
    assert "model.safetensors" in straight and "tokenizer.json" in straight
    assert straight == killed


def test_a_length_that_no_story_has_is_refused(monkeypatch):
    script = load("01_write_stories.py", MIN_WORDS=5000, MAX_WORDS=5000)
    monkeypatch.setattr(script, "ATTEMPTS", 20)
    with pytest.raises(InputError, match="no new story of 5000 to 5000 words in 20 attempts"):
        script.write_story(0, 0, set())


def test_finished_work_is_not_done_again(tmp_path, monkeypatch, capsys):
    train_tiny(tmp_path, monkeypatch)
    stamp = (tmp_path / "embedded" / "model" / "model.safetensors").stat().st_mtime_ns
    train_tiny(tmp_path, monkeypatch)
    assert capsys.readouterr().out.count("up to date") == 2
    assert (tmp_path / "embedded" / "model" / "model.safetensors").stat().st_mtime_ns == stamp


def test_missing_stories_name_the_step(tmp_path, monkeypatch):
    monkeypatch.setenv("STORE_DIR", str(tmp_path))
    with pytest.raises(InputError, match="01_write_stories.py"):
        load("02_train_story_model.py").main()


def test_shipped_files_are_small_and_unchanged(report):
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()) <= 8_000_000
    for part in ("stories", "model"):
        stated = json.loads((SHIPPED / part / "report.json").read_text())
        from lib.outputs import check_files

        check_files(SHIPPED / part, stated["files"], verify=True)
