"""The table of docs/results.md: what the value split keeps, beside stock llama.cpp types, on a real model.

Makes every file from pseudo-float SmolLM2-135M-Instruct (scrambled), the stock ones with llama-quantize,
evaluates them with `gguf-splitquant eval all`, and writes the table with the command that made it::

    python scripts/results_table.py --folder results                          # everything: hours on two cores
    python scripts/results_table.py --folder results --limit-questions 200    # the first 200 of each ARC set

An interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shlex
import subprocess
import sys
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gguf_splitquant.cli import main as splitquant
from gguf_splitquant.runtime.build import build_runtime
from gguf_splitquant.runtime.builds import BuildSpec
from scripts.real_models import smollm2

SPLIT_FILES = {
    "float": ["--layout", "float", "--outtype", "f16"],
    "plain": ["--recipe", "plain"],
    "paper-k2": ["--recipe", "paper", "-k", "2"],
    "paper-k3": ["--recipe", "paper"],
    "paper-k2-row": ["--recipe", "paper", "-k", "2", "--granularity", "row"],
    "paper-k3-row": ["--recipe", "paper", "--granularity", "row"],
}
STOCK_TYPES = ("Q4_0", "Q4_K_M", "Q8_0")


def make_files(folder: Path) -> list[Path]:
    """All files, the float baseline first; those that are there stay."""
    folder.mkdir(parents=True, exist_ok=True)
    model, files = smollm2(), []
    for name, options in SPLIT_FILES.items():
        files.append(folder / f"{name}.gguf")
        if not files[-1].exists() and splitquant(["convert", str(model), str(files[-1]), *options]):
            sys.exit(1)
    tool = build_runtime(BuildSpec(patched=False, tools=True)).build.lib_dir / "llama-quantize"
    for qtype in STOCK_TYPES:
        files.append(folder / f"llama-quantize-{qtype}.gguf")
        if not files[-1].exists():
            # the embedding as in our files, so that the linear layers are what differs
            options = ["--token-embedding-type", "f16", "--output-tensor-type", "f16"]
            command = [tool, *options, files[0], files[-1], qtype]
            subprocess.run(command, check=True, capture_output=True)
    return files


PAGE = """# Measured

SmolLM2-135M-Instruct, pseudo-float: dequantized from a Q4_1 file and its channels reordered, so that no
format meets its own grid again. Embeddings are F16 in every file, so the linear layers are what differs;
`llama-quantize-*` are made by llama.cpp's tool without an importance matrix. The first file is the baseline.
{scope}

```
{table}
```

Made by:

```
{command}
```
"""


def write_page(files: list[Path], arguments: argparse.Namespace) -> None:
    """Evaluate the files and write the page."""
    options = ["--resume", "--output", str(arguments.folder / "results.json")]
    scope = "ARC: all questions of the test sets, zero-shot."
    if arguments.limit_questions:
        options += ["--limit-questions", str(arguments.limit_questions)]
        scope = (
            f"ARC: the first {arguments.limit_questions} questions of each test set, zero-shot; mind the "
            "intervals."
        )
    table = io.StringIO()
    with contextlib.redirect_stdout(table):
        code = splitquant(["eval", "all", *map(str, files), *options])
    if code:
        sys.exit(code)
    command = shlex.join(["python", "scripts/results_table.py", *sys.argv[1:]])
    text = PAGE.format(scope=scope, table=table.getvalue().strip(), command=command)
    arguments.page.write_text(text)
    print(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("results"), help="takes the files: 1.5 GB")
    parser.add_argument("--page", type=Path, default=Path("docs/results.md"))
    parser.add_argument("--limit-questions", type=int, metavar="N", help="only N questions of each ARC set")
    chosen = parser.parse_args()
    write_page(make_files(chosen.folder), chosen)
