"""SAEBench's core evaluation of an exported SAE, without the hub; run it with the peers' Python.

    python ../verify_sae_training/export_sae.py FORMAT=dictionary_learning
    ../../.venv-peers/bin/python saebench_core.py MODEL EXPORT TEXTS

MODEL: directory of a Llama with its tokenizer. EXPORT: folder with ae.pt and config.json of an SAE on a block's output.
TEXTS: a .jsonl file with the field "text", whose first CONTEXT tokens count. The last line printed is SAEBench's
metrics as JSON.
"""
import json
import sys
from pathlib import Path

import datasets
import sae_bench.custom_saes.topk_sae as topk
import torch
import transformers
from sae_bench.evals.core.eval_config import CoreEvalConfig
from sae_bench.evals.core.main import run_evals
from sae_lens.training.activations_store import ActivationsStore
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_llama_weights

CONTEXT = 48  # tokens of a text; shorter texts are left out
PROMPTS = 16  # texts of a batch
BATCHES = 20
CPU = torch.device("cpu")


def hooked_llama(folder):
    """The model in TransformerLens, checked to predict what it predicts in transformers, and its tokenizer."""
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    c = hf.config
    model = HookedTransformer(HookedTransformerConfig(
        model_name=Path(folder).name, original_architecture="LlamaForCausalLM", n_layers=c.num_hidden_layers,
        d_model=c.hidden_size, n_ctx=c.max_position_embeddings, d_head=c.head_dim, n_heads=c.num_attention_heads,
        d_mlp=c.intermediate_size, d_vocab=c.vocab_size, act_fn=c.hidden_act, normalization_type="RMS", final_rms=True,
        eps=c.rms_norm_eps, gated_mlp=True, positional_embedding_type="rotary", rotary_dim=c.head_dim,
        rotary_base=c.rope_parameters["rope_theta"], rotary_adjacent_pairs=False, device="cpu",
    ), tokenizer=tokenizer, default_padding_side="right")
    model.load_state_dict(convert_llama_weights(hf, model.cfg), strict=False)
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).log_softmax(-1), hf(ids).logits.log_softmax(-1), rtol=1e-3, atol=1e-3)
    return model, tokenizer


def main():
    folder, export, texts = sys.argv[1:]
    model, tokenizer = hooked_llama(folder)
    name = json.loads((Path(export) / "config.json").read_text())["trainer"]["lm_name"]
    topk.hf_hub_download = lambda repo_id, filename, **_: f"{export}/{filename}"  # a local folder in place of the hub
    sae = topk.load_dictionary_learning_topk_sae("", "ae.pt", name, device=CPU, dtype=torch.float32)
    with open(texts, encoding="utf-8") as file:
        data = datasets.Dataset.from_list([{"text": json.loads(line)["text"]} for line in file])
    store = ActivationsStore(
        model, data, streaming=False, hook_name=sae.cfg.hook_name, hook_head_index=None, context_size=CONTEXT,
        d_in=model.cfg.d_model, n_batches_in_buffer=4, total_training_tokens=CONTEXT * len(data),
        store_batch_size_prompts=PROMPTS, train_batch_size_tokens=1024, prepend_bos=True, normalize_activations="none",
        device=CPU, dtype="float32",
        disable_concat_sequences=True, sequence_separator_token=None,  # one text per context, as ours were saved
    )
    config = CoreEvalConfig(
        model_name=name, batch_size_prompts=PROMPTS, n_eval_reconstruction_batches=BATCHES,
        n_eval_sparsity_variance_batches=BATCHES, compute_kl=True, compute_ce_loss=True, compute_l2_norms=True,
        compute_sparsity_metrics=True, compute_variance_metrics=True, exclude_special_tokens_from_reconstruction=True,
    )
    metrics, _ = run_evals(sae, store, model, config, ignore_tokens=set(tokenizer.all_special_ids))
    print(json.dumps(metrics))


if __name__ == "__main__":
    main()
