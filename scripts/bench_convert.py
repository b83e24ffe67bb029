"""Time and memory of a conversion, whole process, against llama.cpp's converter + llama-quantize.

The checkpoint has the shapes of Llama 3.2 1B in BF16 with synthetic weights (right for time, meaningless for
quality) and the tokenizer of a small real model. Ours goes from the Hugging Face folder to the final file in
one process; the peer writes a 16-bit GGUF and quantizes it to a type of the same size. ``copy`` is the floor:
the checkpoint read and written once, and flushed to disk as our writer does. Rounds are interleaved; medians
and ratios are printed. Run it from an environment with the test extra::

    python scripts/bench_convert.py --rounds 3 --profile                           # pip install py-spy
    python scripts/bench_convert.py --rounds 3 --layers 2 --recipes Q4_0 Q4_K      # error feedback's search
"""

from __future__ import annotations

import argparse
import collections
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gguf_splitquant.runtime.build import build_runtime
from gguf_splitquant.runtime.builds import BuildSpec
from gguf_splitquant.runtime.sdist import extract_llama_cpp, fetch_sdist
from scripts.profiling import ROOT, print_hot_lines
from scripts.synthetic import write_checkpoint

_STOCK = ("--recipe", "stock", "--no-calibration", "--type")
RECIPES: dict[str, tuple[tuple[str, ...], str]] = {
    "plain": (("--recipe", "plain"), "Q4_0"),
    "paper": (("--recipe", "paper"), "Q4_0"),
    "Q4_0": ((*_STOCK, "Q4_0"), "Q4_0"),
    "Q4_K": ((*_STOCK, "Q4_K"), "Q4_K_S"),
}
"""Options of each, and the type that llama-quantize is asked for beside it."""


@dataclass(frozen=True)
class Run:
    """Whole-process figures of one command: wall and CPU seconds, peak resident memory in bytes."""

    wall: float
    cpu: float
    peak: int


def measure(command: list[str], log: Path) -> Run:
    started = time.monotonic()
    with log.open("ab") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)
    wall = time.monotonic() - started
    if status:
        sys.exit(f"failed ({status}): {' '.join(command)}\n{log.read_text()[-3000:]}")
    # kilobytes on Linux, bytes on macOS
    unit = 1 if sys.platform == "darwin" else 1024
    return Run(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit)


def report(name: str, runs: list[Run], pair: list[Run] | None = None, floor: list[Run] | None = None) -> None:
    wall = statistics.median(r.wall for r in runs)
    spread = f"{min(r.wall for r in runs):.1f}-{max(r.wall for r in runs):.1f}"
    cpu = statistics.median(r.cpu for r in runs)
    peak = max(r.peak for r in runs) / 1e9
    ratios = "".join(f"  {_ratio(runs, other):7.2f}" if other else "" for other in (pair, floor))
    print(f"{name:<34} {wall:7.1f} {f'({spread})':>14} {cpu:7.1f}  {peak:6.2f}{ratios}")


def _ratio(runs: list[Run], others: list[Run]) -> float:
    """The median over rounds: what disturbs a round disturbs both."""
    return statistics.median(a.wall / b.wall for a, b in zip(runs, others, strict=True))


def bench(rounds: int, recipes: list[str], layers: int, folder: Path, profiled: bool) -> None:
    checkpoint, log = folder / f"llama-3.2-1b-shape-{layers}", folder / "log"
    if not checkpoint.is_dir():
        write_checkpoint(checkpoint, layers=layers)
    sources = folder / "llama.cpp"
    if not sources.is_dir():
        extract_llama_cpp(fetch_sdist(folder), sources)
    quantizer = build_runtime(BuildSpec(patched=False, tools=True)).build.lib_dir / "llama-quantize"
    types = list(dict.fromkeys(RECIPES[recipe][1] for recipe in recipes))
    runs: dict[str, list[Run]] = collections.defaultdict(list)
    out, wide = folder / "out.gguf", folder / "wide.gguf"
    converter = [sys.executable, str(sources / "convert_hf_to_gguf.py"), str(checkpoint)]
    commands = {
        recipe: [sys.executable, "convert_splitquant.py", str(checkpoint), str(out), *RECIPES[recipe][0]]
        for recipe in recipes
    }
    for _ in range(rounds):
        copy = ["dd", f"if={checkpoint / 'model.safetensors'}", f"of={out}", "bs=2M", "conv=fsync"]
        runs["copy"].append(measure(copy, log))
        out.unlink()
        for recipe in recipes:
            runs[recipe].append(measure(commands[recipe], log))
            out.unlink()
        runs["converter"].append(measure([*converter, "--outtype", "bf16", "--outfile", str(wide)], log))
        for qtype in types:
            threads = str(os.cpu_count())
            runs[qtype + " alone"].append(measure([str(quantizer), str(wide), str(out), qtype, threads], log))
            out.unlink()
        wide.unlink()
    machine = f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    print(f"{machine}, {rounds} rounds, Llama-3.2-1B shapes, {layers} layers, BF16")
    print(
        f"{'':<34} {'wall s':>7} {'(min-max)':>14} {'CPU s':>7}  {'GB RSS':>6}"
        f"  {'to pair':>7}  {'to copy':>7}"
    )
    report("copy (dd, flushed to disk)", runs["copy"])
    for recipe in recipes:
        pair = _pairs(runs["converter"], runs[RECIPES[recipe][1] + " alone"])
        report(f"gguf-splitquant {recipe}", runs[recipe], pair, runs["copy"])
    report("convert_hf_to_gguf.py bf16", runs["converter"])
    for qtype in types:
        report(f"llama-quantize {qtype}", runs[qtype + " alone"])
    if profiled:
        for recipe in recipes:
            print(f"{recipe}: where its threads are")
            print_hot_lines(commands[recipe])
            out.unlink()


def _pairs(first: list[Run], second: list[Run]) -> list[Run]:
    return [
        Run(a.wall + b.wall, a.cpu + b.cpu, max(a.peak, b.peak)) for a, b in zip(first, second, strict=True)
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=["plain", "paper"])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--profile", action="store_true", help="once more each, watched by py-spy")
    parser.add_argument(
        "--folder", type=Path, help="keep the checkpoint here (3 GB; 8 GB needed while it runs)"
    )
    arguments = parser.parse_args()
    chosen = (arguments.rounds, arguments.recipes, arguments.layers)
    if arguments.folder:
        arguments.folder.mkdir(parents=True, exist_ok=True)
        bench(*chosen, arguments.folder, arguments.profile)
    else:
        with tempfile.TemporaryDirectory(prefix="bench-convert-") as temporary:
            bench(*chosen, Path(temporary), arguments.profile)
