"""Where a command's threads spend their time, by our own lines: a benchmark's figures name their cause.

py-spy watches the process from outside, every hundredth of a second; threads that wait are left out. What
runs in a library, llama.cpp's products included, counts for the line of ours that called it. Threads that
llama.cpp made itself are not seen.
"""

from __future__ import annotations

import collections
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def print_hot_lines(command: list[str], most: int = 8, quiet: bool = True) -> None:
    """Run ``command`` once, watched, and print the lines with the largest shares of the samples.

    Args:
        command: started in the repository's root.
        most: lines.
        quiet: do not print what the command has printed.
    """
    beside = Path(sys.executable).with_name("py-spy")
    spy = str(beside) if beside.is_file() else shutil.which("py-spy")
    if spy is None:
        sys.exit("--profile needs py-spy: pip install py-spy")
    with tempfile.TemporaryDirectory(prefix="profile-") as folder:
        raw = Path(folder) / "raw"
        record = [spy, "record", "--format", "raw", "--threads", "--rate", "100", "--output", str(raw), "--"]
        done = subprocess.run([*record, *command], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"failed ({done.returncode}): {' '.join(command)}\n{done.stderr[-3000:]}")
        if not quiet:
            # py-spy speaks there too
            said = done.stdout.splitlines()
            print("\n".join(line for line in said if line and not line.startswith("py-spy>")))
        lines: collections.Counter[str] = collections.Counter()
        for sample in raw.read_text().splitlines():
            stack, _, count = sample.rpartition(" ")
            ours = [frame for frame in stack.split(";") if "gguf_splitquant/" in frame]
            if ours:
                lines[ours[-1]] += int(count)
    for line, count in lines.most_common(most):
        print(f"  {100 * count / lines.total():5.1f} %  {line}")
