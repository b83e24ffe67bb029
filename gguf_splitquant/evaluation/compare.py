"""One quantized file against its float baseline, in one run: the check for a continuous integration job.

Both models are open at once and read the same text in lock-step, a slab of positions at a time, so the float
model's logits are never stored and memory does not depend on the text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import EvaluationError
from ..progress import SILENT, Progress
from ..runtime.engine import Engine, EngineOptions, KVType
from .behaviour import Behaviour, BehaviourWatch
from .contents import Contents, read_contents
from .divergence import Divergence, TokenScores, score, summarize
from .text import Chunks, Text, choose_context, cut


@dataclass(frozen=True)
class FileSize:
    """Size of one file: bytes, bits per weight of the linear layers, and of everything."""

    path: str
    file_bytes: int
    linear_bpw: float | None
    file_bpw: float

    @classmethod
    def of(cls, contents: Contents) -> FileSize:
        """The sizes of a file."""
        return cls(str(contents.path), contents.file_bytes, contents.linear_bpw, contents.file_bpw)


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found.

    Attributes:
        base, quant: sizes of the two files.
        text: name of the text.
        context: tokens per chunk; the second half of each was scored.
        chunks: chunks read.
        divergence: the figures.
        behaviour: where the file behaves unlike its baseline.
    """

    base: FileSize
    quant: FileSize
    text: str
    context: int
    chunks: int
    divergence: Divergence
    behaviour: Behaviour

    def to_json(self) -> dict[str, Any]:
        """All fields, nested as they are."""
        return dataclasses.asdict(self)


def compare(
    float_path: Path,
    quant_path: Path,
    text: Text,
    *,
    context: int | None = None,
    limit_tokens: int | None = None,
    threads: int | None = None,
    kv: KVType = "f16",
    flash_attention: bool | None = None,
    progress: Progress = SILENT,
) -> Comparison:
    """Compare the logits of two files for the same text.

    Args:
        float_path, quant_path: GGUF files with the same vocabulary.
        text: what both read (:func:`~.text.read_text`).
        context: tokens per chunk; None is 512, or the model's own if that is less.
        limit_tokens: read only so many tokens of the text.
        threads: None is one per performance core.
        kv: type of the KV caches.
        flash_attention: None leaves it to llama.cpp.
        progress: told of every scored token.

    Raises:
        EvaluationError: vocabularies differ, the text or the context does not fit, only NaN came out.
        EngineError, GGUFError: a file cannot be loaded.
    """
    models = [read_contents(float_path), read_contents(quant_path)]
    context = choose_context(models, context)
    options = EngineOptions(n_ctx=context, n_threads=threads, kv=kv, flash_attention=flash_attention)
    with ExitStack() as stack:
        base = stack.enter_context(Engine(float_path, options))
        quant = stack.enter_context(Engine(quant_path, options))
        check_vocabularies(base, quant)
        chunks = cut(base, text, context, limit_tokens)
        watch = BehaviourWatch()
        scores = _score_text(base, quant, chunks, watch, progress)
        behaviour = watch.summary(chunks.tokens, base.detokenize)
    return Comparison(
        base=FileSize.of(models[0]),
        quant=FileSize.of(models[1]),
        text=text.name,
        context=context,
        chunks=len(chunks.tokens),
        divergence=summarize(scores),
        behaviour=behaviour,
    )


def check_vocabularies(base: Engine, other: Engine) -> None:
    """Raise EvaluationError unless both models have the same tokens."""
    fix = f"compare files that were made from the same model as {base.path}"
    if other.n_vocab != base.n_vocab:
        cause = f"has {other.n_vocab} tokens, and {base.path} has {base.n_vocab}"
        raise EvaluationError(other.path, cause, fix)
    if other.vocabulary_digest() != base.vocabulary_digest():
        raise EvaluationError(other.path, f"has other tokens than {base.path}", fix)


def _score_text(
    base: Engine, quant: Engine, chunks: Chunks, watch: BehaviourWatch, progress: Progress
) -> TokenScores:
    parts: list[TokenScores] = []
    progress.start("comparing", len(chunks.tokens) * chunks.scored_per_chunk, "token")
    for chunk, inputs in enumerate(chunks.inputs):
        # the last token only ends the text: nothing is scored after it
        streams = base.logits(inputs[:-1], chunks.first), quant.logits(inputs[:-1], chunks.first)
        targets = chunks.tokens[chunk]
        for left, right in zip(*streams, strict=True):
            follows = targets[left.start + 1 : left.start + 1 + len(left.logits)]
            parts.append(score(left.logits, right.logits, follows))
            watch.see(left.logits, right.logits, parts[-1], chunk, left.start)
            progress.advance(len(follows))
    progress.finish()
    return TokenScores.concatenate(parts)


def violations(
    comparison: Comparison,
    *,
    max_kld: float | None = None,
    max_logit_diff: float | None = None,
    max_flips: float | None = None,
    max_token_kld: float | None = None,
) -> Sequence[str]:
    """The limits that a comparison passes, one sentence each; empty if it is within all.

    Positions without finite logits violate any limit.
    """
    figures = comparison.divergence
    found = []
    if max_kld is not None and not figures.kld_mean <= max_kld:
        found.append(f"mean KLD {figures.kld_mean:.6g} is above {max_kld:g}")
    if max_logit_diff is not None and not figures.logit_max <= max_logit_diff:
        found.append(f"largest logit difference {figures.logit_max:.6g} is above {max_logit_diff:g}")
    behaviour = comparison.behaviour
    if max_flips is not None and behaviour.flip_rate > max_flips:
        found.append(
            f"{behaviour.flip_rate:.6g} of all choices changed from sure to sure of another, "
            f"above {max_flips:g}"
        )
    if max_token_kld is not None and not figures.kld_max <= max_token_kld:
        found.append(f"largest KLD of a token {figures.kld_max:.6g} is above {max_token_kld:g}")
    limits = (max_kld, max_logit_diff, max_flips, max_token_kld)
    if figures.non_finite and any(limit is not None for limit in limits):
        found.append(f"{figures.non_finite} positions have NaN or infinite logits")
    return found
