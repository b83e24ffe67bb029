"""KLD, perplexity and speed on a real model, by the command line that people use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gguf_splitquant.cli import main
from gguf_splitquant.errors import EvaluationError
from gguf_splitquant.evaluation import kld as kld_module
from gguf_splitquant.evaluation.base import run_evaluation
from gguf_splitquant.evaluation.compare import compare
from gguf_splitquant.evaluation.kld import KLDivergence
from gguf_splitquant.evaluation.perplexity import Perplexity
from gguf_splitquant.evaluation.speed import Speed, SpeedOptions
from gguf_splitquant.evaluation.text import read_text
from gguf_splitquant.evaluation.text_evaluation import TextOptions
from gguf_splitquant.runtime.engine import Engine, EngineOptions

pytestmark = pytest.mark.engine

ONE_THREAD = EngineOptions(n_threads=1)


def small_text(tokens: int = 400, context: int = 100) -> TextOptions:
    return TextOptions(read_text(None), context, tokens, ONE_THREAD)


def value(result: Any, model: int, key: str) -> Any:
    return result.models[model].figures[key].value


def test_kld_and_perplexity_agree_with_compare(
    float_gguf: Path, int4_gguf: Path, int8_gguf: Path, tmp_path: Path
) -> None:
    files = [float_gguf, int4_gguf, int8_gguf]
    kld = run_evaluation(KLDivergence(small_text(), cache=tmp_path / "c"), files, tmp_path)
    ppl = run_evaluation(Perplexity(small_text()), files, tmp_path)
    for index, path in enumerate(files[1:], start=1):
        exact = compare(
            float_gguf, path, read_text(None), context=100, limit_tokens=400, threads=1
        ).divergence
        assert value(kld, index, "kld") == pytest.approx(exact.kld_mean, rel=0.01)
        assert value(kld, index, "kld_median") == pytest.approx(exact.kld_median, rel=0.05)
        assert value(kld, index, "top1") == pytest.approx(exact.top1)
        assert value(kld, index, "ppl") == pytest.approx(exact.ppl, rel=1e-5)
        assert value(ppl, index, "ppl") == pytest.approx(exact.ppl, rel=1e-5)
        assert value(ppl, index, "ppl_ratio") == pytest.approx(exact.ppl_ratio, rel=1e-5)
        assert value(kld, index, "ppl_ratio") == pytest.approx(exact.ppl_ratio, rel=1e-5)
        assert value(kld, 0, "ppl") == pytest.approx(exact.ppl_base, rel=1e-5)
    # the first row is the noise floor, far below what int8 does
    assert 0 <= value(kld, 0, "kld") < 0.1 * value(kld, 2, "kld")
    assert value(kld, 2, "kld") < value(kld, 1, "kld")
    assert value(kld, 0, "ppl_ratio") is None


def test_an_interrupted_kld_goes_on_and_the_baseline_runs_once(
    float_gguf: Path, int8_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [float_gguf, int8_gguf]
    monkeypatch.setattr(kld_module, "NOISE_CHUNKS", 2)

    def evaluation() -> KLDivergence:
        return KLDivergence(small_text(), cache=tmp_path / "c")

    whole = run_evaluation(evaluation(), files, tmp_path / "a")
    opened: list[Path] = []

    class Watched(Engine):
        def __init__(self, path: Path, options: EngineOptions) -> None:
            if not options.vocabulary_only:
                opened.append(path)
            super().__init__(path, options)

    monkeypatch.setattr(kld_module, "Engine", Watched)
    for journal in (tmp_path / "a").iterdir():
        lines = journal.read_text().splitlines(keepends=True)
        keep = 5 if journal.name.startswith("kld-float") else 3
        journal.write_text("".join(lines[:keep]))
    resumed = run_evaluation(evaluation(), files, tmp_path / "a", resume=True)
    assert opened == [int8_gguf]
    assert resumed.models == whole.models
    # another baseline: nothing of the old one is used
    opened.clear()
    swapped = run_evaluation(evaluation(), files[::-1], tmp_path / "a", resume=True)
    assert opened == [int8_gguf, int8_gguf, float_gguf]
    assert value(swapped, 1, "kld") != value(whole, 1, "kld")


def test_speed_is_interleaved_and_paired(float_gguf: Path, int8_gguf: Path, tmp_path: Path) -> None:
    options = SpeedOptions(rounds=2, prompt_tokens=16, decode_tokens=4, engine=ONE_THREAD)
    files = [float_gguf, int8_gguf]
    evaluation = Speed(options)
    order = [(item.model, item.key) for item in evaluation.measure(files, [{}, {}], kld_silent())]
    assert order == [(0, "round 0"), (1, "round 0"), (0, "round 1"), (1, "round 1")]
    result = run_evaluation(Speed(options), files, tmp_path)
    for figures in (model.figures for model in result.models):
        for key in ("decode", "prompt", "load"):
            assert figures[key].value > 0
        # of a small process of its own, not of this one with torch in it
        assert 20 < figures["memory"].value < 400
    ratios = Speed(options).summarize(
        {"a": record(10.0), "b": record(30.0), "c": record(5.0)},
        {"a": record(5.0), "b": record(20.0), "d": record(1.0)},
    )
    assert ratios["decode_ratio"].value == pytest.approx((2 + 1.5) / 2)
    assert ratios["decode"].value == 10


def record(decode: float) -> dict[str, float]:
    return {"decode": decode, "prompt": 1.0, "load": 1.0, "memory": 1e6}


def kld_silent() -> Any:
    from gguf_splitquant.progress import SILENT

    return SILENT


def test_speed_reports_a_file_that_does_not_load(
    float_gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from gguf_splitquant.errors import EngineError
    from tests.evaluation.test_contents import MODEL, write

    broken = write(tmp_path / "broken.gguf", MODEL)
    options = SpeedOptions(rounds=1, prompt_tokens=8, decode_tokens=2, engine=ONE_THREAD)
    with pytest.raises(EngineError, match=r"broken\.gguf: llama\.cpp cannot load it"):
        run_evaluation(Speed(options), [float_gguf, broken], tmp_path)


def test_command_writes_results_and_report(
    float_gguf: Path,
    int4_gguf: Path,
    int8_gguf: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GGUF_SPLITQUANT_CACHE", str(tmp_path / "cache"))
    files = [str(float_gguf), str(int4_gguf), str(int8_gguf)]
    small = ["--threads", "1", "--ctx", "64", "--limit-tokens", "128"]
    output, report = tmp_path / "r.json", tmp_path / "r.html"
    written = ["--output", str(output), "--report", str(report)]
    assert main(["eval", "kld", *files, *small, *written]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "kld, version 1"
    assert table[1].split()[:3] == ["model", "MB", "bpw"]
    assert [line.split()[0] for line in table[2:5]] == ["float.gguf", "int4.gguf", "int8.gguf"]
    document = json.loads(output.read_text())
    assert document["metrics_version"] == 1
    assert document["models"][1]["file_bytes"] == int4_gguf.stat().st_size
    assert document["models"][1]["errors"]["blk.0.attn_q.weight"] > 0
    kld = document["evaluations"]["kld"]
    assert kld["settings"]["context"] == 64
    assert kld["models"][2]["figures"]["kld"]["value"] > 0
    page = report.read_text()
    assert page.count("<svg") == 1 and page.count('class="heat"') == 2
    assert "http:" not in page and "https:" not in page and "<script" not in page
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "r.html", "r.json"]
    assert main(["eval", "kld", *files, *small, "--resume", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["evaluations"] == document["evaluations"]


def test_bad_input(float_gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 100)
    for arguments, message in [
        (["--text", str(tmp_path / "latin.txt")], "latin.txt: is not UTF-8"),
        (["--ctx", "1000"], "was trained with a context of 256 tokens, not 1000"),
        (
            ["--report", str(tmp_path / "no" / "r.html"), "--ctx", "64", "--limit-tokens", "64"],
            "r.html: cannot be written",
        ),
    ]:
        code = main(
            ["eval", "ppl", str(float_gguf), "--journals", str(tmp_path / "j"), "--threads", "1", *arguments]
        )
        assert code == 2
        assert message in capsys.readouterr().err
    with pytest.raises(EvaluationError, match="has 20 tokens, fewer"):
        run_evaluation(Perplexity(small_text(20)), [float_gguf], tmp_path)
