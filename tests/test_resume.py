"""Killed at any moment, a conversion goes on and its file is the same, to the byte.

Real processes die by SIGKILL from outside, at random times. ``KILLS=500 pytest tests/test_resume.py`` kills
more of them (``make test-kill``).
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest

from gguf_splitquant.cli import main
from gguf_splitquant.convert import convert
from gguf_splitquant.recipe import Recipe
from gguf_splitquant.sources import open_model
from tests.sources.handmade import CONFIG, header_of, llama_shapes, write_checkpoint, write_safetensors

LOADED = (
    "gguf_splitquant.convert",
    "gguf_splitquant.cli.convert",
    "gguf_splitquant.sources.gguf_file",
    "gguf_splitquant.refining.weights",
)
KILLS = int(os.environ.get("KILLS", "30"))
WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 8}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """74 tensors, and blocks of every size fit their rows."""
    folder = write_checkpoint(tmp_path_factory.mktemp("resume") / "model", **WIDE)
    write_safetensors(folder / "model.safetensors", header_of(llama_shapes({**CONFIG, **WIDE}), "BF16"))
    return folder


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Path:
    """The same as a GGUF file: opened at once."""
    path = checkpoint.with_name("float.gguf")
    convert(open_model(checkpoint), path, Recipe(layout="float"))
    return path


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def lines(journal: Path) -> int:
    try:
        return journal.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def _quietly(arguments: list[str]) -> None:
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        sys.exit(main(arguments))


class Killer:
    """Runs commands in processes of their own, which have the package loaded already, and kills them."""

    def __init__(self, seed: int) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__, *LOADED])
        self._random = random.Random(seed)
        self.kills: list[int] = []

    def run(self, arguments: list[str], journal: Path) -> bool:
        """Run, and kill after some more tensors, or milliseconds. Returns whether it came to its end."""
        process = self._context.Process(target=_quietly, args=(arguments,))
        timed = self._random.random() < 0.25
        enough = lines(journal) + self._random.randrange(1, 40)
        deadline = time.monotonic() + (self._random.uniform(0, 0.3) if timed else 600)
        process.start()
        while process.is_alive() and lines(journal) < enough and time.monotonic() < deadline:
            time.sleep(0.0005)
        done = lines(journal)
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            self.kills.append(done)
            return False
        assert process.exitcode == 0
        return True


@pytest.mark.parametrize(
    "options",
    [("--recipe", "paper"), ("--recipe", "stock", "--no-calibration", "--max-shard-size", "300kB")],
    ids=["one file", "shards"],
)
def test_a_conversion_killed_at_any_moment_goes_on(
    model: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    expected = tmp_path / "uninterrupted"
    expected.mkdir()
    assert main(["convert", str(model), str(expected / "out.gguf"), *options]) == 0
    killer = Killer(seed=len(options))
    finished = 0
    while len(killer.kills) < KILLS // 2:
        folder = tmp_path / f"run{finished}"
        folder.mkdir()
        command = ["convert", str(model), str(folder / "out.gguf"), *options, "--resume"]
        while not killer.run(command, folder / "out.gguf.journal"):
            # what is there under its own name is complete
            assert digests(expected).items() >= {
                item for item in digests(folder).items() if item[0].endswith(".gguf")
            }
        assert digests(folder) == digests(expected)
        finished += 1
    print(f"{len(killer.kills)} kills, {len(set(killer.kills))} different places, {finished} files")
    # of all that were killed some had begun, and not all at the same tensor
    assert len({n for n in killer.kills if n > 1}) > KILLS // 8
