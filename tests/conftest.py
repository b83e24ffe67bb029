"""Fixtures that several areas share: the real engine, real models, real tools."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from gguf_splitquant import refining
from gguf_splitquant.cache import cache_dir
from gguf_splitquant.calibration.calibrate import Calibration
from gguf_splitquant.calibration.checkpoint import calibrate_model
from gguf_splitquant.calibration.moments import Moments
from gguf_splitquant.calibration.own_text import OwnText
from gguf_splitquant.runtime.library import find_library
from gguf_splitquant.runtime.sdist import VERSION, extract_llama_cpp, fetch_sdist
from gguf_splitquant.sources import open_model
from gguf_splitquant.sources.model import SourceModel
from scripts import real_models

# The same examples in every run, without a deadline: machines are doing other things too. To look for new
# ones: pytest --hypothesis-profile=explore
settings.register_profile("suite", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None)
settings.load_profile("suite")


def pytest_configure() -> None:
    """Compiled loops are older than a source file of theirs: numba would take them all the same."""
    folder = Path(refining.__file__).parent
    newest = max(source.stat().st_mtime for source in folder.glob("*.py"))
    for index in folder.glob("__pycache__/*.nbi"):
        if index.stat().st_mtime < newest:
            index.unlink()


@pytest.fixture(scope="session")
def stories15m() -> Path:
    """A real model small enough for every test: stories15M, as trained, in the Hugging Face layout."""
    return real_models.stories15m()


@pytest.fixture(scope="session")
def stories(stories15m: Path) -> SourceModel:
    """stories15M, opened."""
    return open_model(stories15m)


@pytest.fixture(scope="session")
def stories_moments(stories: SourceModel) -> Moments:
    """stories15M calibrated on an eighth of the text that it writes by default."""
    how = Calibration(own=OwnText(sequences=8, length=192))
    return calibrate_model(stories, how)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Pseudo-float SmolLM2-135M-Instruct, scrambled, in the Hugging Face layout."""
    return real_models.smollm2()


@pytest.fixture(scope="session")
def official_converter() -> Path:
    """llama.cpp's own converter, from the sources that the runtime is built from; unpacked once."""
    folder = cache_dir() / "oracle" / f"llama.cpp-{VERSION}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as work:
            sources = Path(work) / "llama.cpp"
            extract_llama_cpp(fetch_sdist(folder.parent), sources)
            sources.rename(folder)
    return folder / "convert_hf_to_gguf.py"


@pytest.fixture(scope="session")
def ggml_base() -> ctypes.CDLL:
    """ggml's own C code, from the patched runtime."""
    folder = find_library()
    if folder is None:
        pytest.fail("no patched library: run `gguf-splitquant build-runtime`")
    suffix = "dylib" if sys.platform == "darwin" else "so"
    return ctypes.CDLL(str(folder / f"libggml-base.{suffix}"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        yield mount
    finally:
        subprocess.run(["umount", str(mount)], check=True)
