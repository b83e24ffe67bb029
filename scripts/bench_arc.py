"""ARC-Challenge's questions on one file, against ``llama-perplexity --multiple-choice`` on the same machine.

Both answer the same questions zero-shot with the same number of threads, each in a process of its own from
start to finish, rounds interleaved. llama-perplexity normalizes per token, so its accuracy is another figure;
only the time is compared. By default it evaluates one question at a time; it is also run with as many in one
context as pay off for it, and the ratio is to the faster of both. Its binary is built once by
``gguf-splitquant build-runtime --stock --with-tools``. Run it from an environment with the package::

    python scripts/bench_arc.py --rounds 3
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gguf_splitquant.convert import convert
from gguf_splitquant.evaluation.tasks import Question
from gguf_splitquant.evaluation.tasks_arc import arc_questions
from gguf_splitquant.recipe import Recipe
from gguf_splitquant.runtime.library import find_library
from gguf_splitquant.runtime.threads import default_threads
from gguf_splitquant.sources import open_model
from scripts.real_models import smollm2

ROOT = Path(__file__).resolve().parent.parent

OURS = """\
import sys
from pathlib import Path
from gguf_splitquant.evaluation.arc import arc
from gguf_splitquant.evaluation.base import run_evaluation
from gguf_splitquant.runtime.engine import EngineOptions
model, folder, limit, threads = sys.argv[1:]
evaluation = arc("arc_challenge", limit=int(limit), engine=EngineOptions(n_threads=int(threads)))
figures = run_evaluation(evaluation, [Path(model)], Path(folder)).models[0].figures
print(f"acc {figures['acc'].value:.4f} acc_norm {figures['acc_norm'].value:.4f}")
"""

# sequences, tokens of context per sequence: one question of up to five choices; eight of them
PEER_SETTINGS = {"one at a time": (5, 512), "eight at a time": (40, 32), "thirty at a time": (120, 32)}


def multiple_choice_file(questions: Sequence[Question]) -> bytes:
    """The questions in the binary form of llama-perplexity (``multiple_choice_score``): the number of tasks,
    the position of each, then question, answers and labels, strings with their length before them; a second
    set of answers is there and empty."""

    def text(value: str) -> bytes:
        data = value.encode("utf-8")
        return struct.pack("<I", len(data)) + data

    tasks = []
    for question in questions:
        labels = [int(index == question.gold) for index in range(len(question.choices))]
        answers = b"".join(map(text, question.choices))
        single = struct.pack("<I", len(labels)) + answers + struct.pack(f"<{len(labels)}i", *labels)
        tasks.append(text(f"Question: {question.question}\nAnswer:") + single + struct.pack("<I", 0))
    head = 4 + 4 * len(tasks)
    positions = [head + sum(map(len, tasks[:index])) for index in range(len(tasks))]
    return struct.pack(f"<I{len(tasks)}I", len(tasks), *positions) + b"".join(tasks)


def timed(command: Sequence[object], environment: dict[str, str]) -> tuple[float, float, str]:
    """Wall and CPU seconds of a command, and the end of what it said."""
    before = os.times()
    start = time.monotonic()
    words = [str(word) for word in command]
    done = subprocess.run(words, env=os.environ | environment, capture_output=True, text=True, check=False)
    wall = time.monotonic() - start
    after = os.times()
    if done.returncode != 0:
        sys.exit(f"{words[0]} failed:\n{done.stderr[-2000:]}")
    cpu = after.children_user - before.children_user + after.children_system - before.children_system
    lines = (done.stdout + done.stderr).splitlines()
    said = next((line for line in reversed(lines) if "acc" in line or "Final result" in line), "")
    return wall, cpu, said.strip()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, nargs="?", help="a GGUF file (default: SmolLM2-135M in F32)")
    parser.add_argument("--questions", type=int, default=1172)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--tools", type=Path, help="folder with llama-perplexity")
    parser.add_argument("--peer", choices=PEER_SETTINGS, action="append", help="only these settings")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    tools = args.tools or find_library(patched=False)
    if tools is None or not (tools / "llama-perplexity").is_file():
        sys.exit("llama-perplexity: not built; run `gguf-splitquant build-runtime --stock --with-tools`")

    questions = arc_questions("arc_challenge")[: args.questions]
    with tempfile.TemporaryDirectory() as scratch:
        model = args.model
        if model is None:
            model = Path(scratch, "smollm2-f32.gguf")
            convert(open_model(smollm2()), model, Recipe(layout="float", outtype="f32"))
        data = Path(scratch, "arc.bin")
        data.write_bytes(multiple_choice_file(questions))
        peer = [tools / "llama-perplexity", "-m", model, "--multiple-choice", "-bf", data, "-t", args.threads]
        commands: dict[str, list[object]] = {
            name: [*peer, "-np", sequences, "-c", context]
            for name, (sequences, context) in PEER_SETTINGS.items()
            if args.peer is None or name in args.peer
        }
        runs: dict[str, list[tuple[float, float]]] = {name: [] for name in ("ours", *commands)}
        for number in range(1, args.rounds + 1):
            folder = Path(scratch, f"round{number}")
            ours = [sys.executable, "-c", OURS, model, folder, len(questions), args.threads]
            for name, command in {"ours": ours, **commands}.items():
                library = "" if name == "ours" else str(tools)
                paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
                wall, cpu, said = timed(command, {**paths, "LD_LIBRARY_PATH": library})
                runs[name].append((wall, cpu))
                print(
                    f"round {number}  {name:>16}: {wall:7.1f} s wall, {cpu:7.1f} s CPU   {said}", flush=True
                )

    medians = {name: statistics.median(wall for wall, _ in figures) for name, figures in runs.items()}
    cpus = {name: statistics.median(cpu for _, cpu in figures) for name, figures in runs.items()}
    fastest = min(commands, key=medians.__getitem__)
    print(f"\n{len(questions)} questions, {args.threads} threads, medians of {args.rounds} rounds")
    for name, median in medians.items():
        print(f"{name:>16}: {median:7.1f} s wall, {cpus[name]:7.1f} s CPU")
    ratio = medians[fastest] / medians["ours"]
    cpu_ratio = cpus[fastest] / cpus["ours"]
    print(f"ours is {ratio:.2f} times as fast as llama-perplexity, {fastest} (by CPU time {cpu_ratio:.2f})")
    if args.json:
        args.json.write_text(json.dumps({"wall": medians, "cpu": cpus, "ratio": ratio}, indent=2) + "\n")


if __name__ == "__main__":
    main()
