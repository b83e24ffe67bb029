"""Tiny checkpoints, one for each way in which real ones differ, and what the official converter is told.

Imported by the tests and by the process that runs the official converter, so: no gguf, no torch here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
CHAT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"


@dataclass(frozen=True)
class Case:
    """One checkpoint.

    Attributes:
        architecture: transformers' class.
        dtype: of the weights, by torch's name.
        tokenizer: ``bpe``, ``sentencepiece`` or ``llama_hf``, see official_run.
        config: fields that differ from SIZES.
        config_edits: fields put into config.json afterwards (None removes one): what transformers no longer
            writes but old checkpoints have.
        tokenizer_config: fields of tokenizer_config.json.
        post_processor: of tokenizer.json: ``template`` puts BOS first, ``byte_level`` nothing, None none.
        files: other files of the checkpoint.
        shard_size: for save_pretrained.
        stored: weights in another form than save_pretrained's: ``fused`` experts, ``bare`` names.
        pre: pre-tokenizer that both converters are told.
        outtypes: to convert to.
        std: of random weights. 0 keeps norms near one and layers of gain one, so that logits are of order one
            and worth comparing with transformers'.
        gain: of the layers, where ``std`` is 0.
        only_ours: keys that our file has and the official one lacks, with the reason.
        moved: keys that stand elsewhere in our file, with the reason.
        last_bit: endings of tensors that may differ in the last bit, with the reason.
        raw_config: the official converter is given config.json as it stands: transformers 5, through which it
            reads it, drops a field that it needs.
        no_official: why the official converter cannot convert it, so that only logits are compared.
    """

    architecture: str
    dtype: str
    tokenizer: str
    config: dict[str, Any] = field(default_factory=dict)
    config_edits: dict[str, Any] = field(default_factory=dict)
    tokenizer_config: dict[str, Any] = field(default_factory=dict)
    post_processor: str | None = None
    files: dict[str, str] = field(default_factory=dict)
    shard_size: str = "1GB"
    stored: str = ""
    pre: str | None = None
    outtypes: tuple[str, ...] = ("f16",)
    std: float = 0.05
    gain: float = 1.0
    only_ours: dict[str, str] = field(default_factory=dict)
    moved: dict[str, str] = field(default_factory=dict)
    last_bit: dict[str, str] = field(default_factory=dict)
    raw_config: bool = False
    no_official: str = ""

    @property
    def logits(self) -> bool:
        """Whether its logits are compared."""
        return self.std == 0


CASES = {
    "Llama-3-tiny-8B-Instruct": Case(
        "LlamaForCausalLM",
        "bfloat16",
        "bpe",
        config={"rope_parameters": LLAMA3_ROPE},
        tokenizer_config={
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "chat_template": CHAT,
        },
        post_processor="template",
        pre="llama-bpe",
        outtypes=("f32", "f16", "bf16"),
    ),
    "llama-2-sharded": Case(
        "LlamaForCausalLM",
        "float16",
        "sentencepiece",
        config={"head_dim": 32, "attention_bias": True, "mlp_bias": True},
        # as transformers 4 wrote it
        config_edits={
            "rope_parameters": None,
            "rope_theta": 20000,
            "rope_scaling": {"type": "linear", "factor": 2.0},
            "_name_or_path": "somebody/llama-2-7b-sharded",
        },
        tokenizer_config={
            "add_bos_token": True,
            "add_eos_token": False,
            "add_prefix_space": False,
            "bos_token": {"content": "<s>", "special": True},
            "unk_token": {"content": "<unk>", "special": True},
            "added_tokens_decoder": {
                "0": {"content": "<unk>", "special": True},
                "310": {"content": "<|user|>", "special": False},
                "311": {"content": "\u2581word", "special": False},
                "9999": {"content": "<beyond>", "special": True},
            },
        },
        files={
            "added_tokens.json": '{"<extra>": 305, "<far>": 4000}',
            "chat_template.jinja": CHAT,
            "additional_chat_templates/tool-use.jinja": "tools",
            "additional_chat_templates/rag.jinja": "rag",
        },
        shard_size="60KB",
        outtypes=("f32", "bf16"),
    ),
    "mistral-float32": Case(
        "MistralForCausalLM",
        "float32",
        "llama_hf",
        config={"head_dim": 8, "rms_norm_eps": 1e-5, "sliding_window": None},
        tokenizer_config={
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "add_bos_token": True,
        },
        files={
            "README.md": "---\nlicense: apache-2.0\nlanguage:\n- en\n- no\ntags: [tiny, test]\n"
            "base_model: mistralai/Mistral-7B-v0.3\ndatasets:\n- wikitext\n---\n# A model\n",
            "generation_config.json": '{"temperature": 0.7, "top_k": 40, "top_p": 0.95, '
            '"repetition_penalty": 1.1}',
        },
        outtypes=("f32", "f16", "bf16"),
    ),
    # roles of tokens that only transformers' class knows
    "llama-unnamed-tokens": Case(
        "LlamaForCausalLM", "float16", "llama_hf", tokenizer_config={"tokenizer_class": "LlamaTokenizer"}
    ),
    "qwen2-tied": Case(
        "Qwen2ForCausalLM",
        "bfloat16",
        "bpe",
        config={
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1000000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
                "beta_fast": 24.0,
                "attention_factor": 1.25,
            },
        },
        tokenizer_config={
            "eos_token": "</s>",
            "add_bos_token": True,
            "chat_template": [{"name": "default", "template": CHAT}, {"name": "tool use", "template": "t"}],
        },
        post_processor="byte_level",
        pre="qwen2",
        outtypes=("f32", "bf16"),
    ),
    "qwen2-untied": Case(
        "Qwen2ForCausalLM",
        "float32",
        "bpe",
        config={"num_key_value_heads": 4},
        config_edits={"head_dim": 16},
        tokenizer_config={"cls_token": "<s>", "sep_token": "</s>"},
        post_processor="roberta",
        pre="qwen2",
        shard_size="100KB",
    ),
    "llama-dynamic-tied": Case(
        "LlamaForCausalLM",
        "float32",
        "bpe",
        config={"tie_word_embeddings": True, "num_key_value_heads": 4},
        config_edits={
            "rope_parameters": None,
            "rope_scaling": {"type": "dynamic", "factor": 2.0},
            "num_key_value_heads": None,
            "rms_norm_eps": None,
            "head_dim": None,
            "max_position_embeddings": None,
            "tokenizer_class": None,
            "eos_token_id": [1, 2],
        },
        pre="smollm",
    ),
    "CodeLlama-vocabulary": Case(
        "LlamaForCausalLM",
        "float16",
        "sentencepiece",
        config={"vocab_size": 32016, "hidden_size": 16, "num_hidden_layers": 1},
        tokenizer_config={"bos_token": "<s>", "eos_token": "</s>", "legacy": True},
    ),
}
