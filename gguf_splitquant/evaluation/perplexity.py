"""Perplexity over a text, by llama-perplexity's protocol."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..progress import Progress
from ..runtime.engine import Engine
from .base import Column, Figure, PerModelEvaluation, Record
from .divergence import half_interval, log_softmax
from .text import cut
from .text_evaluation import TextOptions, chunk_key, gather, to_list

PPL_COLUMNS = (
    Column("ppl", "perplexity", ".4f", "lower", "exp of the mean negative log-likelihood per token"),
    Column("ppl_ratio", "ratio", ".5f", "lower", "perplexity over the baseline's, token by token"),
)


class Perplexity(PerModelEvaluation):
    """Exponential of the mean negative log-likelihood of the text's tokens."""

    name: ClassVar[str] = "ppl"
    columns: ClassVar = PPL_COLUMNS

    def __init__(self, options: TextOptions) -> None:
        self._options = options

    def settings(self) -> dict[str, Any]:
        """See :meth:`Evaluation.settings`."""
        return self._options.settings()

    def measure_model(
        self, model: Path, done: Mapping[str, Record], progress: Progress
    ) -> Iterator[tuple[str, Record]]:
        """One record per chunk: the negative log-likelihood of every scored token, in nats."""
        engine_options = self._options.engine_for([model])
        with Engine(model, engine_options) as engine:
            chunks = cut(engine, self._options.text, engine_options.n_ctx, self._options.limit_tokens)
            todo = [chunk for chunk in range(len(chunks.tokens)) if chunk_key(chunk) not in done]
            progress.start(f"perplexity {model.name}", len(todo) * chunks.scored_per_chunk, "token")
            for chunk in todo:
                nll = []
                for slab in engine.logits(chunks.inputs[chunk, :-1], chunks.first):
                    follows = chunks.tokens[chunk, slab.start + 1 : slab.start + 1 + len(slab.logits)]
                    for row, token in zip(slab.logits, follows, strict=True):
                        nll.append(-log_softmax(row)[token])
                    progress.advance(len(follows))
                yield chunk_key(chunk), {"nll": to_list(np.array(nll))}
            progress.finish()

    def summarize(self, records: Mapping[str, Record], baseline: Mapping[str, Record]) -> dict[str, Figure]:
        """Perplexity, and its ratio to the baseline's."""
        keys = sorted(records)
        nll = gather([records[key] for key in keys], "nll")
        shared = [key for key in keys if key in baseline]
        mine, base = (gather([side[key] for key in shared], "nll") for side in (records, baseline))
        return perplexity_figures(nll, mine - base, is_baseline=records is baseline)


def perplexity_figures(nll: Any, difference: Any, *, is_baseline: bool) -> dict[str, Figure]:
    """Figures from negative log-likelihoods per token, and their paired differences to the baseline's."""
    nll, difference = nll[np.isfinite(nll)], difference[np.isfinite(difference)]
    value = float(np.exp(nll.mean())) if len(nll) else None
    figures = {
        "ppl": Figure(value, None if value is None else value * half_interval(nll)),
        "ppl_ratio": Figure(None),
    }
    if not is_baseline and len(difference):
        ratio = float(np.exp(difference.mean()))
        figures["ppl_ratio"] = Figure(ratio, ratio * half_interval(difference))
    return figures
