"""What evaluations over a running text share: their options, and one item per chunk."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.engine import EngineOptions
from .contents import read_contents
from .divergence import Values
from .text import Text, choose_context


@dataclasses.dataclass(frozen=True)
class TextOptions:
    """What is read, and how.

    Attributes:
        text: see :func:`~.text.read_text`.
        context: tokens per chunk; None is 512, or what the models have if that is less.
        limit_tokens: read only so many tokens.
        engine: how models are opened; its ``n_ctx`` is replaced.
    """

    text: Text
    context: int | None = None
    limit_tokens: int | None = None
    engine: EngineOptions = dataclasses.field(default_factory=EngineOptions)

    def settings(self) -> dict[str, Any]:
        """All that determines figures, as JSON."""
        return {
            "text": self.text.name,
            "text_digest": self.text.digest,
            "context": self.context,
            "limit_tokens": self.limit_tokens,
            "kv": self.engine.kv,
            "flash_attention": self.engine.flash_attention,
        }

    def engine_for(self, models: Sequence[Path]) -> EngineOptions:
        """Options with a context that suits all ``models``.

        Raises:
            EvaluationError: the context wished for is too long for one of them, or too short.
            GGUFError: a file is damaged.
        """
        context = choose_context([read_contents(model) for model in models], self.context)
        return dataclasses.replace(self.engine, n_ctx=context)


def chunk_key(chunk: int) -> str:
    """Key of a chunk's record."""
    return f"chunk {chunk}"


def to_list(values: Values) -> list[float]:
    """Values for a journal: seven digits are more than the computation holds. NaN and infinity stay, as
    Python's JSON writes them."""
    return [float(f"{value:.7g}") for value in values]


def gather(records: Sequence[dict[str, Any]], name: str) -> Values:
    """One field of all records, end to end."""
    return np.concatenate([np.asarray(record[name], dtype=np.float64) for record in records])
