"""How long the package takes to import, and the command line to answer: the goal is 0.3 s.

Each is started in a process of its own; the fastest run counts, and Python's own start is shown beside.

    python scripts/bench_import.py [--runs 15]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

COMMANDS = {
    "python alone": ["-c", "pass"],
    "import gguf_splitquant": ["-c", "import gguf_splitquant"],
    "gguf-splitquant --help": ["-m", "gguf_splitquant", "--help"],
    "gguf-splitquant convert --help": ["-m", "gguf_splitquant", "convert", "--help"],
    "gguf-splitquant verify --help": ["-m", "gguf_splitquant", "verify", "--help"],
    "import numpy, for comparison": ["-c", "import numpy"],
}


def seconds(arguments: list[str], runs: int) -> float:
    """The fastest of some runs."""
    found = []
    for _ in range(runs):
        start = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
        found.append(time.perf_counter() - start)
    return min(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=15)
    args = parser.parse_args()
    for name, command in COMMANDS.items():
        print(f"{name:<32}{1000 * seconds(command, args.runs):>6.0f} ms", flush=True)


if __name__ == "__main__":
    main()
