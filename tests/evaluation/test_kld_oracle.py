"""KLD and perplexity against llama-perplexity, on the same tokens."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from gguf_splitquant.evaluation.base import run_evaluation
from gguf_splitquant.evaluation.kld import KLDivergence
from gguf_splitquant.evaluation.text import read_text
from gguf_splitquant.evaluation.text_evaluation import TextOptions
from gguf_splitquant.runtime.builds import BuildSpec, find_build
from gguf_splitquant.runtime.engine import EngineOptions

pytestmark = [pytest.mark.engine, pytest.mark.oracle]


@pytest.fixture(scope="session")
def llama_perplexity() -> Path:
    override = os.environ.get("LLAMA_PERPLEXITY")
    if override:
        return Path(override)
    for patched in (True, False):
        build = find_build(BuildSpec(patched=patched, tools=True))
        if build is not None:
            return build.lib_dir / "llama-perplexity"
    found = shutil.which("llama-perplexity")
    if found is None:
        pytest.skip("needs llama-perplexity: gguf-splitquant build-runtime --with-tools")
    return Path(found)


def run(tool: Path, *arguments: str) -> str:
    done = subprocess.run([tool, *arguments], capture_output=True, text=True, check=True, timeout=300)
    return done.stdout + done.stderr


def divergence_of(tool: Path, *arguments: str) -> str:
    """The tool's whole report. It logs from a thread of its own, and on a busy machine it can end before that
    thread has written the last lines: then once more."""
    for _ in range(3):
        output = run(tool, *arguments, "--kl-divergence")
        if "Same top p" in output:
            break
    return output


def figure(output: str, label: str) -> float:
    found = re.search(rf"{label}\s*:\s*([0-9.]+)", output)
    assert found, output[-2000:]
    return float(found.group(1))


@pytest.mark.parametrize("file", ["int4_gguf", "int8_gguf"])
def test_llama_perplexity_finds_the_same(
    file: str, llama_perplexity: Path, float_gguf: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    quant: Path = request.getfixturevalue(file)
    text = read_text(None)
    (tmp_path / "text.txt").write_text(text.content, encoding="utf-8")
    common = ["-c", "128", "-b", "128", "-t", "1", "--kl-divergence-base", str(tmp_path / "base.kld")]
    run(llama_perplexity, "-m", str(float_gguf), "-f", str(tmp_path / "text.txt"), *common)
    theirs = divergence_of(llama_perplexity, "-m", str(quant), *common)

    options = TextOptions(text, context=128, engine=EngineOptions(n_threads=1))
    evaluation = KLDivergence(options, cache=tmp_path / "cache")
    figures = run_evaluation(evaluation, [float_gguf, quant], tmp_path).models[1].figures
    ours = {key: value.value or 0.0 for key, value in figures.items()}

    assert ours["kld"] == pytest.approx(figure(theirs, "Mean    KLD"), rel=0.01)
    assert ours["kld_median"] == pytest.approx(figure(theirs, "Median  KLD"), rel=0.02)
    assert ours["ppl"] == pytest.approx(figure(theirs, r"Mean PPL\(Q\)"), rel=1e-3)
    assert 100 * ours["top1"] == pytest.approx(figure(theirs, "Same top p"), abs=0.5)
    kept = sum(p.stat().st_size for p in (tmp_path / "cache").rglob("*.npz"))
    assert kept <= (tmp_path / "base.kld").stat().st_size / 10
