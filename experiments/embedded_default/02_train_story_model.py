"""Train the small language model the project ships on the stories of 01_write_stories.py.

    python experiments/embedded_default/02_train_story_model.py
    python experiments/embedded_default/02_train_story_model.py EPOCHS=2 HIDDEN=64

Reads  store/embedded/stories/ (the root of the store is the environment variable STORE_DIR, if set)
Writes store/embedded/model/   config.json, model.safetensors, tokenizer.json ...: a folder for from_pretrained
                               report.json: constants, perplexity on the test stories beside unigram and bigram, mood probe
A run that was stopped goes on from its last checkpoint and ends with the same bytes, given the same THREADS.
"""
import json
import shutil
from collections import Counter
from pathlib import Path

from lib.constants import override
from lib.environment import InputError, run
from lib.store import atomic_write, check_files, experiment_dir, list_files, read_json, sha256, write_json

import torch
from sklearn.linear_model import LogisticRegression
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HIDDEN = 128                # width of the residual stream
LAYERS = 4                  # blocks
HEADS = 4                   # attention heads per block
MLP_WIDTH = 320             # width inside a block's MLP
N_MERGES = 300              # byte pairs merged before whole words are added
MIN_WORD_COUNT = 3          # a word this frequent in the training stories is a token of its own
EPOCHS = 4                  # passes over the training stories
BATCH_SIZE = 32             # stories per step
LR = 3e-3                   # peak of a schedule that rises over WARMUP steps and falls to 0 on a cosine
WARMUP = 100                # steps
WEIGHT_DECAY = 0.1          # on all matrices, embeddings too: words used alike become alike
SAVE_EVERY = 100            # steps between checkpoints
THREADS = 1                 # CPU threads; sums, and so the last digits, depend on it
SEED = 0
CONSTANTS = override(globals())

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def read_stories(folder: Path, split: str) -> list[dict]:
    """The stories of one split."""
    path = folder / f"{split}.jsonl"
    if not path.exists():
        raise InputError(f"{path} is missing; run 01_write_stories.py first")
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that knows the frequent words whole and can spell any other text in bytes."""
    def byte_level(model: models.BPE) -> Tokenizer:
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        return tokenizer

    small = byte_level(models.BPE())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=len(SPECIAL) + len(alphabet) + N_MERGES, special_tokens=list(SPECIAL.values()),
                                  initial_alphabet=sorted(alphabet), show_progress=False)
    small.train_from_iterator(texts, trainer)
    pieces = json.loads(small.to_str())["model"]
    counts = Counter(word for text in texts for word, _ in small.pre_tokenizer.pre_tokenize_str(text))
    vocab = dict(pieces["vocab"])
    for word in sorted(word for word, count in counts.items() if count >= MIN_WORD_COUNT):
        vocab.setdefault(word, len(vocab))
    # ignore_merges: a word of the vocabulary is taken whole, whatever the merges would make of it
    whole = byte_level(models.BPE(vocab, [tuple(merge) for merge in pieces["merges"]], ignore_merges=True))
    whole.decoder = decoders.ByteLevel()
    whole.add_special_tokens(list(SPECIAL.values()))
    bos = SPECIAL["bos_token"]
    template = processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, vocab[bos])])
    whole.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
    return PreTrainedTokenizerFast(tokenizer_object=whole, model_max_length=512, padding_side="right", **SPECIAL)


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The untrained model, from its own seed."""
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
                         intermediate_size=MLP_WIDTH, max_position_embeddings=512, tie_word_embeddings=True, **ids)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return LlamaForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, stories: list[dict]) -> list[torch.Tensor]:
    """Token ids of each story, BOS in front and EOS behind."""
    return [torch.tensor(ids + [tokenizer.eos_token_id]) for ids in tokenizer([s["text"] for s in stories])["input_ids"]]


def batch_of(encoded: list[torch.Tensor], pad: int) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and labels [B, T], padded on the right; a pad is no label."""
    ids = torch.nn.utils.rnn.pad_sequence(encoded, batch_first=True, padding_value=pad)
    mask = ids != pad
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}


def train(model: LlamaForCausalLM, encoded: list[torch.Tensor], pad: int, checkpoint: Path, stamp: str) -> None:
    """Train in place; `checkpoint` is written every SAVE_EVERY steps and continued if it carries the same stamp."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY},
              {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.98))
    per_epoch = len(encoded) // BATCH_SIZE
    n_steps, start = EPOCHS * per_epoch, 0
    if n_steps == 0:
        raise InputError(f"{len(encoded)} stories don't fill a batch of {BATCH_SIZE}; lower BATCH_SIZE")
    cosine = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, (i + 1) / WARMUP) * 0.5 * (
        1 + torch.cos(torch.tensor(torch.pi * i / n_steps)).item()))
    if checkpoint.exists() and (state := torch.load(checkpoint, weights_only=True))["stamp"] == stamp:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        cosine.load_state_dict(state["schedule"])
        start = state["step"]
    for step in tqdm(range(start, n_steps), desc="training", unit="step", initial=start, total=n_steps):
        epoch, place = divmod(step, per_epoch)
        order = torch.randperm(len(encoded), generator=torch.Generator().manual_seed(SEED * 1000 + epoch))
        chosen = order[place * BATCH_SIZE:(place + 1) * BATCH_SIZE].tolist()
        loss = model(**batch_of([encoded[i] for i in chosen], pad)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        cosine.step()
        if (step + 1) % SAVE_EVERY == 0:
            state = {"stamp": stamp, "step": step + 1, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                     "schedule": cosine.state_dict()}
            atomic_write(checkpoint, lambda path: torch.save(state, path))


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, encoded: list[torch.Tensor], pad: int) -> float:
    """exp of the mean negative log-likelihood per token, EOS included, BOS given."""
    total, n = 0.0, 0
    for start in range(0, len(encoded), 64):
        batch = batch_of(encoded[start:start + 64], pad)
        tokens = int((batch["labels"][:, 1:] != -100).sum())
        total, n = total + model(**batch).loss.item() * tokens, n + tokens
    return float(torch.tensor(total / n).exp())


