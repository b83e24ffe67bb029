"""A mixture of experts that computes what a dense model computes, and what statistics per expert are worth.

No small trained mixture comes from a package registry. This makes one of a trained dense model: every expert
is a copy of the FFN, a router sends each token to some of them, and their weights sum to one, so the function
is the dense model's to rounding. But each expert sees a part of the inputs, as in any mixture, and gets error
feedback of its own. The router's directions are drawn at random, with lengths that differ, so some experts
are used often and some seldom. Scored is text of the dense model's own that calibration has not seen.

    python scripts/mixture.py WORKDIR --experts 8 --used 1    # figures on stories15M; a few minutes
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from gguf_splitquant.calibration.checkpoint import calibrate_model
from gguf_splitquant.calibration.moments import Moments
from gguf_splitquant.calibration.observer import ObservedEngine
from gguf_splitquant.calibration.own_text import OwnText, write_own_text, writing_options
from gguf_splitquant.calibration.runnable import Runnable
from gguf_splitquant.convert import convert
from gguf_splitquant.evaluation.compare import compare
from gguf_splitquant.evaluation.text import read_text
from gguf_splitquant.planning.curves import ExpertUse, InputStatistics, Salience
from gguf_splitquant.recipe import Recipe
from gguf_splitquant.sources import open_model
from scripts.real_models import stories15m

RECIPES = {
    "stock, IQ4_NL": Recipe(layout="stock", qtype="IQ4_NL"),
    "split, 4.5 bits per weight": Recipe(layout="split", target_bpw=4.5),
}


def write_mixture(dense: Path, out: Path, experts: int, used: int, seed: int = 0) -> None:
    """Write a Llama checkpoint as a Mixtral one with the same function.

    Args:
        dense: folder of a LlamaForCausalLM checkpoint in one file.
        out: a folder to make.
        experts: copies of each FFN.
        used: experts per token.
        seed: of the router's directions.
    """
    rng = np.random.default_rng(seed)
    shutil.copytree(dense, out)
    config = json.loads((dense / "config.json").read_text())
    config.update(
        architectures=["MixtralForCausalLM"],
        model_type="mixtral",
        num_local_experts=experts,
        num_experts_per_tok=used,
    )
    (out / "config.json").write_text(json.dumps(config))
    tensors: dict[str, NDArray[np.float32]] = {}
    for name, weight in load_file(dense / "model.safetensors").items():
        prefix, mlp, matrix = name.partition("mlp.")
        if not mlp:
            tensors[name] = weight
            continue
        kind = {"gate_proj.weight": "w1", "down_proj.weight": "w2", "up_proj.weight": "w3"}[matrix]
        for expert in range(experts):
            tensors[f"{prefix}block_sparse_moe.experts.{expert}.{kind}.weight"] = weight.copy()
        if kind == "w1":
            router = rng.standard_normal((experts, weight.shape[1])) * rng.uniform(0.3, 1, (experts, 1))
            tensors[f"{prefix}block_sparse_moe.gate.weight"] = router.astype(np.float32)
    save_file(tensors, out / "model.safetensors")


@dataclasses.dataclass(frozen=True)
class Pooled:
    """The same statistics without a difference between the experts of a stack.

    Attributes:
        moments: the statistics.
        measured: the planner knows the stacks' sensitivities, and how often each expert is used.
    """

    moments: Moments
    measured: bool

    @property
    def sensitivity(self) -> Mapping[str, float]:
        found = self.moments.sensitivity
        return {name: v for name, v in found.items() if self.measured or self.moments.experts(name) is None}

    def input_of(self, weight: str) -> str | None:
        return self.moments.input_of(weight)

    def matrix(self, weight: str, expert: int | None = None) -> NDArray[np.float32]:
        return self.moments.matrix(weight)

    def salience(self, weight: str) -> Salience:
        return self.moments.salience(weight)

    def experts(self, weight: str) -> ExpertUse | None:
        return self.moments.experts(weight) if self.measured else None


def write_text(dense: Path, out: Path, threads: int | None) -> None:
    """Text that a model (a GGUF file) writes itself, with another seed than for calibration."""
    how = OwnText(sequences=24, length=250, seed=77)
    with ObservedEngine(Runnable(dense), writing_options(how, threads)) as engine:
        rows = write_own_text(engine, how)
        out.write_text("\n".join(engine.detokenize(row[1:]) for row in rows), encoding="utf-8")


def measure(folder: Path, experts: int, used: int, threads: int | None) -> None:
    """Print mean KLD to the dense float model, pooled and per expert."""
    dense, mixture = stories15m(), folder / f"mixture-{experts}-{used}"
    if not mixture.is_dir():
        write_mixture(dense, mixture, experts, used)
    base = folder / "dense.gguf"
    convert(open_model(dense), base, Recipe(layout="float", outtype="f32"), force=True)
    write_text(base, folder / "text.txt", threads)
    text = read_text(folder / "text.txt")
    model = open_model(mixture)
    moments = calibrate_model(model, threads=threads)
    rare = {n: len(use.rare) for n in moments.sharing if (use := moments.experts(n))}
    print(f"{experts} experts, {used} per token; {sum(rare.values())} of {experts * len(rare)} are rare")
    known: dict[str, InputStatistics] = {
        "pooled, stacks not measured": Pooled(moments, False),
        "pooled": Pooled(moments, True),
        "per expert": moments,
    }
    for name, recipe in RECIPES.items():
        for kind, statistics in known.items():
            if recipe.qtype and kind == "pooled, stacks not measured":
                continue  # nothing is planned
            out = folder / "quantized.gguf"
            convert(model, out, recipe, statistics=statistics, force=True, threads=threads)
            found = compare(base, out, text, context=256, threads=threads)
            figures = found.divergence
            print(f"  {name}, {kind}: mean KLD {figures.kld_mean:.5f} ± {figures.kld_error:.5f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="WORKDIR")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--used", type=int, default=1)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    measure(options.folder, options.experts, options.used, options.threads)
