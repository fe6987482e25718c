"""Small random models and a word tokenizer that the tests share; nothing here touches the network."""
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import lib.environment  # noqa: E402, F401  (the import guards come before transformers)
from concepts.codes import Codes  # noqa: E402
from forked import SCRIPTS, Forks, Whole, contents  # noqa: E402
import matplotlib  # noqa: E402
import nbformat  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers, processors  # noqa: E402

PROJECT = Path(__file__).resolve().parents[1]
ASSETS = PROJECT.parent / "shared" / "assets"
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu,  # a device to test on, beside the CPU or tests/fake_device.py
                                   pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here")])
WORDS = "the a cat dog bird sat ran saw on under mat tree and then it was red blue happy sad . ,".split()
TEXTS = [
    "the cat sat on the mat .",
    "a dog ran , and then it saw a red bird under the tree .",
    "it was sad",
    "the blue bird was happy and the dog was happy .",
    "a cat",
    "the dog saw the cat , the cat saw the bird , and the bird sat on the tree and it was happy .",
]


@pytest.fixture(autouse=True)
def own_store(tmp_path, monkeypatch):
    """Every test writes to a store of its own."""
    monkeypatch.setenv("STORE_DIR", str(tmp_path / "store"))
    return tmp_path / "store"


@pytest.fixture(autouse=True)
def own_hooks():
    """A script that ends early in this process leaves what catches Ctrl-C and errors in its imports; see
    lib.environment.guard_imports.
    """
    hook, handler = sys.excepthook, signal.getsignal(signal.SIGINT)
    yield
    sys.excepthook = hook
    signal.signal(signal.SIGINT, handler)


def word_tokenizer(bos: bool = True):
    """A fast tokenizer of whole words with [PAD]=0 [BOS]=1 [EOS]=2 [UNK]=3; BOS is put first."""
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[BOS]", "[EOS]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", 1)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", bos_token="[BOS]",
                                                eos_token="[EOS]", unk_token="[UNK]")


def tiny_model(kind: str, width: int = 16, n_blocks: int = 3, seed: int = 0, **extra):
    """A random model of the given family: llama, gpt2, neox or bert; causal LM, or encoder for bert."""
    torch.manual_seed(seed)
    size = {"hidden_size": width, "num_hidden_layers": n_blocks, "num_attention_heads": 2,
            "intermediate_size": 2 * width}
    common = {"vocab_size": len(WORDS) + 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **extra}
    if kind == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**size, **common))
    elif kind == "gpt2":
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=width, n_layer=n_blocks, n_head=2,
                                                                     **common))
    elif kind == "neox":
        model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**size, **common))
    elif kind == "bert":
        model = transformers.BertModel(transformers.BertConfig(**size, **common), add_pooling_layer=False)
    else:
        raise ValueError(kind)
    return model.eval()


def sae_of(store):
    """The folder of the SAE that was trained or imported last in this store."""
    folder = Path(store) / "verify_sae_training"
    return folder / "saes" / (folder / "last_sae.txt").read_text().strip()


def dense_codes(codes):
    dense = torch.zeros(len(codes), codes.n_latents)
    for start, values, indices in codes:
        dense[start : start + len(values)].scatter_add_(1, indices.long(), values)
    return dense


def in_batches(codes, size):
    """The same codes cut otherwise, so that texts straddle the batches."""
    parts = list(codes)
    values, indices = torch.cat([p[1] for p in parts]), torch.cat([p[2] for p in parts])
    cut = [(i, values[i : i + size], indices[i : i + size]) for i in range(0, len(values), size)]
    return Codes(codes.texts, codes.rows, codes.n_latents, lambda: iter(cut))


@pytest.fixture
def tokenizer():
    return word_tokenizer()


@pytest.fixture
def texts():
    return list(TEXTS)


