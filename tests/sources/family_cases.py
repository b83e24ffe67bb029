"""One tiny float32 checkpoint per family: what the table of families is made from.

Weights are scaled so that logits are of order one: they are compared with transformers'. Imported by the
process that runs the official converter too, so: no gguf, no torch here.
"""

from __future__ import annotations

from dataclasses import replace

from .cases import CASES, CHAT, LLAMA3_ROPE, SIZES, Case

BPE = Case(
    "",
    "float32",
    "bpe",
    tokenizer_config={"eos_token": "</s>", "pad_token": "<pad>", "chat_template": CHAT},
    post_processor="byte_level",
    pre="qwen2",
    outtypes=("f32", "f16"),
    std=0,
)
SPM = replace(BPE, tokenizer="sentencepiece", pre=None)
GRANITE = {
    "attention_multiplier": 0.125,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "logits_scaling": 1.5,
}
# transformers would take it for twice the width; what is None stays at its default
MAMBA = {"intermediate_size": None, "state_size": 8}
EXPONENTIAL = {".ssm_a": "float32 exponentials differ between libraries and processors in the last bit"}
# ggml looks gelu up in a table of half precision: smaller layers keep its error below the tolerance
GELU = {"gain": 0.6}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}

FAMILY_CASES = {
    "Llama": replace(
        BPE, architecture="LlamaForCausalLM", pre="llama-bpe", config={"rope_parameters": LLAMA3_ROPE}
    ),
    "Mistral": replace(SPM, architecture="MistralForCausalLM"),
    "Qwen2": replace(BPE, architecture="Qwen2ForCausalLM"),
    "Qwen3": replace(BPE, architecture="Qwen3ForCausalLM", config={"head_dim": 32}),
    "Qwen2-MoE": replace(
        BPE,
        architecture="Qwen2MoeForCausalLM",
        config={**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 48},
    ),
    "Qwen3-MoE": replace(
        BPE,
        architecture="Qwen3MoeForCausalLM",
        config={**EXPERTS, "num_experts": 4, "norm_topk_prob": True, "head_dim": 32},
        shard_size="100KB",
    ),
    "Mixtral": replace(
        SPM,
        architecture="MixtralForCausalLM",
        config={"num_local_experts": 4, "num_experts_per_tok": 2},
        shard_size="100KB",
    ),
    "Gemma-2": replace(
        SPM,
        architecture="Gemma2ForCausalLM",
        **GELU,
        config={"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 4, "num_hidden_layers": 3},
    ),
    "Gemma-3": replace(
        SPM,
        architecture="Gemma3ForCausalLM",
        # norms behind each block undo the gain of layers: what it scales here is the tied head
        gain=0.4,
        config={
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 4,
            "num_hidden_layers": 7,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 20000.0},
            },
        },
    ),
    "Gemma-3 of a model with vision": replace(
        SPM,
        architecture="Gemma3ForConditionalGeneration",
        # as for Gemma-3
        gain=0.4,
        config={
            **dict.fromkeys(SIZES),
            "text_config": {**SIZES, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 64},
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
            "mm_tokens_per_image": 4,
        },
    ),
    "Phi-3": replace(
        SPM,
        architecture="Phi3ForCausalLM",
        config={
            "pad_token_id": 0,
            "original_max_position_embeddings": 256,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 20000.0,
                "partial_rotary_factor": 0.5,
                "long_factor": [1.0, 2.5, 4.0, 8.0],
                "short_factor": [1.0, 1.25, 1.5, 2.0],
            },
        },
        tokenizer_config={**SPM.tokenizer_config, "tokenizer_class": "LlamaTokenizer"},
        moved={"phi3.rope.scaling.attn_factor": "the converter adds it with the tensors, before all others"},
    ),
    "Phi-4": replace(
        BPE,
        architecture="Phi3ForCausalLM",
        config={"pad_token_id": 0, "tie_word_embeddings": True},
        tokenizer_config={**BPE.tokenizer_config, "tokenizer_class": "GPT2Tokenizer"},
    ),
    "SmolLM3": replace(
        BPE, architecture="SmolLM3ForCausalLM", config={"pad_token_id": 0, "num_hidden_layers": 4}
    ),
    "Granite": replace(BPE, architecture="GraniteForCausalLM", config=GRANITE),
    "Granite-MoE": replace(
        BPE,
        architecture="GraniteMoeForCausalLM",
        config={**GRANITE, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "Granite-MoE-shared": replace(
        BPE,
        architecture="GraniteMoeSharedForCausalLM",
        config={
            **GRANITE,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 48,
        },
    ),
    "OLMo-2": replace(BPE, architecture="Olmo2ForCausalLM", pre="olmo"),
    "StableLM": replace(
        BPE, architecture="StableLmForCausalLM", config={"use_qkv_bias": True}, pre="stablelm2"
    ),
    "StableLM-parallel": replace(
        BPE, architecture="StableLmForCausalLM", config={"use_parallel_residual": True}, pre="stablelm2"
    ),
    "StableLM-head-norms": replace(
        BPE,
        architecture="StableLmForCausalLM",
        config={"qk_layernorm": True, "use_parallel_residual": True},
        pre="stablelm2",
        no_official="it collects the norms of the heads and then stops: Unprocessed norms",
    ),
    "GPT-2": replace(BPE, architecture="GPT2LMHeadModel", **GELU, config_edits={"n_ctx": 512}, pre="gpt-2"),
    "GPT-NeoX": replace(
        BPE,
        architecture="GPTNeoXForCausalLM",
        **GELU,
        config_edits={"rotary_pct": 0.25},
        raw_config=True,
        only_ours={"general.file_type": "the converter forgets it here"},
    ),
    "Mamba": replace(BPE, architecture="MambaForCausalLM", config=MAMBA, last_bit=EXPONENTIAL),
    "Falcon-Mamba": replace(
        BPE,
        architecture="FalconMambaForCausalLM",
        # llama.cpp has one epsilon for all norms
        config={**MAMBA, "mixer_rms_eps": 1e-5, "tie_word_embeddings": False},
        last_bit=EXPONENTIAL,
    ),
}
"""By the family's name."""

VARIANTS = {
    # values that change on the way: computed from the checkpoint's own type
    "gemma-2-bfloat16": replace(
        FAMILY_CASES["Gemma-2"], dtype="bfloat16", std=0.05, outtypes=("f32", "f16", "bf16")
    ),
    "gemma-2-float16": replace(FAMILY_CASES["Gemma-2"], dtype="float16", std=0.05, outtypes=("f32", "bf16")),
    "mamba-bfloat16": replace(FAMILY_CASES["Mamba"], dtype="bfloat16", std=0.05, outtypes=("f32", "bf16")),
    "falcon-mamba-float16": replace(FAMILY_CASES["Falcon-Mamba"], dtype="float16", std=0.05),
    "gemma-3-vision-bfloat16": replace(
        FAMILY_CASES["Gemma-3 of a model with vision"], dtype="bfloat16", std=0.05
    ),
    "llama-old-name": replace(
        FAMILY_CASES["Llama"], std=0.05, config_edits={"architectures": ["LLaMAForCausalLM"]}
    ),
    # config.json as transformers 4 wrote it
    "gemma-3-old-config": replace(
        FAMILY_CASES["Gemma-3"],
        std=0.05,
        config_edits={
            "rope_parameters": None,
            "layer_types": None,
            "_sliding_window_pattern": None,
            "sliding_window_pattern": 6,
            "rope_theta": 500000.0,
            "rope_local_base_freq": 30000.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
    "phi-3-old-config": replace(
        FAMILY_CASES["Phi-3"],
        std=0.05,
        config_edits={
            "rope_parameters": None,
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "sliding_window": 128,
            "rope_scaling": {
                "type": "su",
                "long_factor": [1.0, 2.5, 4.0, 8.0],
                "short_factor": [1.0, 1.25, 1.5, 2.0],
            },
        },
        tokenizer_config={
            **FAMILY_CASES["Phi-3"].tokenizer_config,
            "added_tokens_decoder": {
                "0": {"content": "<unk>", "special": True},
                "2": {"content": "</s>", "special": False},
                "310": {"content": "<|user|>", "special": False},
                "311": {"content": "\u2581word", "special": False},
            },
        },
        files={
            "added_tokens.json": '{"<extra>": 305, "<far>": 4000}',
            "tokenizer.json": '{"added_tokens": [{"id": 312, "content": "<|end|>", "special": true}, '
            '{"id": 313, "content": "plain", "special": false}]}',
        },
    ),
    "gpt-neox-old-config": replace(
        FAMILY_CASES["GPT-NeoX"],
        std=0.05,
        config={"use_parallel_residual": False},
        config_edits={
            "rope_parameters": None,
            "rotary_pct": 0.5,
            "rotary_emb_base": 10000,
            "attention_bias": None,
            "intermediate_size": 96,
        },
        only_ours={"general.file_type": "the converter forgets it here"},
    ),
    "stablelm-another-base": replace(
        FAMILY_CASES["StableLM"],
        std=0.05,
        config={
            "rope_parameters": {"rope_type": "default", "rope_theta": 20000.0, "partial_rotary_factor": 0.5}
        },
        only_ours={".rope.freq_base": "without it llama.cpp takes 10,000: wrong for this model"},
    ),
    "smollm3-yarn": replace(
        FAMILY_CASES["SmolLM3"],
        std=0.05,
        config={
            **FAMILY_CASES["SmolLM3"].config,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 5000000.0,
                "factor": 2.0,
                "original_max_position_embeddings": 256,
            },
        },
    ),
    "granite-biases": replace(
        FAMILY_CASES["Granite"], std=0.05, config={**GRANITE, "attention_bias": True, "mlp_bias": True}
    ),
    "granite-small-vocabulary": replace(
        FAMILY_CASES["Granite"],
        std=0.05,
        config={**GRANITE, "vocab_size": 49152, "hidden_size": 16, "num_hidden_layers": 1},
    ),
    # as transformers holds them in memory, and other tools save them
    "qwen3-moe-fused": replace(FAMILY_CASES["Qwen3-MoE"], std=0.05, stored="fused", shard_size="1GB"),
    # as published: without the prefix, with buffers
    "gpt-2-published": replace(FAMILY_CASES["GPT-2"], std=0.05, stored="bare"),
}

ALL_CASES = {**CASES, **FAMILY_CASES, **VARIANTS}

REAL_TOKENIZERS = {
    "real-tokenizer-smollm2": "LlamaForCausalLM",
    "real-tokenizer-stories": "LlamaForCausalLM",
    "real-tokenizer-qwen3": "Qwen3ForCausalLM",
}
"""Tiny checkpoints with tokenizers of real models, made by official_run: their architectures."""
