"""Processes that are killed at a moment of the test's choice."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def kill_when(appears: Callable[[], bool], arguments: list[str]) -> None:
    """Run python with arguments, in the repository's root, and kill it as soon as something is there."""
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT)
    while process.poll() is None:
        with suppress(FileNotFoundError):  # a folder went while it was looked into
            if appears():
                break
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
