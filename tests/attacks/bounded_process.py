"""Readers in a process with little memory, which is ended when one hangs."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HANGS = 120.0
"""Seconds after which a reader will not come back; the slowest takes fifteen on a busy machine."""


@dataclass(frozen=True)
class Verdict:
    """What became of a file: ``kind`` is empty (read), ``refused`` or ``crashed``; ``bytes`` were needed."""

    kind: str
    message: str
    bytes: int
    seconds: float


class BoundedProcess:
    """Asks one reader after the other; a reader that dies or hangs is a verdict too."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def read(self, reader: str, path: Path) -> Verdict:
        """What ``reader`` (of :mod:`.readers`) makes of a file."""
        if self._process is None or self._process.poll() is not None:
            env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "RUST_BACKTRACE": "0"}
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.attacks.readers"],
                env=env,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps([reader, str(path)]) + "\n")
        process.stdin.flush()
        if not select.select([process.stdout], [], [], HANGS)[0]:
            self.close()
            return Verdict("hung", "", 0, HANGS)
        line = process.stdout.readline()
        if not line:
            return Verdict("crashed", f"the process died with code {process.wait()}", 0, 0)
        return Verdict(**json.loads(line))

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None
