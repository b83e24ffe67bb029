"""Positions where a file behaves unlike its baseline."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from gguf_splitquant.cli import main
from gguf_splitquant.evaluation.behaviour import BehaviourWatch
from gguf_splitquant.evaluation.divergence import score
from gguf_splitquant.gguf_io.header import read_header

WORDS = ["a", "b", "c", "d"]


def logits(*rows: tuple[int, float]) -> np.ndarray:
    """Rows with probability ``p`` for one token and the rest shared out."""
    values = np.empty((len(rows), 4), np.float32)
    for row, (token, p) in zip(values, rows, strict=True):
        row[:] = np.log((1 - p) / 3)
        row[token] = np.log(p)
    return values


def test_sure_choices_that_change_are_counted_and_the_worst_is_shown() -> None:
    base = logits((0, 0.9), (0, 0.4), (1, 0.6), (2, 0.97), (3, 0.8))
    other = logits((0, 0.5), (1, 0.9), (2, 0.6), (3, 0.97), (0, 0.45))
    watch = BehaviourWatch()
    tokens = np.array([[0, 1, 2, 3, 0, 1, 2, 3]], np.int32)
    scores = score(base, other, np.zeros(5, np.int32))
    for part in (slice(0, 3), slice(3, 5)):
        some = score(base[part], other[part], np.zeros(len(base[part]), np.int32))
        watch.see(base[part], other[part], some, 0, 2 + part.start)
    found = watch.summary(tokens, lambda ids: "".join(WORDS[i] for i in ids))
    # position 1: the baseline is not sure; position 4: the other is not
    assert (found.tokens, found.sure, found.flips, found.flip_rate) == (5, 4, 2, 0.4)
    assert found.worst is not None and found.worst == found.worst_flip
    assert (found.worst.chunk, found.worst.position, found.worst.context) == (0, 5, "abcdab")
    assert found.worst.kld == scores.kld.max()
    assert (found.worst.base.token, found.worst.quant.token) == ("c", "d")
    assert found.worst.base.probability == pytest.approx(0.97, abs=1e-6)


def test_broken_logits_are_no_place() -> None:
    base, other = logits((0, 0.9)), np.full((1, 4), np.nan, np.float32)
    watch = BehaviourWatch()
    watch.see(base, other, score(base, other, np.zeros(1, np.int32)), 0, 0)
    found = watch.summary(np.zeros((1, 1), np.int32), str)
    assert (found.worst, found.worst_flip, found.flips) == (None, None, 0)


@pytest.mark.engine
def test_a_planted_change_is_flagged(
    float_gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A float file with one row of the embedding, which is the head too, put in place of another."""
    planted = tmp_path / "planted.gguf"
    planted.write_bytes(float_gguf.read_bytes())
    (entry,) = [t for t in read_header(planted).tensors if t.name == "token_embd.weight"]
    data = np.memmap(planted, np.float32, "r+", offset=entry.offset, shape=entry.shape)
    fast = ["--threads", "1", "--ctx", "64", "--limit-tokens", "512"]
    files = ["compare", str(float_gguf)]
    assert main([*files, str(float_gguf), "--max-flips", "0", "--max-token-kld", "0", *fast]) == 0
    assert capsys.readouterr().err == ""
    # the two most ordinary pieces of the vocabulary change places
    data[[278, 29892]] = data[[29892, 278]]
    data.flush()
    assert main([*files, str(planted), "--max-flips", "0", "--json", *fast]) == 1
    printed = capsys.readouterr()
    assert "warning: behaviour changed at" in printed.err
    assert "limit passed" in printed.err
    told = json.loads(printed.out)
    flip = told["behaviour"]["worst_flip"]
    assert {flip["base"]["token"], flip["quant"]["token"]} & {" the", ","}
    assert told["behaviour"]["flips"] >= 1
    assert main([*files, str(planted), "--max-token-kld", "0.1", *fast]) == 1
    assert "largest KLD of a token" in capsys.readouterr().err
    assert main([*files, str(planted), "--max-flips", "-1", *fast]) == 2
