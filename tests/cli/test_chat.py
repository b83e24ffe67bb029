"""``chat`` as a user runs it: piped, and at a terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from gguf_splitquant.recipe import Recipe
from tests.gguf_files import FLOAT, convert_once

pytestmark = pytest.mark.engine
COMMAND = [sys.executable, "-m", "gguf_splitquant", "chat"]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def chat_file(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_once(smollm2, tmp_path_factory.mktemp("chat"), Recipe(layout="float"), "float")


def chat(path: Path, text: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, str(path), *options]
    return subprocess.run(command, input=text, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_piped(chat_file: Path) -> None:
    done = chat(chat_file, "What is the capital of France?\n", "--temp", "0")
    assert done.returncode == 0 and done.stderr == ""
    assert "Paris" in done.stdout and done.stdout.endswith("\n")


def test_without_a_template(stories15m: Path, tmp_path: Path) -> None:
    path = convert_once(stories15m, tmp_path, FLOAT, "float")
    options = ("--seed", "1", "--max-tokens", "8")
    done, again = (chat(path, "Once upon a time", *options) for _ in range(2))
    assert done.returncode == 0 and done.stdout.strip() and done.stdout == again.stdout
    assert "note: the file has no chat template" in done.stderr


def test_errors(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"no")
    for options in ((str(tmp_path / "x.gguf"),), (str(tmp_path / "x.gguf"), "--ctx", "0")):
        done = chat(Path(options[0]), "x", *options[1:])
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_at_a_terminal(chat_file: Path) -> None:
    main, terminal = pty.openpty()
    command = [*COMMAND, str(chat_file), "--temp", "0", "--max-tokens", "20"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=terminal, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    os.close(terminal)
    os.write(main, b"What is the capital of France?\nAnd of Italy?\n\x04")
    said, _ = process.communicate(timeout=300)
    os.close(main)
    assert process.returncode == 0
    assert "Paris" in said and said.count("> ") == 3
