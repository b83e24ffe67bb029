"""Log-likelihoods of many short continuations, with nothing computed twice.

A multiple-choice question is one context and a few continuations. What all questions begin with (the
few-shot examples) is decoded once per run, what the choices of one question have in common once per question;
the choices then share those cells of the KV cache, and the questions of a batch pass through the graph
together. The last token of a continuation is never decoded, and logits are asked for only where a
continuation is scored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import EvaluationError
from ..runtime.engine import Engine, EngineOptions

Tokens = tuple[int, ...]

BATCH_TOKENS = 384
"""Tokens of questions in work at a time. Attention reads every cell of the cache for every token, which
outgrows what wider matrix products save."""

MAX_SEQUENCES = 100
"""Sequences in the cache at once: llama.cpp allows 256 (LLAMA_MAX_SEQ), and fewer than tokens in a batch."""


@dataclass(frozen=True)
class ChoiceRequest:
    """A context and the continuations to score after it, none of them empty."""

    key: str
    context: Tokens
    continuations: tuple[Tokens, ...]

    @property
    def common(self) -> int:
        """Leading tokens that all continuations share and that every one of them goes on after."""
        shared = common_prefix(self.continuations)
        return min(shared, min(map(len, self.continuations)) - 1)

    @property
    def tokens(self) -> int:
        """Tokens to decode if nothing is shared with other requests."""
        tails = sum(len(continuation) - 1 - self.common for continuation in self.continuations)
        return len(self.context) + self.common + tails

    @property
    def longest(self) -> int:
        """Positions that the longest continuation needs."""
        return len(self.context) + max(map(len, self.continuations)) - 1


def common_prefix(texts: Sequence[Tokens]) -> int:
    """Leading tokens that all texts share."""
    # what the first and the last in lexicographic order share, all between them share too
    low, high = min(texts), max(texts)
    return next(
        (i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high))
    )


def encode_pair(engine: Engine, context: str, continuation: str) -> tuple[Tokens, Tokens]:
    """Tokens of both, as ``TemplateLM._encode_pair`` of lm-evaluation-harness has them: the text is tokenized
    as a whole, and cut where the context alone ends.

    Args:
        engine: for its vocabulary.
        context: not empty, no space at its end.
        continuation: begins with a space.

    Raises:
        EvaluationError: the continuation leaves no token of its own.
    """
    alone = engine.tokenize(context)
    whole = engine.tokenize(context + continuation)
    if len(whole) <= len(alone):
        raise EvaluationError(engine.path, f"its tokenizer has no token for {continuation!r}")
    return tuple(alone.tolist()), tuple(whole[len(alone) :].tolist())


def score_choices(
    model: Path, requests: Sequence[ChoiceRequest], options: EngineOptions | None = None
) -> Iterator[tuple[ChoiceRequest, list[float]]]:
    """Sum of log-probabilities (nats) of every continuation, in the order of the requests.

    Memory is the model, ``BATCH_TOKENS`` + the longest request of KV cache, and as many rows of logits as are
    asked for in one batch.

    Args:
        model: a GGUF file.
        requests: at least one.
        options: threads, KV type and kernels; sizes are chosen here.

    Yields:
        Each request with one number per continuation; NaN where the model's logits are not finite.

    Raises:
        EvaluationError: a request is longer than the context that the model was trained with.
    """
    shared = shared_prefix(requests)
    cells = max(BATCH_TOKENS, *(request.tokens - shared for request in requests))
    most = max(MAX_SEQUENCES, *(len(request.continuations) for request in requests))
    options = replace(
        options or EngineOptions(),
        n_ctx=shared + cells,
        n_batch=BATCH_TOKENS,
        n_ubatch=BATCH_TOKENS,
        n_sequences=1 + most,
    )
    with Engine(model, options) as engine:
        for request in requests:
            if request.longest > engine.n_ctx_train:
                raise EvaluationError(
                    model,
                    f"question {request.key} takes {request.longest} tokens, "
                    f"and the model's context has {engine.n_ctx_train}",
                    "use fewer examples (--shots)",
                )
        for start in range(0, shared, engine.n_batch):
            stop = min(shared, start + engine.n_batch)
            engine.decode(requests[0].context[start:stop], np.arange(start, stop), 0, False)
        for batch in _batches(requests, shared, cells, most):
            yield from zip(batch, _score_batch(engine, batch, shared), strict=True)


def shared_prefix(requests: Sequence[ChoiceRequest]) -> int:
    """Leading tokens that all contexts have in common, short of the last one, whose logits are needed."""
    shared = common_prefix([request.context for request in requests])
    return min(shared, min(len(request.context) for request in requests) - 1)


def _batches(
    requests: Sequence[ChoiceRequest], shared: int, cells: int, sequences: int
) -> Iterator[list[ChoiceRequest]]:
    batch: list[ChoiceRequest] = []
    room, lanes = cells, sequences
    for request in requests:
        size, width = request.tokens - shared, len(request.continuations)
        if batch and (size > room or width > lanes):
            yield batch
            batch, room, lanes = [], cells, sequences
        batch.append(request)
        room, lanes = room - size, lanes - width
    yield batch


@dataclass
class _Pass:
    """Tokens on their way into one or more decodes, and what is wanted of each one's logits."""

    tokens: list[int]
    positions: list[int]
    sequences: list[int]
    wanted: list[list[tuple[int, int]]]
    """Per token: pairs of (index of the score to add to, token whose log-probability is added)."""

    @classmethod
    def empty(cls) -> _Pass:
        return cls([], [], [], [])

    def add(self, token: int, position: int, sequence: int, wanted: list[tuple[int, int]]) -> None:
        self.tokens.append(token)
        self.positions.append(position)
        self.sequences.append(sequence)
        self.wanted.append(wanted)

    def run(self, engine: Engine, scores: NDArray[np.float64]) -> None:
        size = engine.n_batch
        for start in range(0, len(self.tokens), size):
            part = slice(start, start + size)
            wanted = self.wanted[part]
            rows = engine.decode(
                self.tokens[part],
                self.positions[part],
                self.sequences[part],
                [bool(pairs) for pairs in wanted],
            )
            for row, pairs in zip(rows, (pairs for pairs in wanted if pairs), strict=True):
                log_sum = log_sum_exp(row)
                for index, token in pairs:
                    scores[index] += float(row[token]) - log_sum


