"""The corpus of split files through a llama.cpp that watches its own memory: ``make test-asan``."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from gguf_splitquant.runtime.builds import BuildSpec, find_build
from gguf_splitquant.runtime.compilation import cxx_compiler
from gguf_splitquant.runtime.sanitizers import sanitizer_environment
from tests.attacks.split_files import ATTACKS, DENSE, EXPERTS, GOOD, TIED, SplitAttack
from tests.runtime.channel_models import split_channels
from tests.runtime.logits_process import LogitsProcess
from tests.runtime.tiny_models import TinyModel, is_linear, split, write

BUILD = find_build(BuildSpec(sanitized=True))
pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(
        BUILD is None, reason="needs `gguf-splitquant build-runtime --sanitized`: make test-asan"
    ),
]


class Sanitized:
    """The library, and what its sanitizers reported."""

    def __init__(self, folder: Path) -> None:
        assert BUILD is not None
        env = sanitizer_environment(cxx_compiler())
        for variable in ("ASAN_OPTIONS", "UBSAN_OPTIONS"):
            env[variable] += f":log_path={folder / 'report'}"
        self._folder = folder
        # numpy's BLAS would start threads that nobody needs
        self.process = LogitsProcess(BUILD.lib_dir, {**env, "OMP_NUM_THREADS": "1"})

    def reports(self) -> list[str]:
        """What was reported since the last question."""
        found = []
        for path in sorted(self._folder.glob("report*")):
            found.append(path.read_text(errors="replace"))
            os.truncate(path, 0)
        return [report for report in found if report.strip()]


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sanitized]:
    sanitized = Sanitized(tmp_path_factory.mktemp("sanitizers"))
    yield sanitized
    sanitized.process.close()


def test_the_sanitizers_are_awake(tmp_path: Path) -> None:
    """ggml writes four blocks where one was allocated."""
    assert BUILD is not None
    script = """if True:
        import ctypes, sys
        ggml = ctypes.CDLL(sys.argv[1])
        libc = ctypes.CDLL(None)
        libc.malloc.restype = ctypes.c_void_p
        block = ctypes.c_void_p(libc.malloc(34))
        ggml.quantize_row_q8_0_ref((ctypes.c_float * 128)(), block, ctypes.c_int64(128))
    """
    done = subprocess.run(
        [sys.executable, "-c", script, str(BUILD.lib_dir / "libggml-base.so")],
        env=sanitizer_environment(cxx_compiler()),
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr and "quantize_row_q8_0_ref" in done.stderr


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_attack(attack: SplitAttack, mmap: bool, sanitized: Sanitized, tmp_path: Path) -> None:
    answer = sanitized.process.run(attack.write(tmp_path / "bad.gguf"), mmap=mmap)
    assert answer.refused == ("model" if attack.theirs else ""), answer.log
    assert attack.theirs in answer.log
    assert sanitized.reports() == []


def _linear(model: TinyModel) -> list[str]:
    return [name for name in model.tensors if is_linear(name) and "gate_inp" not in name]


@pytest.mark.parametrize("repack", [False, True])
@pytest.mark.parametrize("kinds", [(), (Type.Q8_0, Type.Q4_0), (Type.Q5_1, Type.IQ4_NL)], ids=str)
@pytest.mark.parametrize("model", [DENSE, TIED, EXPERTS], ids=["dense", "tied", "experts"])
def test_sound_channel_splits(
    model: TinyModel, kinds: tuple[Type, ...], repack: bool, sanitized: Sanitized, tmp_path: Path
) -> None:
    parts, _ = split_channels(model, _linear(model), kinds=kinds)
    answer = sanitized.process.run(parts.write(tmp_path / "split.gguf"), repack=repack)
    assert answer.refused == ""
    assert np.isfinite(answer.logits).all()
    assert sanitized.reports() == []


def test_sound_value_splits(sanitized: Sanitized, tmp_path: Path) -> None:
    path = write(split(DENSE, _linear(DENSE), 3), tmp_path / "split.gguf")
    answer = sanitized.process.run(path)
    assert answer.refused == "" and np.isfinite(answer.logits).all()
    assert sanitized.reports() == []


def test_saving(sanitized: Sanitized, tmp_path: Path) -> None:
    path = GOOD.write(tmp_path / "split.gguf")
    saved = tmp_path / "saved.gguf"
    assert sanitized.process.run(path, mmap=False, repack=False, save=saved).refused == ""
    assert sanitized.process.run(saved).refused == ""
    assert sanitized.reports() == []
