"""Speed and memory of files against each other.

Machines drift (other load, heat), so rounds are interleaved: every round measures every file once, and a
ratio is taken within a round. Each measurement has a process of its own, so that memory is this file's and
nothing is left over from the one before.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..errors import EngineError
from ..progress import Progress
from ..runtime.engine import Engine, EngineOptions
from .base import Column, Evaluation, Figure, Item, Record
from .contents import read_contents
from .text import choose_context


@dataclasses.dataclass(frozen=True)
class SpeedOptions:
    """What is timed.

    Attributes:
        rounds: measurements of each file.
        prompt_tokens: length of the prompt, processed as one batch.
        decode_tokens: tokens then generated one by one.
        engine: how models are opened; its context and batch sizes are replaced.
    """

    rounds: int = 5
    prompt_tokens: int = 256
    decode_tokens: int = 64
    engine: EngineOptions = dataclasses.field(default_factory=EngineOptions)


class Speed(Evaluation):
    """Prompt and decode tokens per second, load time, peak resident memory; medians over rounds."""

    name: ClassVar[str] = "speed"
    columns: ClassVar = (
        Column("decode", "decode t/s", ".1f", "higher", "tokens generated per second, one at a time"),
        Column(
            "decode_ratio", "ratio", ".3f", "higher", "decode speed over the baseline's in the same round"
        ),
        Column("prompt", "prompt t/s", ".1f", "higher", "tokens of a prompt read per second"),
        Column("prompt_ratio", "ratio", ".3f", "higher", "prompt speed over the baseline's, same round"),
        Column("load", "load s", ".2f", "lower", "from opening the file to being ready"),
        Column(
            "memory", "peak MB", ".0f", "lower", "peak resident memory of the process, file mapping included"
        ),
    )

    def __init__(self, options: SpeedOptions | None = None) -> None:
        self._options = options or SpeedOptions()

    def settings(self) -> dict[str, Any]:
        """See :meth:`Evaluation.settings`. Threads do count here."""
        options = self._options
        return {
            "prompt_tokens": options.prompt_tokens,
            "decode_tokens": options.decode_tokens,
            "threads": options.engine.n_threads,
            "kv": options.engine.kv,
            "flash_attention": options.engine.flash_attention,
        }

    def measure(
        self, models: Sequence[Path], done: Sequence[Mapping[str, Record]], progress: Progress
    ) -> Iterator[Item]:
        """One record per round and model."""
        need = self._options.prompt_tokens + self._options.decode_tokens
        context = choose_context([read_contents(model) for model in models], None)
        prompt_tokens = self._options.prompt_tokens
        if need > context:
            # models with a small context (stories15M has 256) get a shorter prompt, all the same one
            prompt_tokens = max(1, context - self._options.decode_tokens)
        engine = dataclasses.replace(
            self._options.engine, n_ctx=context, n_batch=prompt_tokens, n_ubatch=prompt_tokens
        )
        rounds = [
            (number, index)
            for number in range(self._options.rounds)
            for index in range(len(models))
            if _key(number) not in done[index]
        ]
        progress.start("speed", len(rounds), "run")
        spawn = multiprocessing.get_context("spawn")
        for number, index in rounds:
            with ProcessPoolExecutor(1, mp_context=spawn) as pool:
                task = pool.submit(_probe, models[index], engine, prompt_tokens, self._options.decode_tokens)
                outcome = task.result()
            if isinstance(outcome, str):
                raise EngineError(models[index], outcome)
            yield Item(index, _key(number), outcome)
            progress.advance(1, models[index].name)
        progress.finish()

    def summarize(self, records: Mapping[str, Record], baseline: Mapping[str, Record]) -> dict[str, Figure]:
        """Medians, with half the distance between the quartiles as error; ratios within rounds."""
        rounds = list(records.values())
        figures = {
            "decode": _median([record["decode"] for record in rounds]),
            "prompt": _median([record["prompt"] for record in rounds]),
            "load": _median([record["load"] for record in rounds]),
            "memory": _median([record["memory"] / 1e6 for record in rounds]),
            "decode_ratio": Figure(None),
            "prompt_ratio": Figure(None),
        }
        if records is not baseline:
            shared = [(records[key], baseline[key]) for key in records if key in baseline]
            for name in ("decode", "prompt"):
                figures[f"{name}_ratio"] = _median([mine[name] / base[name] for mine, base in shared])
        return figures


def _key(number: int) -> str:
    return f"round {number}"


def _median(values: Sequence[float]) -> Figure:
    if not values:
        return Figure(None)
    if len(values) < 2:
        return Figure(values[0])
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return Figure(statistics.median(values), (high - low) / 2)


def _probe(model: Path, options: EngineOptions, prompt_tokens: int, decode_tokens: int) -> Record | str:
    """Measure once; runs in its own process. An error comes back as its message: exceptions with several
    arguments do not survive the way between processes."""
    try:
        started = time.perf_counter()
        with Engine(model, options) as engine:
            loaded = time.perf_counter()
            random = np.random.default_rng(0)
            tokens = random.integers(0, engine.n_vocab, prompt_tokens)
            # the first tokens pay for page faults and thread start-up
            engine.decode(tokens[:1], 0, 0, True)
            engine.clear()
            times = [time.perf_counter()]
            engine.decode(tokens, np.arange(prompt_tokens), 0, np.arange(prompt_tokens) == prompt_tokens - 1)
            times.append(time.perf_counter())
            for position in range(prompt_tokens, prompt_tokens + decode_tokens):
                engine.decode([int(tokens[position % prompt_tokens])], position, 0, True)
            times.append(time.perf_counter())
    except EngineError as error:
        return error.cause
    return {
        "load": loaded - started,
        "prompt": prompt_tokens / (times[1] - times[0]),
        "decode": decode_tokens / (times[2] - times[1]),
        "memory": _peak_memory(),
    }


def _peak_memory() -> int:
    """Peak resident memory of this process in bytes; 0 where the system does not tell."""
    try:
        # getrusage is no good on Linux: its peak includes that of the parent, before this program began
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        pass
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
