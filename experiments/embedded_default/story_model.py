"""The parts of 02_train_story_model.py: tokenizer, batches, and scores of a language model."""
import json
from collections import Counter

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
Encoded = list[torch.Tensor]  # token ids of each story


def build_tokenizer(texts: list[str], n_merges: int, min_word_count: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that knows words seen min_word_count times whole and spells any other text."""
    def byte_level(model: models.BPE) -> Tokenizer:
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        return tokenizer

    small = byte_level(models.BPE())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = list(SPECIAL.values())
    trainer = trainers.BpeTrainer(vocab_size=len(special) + len(alphabet) + n_merges, special_tokens=special,
                                  initial_alphabet=sorted(alphabet), show_progress=False)
    small.train_from_iterator(texts, trainer)
    pieces = json.loads(small.to_str())["model"]
    counts = Counter(word for text in texts for word, _ in small.pre_tokenizer.pre_tokenize_str(text))
    vocab = dict(pieces["vocab"])
    for word in sorted(word for word, count in counts.items() if count >= min_word_count):
        vocab.setdefault(word, len(vocab))
    # ignore_merges: a word of the vocabulary is taken whole, whatever the merges would make of it
    whole = byte_level(models.BPE(vocab, [tuple(merge) for merge in pieces["merges"]], ignore_merges=True))
    whole.decoder = decoders.ByteLevel()
    whole.add_special_tokens(special)
    bos = SPECIAL["bos_token"]
    template = processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A $B",
                                             special_tokens=[(bos, vocab[bos])])
    whole.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
    return PreTrainedTokenizerFast(tokenizer_object=whole, model_max_length=512, padding_side="right", **SPECIAL)


def encode(tokenizer: PreTrainedTokenizerFast, stories: list[dict]) -> Encoded:
    """Token ids of each story, BOS in front and EOS behind."""
    return [torch.tensor(ids + [tokenizer.eos_token_id])
            for ids in tokenizer([s["text"] for s in stories])["input_ids"]]


def batch_of(encoded: Encoded, pad: int) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and labels [B, T], padded on the right; a pad is no label."""
    ids = torch.nn.utils.rnn.pad_sequence(encoded, batch_first=True, padding_value=pad)
    mask = ids != pad
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, encoded: Encoded, pad: int) -> float:
    """exp of the mean negative log-likelihood per token, EOS included, BOS given."""
    total, n = 0.0, 0
    for start in range(0, len(encoded), 64):
        batch = batch_of(encoded[start:start + 64], pad)
        tokens = int((batch["labels"][:, 1:] != -100).sum())
        total, n = total + model(**batch).loss.item() * tokens, n + tokens
    return float(torch.tensor(total / n).exp())


def ngram_perplexity(train: Encoded, val: Encoded, test: Encoded, n_vocab: int) -> dict[str, float]:
    """Perplexity on `test` of an add-one unigram, and of a bigram mixed with it by the weight that is best on `val`."""
    pairs = torch.zeros(n_vocab, n_vocab, dtype=torch.float64)
    for ids in train:
        pairs.index_put_((ids[:-1], ids[1:]), torch.ones(len(ids) - 1, dtype=torch.float64), accumulate=True)
    unigram = (pairs.sum(0) + 1) / (pairs.sum() + n_vocab)
    bigram = pairs / pairs.sum(1, keepdim=True).clamp(min=1)

    def score(encoded: Encoded, weight: float) -> float:
        left, right = torch.cat([ids[:-1] for ids in encoded]), torch.cat([ids[1:] for ids in encoded])
        return float((weight * bigram[left, right] + (1 - weight) * unigram[right]).log().mean().neg().exp())

    weight = min((i / 20 for i in range(1, 20)), key=lambda w: score(val, w))
    return {"unigram": score(test, 0.0), "bigram": score(test, weight), "bigram_weight": weight}


@torch.no_grad()
def story_endings(model: LlamaForCausalLM, encoded: Encoded, pad: int, n_last: int) -> torch.Tensor:
    """Mean of the final states of each story's last n_last tokens [n, hidden]: what the model holds at the end."""
    means = []
    for start in range(0, len(encoded), 64):
        batch = batch_of([ids[:-1] for ids in encoded[start:start + 64]], pad)  # without EOS
        mask = batch["attention_mask"]
        hidden = model.model(batch["input_ids"], attention_mask=mask).last_hidden_state
        place = torch.arange(mask.shape[1])
        last = mask * (place >= mask.sum(1, keepdim=True) - n_last)
        means.append((hidden * last[..., None]).sum(1) / last.sum(1, keepdim=True))
    return torch.cat(means)