@pytest.fixture
def saved_model(tmp_path):
    """Directory of a tiny Llama and its tokenizer, and a .jsonl of 60 texts, no two the same: what the scripts take."""
    folder = tmp_path / "model"
    tiny_model("llama").save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    others = [" ".join([WORDS[i + 9 * (k > 3)], *text.split()[1:]])  # another first word, so that all rows differ
              for i in range(2, 11) for k, text in enumerate(TEXTS)]
    lines = "".join(f'{{"text": "{text}"}}\n' for text in TEXTS + others)
    (tmp_path / "texts.jsonl").write_text(lines)
    return folder, tmp_path / "texts.jsonl"


@pytest.fixture(scope="session")
def labelled_texts(tmp_path_factory):
    """A folder with a tiny model (llama/) and train.jsonl, val.jsonl, test.jsonl of texts whose mood is told by a
    word.
    """
    folder = tmp_path_factory.mktemp("labelled")
    tiny_model("llama").save_pretrained(folder / "llama")
    word_tokenizer().save_pretrained(folder / "llama")
    lines = [{"text": f"{TEXTS[i % 6]} {('happy', 'sad')[i % 2]}", "mood": i % 2, "topic": i % 4} for i in range(90)]
    for name, part in (("train", lines), ("val", lines[:20]), ("test", lines[20:50])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in part))
    return folder


@pytest.fixture(scope="session")
def forks():
    """Runs scripts in forked children; see forked.py."""
    with Forks() as server:
        yield server


@pytest.fixture(scope="session")
def undisturbed(forks, labelled_texts, tmp_path_factory):
    """undisturbed(name): a script of forked.SCRIPTS run once in peace, after the steps that it needs; see
    forked.Whole.
    """

    @functools.cache
    def run(name):
        root = tmp_path_factory.mktemp("undisturbed")
        *needed, last = [[part.format(data=labelled_texts) for part in command] for command in SCRIPTS[name]]
        (root / "before").mkdir()
        for command in needed:
            assert (done := forks.run(command, root / "before")).code == 0, done.said
        shutil.copytree(root / "before", root / "whole")
        assert (ended := forks.run(last, root / "whole")).code == 0, ended.said
        return Whole(last, root / "before", ended, contents(root / "whole"))

    return run


def pytest_terminal_summary(terminalreporter):
    """After the tests of faults: what was done to the scripts, how often, and how often something was lost."""
    tried: dict[str, list[int]] = {}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            found = dict(report.user_properties)
            if "fault" in found and report.when == "call":
                row = tried.setdefault(found["fault"], [0, 0])
                row[0] += found["tried"]
                row[1] += outcome == "failed"
    if tried:
        terminalreporter.write_line(f"{'fault':<58} {'tried':>6} {'lost':>5}")
    for fault, (times, lost) in tried.items():
        terminalreporter.write_line(f"{fault:<58} {times:>6} {lost:>5}")


def row_text(run, row) -> str:
    """A row's piece of its text, by the stored character offsets."""
    text, start, end = (int(run.rows[name][row]) for name in ("text_id", "char_start", "char_end"))
    return run.texts[text]["text"][start:end]


def run_script(path: str, *arguments: str, store: Path, check: bool = True) -> subprocess.CompletedProcess:
    """Run one of the project's scripts as a user would, from another directory."""
    environment = os.environ | {"STORE_DIR": str(store), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(PROJECT / path), *arguments], capture_output=True, text=True,
                          env=environment, cwd=store.parent)
    if check and done.returncode:
        raise AssertionError(done.stdout + done.stderr)
    return done


def run_notebook(path: Path, **constants) -> dict:
    """Execute a notebook's code cells in order in one namespace and return it; outputs must not be committed.

    constants: values that take the place of those that the first code cell assigns.
    """
    matplotlib.use("Agg")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    namespace: dict = {}
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None, "notebooks are committed without outputs"
            namespace["In"] = [cell.source]  # as in IPython
            exec(compile(cell.source, f"{path.name} cell {number}", "exec"), namespace)
            namespace.update(constants)
    matplotlib.pyplot.close("all")
    return namespace


def run_readme(capsys) -> str:
    """Run README's block of Python as it stands, and return what it prints."""
    (block,) = re.findall(r"```python\n(.*?)```", (PROJECT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    capsys.readouterr()
    exec(compile(block, "README.md", "exec"), {})
    return capsys.readouterr().out
