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
    "Gemma2ForCausalLM": ("gemma", "Gemma2"),
    "Gemma3ForCausalLM": ("gemma", "Gemma3"),
    "Gemma3ForConditionalGeneration": ("gemma", "Gemma3WithVision"),
    "Phi3ForCausalLM": ("phi3", "Phi3"),
    "SmolLM3ForCausalLM": ("smollm3", "SmolLM3"),
    "GraniteForCausalLM": ("granite", "Granite"),
    "GraniteMoeForCausalLM": ("granite", "GraniteMoe"),
    "GraniteMoeSharedForCausalLM": ("granite", "GraniteMoe"),
    "Olmo2ForCausalLM": ("olmo2", "Olmo2"),
    "StableLmForCausalLM": ("stablelm", "StableLM"),
    "GPT2LMHeadModel": ("gpt2", "GPT2"),
    "GPTNeoXForCausalLM": ("gptneox", "GPTNeoX"),
    "MambaForCausalLM": ("mamba", "Mamba"),
    "FalconMambaForCausalLM": ("mamba", "FalconMamba"),
}


def family_class(architecture: str) -> type[Family]:
    """The class for a supported architecture; KeyError for any other."""
    module, name = FAMILIES[architecture]
    found: type[Family] = getattr(import_module(f".{module}", __name__), name)
    return found
