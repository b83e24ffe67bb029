"""The attacker's intervals are those of llama.cpp's Q4_0, or the figures about them mean nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants

from scripts.quantization_attack import boxes, outside
from tests.sample_models import heavy_tailed

Q4_0 = GGMLQuantizationType.Q4_0


def file_of(path: Path, weight: np.ndarray, qtype: GGMLQuantizationType) -> Path:
    writer = GGUFWriter(path, "llama")
    data = quants.quantize(weight, qtype)
    writer.add_tensor("blk.0.attn_q.weight", data, raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("seed", range(4))
def test_whatever_lies_inside_is_rounded_to_the_same_bytes(seed: int, tmp_path: Path) -> None:
    weight = heavy_tailed(64, 128, seed=seed)
    low, high = (edge.numpy() for edge in boxes(torch.from_numpy(weight)))
    assert ((low <= weight) & (weight <= high)).mean() > 0.99
    assert (high - low).mean() > 0.1 * np.abs(weight).mean()
    place = np.random.default_rng(seed).random(weight.shape, np.float32)
    moved = low + place * (high - low)
    assert np.abs(moved - weight).max() > 0
    assert (quants.quantize(moved, Q4_0) == quants.quantize(weight, Q4_0)).all()
    attacked = file_of(tmp_path / "attacked.gguf", moved, Q4_0)
    assert outside(attacked, attacked) == 0
    # the float values are inside, too; the opposite sign of everything is not
    assert outside(file_of(tmp_path / "f.gguf", moved, GGMLQuantizationType.F32), attacked) < 1e-3
    assert outside(file_of(tmp_path / "n.gguf", -moved, GGMLQuantizationType.F32), attacked) > 0.5
