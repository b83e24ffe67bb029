"""Peak memory of conversions against the size of the model: whole processes, watched from outside.

Checkpoints have the shapes of 1B, 4B and 14B models and are sparse (:mod:`scripts.synthetic`): one layer and
the top of the tables hold values, the rest is holes that read as zeros. Anonymous memory (heap, buffers) is
told apart from pages of mapped files, which the system takes back when it needs them; ``disk`` is the most
that the output's folder held at any time, as a multiple of the finished file::

    python scripts/bench_memory.py --folder bench --recipes paper plan stock

``stock`` and ``split`` are slow, so they convert one layer: memory follows the largest tensor, not the number
of layers. ``calibrate`` lets llama.cpp run all layers on texts of the model's own, as many as by default (its
cache has the size that it has then), each of 16 tokens; the statistics of all layers end on the disk (61 GB
for 14B). ``split`` does that with one layer, plans and refines.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.synthetic import SHAPES, write_checkpoint

ROOT = Path(__file__).resolve().parent.parent
INTERVAL = 0.05

_ONE_TYPE = ("--recipe", "stock", "--type", "Q4_0", "--no-calibration", "--no-split-head")
RECIPES: dict[str, tuple[str, ...]] = {
    "float": ("--layout", "float"),
    "paper": ("--recipe", "paper"),
    "rows": ("--recipe", "paper", "--granularity", "row"),
    "plan": ("--recipe", "stock", "--no-calibration", "--dry-run"),
    "stock": _ONE_TYPE,
}

_CALIBRATE = """
import sys
from pathlib import Path
from gguf_splitquant.calibration.calibrate import Calibration
from gguf_splitquant.calibration.checkpoint import calibrate_model
from gguf_splitquant.calibration.own_text import OwnText
from gguf_splitquant.sources import open_model
folder = Path(sys.argv[2])
how = Calibration(own=OwnText(length=16))
model = open_model(Path(sys.argv[1]))
statistics = calibrate_model(model, how, cache=folder / "cache")
"""

_SPLIT = (
    _CALIBRATE
    + """
from gguf_splitquant.convert import convert
from gguf_splitquant.file_plan import plan_file
from gguf_splitquant.recipe import RECIPES
refined = plan_file(model, RECIPES["split"], statistics=statistics)[2]
convert(model, folder / "out.gguf", RECIPES["split"], statistics=statistics, refined=refined)
"""
)

PROGRAMS = {"calibrate": _CALIBRATE, "split": _SPLIT}
ONE_LAYER = ("stock", "split")


@dataclass(frozen=True)
class Peak:
    """The most that a process held at any time, in bytes, and how long it ran.

    Attributes:
        anonymous: heap and buffers.
        mapped: pages of mapped files, libraries among them.
        total: of both together.
        folder: of the folder that it wrote to.
        final: of that folder in the end.
        wall, cpu: seconds.
    """

    anonymous: int
    mapped: int
    total: int
    folder: int
    final: int
    wall: float
    cpu: float


def watch(command: list[str], folder: Path) -> Peak:
    """Run a command and look at it every few hundredths of a second. Linux only."""
    anonymous = mapped = total = held = 0
    began = time.monotonic()
    with (folder.parent / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            now = _resident(process.pid)
            anonymous, mapped = max(anonymous, now[0]), max(mapped, now[1])
            total = max(total, now[2])
            held = max(held, _on_disk(folder))
            time.sleep(INTERVAL)
    if status:
        sys.exit(f"failed: {' '.join(command)}\n{(folder.parent / 'log').read_text()[-3000:]}")
    return Peak(
        anonymous,
        mapped,
        total,
        held,
        _on_disk(folder),
        time.monotonic() - began,
        usage.ru_utime + usage.ru_stime,
    )


def _resident(pid: int) -> tuple[int, int, int]:
    """Anonymous and mapped resident memory of a process, and the most of both together so far.

    The usage that ``wait4`` reports would not do: it counts what this process held when it started the other.
    """
    fields = dict.fromkeys(("RssAnon", "RssFile", "RssShmem", "VmHWM"), 0)
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in fields:
                fields[name] = 1024 * int(value.split()[0])
    except (FileNotFoundError, ProcessLookupError):
        pass
    return fields["RssAnon"], fields["RssFile"] + fields["RssShmem"], fields["VmHWM"]


def _on_disk(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += 512 * path.lstat().st_blocks
        except FileNotFoundError:
            continue  # renamed meanwhile
    return total


def bench(folder: Path, recipe: str, size: str, limit: str | None) -> None:
    layers = 1 if recipe in ONE_LAYER else None
    checkpoint = folder / f"{size}-{layers or 'all'}"
    if not checkpoint.is_dir():
        write_checkpoint(checkpoint, size, layers, filled=1)
    out = folder / "out"
    out.mkdir()
    try:
        if recipe in PROGRAMS:
            command = [sys.executable, "-c", PROGRAMS[recipe], str(checkpoint), str(out)]
        else:
            target = out / "out.gguf"
            command = [
                *(sys.executable, "convert_splitquant.py", str(checkpoint), str(target)),
                *RECIPES[recipe],
                *(("--memory-limit", limit) if limit else ()),
            ]
        peak = watch(command, out)
    finally:
        shutil.rmtree(out)
    disk = f"{peak.folder / peak.final:6.2f}" if peak.final else "     -"
    print(
        f"{recipe + (f', limit {limit}' if limit else ''):<24} {size:>4} {layers or 'all':>6}"
        f" {peak.anonymous / 1e6:9.0f} {peak.mapped / 1e6:7.0f} {peak.total / 1e6:7.0f} {disk}"
        f" {peak.final / 1e9:7.2f} {peak.wall:7.1f} {peak.cpu:7.1f}",
        flush=True,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder",
        type=Path,
        required=True,
        help="40 GB for the paper's split of 14B, 70 GB for its calibration",
    )
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument(
        "--recipes", nargs="+", choices=[*RECIPES, *PROGRAMS], default=["float", "paper", "plan", "stock"]
    )
    parser.add_argument("--memory-limit", metavar="SIZE", help="as of convert")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; MB at their peaks")
    print(
        f"{'':<24} {'size':>4} {'layers':>6} {'anonymous':>9} {'mapped':>7} {'total':>7} {'disk x':>6}"
        f" {'file GB':>7} {'wall s':>7} {'CPU s':>7}"
    )
    for chosen in arguments.recipes:
        for shape in arguments.sizes:
            bench(arguments.folder, chosen, shape, arguments.memory_limit)
