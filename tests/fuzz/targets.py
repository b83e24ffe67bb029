"""Fuzz targets: bytes in, and what a reader may do with them: read them, or raise a ``SplitQuantError``.

The same targets run under two engines: hypothesis, for a moment, in the ordinary tests; and atheris, which
follows the code that an input reaches, for as long as ``make fuzz`` says. Seeds are sound files, made here.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from gguf_splitquant.calibration.imatrix import write_imatrix
from gguf_splitquant.convert import convert
from gguf_splitquant.errors import SplitQuantError
from gguf_splitquant.planning import plan_refined
from gguf_splitquant.recipe import RECIPES, Recipe
from tests.attacks import readers
from tests.runtime.channel_models import split_channels
from tests.runtime.tiny_models import llama, write
from tests.sample_models import small_model
from tests.sources.handmade import write_checkpoint

LINEAR = ["blk.0.attn_q.weight", "blk.0.attn_k.weight"]


@dataclass(frozen=True)
class Target:
    """One reader.

    Attributes:
        name: of the target.
        read: gets the file.
        seeds: sound files, as bytes.
        file: the name under which the bytes are written.
        base: writes what else has to be there.
    """

    name: str
    read: Callable[[Path], None]
    seeds: Callable[[], list[bytes]]
    file: str = "file"
    base: Callable[[Path], object] | None = None


def _checkpoint_file(name: str) -> Callable[[], list[bytes]]:
    def seeds() -> list[bytes]:
        with tempfile.TemporaryDirectory() as folder:
            return [(write_checkpoint(Path(folder)) / name).read_bytes()]

    return seeds


def _made(make: Callable[[Path], object]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "seed.gguf"
        make(path)
        return path.read_bytes()


def _gguf_seeds() -> list[bytes]:
    parts, _ = split_channels(llama(n_layer=1), LINEAR)
    return [
        _made(lambda path: write(llama(n_layer=1), path)),
        _made(parts.write),
        _made(lambda path: convert(small_model(), path, Recipe())),
    ]


def _imatrix_seeds() -> list[bytes]:
    importance = {"a": np.ones(8), "b": np.ones((3, 4))}
    gguf_format = _made(lambda path: write_imatrix(path, importance, {"a": 5, "b": 5}, "text"))
    legacy = b"\1\0\0\0\1\0\0\0a\2\0\0\0\4\0\0\0" + np.ones(4, "<f4").tobytes()
    return [gguf_format, legacy]


def _plan_seeds() -> list[bytes]:
    recipe = Recipe(layout="split", target_bpw=5.0, calibration="none")
    plan = plan_refined(small_model(), recipe, None)
    return [_made(lambda path: plan.write(path, recipe))]


def _recipe_seeds() -> list[bytes]:
    pattern = Recipe(layout="stock", qtype="Q4_0", tensor_types=((r"blk\.\d+\.(attn|ffn)_[^.]*$", "Q8_0"),))
    return [recipe.to_json().encode() for recipe in (pattern, *RECIPES.values())]


def _verify_seeds() -> list[bytes]:
    # not of the refined layouts: numba does not compile what atheris instruments
    return [
        _made(lambda path: convert(small_model(), path, Recipe())),
        _made(lambda path: convert(small_model(), path, Recipe(layout="float"))),
    ]


_CARD = b"---\nlicense: mit\nbase_model: a/b\ntags: [x, y]\ndatasets:\n- c/d\nlanguage: en\n---\n"
_BPE = {
    "version": "1.0",
    "added_tokens": [],
    "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}]},
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
    "post_processor": {"type": "ByteLevel"},
    "decoder": {"type": "ByteLevel"},
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
}

TARGETS = {
    target.name: target
    for target in (
        Target(
            "safetensors", readers.read_safetensors, _checkpoint_file("model.safetensors"), "m.safetensors"
        ),
        Target(
            "config",
            readers.read_source,
            _checkpoint_file("config.json"),
            "model/config.json",
            lambda folder: write_checkpoint(folder / "model"),
        ),
        Target(
            "tokenizer",
            readers.read_source,
            lambda: [*_checkpoint_file("tokenizer.json")(), json.dumps(_BPE).encode()],
            "model/tokenizer.json",
            lambda folder: write_checkpoint(folder / "model"),
        ),
        Target(
            "model-card",
            readers.read_source,
            lambda: [_CARD],
            "model/README.md",
            lambda folder: write_checkpoint(folder / "model"),
        ),
        Target("gguf-header", readers.inspect, _gguf_seeds, "m.gguf"),
        Target("gguf-source", readers.read_source, _gguf_seeds, "m.gguf"),
        Target("imatrix", readers.imatrix, _imatrix_seeds),
        Target("plan", readers.plan, _plan_seeds),
        Target("recipe", readers.recipe, _recipe_seeds),
        Target("verify", readers.verified, _verify_seeds, "m.gguf"),
    )
}


@contextmanager
def opened(target: Target) -> Iterator[Callable[[bytes], bool]]:
    """A function that gives bytes to the target: True where they were read, False where they were refused.

    Whatever else it raises is a finding.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if target.base is not None:
            target.base(folder)
        path = folder / target.file
        parts = Path(target.file).parts
        place = folder / parts[0] if len(parts) > 1 else path
        expected = {*folder.rglob("*"), path}

        def feed(data: bytes) -> bool:
            path.write_bytes(data)
            try:
                target.read(place)
                return True
            except SplitQuantError as error:
                assert str(error).isprintable() and "\n" not in str(error)
                return False
            finally:
                # reading writes nothing
                assert set(folder.rglob("*")) == expected

        yield feed


@cache
def seeds(name: str) -> tuple[bytes, ...]:
    """The sound files of a target."""
    return tuple(TARGETS[name].seeds())
