"""Time and memory of the calibrated default conversion, phase by phase, on Llama 3.2 1B's shapes.

The weights are synthetic (right for time, meaningless for quality). CPU seconds are given beside wall
seconds: on a busy machine they are the better figure::

    python scripts/bench_calibrated.py --folder bench            # 16 layers
    python scripts/bench_calibrated.py --folder bench --layers 2 --profile      # pip install py-spy
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gguf_splitquant.calibration.checkpoint import calibrate_model
from gguf_splitquant.convert import convert
from gguf_splitquant.file_plan import plan_file
from gguf_splitquant.recipe import RECIPES
from gguf_splitquant.sources import open_model
from scripts.profiling import print_hot_lines
from scripts.synthetic import write_checkpoint


class PhaseTimer:
    """A Progress that notes when every phase began, and its wall and CPU seconds."""

    def __init__(self) -> None:
        self.phases: list[tuple[str, float, float, float, float]] = []
        self._created = time.monotonic()
        self._began = ("", 0.0, 0.0)

    def start(self, what: str, total: int, unit: str) -> None:
        self._began = (what, time.monotonic(), time.process_time())

    def advance(self, amount: int, note: str = "") -> None: ...

    def finish(self) -> None:
        what, wall, cpu = self._began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak_bytes = peak if sys.platform == "darwin" else 1024 * peak
        took = time.monotonic() - wall, time.process_time() - cpu
        self.phases.append((what, wall - self._created, *took, peak_bytes / 1e9))


def bench(folder: Path, layers: int, recipe: str) -> None:
    checkpoint = folder / f"llama-3.2-1b-shape-{layers}"
    if not checkpoint.is_dir():
        write_checkpoint(checkpoint, layers=layers)
    timer, chosen = PhaseTimer(), RECIPES[recipe]
    wall, cpu = time.monotonic(), time.process_time()
    model = open_model(checkpoint)
    statistics = calibrate_model(model, progress=timer, cache=folder / f"calibration-{time.time_ns()}")
    _, _, refined = plan_file(model, chosen, statistics=statistics, progress=timer)
    out = folder / "out.gguf"
    convert(model, out, chosen, statistics=statistics, refined=refined, force=True, progress=timer)
    print(f"{os.cpu_count()} cores, {layers} layers of Llama-3.2-1B shapes, --recipe {recipe}")
    print(f"{'phase':<40} {'from s':>8} {'wall s':>8} {'CPU s':>8} {'GB RSS so far':>14}")
    for what, began, wall_s, cpu_s, peak in timer.phases:
        print(f"{what:<40} {began:8.1f} {wall_s:8.1f} {cpu_s:8.1f} {peak:14.2f}")
    print(f"{'all':<40} {'':>8} {time.monotonic() - wall:8.1f} {time.process_time() - cpu:8.1f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="takes the checkpoint and more: 10 GB")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--recipe", choices=("split", "stock"), default="split")
    parser.add_argument("--profile", action="store_true", help="watched by py-spy, which takes some time too")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.profile:
        options = ["--folder", str(folder), "--layers", str(arguments.layers), "--recipe", arguments.recipe]
        print_hot_lines([sys.executable, __file__, *options], most=20, quiet=False)
    else:
        bench(folder, arguments.layers, arguments.recipe)
