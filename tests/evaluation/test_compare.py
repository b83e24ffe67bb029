"""The command of the continuous integration job, on a real model."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest

from gguf_splitquant.cli import main
from gguf_splitquant.errors import EvaluationError
from gguf_splitquant.evaluation.compare import compare
from gguf_splitquant.evaluation.divergence import score, summarize
from gguf_splitquant.evaluation.text import cut, read_text
from gguf_splitquant.runtime.engine import Engine, EngineOptions

pytestmark = pytest.mark.engine

FAST = ["--threads", "1", "--ctx", "64", "--limit-tokens", "256"]


def test_lock_step_equals_whole_logits(float_gguf: Path, int4_gguf: Path) -> None:
    text = read_text(None)
    streamed = compare(float_gguf, int4_gguf, text, context=200, limit_tokens=400, threads=1)
    options = EngineOptions(n_ctx=200, n_batch=200, n_ubatch=200, n_threads=1)
    scores = []
    with Engine(float_gguf, options) as base, Engine(int4_gguf, options) as quant:
        chunks = cut(base, text, 200, 400)
        for index, inputs in enumerate(chunks.inputs):
            (left,), (right,) = base.logits(inputs, 100), quant.logits(inputs, 100)
            scores.append(score(left.logits[:-1], right.logits[:-1], chunks.targets(index)))
    assert (streamed.chunks, streamed.context, len(scores), len(scores[0])) == (2, 200, 2, 99)
    whole = summarize(type(scores[0]).concatenate(scores))
    for field in ("kld_mean", "kld_p99", "ppl", "ppl_base", "logit_rms"):
        assert getattr(streamed.divergence, field) == pytest.approx(getattr(whole, field), rel=0.02)
    assert streamed.divergence.tokens == whole.tokens == 198
    assert streamed.divergence.kld_mean > 0
    assert streamed.base.linear_bpw == 32


def test_a_file_equals_itself(float_gguf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limits = ["--max-kld", "0", "--max-logit-diff", "0"]
    assert main(["compare", str(float_gguf), str(float_gguf), "--json", *limits, *FAST]) == 0
    result = json.loads(capsys.readouterr().out)
    figures = result["divergence"]
    assert (figures["kld_mean"], figures["logit_max"], figures["top1"]) == (0, 0, 1)
    assert figures["ppl"] == figures["ppl_base"] > 1
    assert result["base"]["file_bytes"] == float_gguf.stat().st_size
    assert (result["context"], result["chunks"], figures["tokens"]) == (64, 4, 4 * 31)
    assert result["violations"] == []


def test_limits_decide_the_exit_code(
    float_gguf: Path, int8_gguf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["compare", str(float_gguf), str(int8_gguf)]
    exact = ["--kv", "f32", "--flash-attn", "off", *FAST]
    assert main([*files, "--max-kld", "0.5", "--max-logit-diff", "5", *exact]) == 0
    table = capsys.readouterr().out
    assert "text: built-in English text, 4 chunks of 64 tokens, 124 scored" in table
    assert f"{int8_gguf.stat().st_size:,}" in table
    assert main([*files, "--max-kld", "1e-9", *exact]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("limit passed: mean KLD ") and printed.err.endswith("is above 1e-09\n")
    assert printed.out == table
    assert main([*files, "--max-logit-diff", "1e-6", "--json", *exact]) == 1
    assert "largest logit difference" in json.loads(capsys.readouterr().out)["violations"][0]


def other_vocabulary(path: Path, source: Path, *, drop: int) -> Path:
    """The same file with the last tokens dropped, or with two tokens swapped if ``drop`` is 0."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, "llama")
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        value = field.contents()
        if key in ("tokenizer.ggml.tokens", "tokenizer.ggml.scores", "tokenizer.ggml.token_type"):
            value = value[: len(value) - drop]
            if key.endswith("tokens"):
                value[500], value[501] = value[501], value[500]
        elif key.endswith(".vocab_size"):
            value -= drop
        kind = field.types[0]
        sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, value, kind, sub)
    for tensor in reader.tensors:
        data = tensor.data
        if drop and tensor.name in ("token_embd.weight", "output.weight"):
            data = data[: len(data) - drop]
        writer.add_tensor(tensor.name, np.ascontiguousarray(data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(("drop", "message"), [(7, "has 31993 tokens, and"), (0, "has other tokens than")])
def test_different_vocabularies(float_gguf: Path, tmp_path: Path, drop: int, message: str) -> None:
    other = other_vocabulary(tmp_path / "other.gguf", float_gguf, drop=drop)
    with pytest.raises(EvaluationError, match=rf"other\.gguf: {message}"):
        compare(float_gguf, other, read_text(None), context=64, threads=1)


def test_bad_input_is_one_line_and_exit_code_2(
    float_gguf: Path, int8_gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["compare", str(float_gguf), str(int8_gguf)]
    (tmp_path / "empty.txt").write_text("")
    for arguments, message in [
        (
            [*files, "--ctx", "512"],
            "was trained with a context of 256 tokens, not 512; use --ctx 256 or less",
        ),
        ([*files, "--ctx", "0"], "--ctx: 0 is less than one"),
        ([*files, "--limit-tokens", "10"], "has 10 tokens, fewer than one context of 256"),
        ([*files, "--text", str(tmp_path / "empty.txt")], "empty.txt: is empty"),
        (["compare", str(tmp_path / "a.gguf"), str(int8_gguf)], "a.gguf: cannot be read"),
        (["compare", str(float_gguf), str(tmp_path / "empty.txt")], "empty.txt: cannot be read"),
    ]:
        assert main([*arguments, "--threads", "1"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1
