"""Logits of models through the llama.cpp that ``LLAMA_CPP_LIB_PATH`` names, in a process of its own.

A process can load one llama.cpp only, and the tests compare two; and a library that dies on a hostile file
should not take the tests with it. Nothing of the package is used here.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

PROMPT = [1, 5, 9, 33, 60, 2, 71]
DECODED = [90, 12, 3]


@dataclass(frozen=True)
class Answer:
    """What the process reported: ``refused`` names the call that failed; ``log`` is llama.cpp's."""

    refused: str
    log: str
    n_parameters: int
    logits: np.ndarray


class LogitsProcess:
    """Answers one question after the other with one library; a question that kills it gets an error.

    Args:
        library: its folder.
        env: of the process; None: this one's.
    """

    def __init__(self, library: Path, env: Mapping[str, str] | None = None) -> None:
        self.library = library
        self._env = os.environ if env is None else env
        self._process: subprocess.Popen[str] | None = None

    def run(
        self,
        model: Path,
        *,
        adapters: Sequence[Path] = (),
        mmap: bool = True,
        allocate: bool = True,
        repack: bool = True,
        save: Path | None = None,
        threads: int = 1,
        prompt: Sequence[int] = PROMPT,
    ) -> Answer:
        """Logits of every position: the prompt in one batch, then DECODED token by token; F32 KV cache, no
        flash attention. ``save`` is where llama.cpp writes the model that it has loaded.

        Raises:
            RuntimeError: the process died.
        """
        out = model.with_suffix(".npz")
        job = {
            "model": str(model),
            "adapters": [str(path) for path in adapters],
            "load_mode": 1 if mmap and allocate else 0,
            "no_alloc": not allocate,
            "use_extra_bufts": repack,
            "save": str(save or ""),
            "threads": threads,
            "prompt": list(prompt),
            "out": str(out),
        }
        if self._process is None or self._process.poll() is not None:
            env = {**self._env, "LLAMA_CPP_LIB_PATH": str(self.library)}
            self._process = subprocess.Popen(
                [sys.executable, __file__], env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        if not self._process.stdout.readline():
            raise RuntimeError(f"{model.name}: the process died with code {self._process.wait()}")
        with np.load(out) as saved:
            return Answer(
                str(saved["refused"]), str(saved["log"]), int(saved["n_parameters"]), saved["logits"]
            )

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()


class _Refused(Exception):
    pass


def _logits(llama: Any, job: dict[str, Any], answer: dict[str, Any]) -> np.ndarray:
    params = llama.llama_model_default_params()
    for name in ("load_mode", "no_alloc", "use_extra_bufts"):
        setattr(params, name, job[name])
    model = _made("model", llama.llama_model_load_from_file(job["model"].encode(), params))
    try:
        answer["n_parameters"] = llama.llama_model_n_params(model)
        if job["save"]:
            llama.llama_model_save_to_file(model, job["save"].encode())
        return _logits_of(llama, model, job)
    finally:
        llama.llama_model_free(model)


def _logits_of(llama: Any, model: Any, job: dict[str, Any]) -> np.ndarray:
    options = llama.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = 64
    options.n_threads = options.n_threads_batch = job["threads"]
    options.type_k = options.type_v = llama.GGML_TYPE_F32
    options.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = _made("context", llama.llama_init_from_model(model, options))
    try:
        if job["no_alloc"]:
            return np.empty(0, np.float32)
        _set_adapters(llama, model, context, job["adapters"])
        n_vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
        rows: list[np.ndarray] = []
        for tokens in (job["prompt"], *([token] for token in DECODED)):
            batch = llama.llama_batch_init(len(tokens), 0, 1)
            batch.n_tokens = len(tokens)
            for i, token in enumerate(tokens):
                batch.token[i], batch.pos[i] = token, len(rows) + i
                batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, 1
            assert llama.llama_decode(context, batch) == 0
            for i in range(len(tokens)):
                row = llama.llama_get_logits_ith(context, i)
                rows.append(np.ctypeslib.as_array(row, (n_vocab,)).copy())
            llama.llama_batch_free(batch)
        return np.stack(rows)
    finally:
        llama.llama_free(context)


def _set_adapters(llama: Any, model: Any, context: Any, paths: list[str]) -> None:
    # freed with the model
    made = [_made("adapter", llama.llama_adapter_lora_init(model, path.encode())) for path in paths]
    adapters = (llama.llama_adapter_lora_p_ctypes * len(made))(*made)
    scales = (ctypes.c_float * len(made))(*[1.0] * len(made))
    assert not made or llama.llama_set_adapters_lora(context, adapters, len(made), scales) == 0


def _made(what: str, pointer: Any) -> Any:
    if not pointer:
        raise _Refused(what)
    return pointer


def _main() -> None:
    import llama_cpp as llama

    lines: list[str] = []
    keep = llama.llama_log_callback(lambda level, text, user: lines.append(text.decode(errors="replace")))
    llama.llama_log_set(keep, ctypes.c_void_p(0))
    llama.llama_backend_init()
    for line in sys.stdin:
        job = json.loads(line)
        lines.clear()
        answer: dict[str, Any] = {"refused": "", "n_parameters": 0, "logits": np.empty(0, np.float32)}
        try:
            answer["logits"] = _logits(llama, job, answer)
        except _Refused as refused:
            answer["refused"] = str(refused)
        np.savez(job["out"], log="".join(lines), **answer)
        print("done", flush=True)
    # without the destructors of a library whose log callback is Python's
    os._exit(0)


if __name__ == "__main__":
    _main()
