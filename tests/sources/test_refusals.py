"""Variants that llama.cpp computes differently from transformers, or not at all: refused, with the reason.

The official converter writes a file for most of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from gguf_splitquant.errors import CheckpointError, SplitQuantError, UnsupportedModelError
from gguf_splitquant.sources.checkpoint import Checkpoint
from gguf_splitquant.sources.config import ModelConfig
from gguf_splitquant.sources.families import FAMILIES, family_class
from gguf_splitquant.sources.families.base import Family
from gguf_splitquant.sources.safetensors import StoredTensor

SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
NEEDED: dict[str, dict[str, Any]] = {
    "Qwen2Moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
    },
    "Qwen3Moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "GraniteMoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "GraniteMoeShared": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Gemma2": {"head_dim": 256},
    "Gemma3": {"head_dim": 256},
    "GPT2LMHeadModel": {"n_layer": 2, "n_embd": 64, "n_head": 4, "n_positions": 512},
    "Mamba": {"intermediate_size": 128},
    "FalconMamba": {"intermediate_size": 128},
}
YARN = {"rope_type": "yarn", "factor": 2.0}


def family(architecture: str, **fields: Any) -> Family:
    short = architecture.removesuffix("ForCausalLM")
    config = ModelConfig({**SIZES, **NEEDED.get(short, {}), **fields}, Path("config.json"))
    # as many tensors as any of these has: their names do not matter here
    tensors = cast("dict[str, StoredTensor]", dict.fromkeys(map(str, range(200))))
    name = architecture if architecture in FAMILIES else f"{architecture}ForCausalLM"
    return family_class(name)(Checkpoint(Path(), config, name, tensors))


@pytest.mark.parametrize("architecture", [a for a in FAMILIES if a != "Gemma3ForConditionalGeneration"])
def test_what_is_needed_is_enough(architecture: str) -> None:
    assert family(architecture).layout()


@pytest.mark.parametrize(
    ("architecture", "fields", "message"),
    [
        ("Llama", {"hidden_act": "gelu"}, "hidden_act gelu: llama.cpp computes silu here"),
        ("Qwen2", {"rope_scaling": {"rope_type": "llama3"}}, "rope type llama3 is not supported"),
        ("Qwen3", {"attention_bias": True}, "attention_bias True: llama.cpp has no biases here"),
        ("Qwen2Moe", {"norm_topk_prob": True}, "norm_topk_prob True"),
        ("Qwen2Moe", {"mlp_only_layers": [1]}, "experts in every layer"),
        ("Qwen2Moe", {"decoder_sparse_step": 2}, "experts in every layer"),
        ("Qwen2Moe", {"qkv_bias": False}, "llama.cpp wants these biases"),
        ("Qwen2Moe", {"tie_word_embeddings": True}, "a head of its own"),
        ("Qwen3Moe", {"norm_topk_prob": False}, "norm_topk_prob is not true"),
        ("Qwen3Moe", {"norm_topk_prob": None}, "norm_topk_prob is not true"),
        ("Gemma2", {"query_pre_attn_scalar": 224}, "query_pre_attn_scalar is not 256"),
        ("Gemma2", {"attn_logit_softcapping": None}, None),
        ("Gemma2", {"tie_word_embeddings": False}, "llama.cpp ties them"),
        ("Gemma2", {"layer_types": ["full_attention"] * 2}, "layer_types"),
        (
            "Gemma2",
            {"hidden_activation": "gelu"},
            "hidden_activation gelu: llama.cpp computes gelu_pytorch_tanh",
        ),
        ("Gemma3", {"attn_logit_softcapping": 50.0}, "does not cap"),
        ("Gemma3", {"sliding_window_pattern": 4}, "sliding_window_pattern 4"),
        ("Gemma3", {"use_bidirectional_attention": True}, "causal"),
        ("Phi3", {"head_dim": 32}, "head_dim 32: llama.cpp divides"),
        ("SmolLM3", {"no_rope_layers": [1, 0]}, "no_rope_layers"),
        ("SmolLM3", {"no_rope_layer_interval": 2}, "no_rope_layer_interval 2"),
        ("SmolLM3", {"use_sliding_window": True}, "no windows"),
        ("Granite", {"head_dim": 32}, "head_dim 32"),
        ("GraniteMoe", {"head_dim": 32}, "head_dim 32"),
        ("Olmo2", {"attention_bias": True}, "no biases"),
        ("StableLm", {"rope_scaling": YARN}, "rope type yarn is not supported"),
        ("StableLm", {"tie_word_embeddings": True}, "a head of its own"),
        ("GPT2LMHeadModel", {"activation_function": "relu"}, "llama.cpp computes gelu"),
        ("GPT2LMHeadModel", {"scale_attn_by_inverse_layer_idx": True}, "scales all layers alike"),
        ("GPTNeoX", {"attention_bias": False}, "wants these biases"),
        ("GPTNeoX", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type linear"),
        ("Mamba", {"intermediate_size": 96}, "not twice"),
        ("Mamba", {"use_bias": True}, "no biases"),
        ("FalconMamba", {"use_conv_bias": False}, "wants this bias"),
    ],
)
def test_variants_that_llama_cpp_does_not_compute(
    architecture: str, fields: dict[str, Any], message: str | None
) -> None:
    import gguf

    with pytest.raises(UnsupportedModelError, match=message or "is null: llama.cpp caps here"):
        made = family(architecture, **fields)
        made.layout()
        made.add_parameters(gguf.GGUFWriter(None, "test"))


@pytest.mark.parametrize(
    ("architecture", "fields", "message"),
    [
        (
            "Mixtral",
            {"num_local_experts": 10**6},
            "1000000 experts in . layers, but .* has 200 tensors",
        ),
        ("Mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok is 5, of 4 experts"),
        ("Qwen3Moe", {"num_experts": None}, "no field 'num_local_experts'"),
        (
            "Phi3",
            {"rope_scaling": {"type": "longrope", "long_factor": [1.0]}},
            "long_factor is not a list of 8",
        ),
        ("GPT2LMHeadModel", {"n_positions": None}, "no field 'n_positions'"),
        ("Gemma3", {"rope_parameters": {"sliding_attention": {"rope_theta": -1}}}, "rope_theta is -1"),
    ],
)
def test_configs_that_contradict_themselves(architecture: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        made = family(architecture, **fields)
        made.layout()
        list(made.extra_tensors())


@pytest.mark.parametrize(
    "architecture", [a for a in FAMILIES if a not in ("LLaMAForCausalLM", "Gemma3ForConditionalGeneration")]
)
def test_fields_left_out_are_transformers_defaults(architecture: str) -> None:
    """A config.json of the sizes alone gives the keys that the one which transformers fills in gives."""
    import gguf
    import transformers

    short = architecture.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
    config_class = getattr(transformers, {"Gemma3": "Gemma3Text"}.get(short, short) + "Config")
    given = {**SIZES, **NEEDED.get(architecture.removesuffix("ForCausalLM"), {})}
    full = config_class(**given).to_dict()

    def keys(fields: dict[str, Any]) -> dict[str, Any]:
        writer = gguf.GGUFWriter(None, "test")
        made = family(architecture, **fields)
        made.layout()
        made.add_parameters(writer)
        return {key: value.value for key, value in writer.kv_data[0].items()}

    assert keys({}) == keys({name: value for name, value in full.items() if value is not None})


def test_messages_are_one_line() -> None:
    with pytest.raises(SplitQuantError) as caught:
        family("Gemma2", layer_types=["full_attention"] * 2).layout()
    assert "\n" not in str(caught.value)
