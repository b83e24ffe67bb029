"""The official converter's files for the checkpoints of cases.py, made once per session."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.real_models import qwen3_tokenizer
from tests.runtime.conftest import patched, prebuilt, stock

__all__ = ["patched", "prebuilt", "stock"]


@pytest.fixture(scope="session")
def official_files(
    official_converter: Path, smollm2: Path, stories15m: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Folder with every checkpoint ``NAME`` and the official ``NAME.OUTTYPE.gguf``."""
    folder = tmp_path_factory.mktemp("official")
    existing = [
        f"real-tokenizer-smollm2={smollm2}",
        f"real-tokenizer-stories={stories15m}",
        f"real-tokenizer-qwen3={qwen3_tokenizer()}",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "tests.sources.official_run", str(official_converter), str(folder), *existing],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder
