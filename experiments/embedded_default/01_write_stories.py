"""Write the stories the project ships, with the concept of every word, from the grammar in grammar.py.

    python experiments/embedded_default/01_write_stories.py
    python experiments/embedded_default/01_write_stories.py N_STORIES=500 SEED=1

Writes under store/embedded/stories/ (the root of the store is the environment variable STORE_DIR, if set)
    train.jsonl, val.jsonl, test.jsonl   {"text", "mood": 0|1, "topic": 0-3, "concepts": [0, 14, ...]}: for each
                                         word, [A-Za-z]+, in order, the number of its leaf, 0 for none
    concepts.json                        the concept tree: leaf number -> path and words
    report.json                          constants, counts, and how well words without their order tell the mood
"""
import json
import random
from pathlib import Path

import checkout  # noqa: F401  (first: finds lib)
from lib.constants import override, refuse
from lib.ranges import Count, Part, Seed, Share

N_STORIES: Count = 6400                   # stories in all three splits together
VAL_FRAC: Share = 0.08                    # share of the stories in val.jsonl
TEST_FRAC: Share = 0.08                   # share of the stories in test.jsonl
MIN_WORDS: Count = 40                     # a story with fewer words is written again
MAX_WORDS: Count = 90                     # and one with more
SAME_MOOD_FRAC: Part = 0.3                # stories that end in the mood they began in; in the others order decides
OTHER_TOPIC_FRAC: Part = 0.3              # stories with one sentence on another topic
SEED: Seed = 0
CONSTANTS = override(globals())
if MIN_WORDS > MAX_WORDS:
    refuse(f"MIN_WORDS={MIN_WORDS} must be at most MAX_WORDS={MAX_WORDS}")
if VAL_FRAC + TEST_FRAC >= 1:
    refuse(f"VAL_FRAC={VAL_FRAC} and TEST_FRAC={TEST_FRAC} leave no story to train on; lower one of them")
if N_STORIES * min(VAL_FRAC, TEST_FRAC) < 2:
    refuse(f"N_STORIES={N_STORIES} leaves hardly a story to validate and test on; raise N_STORIES")

import grammar
import stories
from reports import up_to_date
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from tqdm import tqdm

from lib.environment import InputError, run, say_next
from lib.files import sha256, write_json, write_text
from lib.outputs import in_use, list_files
from lib.store import experiment_dir

ATTEMPTS = 10_000  # to write one story; with the default settings some dozens are enough


def write_story(number: int, seed: int, taken: set[str]) -> dict:
    """Story `number`, unlike all in `taken`. It has a generator of its own, so it does not depend on the others."""
    rng = random.Random(f"{seed}/{number}")
    mood, topic = number % 2, number // 2 % len(grammar.TOPICS)
    for _ in range(ATTEMPTS):
        story = stories.new_story(rng, topic)
        text, numbers = stories.join(stories.sentences(story, mood == 1, SAME_MOOD_FRAC, OTHER_TOPIC_FRAC))
        if MIN_WORDS <= len(numbers) <= MAX_WORDS and text not in taken:
            taken.add(text)
            return {"text": text, "mood": mood, "topic": topic, "concepts": numbers}
    raise InputError(f"no new story of {MIN_WORDS} to {MAX_WORDS} words in {ATTEMPTS:,} attempts; lower MIN_WORDS, "
                     "raise MAX_WORDS, or lower N_STORIES")


def mood_baselines(train: list[dict], test: list[dict]) -> dict[str, float]:
    """Accuracy on `test` of the commoner mood, the best single word, bags of words, and bags of words and pairs."""
    y_train, y_test = [s["mood"] for s in train], [s["mood"] for s in test]
    result = {"majority": max(sum(y_test), len(y_test) - sum(y_test)) / len(y_test)}
    for name, span in (("bag_of_words", (1, 1)), ("bag_of_words_and_pairs", (1, 2))):
        count = CountVectorizer(ngram_range=span, min_df=3, binary=True)
        x_train, x_test = count.fit_transform(s["text"] for s in train), count.transform(s["text"] for s in test)
        if span == (1, 1):
            n, sign = len(y_train), [1 if y else -1 for y in y_train]
            best = max(range(x_train.shape[1]), key=lambda j: abs(x_train[:, j].T @ sign - sum(sign) / 2)[0] / n)
            says = x_test[:, best].toarray().ravel() == 1
            hits = sum(int(a == b) for a, b in zip(says, y_test))
            result["best_single_word"] = max(hits, len(y_test) - hits) / len(y_test)
        model = LogisticRegression(C=0.1, max_iter=1000).fit(x_train, y_train)
        result[name] = model.score(x_test, y_test)
    return {name: round(float(value), 4) for name, value in result.items()}


def describe_concepts() -> dict:
    """The content of concepts.json: the leaves, numbered from 1, and the words with two senses."""
    leaves = [{"number": i + 1, "path": leaf,
               "words": sorted({form.lower() for forms in stories.FORMS[leaf] for form in forms})}
              for i, leaf in enumerate(stories.LEAVES)]
    nodes = {"/".join(leaf.split("/")[:depth]) for leaf in stories.LEAVES for depth in range(1, leaf.count("/") + 2)}
    two_senses = {word: leaves for word, leaves in sorted(stories.SENSES.items()) if len(leaves) > 1}
    return {"leaves": leaves, "nodes": sorted(nodes), "two_senses": two_senses, "topics": grammar.TOPICS,
            "moods": grammar.MOODS}


def main() -> None:
    out, names = experiment_dir("embedded") / "stories", ("train.jsonl", "val.jsonl", "test.jsonl", "concepts.json")
    here = Path(__file__).parent
    made_from = {"constants": CONSTANTS, "grammar": [sha256(here / name) for name in ("grammar.py", "stories.py")]}
    if up_to_date(out / "report.json", made_from):
        print(f"{out} is up to date; delete its report.json to write it again")
        return
    with in_use(out.parent):
        report = write(out, names, made_from)
    print(json.dumps({key: report[key] for key in ("stories", "words", "concept_words", "leaves", "mood_accuracy")},
                     indent=1))
    say_next("02_train_story_model.py")


def write(out: Path, names: tuple[str, ...], made_from: dict) -> dict:
    """Write all files and return the report, which comes last: it marks them complete."""
    taken: set[str] = set()
    written = [write_story(i, SEED, taken) for i in tqdm(range(N_STORIES), desc="stories", unit="story")]
    n_val, n_test = int(N_STORIES * VAL_FRAC), int(N_STORIES * TEST_FRAC)
    splits = dict(zip(names, (written[n_val + n_test:], written[:n_val], written[n_val:n_val + n_test])))
    for name, split in splits.items():
        write_text(out / name, "".join(json.dumps(s, separators=(",", ":")) + "\n" for s in split))
    write_json(out / "concepts.json", describe_concepts())
    numbers = [n for s in written for n in s["concepts"]]
    report = made_from | {
        "stories": {name: len(split) for name, split in splits.items()}, "words": len(numbers),
        "concept_words": sum(n > 0 for n in numbers), "leaves": len(stories.LEAVES),
        "rarest_leaf_words": min(numbers.count(n + 1) for n in range(len(stories.LEAVES))),
        "mood_accuracy": mood_baselines(splits[names[0]], splits[names[2]]),
        "files": list_files(out, list(names)),
    }
    write_json(out / "report.json", report)
    return report


if __name__ == "__main__":
    run(main)
