"""Train the small language model the project ships on the stories of 01_write_stories.py.

    python experiments/embedded_default/02_train_story_model.py
    python experiments/embedded_default/02_train_story_model.py EPOCHS=2 HIDDEN=64

Reads  store/embedded/stories/ (the root of the store is the environment variable STORE_DIR, if set)
Writes store/embedded/model/   config.json, model.safetensors, tokenizer.json ...: a folder for from_pretrained
                               report.json: constants, perplexity on the test stories (also of a unigram and a
                               bigram), accuracy of the mood probe
A stopped run resumes from its last checkpoint and ends with the same bytes, given the same THREADS.
"""
import json
import math
import shutil
from pathlib import Path

import checkout  # noqa: F401  (first: finds lib)
from lib.constants import override, refuse
from lib.ranges import Amount, Count, NotNegative, Rate, Seed, Size, Threads

HIDDEN: Size = 128                        # width of the residual stream
LAYERS: Size = 4                          # blocks
HEADS: Size = 4                           # attention heads per block
MLP_WIDTH: Size = 320                     # width inside a block's MLP
N_MERGES: NotNegative = 300               # byte pairs merged before whole words are added
MIN_WORD_COUNT: Size = 3                  # a word this frequent in the training stories is a token of its own
EPOCHS: Size = 4                          # passes over the training stories
BATCH_SIZE: Size = 32                     # stories per step
LR: Rate = 4e-3                           # peak of a schedule that rises over WARMUP steps and falls to 0 on a cosine
WARMUP: Size = 100                        # steps
WEIGHT_DECAY: Amount = 1.0                # on all matrices, embeddings too: words used alike become alike
SAVE_EVERY: Count = 100                   # steps between checkpoints
THREADS: Threads = 1                      # CPU threads; the last digits depend on it
PROBE_TOKENS: Size = 20                   # last tokens of a story that the mood probe reads
SEED: Seed = 0
CONSTANTS = override(globals())
if HIDDEN % HEADS or HIDDEN // HEADS % 2:
    refuse(f"HIDDEN={HIDDEN} must be a multiple of HEADS={HEADS}, and of twice that")

import story_model
import torch
from reports import up_to_date
from sklearn.linear_model import LogisticRegression
from story_model import Encoded
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lib.environment import InputError, run
from lib.files import parse_json, read_lines, read_torch, require_file, sha256, write_json, write_torch
from lib.outputs import in_use, is_current, list_files
from lib.schemas import COUNT
from lib.store import experiment_dir

STORY = {"text": str, "concepts": [COUNT], "mood": COUNT}
CHECKPOINT = {"stamp": str, "step": COUNT, "model": {}, "optimizer": {}, "schedule": {}}


def read_stories(folder: Path, split: str) -> list[dict]:
    """The stories of one split."""
    path = folder / f"{split}.jsonl"
    require_file(path, remedy="run 01_write_stories.py first")
    return list(read_lines(path, STORY, "delete its folder and run 01_write_stories.py again"))


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The untrained model, from its own seed."""
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
           "pad_token_id": tokenizer.pad_token_id}
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=HIDDEN, num_hidden_layers=LAYERS,
                         num_attention_heads=HEADS, intermediate_size=MLP_WIDTH, max_position_embeddings=512,
                         tie_word_embeddings=True, **ids)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return LlamaForCausalLM(config)


def train(model: LlamaForCausalLM, encoded: Encoded, pad: int, *, checkpoint: Path, stamp: str) -> None:
    """Train in place, from `checkpoint` if it carries the same stamp; it is written every SAVE_EVERY steps."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY},
              {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.98))
    per_epoch = len(encoded) // BATCH_SIZE
    n_steps, start = EPOCHS * per_epoch, 0
    if n_steps == 0:
        raise InputError(f"{len(encoded)} stories don't fill a batch of {BATCH_SIZE}; lower BATCH_SIZE")
    cosine = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1.0, (i + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * i / n_steps)))
    if checkpoint.exists():
        state = read_torch(checkpoint, "train again", CHECKPOINT)
        is_current(checkpoint, parse_json(state["stamp"].encode(), checkpoint, "delete it"), json.loads(stamp),
                   "finish that training with its own, or delete it to train anew")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        cosine.load_state_dict(state["schedule"])
        start = state["step"]
    for step in tqdm(range(start, n_steps), desc="training", unit="step", initial=start, total=n_steps):
        epoch, place = divmod(step, per_epoch)
        order = torch.randperm(len(encoded), generator=torch.Generator().manual_seed(SEED * 1000 + epoch))
        chosen = order[place * BATCH_SIZE:(place + 1) * BATCH_SIZE].tolist()
        loss = model(**story_model.batch_of([encoded[i] for i in chosen], pad)).loss
        if not torch.isfinite(loss):
            raise InputError(f"the loss is no longer finite at step {step}; lower LR")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        cosine.step()
        if (step + 1) % SAVE_EVERY == 0:
            state = {"stamp": stamp, "step": step + 1, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                     "schedule": cosine.state_dict()}
            write_torch(checkpoint, state)


def main() -> None:
    torch.set_num_threads(THREADS)
    folder = experiment_dir("embedded")
    splits = {split: read_stories(folder / "stories", split) for split in ("train", "val", "test")}
    out = folder / "model"
    made_from = {"constants": CONSTANTS, "stories": {s: sha256(folder / "stories" / f"{s}.jsonl") for s in splits}}
    with in_use(folder):
        report = None if up_to_date(out / "report.json", made_from) else make(folder, splits, made_from)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    if report is None:
        print(f"{out} is up to date; delete its report.json to train again")
        return
    print(json.dumps({key: value for key, value in report.items() if key not in ("files", "stories", "constants")},
                     indent=1))


def make(folder: Path, splits: dict[str, list[dict]], made_from: dict) -> dict:
    """Make tokenizer, model and scores, and return the report, which comes last: it marks the model complete."""
    out = folder / "model"
    tokenizer = story_model.build_tokenizer([s["text"] for s in splits["train"]], N_MERGES, MIN_WORD_COUNT)
    encoded = {split: story_model.encode(tokenizer, stories) for split, stories in splits.items()}
    pad, model = tokenizer.pad_token_id, new_model(tokenizer)
    train(model, encoded["train"], pad, checkpoint=folder / "checkpoints" / "story_model.pt",
          stamp=json.dumps(made_from, sort_keys=True))
    model.eval()
    test = {"model": story_model.perplexity(model, encoded["test"], pad)}
    test |= story_model.ngram_perplexity(encoded["train"], encoded["val"], encoded["test"], len(tokenizer))
    ends = {split: story_model.story_endings(model, encoded[split], pad, PROBE_TOKENS) for split in ("train", "test")}
    moods = {split: [story["mood"] for story in splits[split]] for split in ends}
    probe = LogisticRegression(C=0.1, max_iter=1000).fit(ends["train"], moods["train"])
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "generation_config.json").unlink(missing_ok=True)
    names = sorted(path.name for path in out.iterdir() if path.name != "report.json")
    report = made_from | {
        "parameters": model.num_parameters(), "vocabulary": len(tokenizer),
        "tokens": {split: sum(map(len, ids)) for split, ids in encoded.items()},
        "test_perplexity": {name: round(value, 4) for name, value in test.items()},
        "train_perplexity": round(story_model.perplexity(model, encoded["train"][:len(encoded["test"])], pad), 4),
        "mood_probe_accuracy": round(float(probe.score(ends["test"], moods["test"])), 4),
        "files": list_files(out, names),
    }
    write_json(out / "report.json", report)
    return report


if __name__ == "__main__":
    run(main)
