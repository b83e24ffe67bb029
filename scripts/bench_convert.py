"""Time and memory of a conversion, whole process, against llama.cpp's converter + llama-quantize.

The checkpoint has the shapes of Llama 3.2 1B in BF16 with synthetic weights (right for time, meaningless for
quality) and the tokenizer of a small real model. Ours goes from the Hugging Face folder to the final file in
one process; the peer writes a 16-bit GGUF and quantizes it to Q4_0. Rounds are interleaved; medians and the
ratio are printed. Run it from an environment with the test extra::

    python scripts/bench_convert.py --rounds 3
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gguf_splitquant.runtime.build import build_runtime
from gguf_splitquant.runtime.builds import BuildSpec
from gguf_splitquant.runtime.sdist import extract_llama_cpp, fetch_sdist
from scripts.real_models import stories15m

ROOT = Path(__file__).resolve().parent.parent

LLAMA_3_2_1B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


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


def write_checkpoint(folder: Path, layers: int = 16) -> None:
    """A BF16 checkpoint of normally distributed weights, written tensor by tensor."""
    config = {**LLAMA_3_2_1B, "num_hidden_layers": layers}
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for i in range(layers):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.mlp.down_proj.weight": (hidden, inner),
            f"{layer}.mlp.gate_proj.weight": (inner, hidden),
            f"{layer}.mlp.up_proj.weight": (inner, hidden),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
            f"{layer}.self_attn.k_proj.weight": (kv, hidden),
            f"{layer}.self_attn.o_proj.weight": (hidden, hidden),
            f"{layer}.self_attn.q_proj.weight": (hidden, hidden),
            f"{layer}.self_attn.v_proj.weight": (kv, hidden),
        }
    shapes["model.norm.weight"] = (hidden,)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = stories15m()
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder / name)
    header, position = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(0)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            for start in range(0, shape[0], 4096):
                rows = (min(4096, shape[0] - start), *shape[1:])
                weights = rng.standard_normal(rows, np.float32) * np.float32(0.02)
                file.write((weights.view(np.uint32) >> 16).astype("<u2").tobytes())


def report(name: str, runs: list[Run], baseline: list[Run] | None = None) -> None:
    wall = statistics.median(r.wall for r in runs)
    spread = f"{min(r.wall for r in runs):.1f}-{max(r.wall for r in runs):.1f}"
    cpu = statistics.median(r.cpu for r in runs)
    peak = max(r.peak for r in runs) / 1e9
    ratio = f"  {wall / statistics.median(r.wall for r in baseline):5.2f}" if baseline else ""
    print(f"{name:<34} {wall:7.1f} ({spread})  {cpu:7.1f}  {peak:6.2f}{ratio}")


def bench(rounds: int, recipes: list[str], folder: Path) -> None:
    checkpoint, log = folder / "llama-3.2-1b-shape", folder / "log"
    if not checkpoint.is_dir():
        write_checkpoint(checkpoint)
    sources = folder / "llama.cpp"
    if not sources.is_dir():
        extract_llama_cpp(fetch_sdist(folder), sources)
    quantizer = build_runtime(BuildSpec(patched=False, tools=True)).build.lib_dir / "llama-quantize"
    ours: dict[str, list[Run]] = {recipe: [] for recipe in recipes}
    to_float: list[Run] = []
    to_q4: list[Run] = []
    for _ in range(rounds):
        for recipe in recipes:
            out = folder / f"{recipe}.gguf"
            ours[recipe].append(
                measure(
                    [sys.executable, "convert_splitquant.py", str(checkpoint), str(out), "--recipe", recipe],
                    log,
                )
            )
            out.unlink()
        wide, narrow = folder / "peer-bf16.gguf", folder / "peer-q4_0.gguf"
        to_float.append(
            measure(
                [
                    sys.executable,
                    str(sources / "convert_hf_to_gguf.py"),
                    str(checkpoint),
                    "--outtype",
                    "bf16",
                    "--outfile",
                    str(wide),
                ],
                log,
            )
        )
        to_q4.append(measure([str(quantizer), str(wide), str(narrow), "Q4_0", str(os.cpu_count())], log))
        wide.unlink()
        narrow.unlink()
    pair = [
        Run(a.wall + b.wall, a.cpu + b.cpu, max(a.peak, b.peak)) for a, b in zip(to_float, to_q4, strict=True)
    ]
    print(f"{os.cpu_count()} cores, {rounds} rounds, Llama-3.2-1B shapes, BF16")
    print(f"{'':<34} {'wall s':>7} (min-max)  {'CPU s':>7}  {'GB RSS':>6}  ratio to the pair")
    for recipe in recipes:
        report(f"gguf-splitquant --recipe {recipe}", ours[recipe], pair)
    report("convert_hf_to_gguf.py bf16", to_float)
    report("llama-quantize Q4_0", to_q4)
    report("the pair", pair)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--recipes", nargs="+", default=["plain", "paper"])
    parser.add_argument(
        "--folder", type=Path, help="keep the checkpoint here (3 GB; 8 GB needed while it runs)"
    )
    arguments = parser.parse_args()
    if arguments.folder:
        arguments.folder.mkdir(parents=True, exist_ok=True)
        bench(arguments.rounds, arguments.recipes, arguments.folder)
    else:
        with tempfile.TemporaryDirectory(prefix="bench-convert-") as temporary:
            bench(arguments.rounds, arguments.recipes, Path(temporary))