def _score_batch(engine: Engine, batch: Sequence[ChoiceRequest], shared: int) -> list[list[float]]:
    stems, tails = _Pass.empty(), _Pass.empty()
    copies: list[tuple[int, int]] = []
    # sequence 0 holds the shared prefix; score i belongs to sequence i + 1
    first = 0
    for request in batch:
        common, n_context = request.common, len(request.context)
        lanes = range(first, first + len(request.continuations))
        engine.copy_sequence(0, first + 1)
        copies += [(first + 1, lane + 1) for lane in lanes[1:]]
        stem = request.context + request.continuations[0][:common]
        for position in range(shared, len(stem)):
            depth = position + 1 - n_context
            wanted = (
                [(lane, request.continuations[lane - first][depth]) for lane in lanes] if depth >= 0 else []
            )
            stems.add(stem[position], position, first + 1, wanted)
        for lane, continuation in zip(lanes, request.continuations, strict=True):
            for depth in range(common, len(continuation) - 1):
                tails.add(continuation[depth], n_context + depth, lane + 1, [(lane, continuation[depth + 1])])
        first = lanes.stop

    scores = np.zeros(first)
    stems.run(engine, scores)
    for source, target in copies:
        engine.copy_sequence(source, target)
    tails.run(engine, scores)
    for sequence in range(1, first + 1):
        engine.truncate_sequence(sequence)
    ends = np.cumsum([len(request.continuations) for request in batch])
    return [part.tolist() for part in np.split(scores, ends[:-1])]


def log_sum_exp(row: NDArray[np.float32]) -> float:
    """log of the sum of exp(``row``): terms in float32, their sum in float64; NaN if any is not finite.

    The error is below 1e-6 nats for vocabularies of any size in use: each term is right to one part in 1e7,
    and errors of terms do not add up beyond that.
    """
    top = row.max()
    with np.errstate(invalid="ignore", under="ignore"):
        total = np.exp(row - top).sum(dtype=np.float64)
    return float(top) + float(np.log(total)) if np.isfinite(top) else float("nan")
