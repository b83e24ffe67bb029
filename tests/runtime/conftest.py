"""The two libraries that the patch's tests compare, and one that others built, each in its own process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gguf_splitquant.runtime.library import find_library
from tests.runtime.foreign_process import ForeignProcess
from tests.runtime.logits_process import LogitsProcess


@pytest.fixture(scope="session")
def patched() -> Iterator[LogitsProcess]:
    yield from _process(patched=True, command="gguf-splitquant build-runtime")


@pytest.fixture(scope="session")
def stock() -> Iterator[LogitsProcess]:
    yield from _process(patched=False, command="gguf-splitquant build-runtime --stock")


@pytest.fixture(scope="session")
def prebuilt() -> Iterator[ForeignProcess]:
    process = ForeignProcess()
    yield process
    process.close()


def _process(patched: bool, command: str) -> Iterator[LogitsProcess]:
    folder = find_library(patched=patched)
    if folder is None:
        pytest.fail(f"the library is not built: run `{command}`")
    process = LogitsProcess(folder)
    yield process
    process.close()
