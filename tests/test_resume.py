"""Killed at any moment, a conversion goes on and its file is the same, to the byte.

Real processes die by SIGKILL from outside, at random times. ``KILLS=500 pytest tests/test_resume.py`` kills
more of them (``make test-kill``).
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gguf_splitquant.cache import cache_dir
from gguf_splitquant.cli import main
from gguf_splitquant.convert import convert
from gguf_splitquant.errors import OutputError
from gguf_splitquant.gguf_io.journal import journal_path
from gguf_splitquant.recipe import Recipe
from gguf_splitquant.sources import open_model
from scripts.empty_cache import empty_cache
from tests.killing import kill_when
from tests.sources.handmade import CONFIG, header_of, llama_shapes, write_checkpoint, write_safetensors

LOADED = (
    "gguf_splitquant.convert",
    "gguf_splitquant.cli.convert",
    "gguf_splitquant.sources.gguf_file",
    "gguf_splitquant.refining.weights",
)
STOCK = {"target_bpw": 4.9, "embedding": "Q8_0", "calibration": "none"}
KILLS = int(os.environ.get("KILLS", "30"))
WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 6}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """56 tensors, and blocks of every size fit their rows."""
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
            there = digests(folder)
            assert digests(expected).items() >= {item for item in there.items() if item[0].endswith(".gguf")}
        assert digests(folder) == digests(expected)
        finished += 1
    print(f"{len(killer.kills)} kills, {len(set(killer.kills))} different places, {finished} files")
    # of all that were killed some had begun, and not all at the same tensor
    assert len({n for n in killer.kills if n > 1}) > min(KILLS // 8, 28)  # half of the tensors


def begun(command: list[str], journal: Path, tensors: int) -> subprocess.Popen[str]:
    """A process of the command line that has ``tensors`` complete."""
    process = subprocess.Popen(
        [sys.executable, "-m", "gguf_splitquant", *command],
        stderr=subprocess.PIPE,
        text=True,
        # whoever runs the tests in the background lets them ignore it, and they would hand that on
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while process.poll() is None and lines(journal) <= tensors:
        time.sleep(0.002)
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_it_stops_cleanly_and_says_how_to_go_on(
    checkpoint: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    out = tmp_path / "with space.gguf"
    command = ["convert", str(checkpoint), str(out), "--recipe", "stock", "--no-calibration"]
    process = begun(command, journal_path(out), 1)
    process.send_signal(number)
    _, said = process.communicate()
    assert process.returncode == code
    assert not out.exists() and journal_path(out).exists()
    going_on = said.splitlines()[0].removeprefix("to go on: gguf-splitquant ")
    assert shlex.split(going_on) == [*command, "--resume"]
    complete = lines(journal_path(out)) - 1
    assert main(command) == 2  # neither thrown away nor gone on with unless asked
    assert main(shlex.split(going_on)) == 0
    convert(open_model(checkpoint), tmp_path / "expected.gguf", Recipe(layout="stock", **STOCK))
    assert digests(tmp_path)[out.name] == digests(tmp_path)["expected.gguf"]
    assert complete > 0


@pytest.mark.engine
@pytest.mark.parametrize(
    "own",
    [False, pytest.param(True, marks=pytest.mark.skipif(KILLS < 100, reason="minutes: make test-kill"))],
    ids=["a user's text", "own text"],
)
def test_a_calibrated_conversion_killed_in_every_phase_goes_on(
    stories15m: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: bool
) -> None:
    """Nothing that was complete is done again: text and moments, batches of sensitivities, plan, tensors."""
    runtime = cache_dir() / "runtime"
    calibration = empty_cache(tmp_path / "cache", runtime) / "calibration"
    out, whole = tmp_path / "out.gguf", tmp_path / "whole.gguf"
    text = tmp_path / "text"
    text.write_text(" ".join(f"Once upon a time there were {i} cats and a dog." for i in range(300)))
    options = [] if own else ["--calibration-text", str(text)]
    command = ["convert", str(stories15m), str(out), *options, "--resume"]
    monkeypatch.setenv("GGUF_SPLITQUANT_CACHE", str(calibration.parent))

    running = ["-m", "gguf_splitquant", *command]
    kill_when(lambda: any(calibration.glob("unfinished-*/00003.*")), running)
    kill_when(lambda: any(map(lines, calibration.glob("unfinished-*/probes.jsonl"))), running)
    (tokens,) = calibration.glob("unfinished-*/tokens.npy")
    written = tokens.stat().st_mtime_ns
    kill_when(lambda: lines(journal_path(out)) > 20, running)
    (tokens,) = calibration.glob("*/tokens.npy")
    assert tokens.stat().st_mtime_ns == written
    assert not list(calibration.glob("unfinished-*"))
    assert main(command) == 0

    other = empty_cache(tmp_path / "other", runtime)
    monkeypatch.setenv("GGUF_SPLITQUANT_CACHE", str(other))
    assert main(["convert", str(stories15m), str(whole), *options]) == 0
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "other", "out.gguf", "text", "whole.gguf"]


def test_a_disk_that_fills_up_leaves_what_is_complete(model: Path, small_disk: Path, tmp_path: Path) -> None:
    recipe = Recipe(layout="stock", qtype="Q2_K", calibration="none", split_head=False)
    source = open_model(model)
    convert(source, tmp_path / "expected.gguf", recipe)
    filler = small_disk / "filler"
    total = (tmp_path / "expected.gguf").stat().st_size
    assert 300_000 < total < 1_000_000

    class Filler:
        """Another program that takes the disk, but for a little, while the conversion is at work."""

        def start(self, what: str, total: int, unit: str) -> None: ...

        def advance(self, amount: int, note: str = "") -> None:
            if filler.exists():
                return
            with filler.open("wb", buffering=0) as file:
                for _ in range((shutil.disk_usage(small_disk).free - total // 2) // 4096):
                    file.write(bytes(4096))

        def finish(self) -> None: ...

    out = small_disk / "out.gguf"
    with pytest.raises(OutputError, match=r"the disk is full; free some space, then .* --resume"):
        convert(source, out, recipe, threads=1, progress=Filler())
    complete = lines(journal_path(out)) - 1
    assert 0 < complete < len(source.tensors)
    assert sorted(p.name for p in small_disk.iterdir()) == ["filler", "out.gguf.journal", "out.gguf.partial"]
    with pytest.raises(OutputError, match=r"disk"):  # still no room
        convert(source, out, recipe, resume=True)
    filler.unlink()
    convert(source, out, recipe, resume=True)
    assert out.read_bytes() == (tmp_path / "expected.gguf").read_bytes()
    assert [p.name for p in small_disk.iterdir()] == ["out.gguf"]
