"""A download is either the pinned file or an error that says what happened."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest

from gguf_splitquant.errors import SplitQuantError
from gguf_splitquant.pypi import check_sha256, run_fetch


def test_the_expected_file_passes_and_another_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.whl"
    path.write_bytes(b"these bytes")
    digest = hashlib.sha256(b"these bytes").hexdigest()
    check_sha256(path, digest)
    path.write_bytes(b"other bytes")
    with pytest.raises(SplitQuantError, match=rf"x\.whl: its SHA-256 is .*, expected {digest}"):
        check_sha256(path, digest)


def test_a_failing_client_is_quoted() -> None:
    command = [sys.executable, "-c", "import sys; sys.exit('first\\nERROR: no such version')"]
    with pytest.raises(SplitQuantError, match="pkg==9: the download failed: ERROR: no such version;"):
        run_fetch(command, "pkg==9")


def test_a_silent_failure_has_its_exit_code() -> None:
    with pytest.raises(SplitQuantError, match="exit code 3"):
        run_fetch([sys.executable, "-c", "raise SystemExit(3)"], "pkg==9")
