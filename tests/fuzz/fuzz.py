"""Fuzz one target with atheris: ``python -m tests.fuzz.fuzz gguf-header --seconds 60``.

Prints executions and findings; a finding's input stays in the folder ``--findings`` and ends that target.
Exit code 1 where there is one. What is found becomes a fix, and an entry of the corpus in tests/attacks.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

NAMES = (
    *("safetensors", "config", "tokenizer", "model-card", "gguf-header", "gguf-source", "imatrix", "plan"),
    *("recipe", "verify"),
)


def run_all(seconds: int, findings: Path, names: list[str]) -> int:
    """Each target in a process of its own: libFuzzer ends the process with the run."""
    found = 0
    for name in names:
        folder = findings / name
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "tests.fuzz.fuzz", "--inside", name, "--seconds", str(seconds)]
        done = subprocess.run(
            [*command, "--findings", str(folder)],
            capture_output=True,
            text=True,
            errors="replace",
            env={**os.environ, "RUST_BACKTRACE": "0"},
        )
        said = done.stdout + done.stderr
        inputs = sorted(folder.iterdir())
        counts = re.findall(r"stat::number_of_executed_units: +(\d+)|^#(\d+)", said, re.MULTILINE)
        executions = max((int(a or b) for a, b in counts), default=0)
        print(f"{name:<12} {executions:>10,} executions, {len(inputs)} findings", flush=True)
        if done.returncode or inputs:
            found += 1
            print(said[-3000:])
            print("\n".join(str(path) for path in inputs))
    return 1 if found else 0


def run_one(name: str, seconds: int, findings: Path) -> None:
    """Fuzz in this process; does not come back."""
    import atheris

    with atheris.instrument_imports(include=["gguf_splitquant", "yaml", "json"]):
        from tests.fuzz.targets import TARGETS, opened, seeds

    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(seeds(name)):
            (Path(corpus) / str(number)).write_bytes(seed)
        with opened(TARGETS[name]) as feed:
            # what is imported on the way is not an input's fault
            for seed in seeds(name):
                feed(seed)
            options = [
                f"-max_total_time={seconds}",
                # an input that takes a minute, or two gigabytes, is a finding
                "-timeout=60",
                "-rss_limit_mb=3000",
                "-max_len=65536",
                "-report_slow_units=60",
                "-print_final_stats=1",
                f"-artifact_prefix={findings}/",
            ]
            atheris.Setup([sys.argv[0], *options, corpus], feed)
            atheris.Fuzz()


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"default: {' '.join(NAMES)}")
    parser.add_argument("--seconds", type=int, default=60, metavar="N", help="for each (default: 60)")
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"), metavar="FOLDER")
    parser.add_argument("--inside", metavar="TARGET", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        run_one(args.inside, args.seconds, args.findings)
    return run_all(args.seconds, args.findings, args.targets or list(NAMES))


if __name__ == "__main__":
    raise SystemExit(main())
