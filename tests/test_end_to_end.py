"""The whole way on real models: checkpoint, split, file, engine, comparison with float."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, quants

from gguf_splitquant.convert import convert
from gguf_splitquant.evaluation.compare import Comparison, compare
from gguf_splitquant.evaluation.text import read_text
from gguf_splitquant.recipe import RECIPES, Recipe
from gguf_splitquant.sources import open_model
from gguf_splitquant.sources.model import FloatType, SourceTensor
from tests.gguf_files import FLOAT

pytestmark = pytest.mark.engine


class Files:
    """One checkpoint, converted by any recipe on demand and compared with its float file."""

    def __init__(self, checkpoint: Path, folder: Path) -> None:
        self.model = open_model(checkpoint)
        self.folder = folder
        self.float = self.file("float", FLOAT)

    def file(self, name: str, recipe: Recipe) -> Path:
        path = self.folder / f"{name}.gguf"
        if not path.exists():
            convert(self.model, path, recipe)
        return path

    def compare(self, path: Path, *, exact: bool = False, base: Path | None = None) -> Comparison:
        """``exact``: with nothing rounded on the way: F32 KV cache, no flash attention."""
        options = {"kv": "f32", "flash_attention": False} if exact else {}
        text = read_text(None)
        return compare(base or self.float, path, text, context=256, limit_tokens=1024, **options)


@pytest.fixture(scope="module")
def stories(stories15m: Path, tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(stories15m, tmp_path_factory.mktemp("stories"))


@pytest.fixture(scope="module")
def smol(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(smollm2, tmp_path_factory.mktemp("smol"))


@pytest.mark.parametrize("k", [2, 3, 8])
def test_engine_sums_the_float_split_to_the_unsplit_model(stories: Files, k: int) -> None:
    split = stories.file(f"split-{k}", Recipe(k=k, bits=32, outtype="f32"))
    divergence = stories.compare(split, exact=True).divergence
    assert divergence.logit_max < 1e-4
    assert divergence.top1 == 1.0


def decoded_sums(stories: Files, packed: Path, out: Path) -> Path:
    """A plain F32 file whose weights are what the packed file's sub-layers decode to, summed."""
    sums: dict[str, np.ndarray] = {}
    for tensor in GGUFReader(packed).tensors:
        base = tensor.name.split(".split")[0] + ".weight" if ".split" in tensor.name else tensor.name
        values = quants.dequantize(tensor.data, tensor.tensor_type)
        sums[base] = sums[base] + values if base in sums else values

    def of(source: SourceTensor) -> SourceTensor:
        values = sums[source.name]
        return SourceTensor(source.name, source.shape, FloatType.F32, lambda a, b: values[a:b])

    model = dataclasses.replace(stories.model, tensors=tuple(of(t) for t in stories.model.tensors))
    convert(model, out, FLOAT)
    return out


@pytest.mark.parametrize(
    "recipe",
    [Recipe(outtype="f32"), Recipe(bits=8, outtype="f32"), Recipe(granularity="block", outtype="f32")],
)
def test_engine_computes_what_the_packed_file_says(stories: Files, recipe: Recipe, tmp_path: Path) -> None:
    packed = stories.file(f"packed-{recipe.bits}-{recipe.granularity}", recipe)
    plain = decoded_sums(stories, packed, tmp_path / "sums.gguf")
    difference = stories.compare(packed, exact=True, base=plain).divergence
    # The kernels quantize activations to 8 bits; everything else is exact. Measured: RMS 0.115 and KLD 0.0033
    # for the paper's recipe (Q4_K rounds activations in blocks of 256), 0.075 and 0.0013 for INT8, which is
    # what an ordinary unsplit Q8_0 file shows too.
    assert difference.logit_rms < (0.1 if recipe.bits == 8 else 0.15)
    assert difference.kld_mean < (2e-3 if recipe.bits == 8 else 5e-3)


def test_the_split_repairs_what_per_tensor_int4_destroys(smol: Files) -> None:
    # measured over the whole text in chunks of 512 tokens: plain 8.43, k = 2 2.66, k = 3 0.94
    plain = smol.compare(smol.file("plain", RECIPES["plain"])).divergence
    two = smol.compare(smol.file("two", Recipe(k=2))).divergence
    paper = smol.compare(smol.file("paper", RECIPES["paper"])).divergence
    assert plain.kld_mean > 6
    assert plain.top1 < 0.05
    assert 2 < two.kld_mean < 5
    assert paper.kld_mean < 1.5
    assert paper.top1 > 0.35


def test_true_float_model_agrees(stories: Files) -> None:
    klds = [
        stories.compare(stories.file(name, recipe)).divergence.kld_mean
        for name, recipe in (("plain", RECIPES["plain"]), ("two", Recipe(k=2)), ("paper", RECIPES["paper"]))
    ]
    assert klds == sorted(klds, reverse=True)
    assert klds[2] < klds[0] / 4
