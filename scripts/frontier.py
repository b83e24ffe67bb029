"""The figures of docs/frontier.md: mean KLD at every size, ours against llama-quantize, on a real model.

Makes our files and llama-quantize's (without and with an importance matrix from real text), measures all of
them with ``gguf-splitquant eval kld`` on held-out text, and writes a table, an ablation and a plot::

    python scripts/frontier.py smollm2 --text wiki.test.raw --imatrix-text wiki.test.raw    # about an hour
    python scripts/frontier.py stories15m --imatrix-text wiki.test.raw                      # six minutes

The first tokens of the text are scored; llama-quantize's importance matrix is made from the last part of its
text, so both may be one file.
Our own files see neither: they are calibrated on what the model writes itself. All embeddings are F16, so the
linear layers are what differs. An interrupted run goes on where it stopped. Needs matplotlib
(``pip install ".[plots]"``).
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gguf_splitquant.cli import main as splitquant
from gguf_splitquant.evaluation.text import read_text
from gguf_splitquant.runtime.build import build_runtime
from gguf_splitquant.runtime.builds import BuildSpec
from scripts.real_models import smollm2, stories15m

MODELS = {"smollm2": smollm2, "stories15m": stories15m}
TITLES = {"smollm2": "SmolLM2-135M-Instruct, pseudo-float, channels reordered", "stories15m": "stories15M"}
STOCK_TYPES = (
    *("Q2_K", "Q3_K_S", "Q3_K_M", "IQ3_S", "IQ4_XS", "IQ4_NL", "Q4_0", "Q4_K_S"),
    *("Q4_K_M", "Q5_0", "Q5_1", "Q5_K_M", "Q6_K", "Q8_0"),
)
PLAIN_TYPES = ("Q4_0", "IQ4_NL", "Q4_K_M", "Q5_1", "Q6_K")
"""Also made without an importance matrix."""
STOCK_TARGETS = (4.5, 4.9, 6.5)
SPLIT_TARGETS = (3.5, 4.0, 4.5, 4.9, 5.0, 6.5, 8.3)
ABLATION = {
    "one type, no statistics": ("--recipe", "stock", "--type", "IQ4_NL", "--no-calibration"),
    "A: importance from own text": ("--recipe", "stock", "--type", "IQ4_NL", "--imatrix", "{own}"),
    "A, B: error feedback": ("--recipe", "stock", "--type", "IQ4_NL"),
    "A, B, D: planned types": ("--recipe", "stock", "--target-bpw", "4.5"),
    "A, B, C, D: channel split": ("--recipe", "split", "--target-bpw", "4.5"),
    "A, C, D: no error feedback": ("--recipe", "split", "--target-bpw", "4.5", "--imatrix", "{own}"),
    "C, D: no statistics": ("--recipe", "split", "--target-bpw", "4.5", "--no-calibration"),
}
"""At 4.5 bits per weight of the linear layers; A to D: own text, feedback, channel split, planning."""
CHUNKS = 60


@dataclass(frozen=True)
class Row:
    """One file: who made it, what it is called, and where it is."""

    maker: str
    name: str
    path: Path


def make_files(model: str, folder: Path, imatrix_text: Path) -> list[Row]:
    """All files, the float baseline first; those that are there stay."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = MODELS[model]()
    rows = [Row("float", "F16", folder / "float.gguf")]
    _convert(checkpoint, rows[0].path, "--layout", "float", "--outtype", "f16")
    own = folder / "own.imatrix.gguf"
    for layout, targets in (("stock", STOCK_TARGETS), ("split", SPLIT_TARGETS)):
        for target in targets:
            path = folder / f"{layout}-{target}.gguf"
            options = ["--write-imatrix", own] if not own.exists() else []
            _convert(checkpoint, path, "--recipe", layout, "--target-bpw", target, *options)
            rows.append(Row(layout, f"{target}", path))
    for number, (name, options) in enumerate(ABLATION.items()):
        path = folder / f"ablation-{number}.gguf"
        same = folder / f"{options[1]}-{options[-1]}.gguf"
        if same.exists() and not path.exists():  # the point above under another name
            path.hardlink_to(same)
        _convert(checkpoint, path, *(o.format(own=own) for o in options))
        rows.append(Row("ablation", name, path))
    tools = build_runtime(BuildSpec(patched=False, tools=True)).build.lib_dir
    imatrix = _imatrix(tools, rows[0].path, folder, imatrix_text)
    for qtype in STOCK_TYPES:
        rows.append(_quantize(tools, rows[0].path, folder, qtype, imatrix))
    for qtype in PLAIN_TYPES:
        rows.append(_quantize(tools, rows[0].path, folder, qtype, None))
    return rows


def _convert(checkpoint: Path, path: Path, *options: object) -> None:
    # the embedding as in llama-quantize's files here, so that the linear layers are what differs
    embedding = [] if "float" in options else ["--embedding-type", "float"]
    arguments = ["convert", checkpoint, path, *options, *embedding]
    if not path.exists() and splitquant([str(a) for a in arguments]):
        sys.exit(1)


