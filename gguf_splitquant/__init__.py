"""Hugging Face checkpoint to split-quantized GGUF for llama.cpp: on a CPU, without a data set.

The public verbs::

    model = open_model(Path("SmolLM2-135M-Instruct"))
    plan = make_plan(model, RECIPES["paper"])
    convert(model, Path("out.gguf"), RECIPES["paper"])
    compare(Path("float.gguf"), Path("out.gguf"))

They are imported on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .convert import ConversionReport, convert
    from .errors import SplitQuantError
    from .evaluation.compare import compare
    from .planning import make_plan
    from .recipe import RECIPES, Recipe
    from .sources import open_model

_HOMES = {
    "ConversionReport": "convert",
    "RECIPES": "recipe",
    "Recipe": "recipe",
    "SplitQuantError": "errors",
    "compare": "evaluation.compare",
    "convert": "convert",
    "make_plan": "planning",
    "open_model": "sources",
}

__all__ = [
    "RECIPES",
    "ConversionReport",
    "Recipe",
    "SplitQuantError",
    "__version__",
    "compare",
    "convert",
    "make_plan",
    "open_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
