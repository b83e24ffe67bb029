"""The reason that is picked from llama.cpp's log: a user sees only this line."""

from __future__ import annotations

import pytest

from gguf_splitquant.runtime.engine_log import EngineLog

INFO, WARN, ERROR, CONTINUED = 2, 3, 4, 5


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        # as llama.cpp 0c1e57098 logs a text file, a file with extra tensors, and a context without memory
        (
            [
                (ERROR, "gguf_init_from_reader: invalid magic characters: 'root', expected 'GGUF'\n"),
                (
                    ERROR,
                    "llama_model_load: error loading model: loader: failed to load model from x\n",
                ),
                (ERROR, "llama_model_load_from_file_impl: failed to load model\n"),
            ],
            "invalid magic characters: 'root', expected 'GGUF'",
        ),
        (
            [
                (INFO, "load_tensors: loading\n"),
                (
                    ERROR,
                    "llama_model_load: error loading model: done_getting_tensors: "
                    "wrong number of tensors; expected 482, got 272\n",
                ),
                (ERROR, "llama_model_load_from_file_impl: failed to load model\n"),
            ],
            "wrong number of tensors; expected 482, got 272",
        ),
        (
            [(ERROR, "llama_init_from_model: failed to initialize the context: failed to allocate buffer\n")],
            "failed to initialize the context: failed to allocate buffer",
        ),
        ([(WARN, "something is "), (CONTINUED, "odd\n"), (INFO, "done\n")], "something is odd"),
        ([(ERROR, "llama_model_load_from_file_impl: failed to load model\n")], "failed to load model"),
        ([(INFO, "all is well\n")], ""),
        ([(CONTINUED, ".")], ""),
    ],
)
def test_reason(lines: list[tuple[int, str]], reason: str) -> None:
    log = EngineLog()
    for level, text in lines:
        log.add(level, text)
    assert log.reason() == reason
    log.clear()
    assert log.reason() == ""


def test_keeps_only_the_last_lines() -> None:
    log = EngineLog(keep=2)
    for number in range(5):
        log.add(ERROR, f"error {number}\n")
    log.add(INFO, "later\n")
    assert log.reason() == "error 4"
    log.add(INFO, "later still\n")
    assert log.reason() == ""