def _imatrix(tools: Path, baseline: Path, folder: Path, text: Path) -> Path:
    """An importance matrix from chunks of real text that is not scored."""
    out = folder / "real.imatrix.gguf"
    if not out.exists():
        content = read_text(text).content
        sample = folder / "imatrix-text.txt"
        # four characters a token is generous: the scored part is never reached
        sample.write_text(content[-min(len(content) // 2, CHUNKS * 512 * 6) :])
        command = [tools / "llama-imatrix", "-m", baseline, "-f", sample, "-o", out, "--chunks", CHUNKS]
        subprocess.run([str(c) for c in command], check=True, capture_output=True)
    return out


def _quantize(tools: Path, baseline: Path, folder: Path, qtype: str, imatrix: Path | None) -> Row:
    out = folder / f"llama-quantize-{qtype}{'-imatrix' if imatrix else ''}.gguf"
    if not out.exists():
        options = ["--imatrix", imatrix] if imatrix else []
        options += ["--token-embedding-type", "f16", "--output-tensor-type", "f16"]
        command = [tools / "llama-quantize", *options, baseline, out, qtype]
        subprocess.run([str(c) for c in command], check=True, capture_output=True)
    return Row("llama-quantize, imatrix" if imatrix else "llama-quantize", qtype, out)


def measure(rows: list[Row], folder: Path, text: Path | None, tokens: int, threads: int | None) -> None:
    """Evaluate all files into ``results.json``."""
    options = ["--limit-tokens", str(tokens), "--resume", "--output", str(folder / "results.json")]
    options += ["--text", str(text)] if text else []
    options += ["--threads", str(threads)] if threads else []
    if splitquant(["eval", "kld", *(str(r.path) for r in rows), *options]):
        sys.exit(1)


def write_page(model: str, rows: list[Row], folder: Path, page: Path, command: str) -> None:
    """One table, the ablation, and the plot, as a section of its own file."""
    results = json.loads((folder / "results.json").read_text())
    facts = {m["file"]: m for m in results["models"]}
    figures = {m["file"]: m["figures"] for m in results["evaluations"]["kld"]["models"]}

    def line(row: Row, *first: str) -> str:
        fact, figure = facts[str(row.path)], figures[str(row.path)]
        kld = f"{figure['kld']['value']:.4f} ± {figure['kld']['error']:.4f}"
        rest = f"{figure['top1']['value']:.1%} | {figure['ppl']['value']:.2f}"
        return (
            f"| {' | '.join(first)} | {fact['linear_bpw']:.2f} | {fact['file_bytes'] / 1e6:.1f} | "
            f"{kld} | {rest} |"
        )

    def size(row: Row) -> float:
        return float(facts[str(row.path)]["linear_bpw"])

    head = "bpw, linear | MB | mean KLD | same top-1 | perplexity |\n"
    files = sorted((r for r in rows if r.maker not in ("ablation", "float")), key=size)
    lines = [f"# {TITLES[model]}\n", f"![mean KLD against size](frontier-{model}.svg)\n"]
    lines += [f"| maker | file | {head}|---|---|---|---|---|---|---|"]
    lines += [line(r, r.maker, r.name) for r in files]
    lines += [f"\n| at 4.5 bits per weight | {head}|---|---|---|---|---|---|"]
    lines += [line(r, r.name) for r in rows if r.maker == "ablation"]
    lines += [f"\n```\n{command}\n```\n"]
    page.with_name(f"frontier-{model}.md").write_text("\n".join(lines))
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows[1:]:
        kld = figures[str(row.path)]["kld"]["value"]
        points.setdefault(row.maker, []).append((size(row), kld))
    plot(TITLES[model], points, page.with_name(f"frontier-{model}.svg"))


def plot(title: str, points: dict[str, list[tuple[float, float]]], path: Path) -> None:
    """Mean KLD, logarithmic, against bits per weight of the linear layers."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "frontier"
    from matplotlib import pyplot

    styles = {
        "split": ("ours, split layout", "o-", "C0"),
        "stock": ("ours, stock layout", "s-", "C1"),
        "llama-quantize, imatrix": ("llama-quantize, imatrix of real text", "^", "C3"),
        "llama-quantize": ("llama-quantize", "x", "0.5"),
    }
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for maker, (label, style, color) in styles.items():
        chosen = sorted(points.get(maker, []))
        axes.semilogy(*zip(*chosen, strict=True), style, color=color, label=label)
    axes.set(
        xlabel="bits per weight of the linear layers",
        ylabel="mean KLD to the float model (nats)",
        title=title,
    )
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=list(MODELS))
    parser.add_argument("--text", type=Path, help="UTF-8 text, the longer the better (default: built-in)")
    parser.add_argument(
        "--imatrix-text",
        type=Path,
        required=True,
        help="UTF-8 text whose last part makes llama-quantize's imatrix",
    )
    parser.add_argument("--tokens", type=int, default=4096, help="of the text that are read")
    parser.add_argument("--folder", type=Path, default=Path("frontier"), help="takes the files: 5 GB")
    parser.add_argument("--page", type=Path, default=Path("docs/frontier.md"))
    parser.add_argument("--threads", type=int)
    chosen = parser.parse_args()
    if find_spec("matplotlib") is None:
        sys.exit('the plot needs matplotlib: pip install ".[plots]"')
    work = chosen.folder / chosen.model
    made = make_files(chosen.model, work, chosen.imatrix_text)
    measure(made, work, chosen.text, chosen.tokens, chosen.threads)
    write_page(
        chosen.model, made, work, chosen.page, shlex.join(["python", "scripts/frontier.py", *sys.argv[1:]])
    )
