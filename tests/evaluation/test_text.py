"""Texts and how they are cut: bad input, and llama-perplexity's chunks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gguf_splitquant.errors import EvaluationError
from gguf_splitquant.evaluation.text import Text, choose_context, cut, read_text


def model(context_length: int, name: str = "m.gguf") -> Any:
    return SimpleNamespace(path=Path(name), context_length=context_length)


def tokenizer(n_tokens: int, *, adds_bos: bool) -> Any:
    tokens = np.arange(100, 100 + n_tokens, dtype=np.int32)
    return SimpleNamespace(tokenize=lambda _: tokens, adds_bos=adds_bos, bos=1)


def test_built_in_text() -> None:
    text = read_text(None)
    assert text.name == "built-in English text"
    assert 1400 < len(text.content.split()) < 1800
    assert text.content.isascii()
    assert len(text.digest) == 32


def test_a_file_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes(b"one\r\ntwo \xc3\xa9\n")
    assert read_text(path) == Text(str(path), "one\r\ntwo é\n")
    assert read_text(path).digest != read_text(None).digest


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b" \n\t ", "is empty"),
        (b"abc\xff\xfe", r"is not UTF-8 \(byte 3 is 0xff\); convert it with `iconv -t utf-8`"),
    ],
)
def test_bad_files(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes(data)
    with pytest.raises(EvaluationError, match=rf"t\.txt: {message}"):
        read_text(path)
    with pytest.raises(EvaluationError, match=r"gone: cannot be read: No such file"):
        read_text(tmp_path / "gone")


def test_context() -> None:
    assert choose_context([model(8192), model(2048)], None) == 512
    assert choose_context([model(256), model(8192)], None) == 256
    assert choose_context([model(0)], None) == 512
    assert choose_context([model(2048), model(0)], 1024) == 1024
    with pytest.raises(EvaluationError, match=r"b\.gguf: was trained with a context of 256 tokens, not 300"):
        choose_context([model(512), model(256, "b.gguf")], 300)
    with pytest.raises(EvaluationError, match="3 tokens are too few"):
        choose_context([model(512)], 3)


def test_chunks_as_llama_perplexity_cuts_them() -> None:
    chunks = cut(tokenizer(35, adds_bos=True), Text("t", "x"), 10)
    assert chunks.tokens.shape == chunks.inputs.shape == (3, 10)
    assert chunks.tokens[1].tolist() == list(range(110, 120))
    # BOS takes the place of the first token of each chunk, the rest and the targets are the text's
    assert chunks.inputs[:, 0].tolist() == [1, 1, 1]
    assert (chunks.inputs[:, 1:] == chunks.tokens[:, 1:]).all()
    # n_ctx/2 <= position < n_ctx - 1
    assert (chunks.first, chunks.scored_per_chunk, chunks.context) == (5, 4, 10)
    assert chunks.targets(1).tolist() == [116, 117, 118, 119]
    plain = cut(tokenizer(35, adds_bos=False), Text("t", "x"), 10)
    assert (plain.inputs == plain.tokens).all()
    assert len(cut(tokenizer(35, adds_bos=True), Text("t", "x"), 10, limit_tokens=29).tokens) == 2


def test_text_shorter_than_a_chunk() -> None:
    with pytest.raises(EvaluationError, match="t: has 9 tokens, fewer than one context of 10"):
        cut(tokenizer(9, adds_bos=True), Text("t", "x"), 10)
