"""What families compute: frequency factors and the order of rotated rows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf_splitquant.errors import CheckpointError, UnsupportedModelError
from gguf_splitquant.sources.config import ModelConfig
from gguf_splitquant.sources.families import FAMILIES, family_class
from gguf_splitquant.sources.families.llama import interleave_heads
from gguf_splitquant.sources.families.rope import Rope
from gguf_splitquant.sources.model import FloatType, SourceTensor

# head size, factor, original context of models with Llama 3 scaling (theta 500,000; factors 1 and 4)
PUBLISHED = {
    "Llama-3.1-8B": (128, 8.0, 8192),
    "Llama-3.2-1B": (64, 32.0, 8192),
    "Llama-3.2-3B": (128, 32.0, 8192),
    "Llama-3.3-70B": (128, 8.0, 8192),
}


def factors(head_dim: int, factor: float, context: int, theta: float, low: float, high: float) -> Any:
    settings_ = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }
    config = ModelConfig({"rope_parameters": settings_}, Path("config.json"))
    return Rope.of(config, context).llama3_factors(head_dim)


def by_torch(head_dim: int, factor: float, context: int, theta: float, low: float, high: float) -> Any:
    """The definition, value by value in torch: its scalar arithmetic is what the official converter runs."""
    import torch

    frequencies = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    result = []
    for frequency in frequencies:
        wavelength = 2 * math.pi / frequency
        smooth = (context / wavelength - low) / (high - low)
        between = 1 / ((1 - smooth) / factor + smooth)
        short, long = wavelength < context / high, wavelength > context / low
        result.append(1.0 if short else factor if long else between)
    return torch.tensor(result, dtype=torch.float32).numpy()


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_factors_equal_torch_bit_for_bit(model: str) -> None:
    arguments = (*PUBLISHED[model], 500000.0, 1.0, 4.0)
    assert factors(*arguments).tobytes() == by_torch(*arguments).tobytes()


@settings(max_examples=50, deadline=None)
@given(
    head_dim=st.sampled_from([16, 64, 80, 96, 128]),
    factor=st.floats(1.5, 64),
    context=st.sampled_from([512, 8192]),
    theta=st.floats(1e3, 1e7),
    high=st.floats(2.0, 16.0),
)
def test_any_factors_equal_torch_closely(
    head_dim: int, factor: float, context: int, theta: float, high: float
) -> None:
    """torch's vector power is one bit off now and then; at the edge of a band that can flip one value."""
    arguments = (head_dim, factor, context, theta, 1.0, high)
    mine, theirs = factors(*arguments), by_torch(*arguments)
    assert np.count_nonzero(~np.isclose(mine, theirs, rtol=1e-4)) <= 1


def test_bands() -> None:
    """High frequencies stay, low ones are divided by the factor, those between lie between."""
    values = factors(128, 8.0, 8192, 500000.0, 1.0, 4.0)
    assert values.dtype == np.float32 and values.shape == (64,)
    assert values[0] == 1 and values[-1] == 8 and np.all(np.diff(values) >= 0)
    assert 1 < values[np.searchsorted(values, 1, side="right")] < 8


def test_inverted_band() -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"low_freq_factor 4\.0 is not below high_freq_factor 1\.0"
    ):
        factors(64, 8.0, 8192, 500000.0, 4.0, 1.0)


@pytest.mark.parametrize(
    ("fields", "kind", "theta", "original"),
    [
        ({}, "default", 10000.0, None),
        ({"rope_theta": 5000}, "default", 5000.0, None),
        ({"rope_scaling": None, "rope_theta": 5000}, "default", 5000.0, None),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}, "rope_theta": 5},
            "default",
            7.0,
            None,
        ),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "dynamic", 10000.0, None),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "yarn", 10000.0, 77),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2}, "original_max_position_embeddings": 5},
            "yarn",
            10000.0,
            5,
        ),
    ],
)
def test_reads_both_generations_of_config(
    fields: dict[str, Any], kind: str, theta: float, original: int | None
) -> None:
    rope = Rope.of(ModelConfig(fields, Path("config.json")), context=77)
    assert (rope.kind, rope.theta, rope.original_context) == (kind, theta, original)


def test_rope_errors_name_section_and_field() -> None:
    config = ModelConfig(
        {"rope_scaling": {"type": "yarn", "factor": 1, "rope_theta": -1}}, Path("config.json")
    )
    with pytest.raises(CheckpointError, match=r"config\.json: rope_scaling: rope_theta is -1, not a number"):
        Rope.of(config, 8)


@settings(deadline=None)
@given(st.integers(1, 4), st.sampled_from([2, 4, 6]), st.data())
def test_interleaved_rows_read_only_their_heads(n_heads: int, head_dim: int, data: st.DataObject) -> None:
    """Pairs (i, i + half) of every head come side by side, and a slab reads the heads it touches, no more."""
    n_rows = n_heads * head_dim
    values = np.arange(n_rows * 3, dtype=np.float32).reshape(n_rows, 3)
    reads: list[tuple[int, int]] = []

    def read_rows(start: int, stop: int) -> Any:
        reads.append((start, stop))
        return values[start:stop]

    tensor = interleave_heads(SourceTensor("q", values.shape, FloatType.F32, read_rows), n_heads)
    expected = values.reshape(n_heads, 2, head_dim // 2, 3).swapaxes(1, 2).reshape(n_rows, 3)
    start = data.draw(st.integers(0, n_rows))
    stop = data.draw(st.integers(start, n_rows))
    assert np.array_equal(tensor.read_rows(start, stop), expected[start:stop])
    ((first, end),) = reads
    assert first == start // head_dim * head_dim and end <= -(-stop // head_dim) * head_dim


def test_every_registered_family_loads() -> None:
    for architecture in FAMILIES:
        assert family_class(architecture).arch.name
    with pytest.raises(KeyError):
        family_class("BertModel")
