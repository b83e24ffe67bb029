"""Packed sub-layers against the plain definition, for every width, granularity, k and checkpoint type."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import quants

from gguf_splitquant.packing import SubLayerPacker, choose_encoding, decode, fit_grid, quantize
from gguf_splitquant.recipe import Granularity
from gguf_splitquant.sources.model import FloatType, to_float32
from gguf_splitquant.splitting import ValueHistogram, fit_value_split
from tests.sample_models import heavy_tailed, raw_of, tensor_of


def reference(members: np.ndarray, bits: int, scale_bits: int, group: int) -> np.ndarray:
    """Linear quantization of one sub-layer, group by group, as the paper describes it."""
    out = np.empty_like(members)
    for source, target in zip(members.reshape(-1, group), out.reshape(-1, group), strict=True):
        grid = fit_grid(source.min(), source.max(), bits, scale_bits=scale_bits)
        target[:] = decode(quantize(source, grid), grid)
    return out


@pytest.mark.parametrize("dtype", FloatType)
@pytest.mark.parametrize("granularity", ["tensor", "row", "block"])
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize(("k", "columns"), [(1, 256), (3, 256), (2, 96), (5, 96)])
def test_decodes_to_the_reference(
    dtype: FloatType, granularity: Granularity, bits: int, k: int, columns: int
) -> None:
    weights = heavy_tailed(24, columns, seed=bits)
    tensor = tensor_of("w", weights, dtype)
    histogram = ValueHistogram.of(tensor)
    split = fit_value_split(tensor, histogram, k)
    encoding = choose_encoding(bits, columns, granularity)
    assert encoding is not None
    packer = SubLayerPacker(split, dtype, encoding, granularity)
    raw = raw_of(weights, dtype)
    # two slabs: the result must not depend on where the rows are cut
    slabs = [packer.pack(raw[:10]), packer.pack(raw[10:])]
    values = to_float32(raw, dtype)
    group = {"tensor": values.size, "row": columns, "block": encoding.block_columns}[granularity]
    total = np.zeros(values.shape, np.float64)
    for cluster in range(k):
        packed = np.concatenate([slab[cluster] for slab in slabs])
        decoded = quants.dequantize(packed, encoding.qtype)
        members = np.where(split.members(values, cluster), values, np.float32(0))
        np.testing.assert_array_equal(decoded, reference(members, bits, encoding.scale_bits, group))
        assert not decoded[~split.members(values, cluster)].any()
        total += decoded
    error = float(np.sum((values - total) ** 2))
    assert packer.squared_error(histogram) == pytest.approx(error, rel=1e-5)
