"""Model families by the architecture name in config.json.

To add one, write a module with a :class:`~gguf_splitquant.sources.families.base.Family` and name it here.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .base import Family

# architecture in config.json -> module of this package, class
FAMILIES = {
    "LlamaForCausalLM": ("llama", "Llama"),
    "LLaMAForCausalLM": ("llama", "Llama"),
    "MistralForCausalLM": ("llama", "Mistral"),
    "Qwen2ForCausalLM": ("qwen2", "Qwen2"),
    "Qwen3ForCausalLM": ("qwen3", "Qwen3"),
    "Qwen2MoeForCausalLM": ("qwen_moe", "Qwen2Moe"),
    "Qwen3MoeForCausalLM": ("qwen_moe", "Qwen3Moe"),
    "MixtralForCausalLM": ("mixtral", "Mixtral"),
}


def family_class(architecture: str) -> type[Family]:
    """The class for a supported architecture; KeyError for any other."""
    module, name = FAMILIES[architecture]
    found: type[Family] = getattr(import_module(f".{module}", __name__), name)
    return found
