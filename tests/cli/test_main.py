"""The command line's frame: instant, helpful, honest exit codes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gguf_splitquant import __version__
from gguf_splitquant.cli import main
from tests.sources.handmade import write_checkpoint


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert __version__ in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["no-such-verb"], ["convert"]])
def test_usage_errors_exit_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2


@pytest.mark.parametrize("verb", ["convert", "build-runtime", "compare", "eval", "chat", "inspect", "verify"])
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    assert f"gguf-splitquant {verb}" in capsys.readouterr().out


def test_paths_that_are_too_long(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "model")
    sound, long = str(tmp_path / "model"), str(tmp_path / ("a" * 257 + ".gguf"))
    for arguments in (
        ["convert", sound, long],
        ["convert", long, str(tmp_path / "out.gguf")],
        ["convert", "a/" * 3000, str(tmp_path / "out.gguf")],
        ["inspect", long],
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and "File name too long" in error
        assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys; from gguf_splitquant.cli import main\n"
        "try: main(['convert', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'numpy', 'transformers', 'gguf', 'torch', 'llama_cpp'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
