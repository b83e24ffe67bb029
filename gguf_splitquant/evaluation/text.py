"""The text that KLD and perplexity are measured on, and llama-perplexity's way of cutting it.

Figures are comparable only when tokens, context and scored positions are the same, so there is one protocol
here, that of llama.cpp's tools/perplexity: chunks of one context, BOS (where the model wants it) in place of
a chunk's first token, and only the second half of a chunk scored, so that every scored token has a context.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import EvaluationError
from ..runtime.engine import Engine
from .contents import Contents

DEFAULT_CONTEXT = 512
MIN_CONTEXT = 4
_SAMPLE = "sample_text.txt"


@dataclass(frozen=True)
class Text:
    """A text with the name that is shown beside figures measured on it."""

    name: str
    content: str

    @property
    def digest(self) -> str:
        """First half of the SHA-256 of the UTF-8 text, hexadecimal."""
        return hashlib.sha256(self.content.encode("utf-8")).hexdigest()[:32]


@dataclass(frozen=True)
class Chunks:
    """A text cut for a model.

    Attributes:
        tokens: int32, shape ``(chunks, context)``: what the text says.
        inputs: the same, as fed to the model (BOS instead of the first token where the model wants it).
        first: first position of a chunk whose prediction is scored; the last scored one is ``context - 2``.
    """

    tokens: NDArray[np.int32]
    inputs: NDArray[np.int32]
    first: int

    @property
    def context(self) -> int:
        """Tokens per chunk."""
        return int(self.tokens.shape[1])

    @property
    def scored_per_chunk(self) -> int:
        """Predictions scored in one chunk."""
        return self.context - 1 - self.first

    def targets(self, chunk: int) -> NDArray[np.int32]:
        """The tokens that the scored positions of ``chunk`` should predict."""
        targets: NDArray[np.int32] = self.tokens[chunk, self.first + 1 :]
        return targets


def read_text(path: Path | None) -> Text:
    """The text of a file, or the built-in English one if ``path`` is None.

    Raises:
        EvaluationError: the file cannot be read, is empty, or is not UTF-8.
    """
    if path is None:
        content = resources.files(__package__).joinpath(_SAMPLE).read_text(encoding="utf-8")
        return Text("built-in English text", content)
    try:
        # bytes, because text mode would turn \r\n into \n, which llama-perplexity does not
        content = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise EvaluationError(path, f"cannot be read: {error.strerror}", "give the path of a text") from error
    except UnicodeDecodeError as error:
        cause = f"is not UTF-8 (byte {error.start} is {error.object[error.start]:#04x})"
        raise EvaluationError(path, cause, "convert it with `iconv -t utf-8`") from error
    if not content.strip():
        raise EvaluationError(path, "is empty", "give a text of a few thousand words")
    return Text(str(path), content)


def choose_context(models: Sequence[Contents], wish: int | None) -> int:
    """The context to use for all ``models``: the wish, or by default 512 or as much as all of them have.

    Raises:
        EvaluationError: longer than a model was trained with, or too short to score anything.
    """
    for model in models:
        if wish is not None and 0 < model.context_length < wish:
            raise EvaluationError(
                model.path,
                f"was trained with a context of {model.context_length} tokens, not {wish}",
                f"use --ctx {model.context_length} or less",
            )
    if wish is not None and wish < MIN_CONTEXT:
        raise EvaluationError("--ctx", f"{wish} tokens are too few to score", f"use {MIN_CONTEXT} or more")
    known = [model.context_length for model in models if model.context_length > 0]
    return wish or min([DEFAULT_CONTEXT, *known])


def cut(engine: Engine, text: Text, context: int, limit_tokens: int | None = None) -> Chunks:
    """Tokenize and cut ``text``; what is left over at the end is not used.

    Args:
        engine: the model whose tokenizer is used.
        text: what to cut.
        context: tokens per chunk.
        limit_tokens: use only so many tokens of the text.

    Raises:
        EvaluationError: the text is shorter than one chunk.
    """
    tokens = engine.tokenize(text.content)[:limit_tokens]
    n_chunks = len(tokens) // context
    if n_chunks == 0:
        raise EvaluationError(
            text.name,
            f"has {len(tokens)} tokens, fewer than one context of {context}",
            "use a longer text, or a smaller --ctx",
        )
    chunks = tokens[: n_chunks * context].reshape(n_chunks, context)
    inputs = chunks.copy()
    if engine.adds_bos:
        inputs[:, 0] = engine.bos
    return Chunks(chunks, inputs, context // 2)
