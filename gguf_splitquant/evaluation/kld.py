"""Kullback-Leibler divergence from the float baseline over a text: the figure that ranks quantized files.

The baseline runs once; what is kept of it (:mod:`.baseline`) serves every file, now and later. Its own row in
the table is the noise floor: the float file against its kept self, run with other thread and batch sizes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..cache import cache_dir
from ..progress import Progress
from ..runtime.engine import Engine, EngineOptions
from ..runtime.threads import default_threads
from .base import Column, Evaluation, Figure, Item, Record
from .baseline import FORMAT_VERSION, BaselineCache, compress, score_against
from .compare import check_vocabularies
from .divergence import TokenScores, Values, half_interval
from .journal import model_identity
from .perplexity import PPL_COLUMNS, perplexity_figures
from .text import Chunks, cut
from .text_evaluation import TextOptions, chunk_key, gather, to_list

NOISE_CHUNKS = 8
"""Chunks on which the noise floor is measured: it costs a pass of the float model."""

_NOISE_BATCH = 48


class KLDivergence(Evaluation):
    """KL(baseline || model) of the next-token distributions, in nats per token.

    Args:
        options: text and engine.
        cache: folder for baselines; the user cache by default.
    """

    name: ClassVar[str] = "kld"
    about_baseline: ClassVar[bool] = True
    columns: ClassVar = (
        Column("kld", "mean KLD", ".6f", "lower", "mean divergence from the baseline, nats per token"),
        Column("kld_median", "median", ".6f", "lower", "half of the tokens are below"),
        Column("kld_p90", "p90", ".5f", "lower"),
        Column("kld_p99", "p99", ".5f", "lower"),
        Column("kld_p999", "p99.9", ".4f", "lower"),
        Column("kld_max", "max", ".4f", "lower"),
        Column("top1", "top-1", ".2%", "higher", "tokens whose most likely successor is the same"),
        *PPL_COLUMNS,
    )

    def __init__(self, options: TextOptions, *, cache: Path | None = None) -> None:
        self._options = options
        self._cache = cache or cache_dir() / "baselines"

    def settings(self) -> dict[str, Any]:
        """See :meth:`Evaluation.settings`."""
        return self._options.settings() | {"baseline_format": FORMAT_VERSION}

    def measure(
        self, models: Sequence[Path], done: Sequence[Mapping[str, Record]], progress: Progress
    ) -> Iterator[Item]:
        """See :meth:`Evaluation.measure`. One record per chunk, with a number per scored token."""
        options = self._options.engine_for(models)
        head = self._options.settings() | {"context": options.n_ctx, "baseline": model_identity(models[0])}
        digest = hashlib.sha256(json.dumps([FORMAT_VERSION, head], sort_keys=True).encode()).hexdigest()
        cache = BaselineCache(self._cache / digest[:24], head)
        with Engine(models[0], EngineOptions(vocabulary_only=True)) as base:
            chunks = cut(base, self._options.text, options.n_ctx, self._options.limit_tokens)
            wanted = range(len(chunks.tokens))
            todo = [[chunk for chunk in wanted if chunk_key(chunk) not in have] for have in done]
            for model in models[1:]:
                with Engine(model, EngineOptions(vocabulary_only=True)) as other:
                    check_vocabularies(base, other)
        self._fill(cache, models[0], options, chunks, sorted(set().union(*todo)), progress)
        for index, model in enumerate(models):
            if not todo[index]:
                continue
            used = _other_sizes(options) if index == 0 else options
            what = "noise floor" if index == 0 else f"KLD {model.name}"
            progress.start(what, len(todo[index]) * chunks.scored_per_chunk, "token")
            with Engine(model, used) as engine:
                for chunk in todo[index]:
                    if index == 0 and chunk >= NOISE_CHUNKS:
                        record = _record(cache.load(chunk).nll)
                    else:
                        record = self._score(engine, cache, chunks, chunk)
                    yield Item(index, chunk_key(chunk), record)
                    progress.advance(chunks.scored_per_chunk)
            progress.finish()

    def _fill(
        self,
        cache: BaselineCache,
        model: Path,
        options: EngineOptions,
        chunks: Chunks,
        wanted: Sequence[int],
        progress: Progress,
    ) -> None:
        missing = [chunk for chunk in wanted if chunk not in cache]
        if not missing:
            return
        progress.start(f"baseline {model.name}", len(missing) * chunks.scored_per_chunk, "token")
        with Engine(model, options) as engine:
            for chunk in missing:
                slabs = engine.logits(chunks.inputs[chunk, :-1], chunks.first)
                parts = [
                    compress(
                        slab.logits, _follows(chunks, chunk, slab.start, len(slab.logits)), seed=slab.start
                    )
                    for slab in slabs
                ]
                names = [f.name for f in dataclasses.fields(parts[0])]
                rows = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
                cache.store(chunk, type(parts[0])(**rows))
                progress.advance(chunks.scored_per_chunk)
        progress.finish()

    def _score(self, engine: Engine, cache: BaselineCache, chunks: Chunks, chunk: int) -> Record:
        rows = cache.load(chunk)
        parts = []
        for slab in engine.logits(chunks.inputs[chunk, :-1], chunks.first):
            at = slice(slab.start - chunks.first, slab.start - chunks.first + len(slab.logits))
            here = type(rows)(**{f.name: getattr(rows, f.name)[at] for f in dataclasses.fields(rows)})
            follows = _follows(chunks, chunk, slab.start, len(slab.logits))
            parts.append(score_against(here, slab.logits, follows))
        scores = TokenScores.concatenate(parts)
        return _record(scores.nll_base, scores)

    def summarize(self, records: Mapping[str, Record], baseline: Mapping[str, Record]) -> dict[str, Figure]:
        """Divergence, agreement and perplexity over the tokens with finite logits."""
        parts = list(records.values())
        kld, nll_base, nll = (gather(parts, name) for name in ("kld", "nll_base", "nll"))
        same = np.array([c == "1" for part in parts for c in part["same_top"]], dtype=np.float64)
        is_baseline = records is baseline
        # the baseline's own tokens are all scored, its noise only on some
        good = np.isfinite(kld) & np.isfinite(nll)
        if not is_baseline:
            good &= np.isfinite(nll_base)
        figures = {column.key: Figure(None) for column in self.columns}
        if good.any():
            kld, same = kld[good], same[good]
            quantiles = {"median": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999, "max": 1.0}
            figures |= {f"kld_{name}": Figure(float(np.quantile(kld, q))) for name, q in quantiles.items()}
            figures["kld"] = Figure(float(kld.mean()), half_interval(kld))
            figures["top1"] = Figure(float(same.mean()), half_interval(same))
        if is_baseline:
            return figures | perplexity_figures(nll_base, nll_base, is_baseline=True)
        return figures | perplexity_figures(nll[good], (nll - nll_base)[good], is_baseline=False)

    def notes(self, records: Mapping[str, Record]) -> Sequence[str]:
        """Positions that were left out."""
        parts = list(records.values())
        broken = int(np.count_nonzero(~np.isfinite(gather(parts, "kld") + gather(parts, "nll"))))
        return (f"{broken} positions have NaN or infinite logits and are left out",) if broken else ()


def _record(nll_base: Values, scores: TokenScores | None = None) -> Record:
    record: Record = {"nll_base": to_list(nll_base), "kld": [], "nll": [], "same_top": ""}
    if scores is not None:
        record |= {"kld": to_list(scores.kld), "nll": to_list(scores.nll)}
        record["same_top"] = "".join("1" if same else "0" for same in scores.same_top)
    return record


def _follows(chunks: Chunks, chunk: int, start: int, count: int) -> Any:
    return chunks.tokens[chunk, start + 1 : start + 1 + count]


def _other_sizes(options: EngineOptions) -> EngineOptions:
    """Options that change only the order of summation: what they change in the logits is noise."""
    threads = options.n_threads or default_threads()
    return dataclasses.replace(
        options,
        n_threads=threads - 1 if threads > 1 else 2,
        n_batch=min(_NOISE_BATCH, options.n_batch),
        n_ubatch=min(_NOISE_BATCH, options.n_ubatch),
    )
