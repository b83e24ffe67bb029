"""Log-likelihoods of many short continuations, with nothing computed twice.

A multiple-choice question is one context and a few continuations. What all questions begin with (the
few-shot examples) is decoded once per run. Of the rest, the texts of a batch of questions form a tree: a
token that several texts have in common at the same place, with all that is before it, is decoded once, and
its cell of the KV cache belongs to all of them. Questions that begin alike come together, and a batch passes
through the graph at once. The last token of a continuation is never decoded, and logits are asked for only
where a continuation is scored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import EvaluationError
from ..runtime.engine import Engine, EngineOptions

Tokens = tuple[int, ...]

BATCH_TOKENS = 256
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
    def tokens(self) -> int:
        """Tokens to decode if nothing is shared with other requests."""
        tails = {text[:end] for text in self.continuations for end in range(1, len(text))}
        return len(self.context) + len(tails)

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
    """Sum of log-probabilities (nats) of every continuation.

    Memory is the model, ``BATCH_TOKENS`` + the longest request of KV cache, and as many rows of logits as are
    asked for in one batch.

    Args:
        model: a GGUF file.
        requests: at least one.
        options: threads, KV type and kernels; sizes are chosen here.

    Yields:
        Each request with one number per continuation, NaN where the model's logits are not finite; requests
        that begin alike one after the other.

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
            yield from zip(batch, _Tree(batch, shared).scores(engine), strict=True)


def shared_prefix(requests: Sequence[ChoiceRequest]) -> int:
    """Leading tokens that all contexts have in common, short of the last one, whose logits are needed."""
    shared = common_prefix([request.context for request in requests])
    return min(shared, min(len(request.context) for request in requests) - 1)


def _batches(
    requests: Sequence[ChoiceRequest], shared: int, cells: int, sequences: int
) -> Iterator[list[ChoiceRequest]]:
    batch: list[ChoiceRequest] = []
    room, lanes = cells, sequences
    for request in sorted(requests, key=lambda request: request.context):
        known = common_prefix([batch[-1].context, request.context]) if batch else shared
        size, width = request.tokens - known, len(request.continuations)
        if batch and (size > room or width > lanes):
            yield batch
            batch, room, lanes = [], cells, sequences
            size = request.tokens - shared
        batch.append(request)
        room, lanes = room - size, lanes - width
    yield batch


class _Tree:
    """The texts of a batch. Score i belongs to sequence i + 1; sequence 0 holds what all begin with.

    Tokens stand after those that are before them in their texts.
    """

    def __init__(self, batch: Sequence[ChoiceRequest], shared: int) -> None:
        self._tokens: list[int] = []
        self._positions: list[int] = []
        self._parents: list[int] = []
        """Per token: which one is before it; -1 at the beginning."""
        self._sequences: list[list[int]] = []
        """Per token: the texts that it is in."""
        self._wanted: list[list[tuple[int, int]]] = []
        """Per token: pairs of (index of the score to add to, token whose log-probability is added)."""
        self._ends = np.cumsum([len(request.continuations) for request in batch])
        known: dict[tuple[int, int], int] = {}
        score = 0
        for request in batch:
            for continuation in request.continuations:
                text, here = request.context + continuation, -1
                for position in range(shared, len(text) - 1):
                    key = here, text[position]
                    if key not in known:
                        known[key] = len(self._tokens)
                        self._tokens.append(text[position])
                        self._positions.append(position)
                        self._parents.append(here)
                        self._sequences.append([])
                        self._wanted.append([])
                    here = known[key]
                    self._sequences[here].append(score + 1)
                    if position + 1 >= len(request.context):
                        self._wanted[here].append((score, text[position + 1]))
                score += 1

    def scores(self, engine: Engine) -> list[list[float]]:
        """Of each request; the engine's sequences are empty again afterwards, but for the first."""
        sequences = range(1, int(self._ends[-1]) + 1)
        sums = np.zeros(len(sequences))
        if engine.is_recurrent:
            self._branch_by_branch(engine, sums)
        else:
            for sequence in sequences:
                engine.copy_sequence(0, sequence)
            self._decode(engine, range(len(self._tokens)), self._sequences, sums)
        for sequence in sequences:
            engine.truncate_sequence(sequence)
        return [part.tolist() for part in np.split(sums, self._ends[:-1])]

    def _branch_by_branch(self, engine: Engine, sums: NDArray[np.float64]) -> None:
        """A state belongs to one sequence: where texts part, each goes on with a copy of it."""
        first = [sequences[0] for sequences in self._sequences]
        children = Counter(self._parents)
        levels: dict[int, list[int]] = {}
        level: list[int] = []
        for token, parent in enumerate(self._parents):
            # also where the first text of all ends, and a single other one goes on
            parts = parent >= 0 and (children[parent] > 1 or first[parent] != first[token])
            level.append(level[parent] + parts if parent >= 0 else 0)
            levels.setdefault(level[token], []).append(token)
        for _, tokens in sorted(levels.items()):
            for token in tokens:
                parent = self._parents[token]
                source = 0 if parent < 0 else first[parent]
                if source != first[token]:
                    engine.copy_sequence(source, first[token])
            self._decode(engine, tokens, first, sums)

    def _decode(
        self,
        engine: Engine,
        chosen: Sequence[int],
        sequences: Sequence[int] | Sequence[Sequence[int]],
        sums: NDArray[np.float64],
    ) -> None:
        """Run some tokens, in their order, and add up what is wanted of their logits."""
        for start in range(0, len(chosen), engine.n_batch):
            part = chosen[start : start + engine.n_batch]
            rows = engine.decode(
                [self._tokens[i] for i in part],
                [self._positions[i] for i in part],
                [sequences[i] for i in part],
                [bool(self._wanted[i]) for i in part],
            )
            for row, i in zip(rows, (i for i in part if self._wanted[i]), strict=True):
                log_sum = log_sum_exp(row)
                for index, token in self._wanted[i]:
                    sums[index] += float(row[token]) - log_sum


def log_sum_exp(row: NDArray[np.float32]) -> float:
    """log of the sum of exp(``row``): terms in float32, their sum in float64; NaN if any is not finite.

    The error is below 1e-6 nats for vocabularies of any size in use: each term is right to one part in 1e7,
    and errors of terms do not add up beyond that.
    """
    top = row.max()
    with np.errstate(invalid="ignore", under="ignore"):
        total = np.exp(row - top).sum(dtype=np.float64)
    return float(top) + float(np.log(total)) if np.isfinite(top) else float("nan")
