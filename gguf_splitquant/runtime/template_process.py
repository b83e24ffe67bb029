"""The process that renders chat templates: started for the first one, ended when one takes too long."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from jinja2 import TemplateError

from .template_worker import MOST_TEXT

SECONDS = 20.0
"""For one conversation, which takes milliseconds; a busy machine needs longer to start the process."""

# a character is at most twelve bytes of JSON
_MOST_ANSWER = 12 * MOST_TEXT + 1024
# a checkout that is not installed is found where this process finds it
_SCRIPT = """
import sys
sys.path[:] = {path!r}
from gguf_splitquant.runtime.template_worker import main
main()
"""


class TemplateProcess:
    """One process, which renders one conversation after the other.

    Args:
        seconds: that one may take.
    """

    def __init__(self, seconds: float = SECONDS) -> None:
        self.seconds = seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def render(self, request: Mapping[str, Any]) -> str:
        """The text for what :mod:`.template_worker` takes. Thread-safe.

        Raises:
            TemplateError: the template is broken, refuses the messages, or needs more time or memory than a
                template may.
        """
        with self._lock:
            try:
                answer = json.loads(self._answer(json.dumps(request).encode() + b"\n"))
            except BaseException:
                # whatever it is doing, nobody waits for it any more
                self.close()
                raise
        if "error" in answer:
            raise TemplateError(answer["error"])
        return str(answer["text"])

    def close(self) -> None:
        """End the process; the next conversation starts another."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _answer(self, line: bytes) -> bytes:
        if self._process is None or self._process.poll() is not None:
            self.close()
            command = [sys.executable, "-c", _SCRIPT.format(path=sys.path)]
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                # Ctrl-C is for the chat, not for this process
                start_new_session=True,
            )
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(line)
            process.stdin.flush()
        except BrokenPipeError as error:
            raise TemplateError("the process that renders it has ended") from error
        end = time.monotonic() + self.seconds
        answer = b""
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while not answer.endswith(b"\n"):
                if not selector.select(max(0.0, end - time.monotonic())):
                    raise TemplateError(f"it takes longer than {self.seconds:g} seconds")
                piece = os.read(process.stdout.fileno(), 1 << 20)
                answer += piece
                if not piece or len(answer) > _MOST_ANSWER:
                    raise TemplateError("it needs more memory than a template may")
        return answer


TEMPLATES = TemplateProcess()
"""The one that all templates share."""
