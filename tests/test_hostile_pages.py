"""Tokens, names, concepts and paths that want to be markup, scripts or formulas: in every page they are text."""
import json
import re

import IPython.display
import pytest
from conftest import WORDS, run_notebook, sae_of, tiny_model
from test_verify_scripts import FOLDER, SMALL, TRAIN, script  # noqa: F401  (a fixture)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from checks import figures
from concepts.codes import encode_run
from concepts.dictionary import write_concepts
from concepts.firings import collect_firings
from lib.environment import log
from lib.ground_truth import ground_truth
from lib.sae import load_sae, sae_hash
from lib.store import open_run

EVIL = "<img/src=x/onerror=alert(1)>"
TOKENS = [EVIL, f"x\n\n{EVIL}", "`", f"`{EVIL}`", "$\\frac$", "$x$", "=cmd()", "{{data}}",
          "</script><script>alert(2)</script>", "[a](javascript:alert(3))", "&lt;b&gt;"]
LEAVES = [{"number": 1, "path": f"{EVIL}".replace("/", "|"), "words": ["cat"]},
          {"number": 2, "path": "a$\\frac$/b$", "words": ["dog"]}]


def hostile_model(folder):
    """A tiny Llama whose vocabulary is WORDS and TOKENS, split at spaces alone."""
    names = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", *WORDS, *TOKENS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    tokenizer.post_processor = processors.TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", 1)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]",
                            unk_token="[UNK]").save_pretrained(folder)
    tiny_model("llama", vocab_size=len(names)).save_pretrained(folder)


@pytest.fixture
def shown(monkeypatch):
    """Everything that notebooks display as HTML or Markdown, in order."""
    found = []

    def keep(*objects, **_):
        for thing in objects:
            for kind in ("_repr_html_", "_repr_markdown_"):
                text = getattr(thing, kind, lambda: None)()
                if text:
                    found.append(text)

    monkeypatch.setattr(IPython.display, "display", keep)
    return found


def test_hostile_data_stay_text_in_the_notebooks(script, own_store, tmp_path, shown, capsys):  # noqa: F811
    folder = tmp_path / "secret$\\frac$<b>customer"
    hostile_model(folder / "model")
    sentences = [f"the cat saw a dog {TOKENS[i % len(TOKENS)]} and {TOKENS[(i + 1) % len(TOKENS)]} on "
                 f"{TOKENS[(3 * i) % len(TOKENS)]} ." for i in range(90)]
    numbers = [[0] * len(re.findall("[A-Za-z]+", text)) for text in sentences]
    for text, found in zip(sentences, numbers):
        for i, word in enumerate(re.findall("[A-Za-z]+", text)):
            found[i] = {"cat": 1, "dog": 2}.get(word, 0)
    lines = [json.dumps({"text": text, "concepts": found, "topic": 0, "mood": i % 2})
             for i, (text, found) in enumerate(zip(sentences, numbers))]
    (folder / "texts.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "concepts.json").write_text(json.dumps({"leaves": LEAVES, "topics": [EVIL], "moods": ["$\\frac$", "$x"]}))
    assert script("01_save_activations.py", f"MODEL={folder}/model", f"DATASET={folder}/texts.jsonl", "VAL_FRAC=0.4",
                  *SMALL)[0] == 0
    assert script("02_train_sae.py", *TRAIN)[0] == 0
    for handler in list(log.handlers):  # of the scripts, which ran in this process
        log.removeHandler(handler)
    sae = load_sae(sae_of(own_store) / "topk_sae.pt")
    run = open_run("verify_sae_training")
    truth = ground_truth(run)
    assert {LEAVES[0]["path"], "how it ends: $\\frac$"} <= {concept.name for concept in truth.concepts}
    rows = [{"concept": concept.name, "context": number % 2, "latent": {"f1": 0.5}}
            for number, concept in enumerate(truth.concepts)]
    figures.recovery_examples(rows, {"latent": "latents"}).canvas.draw()
    store = sae_of(own_store)
    living = collect_firings(encode_run(run, run.hook(), sae)).fires.nonzero()[:, 0].tolist()
    header = {"sae_hash": sae_hash(sae), "run_id": "r", "n_latents": sae.n_latents}
    write_concepts(store / "concepts.json", header,
                   {i: {"name": e, "description": e, "notes": e, "source": "human"} for i, e in zip(living, TOKENS)})
    for name in ("04_name_sae_concepts.ipynb", "05_show_concepts.ipynb"):
        run_notebook(FOLDER / name)
    assert len(shown) > 12
    for text in shown:
        assert "mathjax_ignore" in text or "$" not in text, "no formulas"
        assert ("<img" not in text and "<script" not in text
                and "javascript:alert(3))" not in re.findall(r'href="([^"]*)"', text))
    page = (store / "concepts.html").read_text()
    assert "<img" not in page and page.count("<script") == page.count("</script>") == 1 + page.count(
        '<script type="application/json" id="')
    said = capsys.readouterr().out
    for text in (*shown, page, said):
        assert "customer" not in text and str(tmp_path) not in text, "paths stay on this machine"
    assert not re.search(r'(^|[\n,])"?[=+@]', (store / "concepts.csv").read_text())


@pytest.mark.parametrize("content", [
    {}, [], None, 3, "text", {"leaves": {}}, {"leaves": []}, {"leaves": [1]},
    {"leaves": [{"number": "1", "path": "a", "words": []}]},
    {"leaves": [{"number": 1, "path": "a", "words": ["b"]}] * 2, "topics": ["t"], "moods": ["m"]},
    {"leaves": [{"number": 1, "path": 5, "words": ["b"]}]},
    {"schema_version": 1, "sae_hash": "aa", "n_latents": 3, "concepts": {}},
    {"leaves": [{"number": 7, "path": "a", "words": ["cat"]}]}, "not JSON",
    {"leaves": [{"number": 7, "path": "a", "words": ["cat"]}], "topics": ["t"], "moods": ["m"]},
])
@pytest.mark.parametrize("given", [None, [1, 1, 1], [[1]], 5, {"1": 1}])
def test_a_concepts_file_of_another_project_is_ignored_in_one_line(tmp_path, caplog, content, given):
    """Beside data with and without concepts of their own."""
    lines = [{"text": "the cat sat"} | ({} if given is None else {"concepts": given, "topic": "t", "mood": [0]})] * 3
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "concepts.json").write_text("{" if content == "not JSON" else json.dumps(content))
    meta = {"dataset": {"name": str(tmp_path / "texts.jsonl"), "split": "train", "field": "text", "limit": None}}
    run = type("Run", (), {"meta": meta, "texts": [{"text": "the cat sat"}], "rows": {}})
    assert ground_truth(run) is None
    assert len(caplog.records) == 1 and "ignored" in caplog.text and str(tmp_path) not in caplog.text
