"""Calibration: a float model in, the second moments of all its layer inputs out; done once per checkpoint."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray

from ..cache import cache_dir
from ..errors import SplitQuantError
from ..gguf_io.pairs import read_pairs
from ..locks import open_locked, wait_for_lock
from ..memory import give_back
from ..progress import SILENT, Progress
from ..runtime.chat_template import chat_template
from ..runtime.engine import EngineOptions
from ..sources.model import SourceModel
from .gathered import complete_moments, forget_gathered, is_gathered
from .moment_writer import MomentWriter
from .moments import Moments, TokenWeighting
from .observer import ObservedEngine
from .own_text import OwnText, write_own_text, writing_options
from .runnable import Runnable, runnable
from .sensitivity import Probing, measure_sensitivity, row_scales

I32 = NDArray[np.int32]

_VERSION = 13
"""Raised whenever the same settings give other moments, sensitivities or salience: part of the cache key."""

_SLAB = 1536
"""Tokens per pass through the graph: bounds the memory for activations (and the never computed logits)."""

MEMORY = 1 << 30
"""Bytes for sums and for copies of weights, unless more or less is allowed. A fixed figure: what calibration
takes must not grow with the number of layers, however much memory there is."""

_TEXT, _TOKENS = "text.npy", "tokens.npy"
_PROBES = "probes.jsonl"

_TODAY = datetime.datetime(2026, 1, 1)
"""For templates that ask for the date: the text must not depend on the day on which it is written."""


@dataclass(frozen=True)
class Calibration:
    """What to calibrate on, and how.

    Attributes:
        own: how the model writes its own text.
        text: a user's own text, read instead; None: the model writes.
        most_tokens: of ``text``, taken evenly from all over it.
        weighting: what sink tokens count.
        probing: how the layers' sensitivities are measured.
        chat: begin every other text as a user's message where the model has a chat template.
    """

    own: OwnText = field(default_factory=OwnText)
    text: Path | None = None
    most_tokens: int = 12288
    weighting: TokenWeighting = field(default_factory=TokenWeighting)
    probing: Probing = field(default_factory=Probing)
    chat: bool = True


def calibrate(
    model: SourceModel | Path,
    weights_digest: str,
    how: Calibration | None = None,
    *,
    n_threads: int | None = None,
    memory: int = MEMORY,
    progress: Progress = SILENT,
    cache: Path | None = None,
) -> Moments:
    """Second moments and sensitivities of all linear layers, from the cache where they are known.

    A run that was interrupted is gone on with: after the text, the last input whose moments were complete,
    and the last batch of sensitivities. One process at a time calibrates a model; others that share the cache
    wait for it.

    Args:
        model: a checkpoint, or a GGUF file that llama.cpp runs: float, or close to it (Q8_0 halves the time).
        weights_digest: identifies the checkpoint's weights and tokenizer; the cache key with ``how``.
        how: text and weighting.
        n_threads: None is one per performance core.
        memory: bytes for statistics that grow while the model runs, and for copies of weights. With more of
            it calibration is faster, with the same result.
        progress: of writing the text and of gathering.
        cache: folder for results; None: ``calibration`` in the user's cache folder.

    Raises:
        EngineError: the model does not run, or its activations overflow.
        CheckpointError: a weight cannot be read.
        SplitQuantError: the text is unreadable or too short; the disk is full.
    """
    how = how or Calibration()
    if how.text is not None and not how.text.is_file():
        raise SplitQuantError(how.text, "no such text file", "give a UTF-8 text")
    about = _about(weights_digest, how)
    key = _key(about)
    root = cache or cache_dir() / "calibration"
    folder = root / key
    if folder.is_dir():
        return Moments.open(folder)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _alone(root / f"unfinished-{key}", progress) as work:
            # whoever was waited for may have done it
            if not folder.is_dir():
                _empty_unless_resumable(work)
                with runnable(model, work, memory // 2, n_threads) as running:
                    _calibrate(running, work, how, about, memory - running.copies, n_threads, progress)
                work.rename(folder)
                give_back()
    except OSError as error:
        fix = "free space, or set GGUF_SPLITQUANT_CACHE"
        raise SplitQuantError(root, f"cannot hold the calibration: {error}", fix) from error
    return Moments.open(folder)


def cached(weights_digest: str, how: Calibration, cache: Path | None = None) -> Moments | None:
    """What :func:`calibrate` would find in the cache; None if it would run the model."""
    folder = (cache or cache_dir() / "calibration") / _key(_about(weights_digest, how))
    return Moments.open(folder) if folder.is_dir() else None


@contextmanager
def _alone(work: Path, progress: Progress) -> Iterator[Path]:
    """A folder for unfinished work that no other process is in; it waits for one that is.

    Work that has nothing to go on with is not left behind.
    """
    path = work.with_name(f"{work.name}.lock")
    file = open_locked(path)
    if file is None:
        progress.start("waiting for another calibration of this model", 1, "calibration")
        file = wait_for_lock(path)
        progress.finish()
    with file:
        try:
            work.mkdir(exist_ok=True)
            yield work
        finally:
            if work.is_dir() and not _resumable(work):
                shutil.rmtree(work, ignore_errors=True)
            path.unlink(missing_ok=True)


def _resumable(work: Path) -> bool:
    """The text is complete, so there is something to go on with."""
    return (work / _TOKENS).is_file() or is_gathered(work)


def _empty_unless_resumable(work: Path) -> None:
    """Text that was not complete when a run ended cannot be gone on with."""
    if not _resumable(work):
        shutil.rmtree(work)
        work.mkdir()


def _calibrate(
    model: Runnable,
    work: Path,
    how: Calibration,
    about: Mapping[str, Any],
    memory: int,
    n_threads: int | None,
    progress: Progress,
) -> None:
    """Write or read the text, make moments of its inputs, then probe; all is gone on with where it ended.

    But the text is one step: sums grow with every token of it, and a copy of them to go back to, and of
    llama.cpp's cache, would be as large as the model.
    """
    if not (work / _TOKENS).is_file():
        if is_gathered(work):
            complete_moments(work, how.weighting, about, n_threads, progress)
        elif how.text:
            tokens = user_text(model.path, how.text, how.own.length, how.most_tokens)
            gather(model, tokens, work, how.weighting, about, memory, n_threads, progress)
        else:
            write_and_gather(model, work, how, about, memory, n_threads, progress)
        # the last to appear: with it the moments are complete
        (work / _TEXT).rename(work / _TOKENS)
    if is_gathered(work):
        forget_gathered(work)
    moments = Moments.open(work)
    sensitivity = measure_sensitivity(
        model,
        np.load(work / _TOKENS),
        row_scales(model, moments.sharing.keys(), n_threads),
        moments,
        how.probing,
        n_threads=n_threads,
        progress=progress,
        records=work / _PROBES,
    )
    moments.with_sensitivity(sensitivity)
    moments.complete_salience(progress)
    (work / _PROBES).unlink()


def write_and_gather(
    model: Runnable,
    folder: Path,
    how: Calibration,
    about: Mapping[str, Any],
    memory: int = 0,
    n_threads: int | None = None,
    progress: Progress = SILENT,
) -> tuple[I32, Moments]:
    """Let the model write, and add up the moments of what it computes meanwhile: one pass instead of two.

    ``memory`` is that of :class:`MomentWriter`.

    Returns:
        The text, int32 (sequences, length), and the moments; the last token of each sequence is not read.
    """
    own = dataclasses.replace(how.own, length=how.own.length_for(model.nbytes))
    read = own.sequences * (own.length - 1)
    writer = MomentWriter(folder, how.weighting, read, memory, n_threads)
    with ObservedEngine(model, writing_options(own, n_threads), writer) as engine:
        opening = chat_opening(model.path) if how.chat else None
        tokens = write_own_text(engine, own, opening, progress)
    np.save(folder / _TEXT, tokens)
    return tokens, writer.finish(engine.sharing, about, progress)


def user_text(model: Path, text: Path, length: int, most_tokens: int) -> I32:
    """A file's text as pieces of ``length`` tokens, evenly from all over it: int32 (pieces, length)."""
    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SplitQuantError(text, f"cannot be read as UTF-8 text: {error}", "give a text file") from error
    with ObservedEngine(Runnable(model), EngineOptions(vocabulary_only=True)) as engine:
        tokens = engine.tokenize(content, add_special=False)
        start = [engine.bos] if engine.adds_bos and engine.bos >= 0 else []
    body = length - len(start)
    pieces = len(tokens) // body
    if pieces == 0:
        raise SplitQuantError(
            text, f"has {len(tokens)} tokens", f"give at least {body}, better {most_tokens}"
        )
    wanted = min(pieces, max(1, most_tokens // length))
    chosen = np.linspace(0, pieces - 1, wanted).round().astype(int)
    rows = [np.concatenate([start, tokens[i * body : (i + 1) * body]]) for i in chosen]
    return np.stack(rows).astype(np.int32)


def gather(
    model: Runnable,
    tokens: I32,
    folder: Path,
    weighting: TokenWeighting,
    about: Mapping[str, Any],
    memory: int = 0,
    n_threads: int | None = None,
    progress: Progress = SILENT,
) -> Moments:
    """Run ``tokens``, int32 (sequences, length), through the model and add up the moments in ``folder``.

    ``memory`` is that of :class:`MomentWriter`.
    """
    count, length = tokens.shape
    together = max(1, min(count, _SLAB // length))
    options = EngineOptions(
        n_ctx=together * -(-length // 256) * 256,
        n_batch=together * length,
        n_ubatch=together * length,
        n_sequences=together,
        n_threads=n_threads,
    )
    writer = MomentWriter(folder, weighting, tokens.size, memory, n_threads)
    with ObservedEngine(model, options, writer) as engine:
        progress.start("gathering statistics of layer inputs", tokens.size, "tok")
        for first in range(0, count, together):
            slab = tokens[first : first + together]
            engine.clear()
            sequences, positions = np.divmod(np.arange(slab.size), length)
            engine.observe(slab.reshape(-1), positions, sequences)
            progress.advance(slab.size)
        progress.finish()
    np.save(folder / _TEXT, tokens)
    return writer.finish(engine.sharing, about, progress)


def chat_opening(model: Path) -> str | None:
    """What the model's chat template puts before a user's message; None without a usable template."""
    template = chat_template(read_pairs(model))
    if template is None:
        return None
    mark = "\x00message\x00"
    try:
        rendered = template.render([{"role": "user", "content": mark}], generate=False, now=lambda: _TODAY)
    except TemplateError:
        return None
    before, found, _ = rendered.partition(mark)
    return before if found and before else None


def _key(about: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]


def _about(weights_digest: str, how: Calibration) -> dict[str, Any]:
    about = dataclasses.asdict(how)
    about["text"] = hashlib.sha256(how.text.read_bytes()).hexdigest() if how.text else None
    if how.text is None:
        del about["most_tokens"]
    about["weighting"]["limit"] = str(how.weighting.limit)  # JSON has no infinity
    return {**about, "weights": weights_digest, "version": _VERSION}
