"""Log-probabilities from a llama.cpp that others built: the prebuilt binary in PyPI's ``xllamacpp``.

"Runs in any llama.cpp" is shown on a binary that nobody here compiled. It runs in a process of its own, since
a library that dies on a file should not take the tests with it. Nothing of the package is used here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.runtime.logits_process import PROMPT

CONTINUED = 4


@dataclass(frozen=True)
class ForeignAnswer:
    """What the process reported.

    Attributes:
        refused: the error with which it refused the file, and what it logged; empty if it took it.
        log_probabilities: by token, of the token after PROMPT; NaN for those that were not asked for.
        decoded: how many tokens it added to PROMPT.
    """

    refused: str
    log_probabilities: np.ndarray
    decoded: int


class ForeignProcess:
    """Answers one question after the other; a question that kills it gets an error."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def run(self, model: Path, vocabulary: int, token: int, top: int | None = None) -> ForeignAnswer:
        """Load ``model`` and continue PROMPT; F32 KV cache, no flash attention, one thread.

        Args:
            model: a GGUF file.
            vocabulary: its number of tokens.
            token: a token that is text by itself. The continuation begins with it, whatever the model says:
                probabilities are reported with text only, and a part of a character is none.
            top: how many of the most probable tokens to ask for; None: all.

        Raises:
            RuntimeError: the process died.
        """
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, __file__],
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(
            json.dumps({"model": str(model), "token": token, "top": top or vocabulary}) + "\n"
        )
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{model.name}: the process died with code {self._process.wait()}")
        answer = json.loads(line)
        log_probabilities = np.full(vocabulary, np.nan)
        for token, value in answer["top"]:
            log_probabilities[token] = value
        return ForeignAnswer(answer["refused"], log_probabilities, answer["decoded"])

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()


def _answer(llama: Any, job: dict[str, Any]) -> dict[str, Any]:
    params = llama.CommonParams()
    params.model.path = job["model"]
    params.n_ctx = 64
    params.n_parallel = 1
    params.warmup = params.fit_params = False
    params.cache_ram_mib = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    try:
        server = llama.Server(params)
    except RuntimeError as error:
        return {"refused": str(error), "top": [], "decoded": 0}
    # the bias moves the choice, not the probabilities that are reported
    request = {
        "prompt": PROMPT,
        "n_predict": CONTINUED,
        "n_probs": job["top"],
        "logit_bias": [[job["token"], 1000]],
        "temperature": 0,
        "cache_prompt": False,
        "ignore_eos": True,
    }
    done = server.handle_completions(request)
    first = done["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    decoded = done["usage"]["completion_tokens"]
    return {"refused": "", "top": [(t["id"], t["logprob"]) for t in first], "decoded": decoded}


def _last_words(log: IO[bytes]) -> str:
    """What the library logged about a file that it refused; a thread of its own writes it, a little later."""
    for _ in range(100):
        words = os.pread(log.fileno(), 1 << 20, 0).decode(errors="replace")
        if "exiting due to model loading error" in words:
            return words
        time.sleep(0.1)
    return words


def _main() -> None:
    import xllamacpp

    # what the library prints must not mix with the answers, and says why it refuses a file
    answers = os.fdopen(os.dup(1), "w")
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        for line in sys.stdin:
            log.seek(0)
            log.truncate()
            answer = _answer(xllamacpp, json.loads(line))
            if answer["refused"]:
                answer["refused"] += _last_words(log)
            print(json.dumps(answer), file=answers, flush=True)
    os._exit(0)


if __name__ == "__main__":
    _main()
