"""File names as people expect them: the model, then how it is encoded (``Model-SplitQ4.9.gguf``).

After the naming convention in ggml's docs/gguf.md, whose last part before the ending is the encoding.
"""

from __future__ import annotations

import re

from gguf import Keys

from ..planning.plan import Plan
from ..planning.roles import Role
from ..sources.model import SourceModel

_NOT_IN_NAMES = re.compile(r"[^\w.+-]+")


def file_name(model: SourceModel, plan: Plan, source: str) -> str:
    """The name of a file.

    Args:
        model: gives its name.
        plan: gives the encoding.
        source: stands in for a name that the model does not have.
    """
    name = model.metadata.get(Keys.General.NAME)
    words = str(name.value) if name is not None and isinstance(name.value, str) else source
    words = _NOT_IN_NAMES.sub("-", words).strip("-.")
    # file systems count bytes, and most take 255
    words = words.encode("utf-8", "ignore")[:100].decode("utf-8", "ignore") or "model"
    return f"{words}-{encoding(plan)}.gguf"


def encoding(plan: Plan) -> str:
    """``SplitQ4.9``, ``StockQ4.9``, ``Q8_0``, ``SplitQuantV2-k3-INT4`` or ``BF16``."""
    recipe = plan.recipe
    if recipe.qtype:
        return recipe.qtype
    if recipe.refined:
        layout = {"split": "SplitQ", "stock": "StockQ"}[recipe.layout]
        bits = recipe.target_bpw or plan.bpw(Role.LINEAR, Role.HEAD)
        return f"{layout}{bits:.2f}".rstrip("0").rstrip(".")
    if recipe.layout == "value":
        width = "F32" if recipe.bits == 32 else f"INT{recipe.bits}"
        return width if recipe.k == 1 else f"SplitQuantV2-k{recipe.k}-{width}"
    return str(plan.file_type.name).removeprefix("MOSTLY_").removeprefix("ALL_")
