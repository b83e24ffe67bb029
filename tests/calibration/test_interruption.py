"""Ctrl-C while llama.cpp computes and calls back: it arrives, and at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from gguf_splitquant.calibration.experts import Routing
from gguf_splitquant.calibration.observer import ObservedEngine
from gguf_splitquant.calibration.runnable import Runnable
from gguf_splitquant.runtime.deferral import DeferredSignals
from gguf_splitquant.runtime.engine import EngineOptions
from tests.gguf_files import FLOAT, convert_once


class Noted(Exception):
    """What the handlers of these tests raise."""


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM])
def number(request: pytest.FixtureRequest) -> Iterator[signal.Signals]:
    def handle(*_: object) -> None:
        raise Noted

    before = signal.signal(request.param, handle)
    yield request.param
    signal.signal(request.param, before)


def test_a_signal_waits_for_the_end_of_the_context(number: signal.Signals) -> None:
    reached = []
    with pytest.raises(Noted), DeferredSignals() as signals:
        signal.raise_signal(number)
        reached.append(signals.pending)
    assert reached == [number]
    with pytest.raises(Noted):
        signal.raise_signal(number)  # the handler is back


@pytest.mark.engine
def test_it_ends_the_computation_and_arrives(
    stories15m: Path, tmp_path: Path, number: signal.Signals
) -> None:
    seen: list[str] = []

    def sink(name: str, _inputs: NDArray[np.float32], _routing: Routing | None) -> None:
        seen.append(name)
        if len(seen) == 3:
            signal.raise_signal(number)

    model = convert_once(stories15m, tmp_path, FLOAT, "float")
    options = EngineOptions(n_ctx=256, n_batch=16, n_ubatch=16)
    with ObservedEngine(Runnable(model), options, sink) as engine:
        with pytest.raises(Noted):
            engine.observe(np.arange(5, 21), np.arange(16), 0)
        assert len(seen) == 3
        engine.clear()
        engine.observe(np.arange(5, 21), np.arange(16), 0)
    assert len(seen) == 3 + 25
