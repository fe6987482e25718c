"""Tiny random models of the families that people use, made from transformers' own configs.

    python tests/zoo.py        prints what works where: one line a family, one column a kind of hook point

Widths of 16, two or three blocks; biases, norms' gains and scales are drawn too, so that a term which is left out
shows.
"""
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import lib.environment  # noqa: E402, F401  (the import guards come before transformers)
import torch  # noqa: E402
import transformers  # noqa: E402

WIDTH, VOCABULARY, POSITIONS = 16, 32, 64
SPECIAL = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZE = {
    "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": POSITIONS,
}
HEADS_OF_8 = {"head_dim": 8}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
DEEPSEEK = {
    **EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "n_group": 1, "topk_group": 1,
}
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}
VISION = {"hidden_size": 24, "intermediate_size": 16, "num_hidden_layers": 5, "num_attention_heads": 2, "image_size": 8,
          "patch_size": 4}

# name: (class of the model, config's options besides SIZE and SPECIAL). An option of None takes one out again.
FAMILIES = {
    "gpt2": ("GPT2LMHeadModel", {}),
    "gpt_neo": ("GPTNeoForCausalLM",
                {"attention_types": [[["global", "local"], 1]], "window_size": 8, "num_layers": 2}),
    "gpt_neox": ("GPTNeoXForCausalLM", {"use_parallel_residual": True}),
    "gpt_neox_serial": ("GPTNeoXForCausalLM", {"use_parallel_residual": False}),
    "gptj": ("GPTJForCausalLM", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": POSITIONS, "rotary_dim": 4}),
    "opt": ("OPTForCausalLM", {"ffn_dim": 32, "word_embed_proj_dim": 16}),
    "opt_350m": ("OPTForCausalLM", {"ffn_dim": 32, "word_embed_proj_dim": 8, "do_layer_norm_before": False}),
    "bloom": ("BloomForCausalLM", {}),
    "falcon_old": ("FalconForCausalLM",
                   {"alibi": True, "parallel_attn": False, "bias": True, "new_decoder_architecture": False}),
    "falcon_7b": ("FalconForCausalLM", {"parallel_attn": True, "multi_query": True, "new_decoder_architecture": False}),
    "falcon_40b": ("FalconForCausalLM", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "llama": ("LlamaForCausalLM", {}),
    "mistral": ("MistralForCausalLM", {"sliding_window": 8}),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16}),
    "qwen3": ("Qwen3ForCausalLM", HEADS_OF_8),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {**EXPERTS, **HEADS_OF_8, "num_experts": 4}),
    "gemma": ("GemmaForCausalLM", HEADS_OF_8),
    "gemma2": ("Gemma2ForCausalLM", {**HEADS_OF_8, "sliding_window": 8}),
    "gemma3": ("Gemma3ForCausalLM",
               {**HEADS_OF_8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}),
    "phi": ("PhiForCausalLM", {}),
    "phi3": ("Phi3ForCausalLM", {}),
    "olmo": ("OlmoForCausalLM", {}),
    "olmo2": ("Olmo2ForCausalLM", {}),
    "olmo3": ("Olmo3ForCausalLM", {}),
    "olmoe": ("OlmoeForCausalLM", {"num_experts": 4, "num_experts_per_tok": 2}),
    "glm": ("GlmForCausalLM", HEADS_OF_8),
    "glm4": ("Glm4ForCausalLM", HEADS_OF_8),
    "granite": ("GraniteForCausalLM",
                {"residual_multiplier": 0.22, "attention_multiplier": 0.5, "logits_scaling": 2.0}),
    "cohere": ("CohereForCausalLM", {}),
    "cohere2": ("Cohere2ForCausalLM", {**HEADS_OF_8, "sliding_window": 8}),
    "stablelm": ("StableLmForCausalLM", {}),
    "stablelm_parallel": ("StableLmForCausalLM", {"use_parallel_residual": True}),
    "starcoder2": ("Starcoder2ForCausalLM", {}),
    "mpt": ("MptForCausalLM",
            {"d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": POSITIONS, "expansion_ratio": 2}),
    "deepseek_v2": ("DeepseekV2ForCausalLM", DEEPSEEK),
    "deepseek_v3": ("DeepseekV3ForCausalLM", DEEPSEEK),
    "gpt_oss": ("GptOssForCausalLM",
                {**HEADS_OF_8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}),
    "smollm3": ("SmolLM3ForCausalLM", {}),
    "ernie4_5": ("Ernie4_5ForCausalLM", HEADS_OF_8),
    "mamba": ("MambaForCausalLM", {"state_size": 4}),
    "mamba2": ("Mamba2ForCausalLM", {"num_heads": 4, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8}),
    "rwkv": ("RwkvForCausalLM", {"attention_hidden_size": 16, "context_length": POSITIONS}),
    "jamba": ("JambaForCausalLM", {
        "num_hidden_layers": 3, "attn_layer_period": 3, "attn_layer_offset": 1, "expert_layer_period": 3,
        "expert_layer_offset": 1,
        "num_experts": 4, "use_mamba_kernels": False, "mamba_d_state": 4, "mamba_dt_rank": 2}),
    "bamba": ("BambaForCausalLM", {**MAMBA2, "attn_layer_indices": [1]}),
    "zamba2": ("Zamba2ForCausalLM", {
        **MAMBA2, "num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "mamba"], "n_mamba_heads": 4,
        "mamba_ngroups": 1,
        "chunk_size": 8, "num_mem_blocks": 1, "use_mem_rope": True, "adapter_rank": 4}),
    "recurrent_gemma": ("RecurrentGemmaForCausalLM", {
        **HEADS_OF_8, "num_hidden_layers": 3, "lru_width": 16, "attention_window_size": 8,
        "block_types": ["recurrent", "recurrent", "attention"]}),
    "falcon_h1": ("FalconH1ForCausalLM", {**MAMBA2, "mamba_d_ssm": 32}),
    "qwen3_next": ("Qwen3NextForCausalLM", {
        **EXPERTS, **HEADS_OF_8, "num_experts": 4, "shared_expert_intermediate_size": 16,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}),
    "bert": ("BertModel", {}),
    "roberta": ("RobertaModel", {"max_position_embeddings": POSITIONS + 1}),
    "modernbert": ("ModernBertModel", {"cls_token_id": 1, "sep_token_id": 2, "local_attention": 8}),
    "distilbert": ("DistilBertModel", {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}),
    "deberta_v2": ("DebertaV2Model",
                   {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}),
    "electra": ("ElectraModel", {"embedding_size": 8}),
    "albert": ("AlbertModel", {"embedding_size": 8}),
    "xlm": ("XLMModel", {"emb_dim": 16, "n_layers": 2, "n_heads": 2, "pad_index": 0, "use_lang_emb": False}),
    "t5": ("T5ForConditionalGeneration",
           {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}),
    "bart": ("BartForConditionalGeneration", {
        "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32, "decoder_start_token_id": 2}),
    "llava": ("LlavaForConditionalGeneration", {}),
    "vit": ("ViTModel", {}),
    "clip": ("CLIPModel", {}),
}


def config_of(name):
    """The config of a family's tiny model."""
    class_name, options = FAMILIES[name]
    kind = getattr(transformers, class_name).config_class
    if name == "llava":
        text = transformers.LlamaConfig(**SIZE, **SPECIAL)
        return kind(text_config=text, vision_config=transformers.CLIPVisionConfig(**VISION),
                    image_token_index=VOCABULARY - 1)
    if name == "vit":
        return kind(**VISION)
    if name == "clip":
        return kind(text_config={**SIZE, **SPECIAL}, vision_config=VISION, projection_dim=16)
    return kind(**{**SIZE, **SPECIAL, **options})


def build(name, seed=0):
    """The family's tiny model in eval mode; the same weights for the same seed. Every weight is drawn: gains about 1,
    the rest about 0.
    """
    torch.manual_seed(seed)
    model = getattr(transformers, FAMILIES[name][0])(config_of(name))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.mul_(5)
    return model.eval()


PARALLEL = {"resid_mid"}
NOTHING_INSIDE = {"resid_mid", "attn_out", "mlp_out"}
# The roles that a family lacks: at a block (by number), or at every one.
LACKS = {
    "gpt_neox": PARALLEL, "gptj": PARALLEL, "falcon_7b": PARALLEL, "falcon_40b": PARALLEL, "phi": PARALLEL,
    "cohere": PARALLEL, "cohere2": PARALLEL,
    "stablelm_parallel": PARALLEL,
    "olmo2": {"resid_mid"}, "olmo3": {"resid_mid"},  # no norm before the MLP
    "granite": {"attn_out", "mlp_out"},  # scaled before the sum
    "opt_350m": NOTHING_INSIDE, "bert": NOTHING_INSIDE, "roberta": NOTHING_INSIDE, "distilbert": NOTHING_INSIDE,
    "deberta_v2": NOTHING_INSIDE,
    "electra": NOTHING_INSIDE, "bart": NOTHING_INSIDE,  # the sum is normalised, so the stream ends at every norm
    "mamba": NOTHING_INSIDE, "mamba2": NOTHING_INSIDE, "zamba2": NOTHING_INSIDE,
    "rwkv": {0: {"attn_out"}},  # the first block normalises its input before the sum
    "jamba": {0: {"attn_out"}, 2: {"attn_out"}}, "bamba": {0: {"attn_out"}},
    "recurrent_gemma": {0: {"attn_out"}, 1: {"attn_out"}},
    "falcon_h1": {"attn_out"},  # attention and Mamba side by side
}
WITHOUT_BLOCKS = {"albert": "has no list of blocks", "xlm": "keeps the parts of its blocks apart"}
DOTTED = {"albert": "encoder,embeddings", "xlm": "attentions.1,ffns.0"}
NO_TEXT = {"vit": "does not read token ids", "clip": "does not read token ids"}
TEXT_FAMILIES = [name for name in FAMILIES if name not in NO_TEXT]
BLOCK_FAMILIES = [name for name in TEXT_FAMILIES if name not in WITHOUT_BLOCKS]


def lacks(name, block):
    """The roles that a block of the family lacks."""
    found = LACKS.get(name, set())
    return found.get(block, set()) if isinstance(found, dict) else found


def text_model(name):
    """The part of the family's model that reads text: of T5 and BART the encoder."""
    model = build(name)
    return model.get_encoder() if model.config.is_encoder_decoder else model


def table():
    """Lines of a table in Markdown: for each family and role the blocks that have it, or why none has."""
    from lib.residual_stream import ROLES
    from list_layers import short_names

    def reason(clause):
        for words, short in (("in parallel", "no: parallel"), ("no norm", "no: no norm there"),
                             ("no part", "no: never by itself"), ("no sum", "no: no sum")):
            if words in clause:
                return short
        return clause

    lines = ["| family | class | " + " | ".join(ROLES) + " |", "|" + "---|" * (len(ROLES) + 2)]
    for name, (class_name, _) in FAMILIES.items():
        try:
            if name in NO_TEXT:
                raise lib.environment.InputError("refused: reads no text")
            model = text_model(name)
            n, found = model.config.get_text_config().num_hidden_layers, []
            for row in short_names(model):
                some = "" if len(row["blocks"]) == n else f" (of {n} blocks: {', '.join(map(str, row['blocks']))})"
                found.append("yes" + some if row["blocks"] else reason(row["refused"][0]))
        except lib.environment.InputError as error:
            found = [str(error).split(";")[0].replace(f"{class_name} ", "refused: ")] + [""] * (len(ROLES) - 1)
        lines.append(f"| {name} | {type(model).__name__ if name not in NO_TEXT else class_name} | " + " | ".join(found)
                     + " |")
    return lines


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    print("\n".join(table()))
