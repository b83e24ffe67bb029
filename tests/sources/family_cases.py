"""One tiny float32 checkpoint per family: what the table of families is made from.

Weights are scaled so that logits are of order one: they are compared with transformers'. Imported by the
process that runs the official converter too, so: no gguf, no torch here.
"""

from __future__ import annotations

from dataclasses import replace

from .cases import CASES, CHAT, LLAMA3_ROPE, Case

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
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}

FAMILY_CASES = {
    "Llama": replace(
        BPE, architecture="LlamaForCausalLM", pre="llama-bpe", config={"rope_parameters": LLAMA3_ROPE}
    ),
    "Mistral": replace(BPE, architecture="MistralForCausalLM", tokenizer="sentencepiece", pre=None),
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
        BPE,
        architecture="MixtralForCausalLM",
        tokenizer="sentencepiece",
        pre=None,
        config={"num_local_experts": 4, "num_experts_per_tok": 2},
        shard_size="100KB",
    ),
}
"""By the family's name."""

ALL_CASES = {**CASES, **FAMILY_CASES}
