"""Text that the model writes itself: calibration without a data set.

A sample of the model's own distribution at temperature 1 is, by construction, the text on which its
next-token distribution matters. Sequences start from a random token, so that together they cover the
vocabulary; for a chat model every other one starts where a user's message would, and the model writes both
sides of a conversation. One pair of texts in four is written at a higher temperature: a model that writes
about little (stories15M) is given other text too, and directions that its own text never takes would be
rounded without regard for them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..progress import SILENT, Progress
from ..runtime.engine import EngineOptions
from .observer import ObservedEngine

I32 = NDArray[np.int32]

_AFTER_OPENING = 64
"""Tokens that a text leaves at least behind a long opening, unless half of it is less."""

_WORK = 64_000_000_000 * 384
"""Bytes of the model times tokens, at most."""


@dataclass(frozen=True)
class OwnText:
    """How the model writes its calibration text.

    Attributes:
        sequences: texts written side by side.
        length: tokens of each, at most: large models write shorter ones (:meth:`length_for`).
        temperatures: of the sampling, one pair of texts after the other; 1 is the model's own distribution.
        seed: of first tokens and sampling.
    """

    sequences: int = 64
    length: int = 384
    temperatures: tuple[float, ...] = (1.0, 1.0, 1.0, 1.5)
    seed: int = 0

    def length_for(self, model_bytes: int) -> int:
        """Tokens of each text that a model of this size writes: at least half of :attr:`length`.

        Shorter texts and not fewer: a step reads all weights, and takes little longer for more texts.
        """
        affordable = _WORK // max(1, model_bytes * self.sequences)
        return min(self.length, max(1, self.length // 2, affordable))


def write_own_text(
    engine: ObservedEngine, how: OwnText, opening: str | None = None, progress: Progress = SILENT
) -> I32:
    """Let the model write: int32 (sequences, length).

    Args:
        engine: opened with :func:`writing_options`.
        how: amount and seed.
        opening: what stands before a user's message in the model's chat template; None: no chat.
        progress: counts tokens.
    """
    rng = np.random.default_rng(how.seed)
    starters = _ordinary_tokens(engine)
    prompts = []
    for i in range(how.sequences):
        prompt = [engine.bos] if engine.adds_bos and engine.bos >= 0 else []
        if opening is not None and i % 2:
            text = engine.tokenize(opening, add_special=True, parse_special=True)
            prompt = text[: max(how.length // 2, how.length - _AFTER_OPENING)].tolist()
        prompts.append([*prompt, int(rng.choice(starters))] if not (opening and i % 2) else prompt)
    text = np.zeros((how.sequences, how.length), np.int32)
    known = np.array([len(p) for p in prompts])
    for i, prompt in enumerate(prompts):
        text[i, : len(prompt)] = prompt
    every = np.arange(how.sequences)
    cycle = np.asarray(how.temperatures, np.float32)
    temperatures = cycle[every // 2 % len(cycle), None]
    engine.clear()
    progress.start("writing calibration text", text.size, "tok")
    for position in range(how.length - 1):
        logits = engine.decode(text[:, position], np.full(how.sequences, position), every, True)
        drawn = _sample(logits, temperatures, rng)
        free = known <= position + 1
        text[free, position + 1] = drawn[free]
        for i in every[free]:
            if engine.ends_text(int(text[i, position])):  # a new text follows, as in training
                text[i, position + 1] = rng.choice(starters)
        progress.advance(how.sequences)
    progress.finish()
    return text


def writing_options(how: OwnText, n_threads: int | None = None) -> EngineOptions:
    """How an engine for :func:`write_own_text` is opened."""
    cells = -(-how.length // 256) * 256
    return EngineOptions(
        n_ctx=how.sequences * cells,
        n_batch=how.sequences,
        n_ubatch=how.sequences,
        n_sequences=how.sequences,
        n_threads=n_threads,
        # for a token each of many short texts llama.cpp's fused attention takes twice as long on a CPU
        flash_attention=False,
    )


_SPAN = 256
"""Tokens whose probabilities are added up first: sampling looks for the span, then inside it."""


def _sample(logits: NDArray[np.float32], temperatures: NDArray[np.float32], rng: np.random.Generator) -> I32:
    """One token per row from softmax(logits / temperature), by inverting the cumulative distribution."""
    weights = logits - logits.max(axis=1, keepdims=True)
    weights /= temperatures  # in place: fresh memory takes longer than the arithmetic
    np.exp(weights, out=weights)
    starts = np.arange(0, weights.shape[1], _SPAN)
    spans = np.cumsum(np.add.reduceat(weights, starts, axis=1), axis=1, dtype=np.float64)
    wanted = rng.random(len(logits)) * spans[:, -1]
    drawn = np.empty(len(logits), np.int32)
    for i, (row, point) in enumerate(zip(weights, wanted, strict=True)):
        span = min(int(np.searchsorted(spans[i], point, side="right")), len(starts) - 1)
        before = spans[i, span - 1] if span else 0.0
        inside = np.cumsum(row[starts[span] : starts[span] + _SPAN], dtype=np.float64)
        place = int(np.searchsorted(inside, point - before, side="right"))
        drawn[i] = starts[span] + min(place, len(inside) - 1)
    return drawn


def _ordinary_tokens(engine: ObservedEngine) -> I32:
    """Tokens that are text: neither control, unknown, unused nor single bytes."""
    return np.array([t for t in range(engine.n_vocab) if engine.is_text(t)], np.int32)