def ngram_perplexity(train: list[torch.Tensor], val: list[torch.Tensor], test: list[torch.Tensor], n_vocab: int) -> dict[str, float]:
    """Perplexity on `test` of an add-one unigram, and of a bigram mixed with it by the weight that is best on `val`."""
    pairs = torch.zeros(n_vocab, n_vocab, dtype=torch.float64)
    for ids in train:
        pairs.index_put_((ids[:-1], ids[1:]), torch.ones(len(ids) - 1, dtype=torch.float64), accumulate=True)
    unigram = (pairs.sum(0) + 1) / (pairs.sum() + n_vocab)
    bigram = pairs / pairs.sum(1, keepdim=True).clamp(min=1)

    def score(encoded: list[torch.Tensor], weight: float) -> float:
        left, right = torch.cat([ids[:-1] for ids in encoded]), torch.cat([ids[1:] for ids in encoded])
        return float((weight * bigram[left, right] + (1 - weight) * unigram[right]).log().mean().neg().exp())

    weight = min((i / 20 for i in range(1, 20)), key=lambda w: score(val, w))
    return {"unigram": score(test, 0.0), "bigram": score(test, weight), "bigram_weight": weight}


@torch.no_grad()
def story_states(model: LlamaForCausalLM, encoded: list[torch.Tensor], pad: int) -> torch.Tensor:
    """The final state at each story's last word [n, hidden]: what the model makes of the whole story, in order."""
    states = []
    for start in range(0, len(encoded), 64):
        batch = batch_of(encoded[start:start + 64], pad)
        hidden = model.model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        states.append(hidden[torch.arange(len(hidden)), batch["attention_mask"].sum(1) - 2])
    return torch.cat(states)


def main() -> None:
    torch.set_num_threads(THREADS)
    folder = experiment_dir("embedded")
    splits = {split: read_stories(folder / "stories", split) for split in ("train", "val", "test")}
    out = folder / "model"
    made_from = {"constants": CONSTANTS, "stories": {s: sha256(folder / "stories" / f"{s}.jsonl") for s in splits}}
    if (out / "report.json").exists():
        report = read_json(out / "report.json")
        if {key: report.get(key) for key in made_from} == made_from:
            check_files(out, report["files"], verify=True)
            print(f"{out} is up to date; delete its report.json to train again")
            return
    tokenizer = build_tokenizer([s["text"] for s in splits["train"]])
    encoded, pad = {split: encode(tokenizer, stories) for split, stories in splits.items()}, tokenizer.pad_token_id
    model, checkpoint = new_model(tokenizer), folder / "checkpoints" / "story_model.pt"
    train(model, encoded["train"], pad, checkpoint, json.dumps(made_from, sort_keys=True))
    model.eval()
    test = {"model": perplexity(model, encoded["test"], pad)}
    test |= ngram_perplexity(encoded["train"], encoded["val"], encoded["test"], len(tokenizer))
    probe = LogisticRegression(max_iter=1000).fit(story_states(model, encoded["train"], pad), [s["mood"] for s in splits["train"]])
    accuracy = probe.score(story_states(model, encoded["test"], pad), [s["mood"] for s in splits["test"]])
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "generation_config.json").unlink(missing_ok=True)
    names = sorted(path.name for path in out.iterdir() if path.name != "report.json")
    report = made_from | {
        "parameters": model.num_parameters(), "vocabulary": len(tokenizer),
        "tokens": {split: sum(map(len, ids)) for split, ids in encoded.items()},
        "test_perplexity": {name: round(value, 4) for name, value in test.items()},
        "train_perplexity": round(perplexity(model, encoded["train"][:len(encoded["test"])], pad), 4),
        "mood_probe_accuracy": round(float(accuracy), 4), "files": list_files(out, names),
    }
    write_json(out / "report.json", report)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    print(json.dumps({key: value for key, value in report.items() if key not in ("files", "stories", "constants")}, indent=1))


if __name__ == "__main__":
    run(main)
